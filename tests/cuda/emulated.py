"""Builds CUDA device code for the host over tests/emulation/cuda.h, and hands it tensors with guarded edges."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[2]
EMULATION, DEVICE = ROOT / "tests" / "emulation", ROOT / "csrc" / "cuda"
GUARD = 64  # elements before and after every tensor; a multiple of 16 bytes, so that it does not change alignment
ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}


@functools.cache
def build(source: str, change: tuple[str, str, str] | None = None, define: str = "") -> Path:
    """The library built of tests/emulation/<source>.cpp, compiled once for each content of the sources.

    change: (file of csrc/cuda, text that occurs once in it, what to put there), for a kernel that is wrong on purpose.
    define: a macro for the source, which may leave out with it what takes long to compile.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    files = {f.name: f.read_text() for f in sorted(DEVICE.iterdir())}
    files["../library.cpp"] = (DEVICE.parent / "library.cpp").read_text()
    files |= {f"../common/{f.name}": f.read_text() for f in sorted((DEVICE.parent / "common").iterdir())}
    if change is not None:
        name, old, new = change
        assert files[name].count(old) == 1, f"{old!r} occurs {files[name].count(old)} times in {name}"
        files[name] = files[name].replace(old, new)
    # The emulated launch.h and primitives.cuh take the place of the real ones.
    files |= {f.name: f.read_text() for f in sorted(EMULATION.iterdir())}
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000", *([f"-D{define}"] if define else [])]
    flags += os.environ.get("MTLKERNELS_EMULATION_FLAGS", "").split()  # of a sanitizer or of gcov, say
    if source == "operators":
        flags.append("-fvisibility=hidden")  # as in the library, whose glue has torch's hidden types for members
    key = hashlib.sha256(repr((sorted(files.items()), flags, torch.__version__)).encode()).hexdigest()[:20]
    folder = Path(tempfile.gettempdir()) / f"mtlkernels-emulation-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{source}-{key}.so"
    if "--coverage" in flags and change is None:
        flags += ["-dumpdir", f"{folder}/{source}-{key}-"]  # its notes stay, but not those of kernels wrong on purpose
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as top:
            tmp = Path(top, "cuda")
            for name, text in files.items():
                Path(tmp, name).parent.mkdir(exist_ok=True)
                Path(tmp, name).write_text(text)
            includes = [flag for path in include_paths() for flag in ("-isystem", path)]
            torch_library = Path(torch.__file__).parent / "lib"
            link = ["-o", "built.so", f"-L{torch_library}", "-ltorch_cpu", f"-Wl,-rpath,{torch_library}"]
            command = [compiler, *flags, *includes, f"{source}.cpp", *link]
            done = subprocess.run(command, cwd=tmp, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            os.replace(Path(tmp, "built.so"), library)  # whole or not at all, for another process may build the same
    return library


class Device:
    """One emulated device: places tensors, calls kernels, checks the edges afterwards."""

    def __init__(self, library: Path, order: str = "forward", seed: int = 0, skipped_barrier: int = -1) -> None:
        self.library, self.placed = ctypes.CDLL(str(library)), []
        self.library.last_error.restype = ctypes.c_char_p
        self.library.schedule(ORDERS[order], seed, skipped_barrier)

    def put(self, tensor: Tensor) -> Tensor:
        """A copy of the tensor between guards: NaN for floating-point types, else zeros."""
        fill = float("nan") if tensor.is_floating_point() else 0
        room = torch.full((tensor.numel() + 2 * GUARD,), fill, dtype=tensor.dtype)
        inner = room[GUARD : GUARD + tensor.numel()].view(tensor.shape)
        inner.copy_(tensor)
        self.placed.append(room)
        return inner

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A guarded tensor of NaN, so that whatever a kernel leaves unwritten shows."""
        return self.put(torch.full(shape, float("nan"), dtype=dtype))

    def call(self, function: Callable, fields: dict[str, int | Tensor | None], names: list[str]) -> None:
        """Calls a C function with one struct of eight-byte fields; a tensor is passed as its address, None as 0."""
        values = [fields.get(name) for name in names]
        unknown = set(fields) - set(names)
        assert not unknown, unknown
        numbers = [v.data_ptr() if isinstance(v, Tensor) else v or 0 for v in values]
        function((ctypes.c_int64 * len(numbers))(*numbers))
        error = self.library.last_error().decode()
        if error:
            raise RuntimeError(error)
        for room in self.placed:
            edges = torch.cat([room[:GUARD], room[-GUARD:]])
            untouched = edges.isnan() if edges.is_floating_point() else edges == 0
            assert untouched.all(), "a write outside a tensor"


def noticed(check: Callable[[Device], None], library: Path, **schedule: int) -> bool:
    """Whether `check` fails under some order of threads, or kernels never end."""
    for order in ORDERS:
        try:
            check(Device(library, order, seed=5, **schedule))
        except (AssertionError, RuntimeError):
            return True
    return False


def assert_every_barrier_matters(check: Callable[[Device], None], library: Path, barriers: range) -> None:
    """`check` holds, and fails where one of the barriers, or of the waits for copies, is left out."""
    assert Device(library).library.barriers() == barriers.stop
    assert not noticed(check, library)
    for barrier in barriers:
        assert noticed(check, library, skipped_barrier=barrier), f"barrier {barrier} may go without notice"
