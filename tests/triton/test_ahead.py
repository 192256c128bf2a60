"""The kernels compiled to machine code for real GPUs, which needs none: no spills, and tensor cores where expected."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent


def compile_for(target: int, *extra: str) -> list[dict]:
    """What compile_ahead.py reports; in a process where the interpreter is off."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(HERE.parents[1]), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    command = [sys.executable, str(HERE / "compile_ahead.py"), str(target), *extra]
    done = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found: list[dict]) -> None:
    assert found
    for one in found:
        # A frame of 8 bytes is none of spills: for those kernels ptxas -v reports 0 bytes spilled.
        assert one["stack"] <= 8 and one["local"] == 0, f"spills: {one}"
        assert one["shared"] <= {80: 163, 90: 227, 100: 227}[one["target"]] * 1024, f"too much shared memory: {one}"
        if "precision" not in one:
            continue
        cores = one["dtype"] != "fp32" or one["precision"] == "tf32"
        instructions = one["wgmma"] + one["tcgen05"] + one["mma"]
        assert bool(instructions) == cores, f"tensor cores: {one}"
        # Tiles of 16 to 64 rows are below what the larger instructions take.
        if cores and one["shape"][0] >= 64 and one["target"] == 90:
            assert one["wgmma"], f"no wgmma: {one}"
        if cores and one["shape"][0] >= 64 and one["target"] == 100:
            assert one["tcgen05"], f"no tcgen05: {one}"


def test_hopper():
    check(compile_for(90))


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90, 100])
def test_every_configuration(target):
    check(compile_for(target, "all"))
