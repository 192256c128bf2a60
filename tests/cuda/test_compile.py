"""nvcc compiles every CUDA source for the supported GPUs, and no kernel spills or keeps anything in local memory."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

DEVICE = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
SOURCES = sorted(source.name for source in DEVICE.glob("*.cu"))
ARCHITECTURES = [pytest.param(sm, marks=[] if sm == 90 else pytest.mark.slow, id=f"sm_{sm}") for sm in (80, 90, 100)]


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_no_spills(source: str, sm: int, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc not found")
    includes = [flag for path in include_paths() for flag in ("-isystem", path)]
    command = [nvcc, "-cubin", f"-arch=sm_{sm}", "-std=c++17", "-O3", "-Xptxas", "-v", "-Werror", "all-warnings"]
    command += [
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        *includes,
        DEVICE / source,
        "-o",
        tmp_path / "kernels.cubin",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = done.stdout + done.stderr
    kernels = re.findall(
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
        report,
    )
    assert kernels, report
    local = [kernel for kernel in kernels if any(int(count) for count in kernel[1:])]
    assert not local, f"kernel, stack, spill stores, spill loads: {local}"
