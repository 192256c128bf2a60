"""Finds and loads the compiled operators, once, when the package is imported; what went wrong is kept for whoever asks.

The library (``lib/libmtlkernels.so``) holds no Python: it registers its operators with torch's dispatcher as
``torch.ops.mtlkernels``. Without it everything still runs, on the reference backend (and on Triton on a GPU).
"""

import importlib
import struct
import warnings
from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).with_name("lib") / "libmtlkernels.so"
REMEDY = "with torch and a C++20 compiler there: pip install --no-build-isolation --no-deps --force-reinstall ."

# What build_info() says where the module of that name is absent too.
_NOTHING = {"cpu_isas": (), "cuda_archs": (), "cxx": "", "nvcc": "", "torch_target": "", "torch_headers": ""}


def loaded() -> bool:
    """Whether the compiled operators are there."""
    return _problem is None


def reason() -> str:
    """Why the compiled operators are not there, as a sentence that says what to do; empty if they are."""
    return _problem or ""


def build_info() -> dict[str, Any]:
    """What this installation holds.

    loaded, reason   whether the compiled operators are in use, and why not
    library          the path of their library
    cpu_isas         the CPU instruction sets it has kernels for
    cpu_isa          the one in use, the best that the processor has
    cuda_archs       the GPU architectures it was compiled for, as nvcc names them; empty without CUDA kernels
    cxx, nvcc        the compilers
    torch_target     the oldest torch that it loads under; torch_headers: the one it was compiled against
    torch, cuda      the running torch, and the CUDA version that one was built with, or None
    """
    try:
        module = importlib.import_module(f"{__package__}._build_info")
        built = {name: getattr(module, name) for name in _NOTHING}
    except (ImportError, AttributeError):
        built = dict(_NOTHING)
    running = {"torch": torch.__version__, "cuda": torch.version.cuda}
    isa = torch.ops.mtlkernels.cpu_isa("") if loaded() else ""
    return {"loaded": loaded(), "reason": reason(), "library": str(PATH), "cpu_isa": isa, **built, **running}


def empty_cache() -> int:
    """Give back the memory that the CPU kernels keep for reuse; returns its bytes.

    Large outputs come from a pool: what a step frees, the next one takes again, without the page faults of fresh
    memory. A block that 64 further large allocations passed over is given back by itself.
    """
    return torch.ops.mtlkernels.empty_cache() if loaded() else 0


def _load() -> str | None:
    """Load the library. Returns what went wrong, or None."""
    if not PATH.exists():
        return f"{PATH} is missing: the package was installed without a compiler, or its build saw no torch; {REMEDY}"
    try:
        _check_whole()
        torch.ops.load_library(PATH)
    except (OSError, RuntimeError) as error:
        cause = error.__cause__ or error
        return f"{PATH} cannot be loaded ({cause}); to build it anew, {REMEDY}"
    return None


def _check_whole() -> None:
    """Raise OSError for a file that is no ELF library, or one cut short: loading that would end in a SIGBUS."""
    with open(PATH, "rb") as file:
        header = file.read(64)
        size = file.seek(0, 2)
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        raise OSError("not a 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", header, 40)  # the section header table: linkers write it last
    entry_size, entries = struct.unpack_from("<HH", header, 58)
    if size < table + entry_size * entries:
        raise OSError(f"truncated: {size} bytes, {table + entry_size * entries} expected")


_problem = _load()
if _problem:
    warnings.warn(f"mtlkernels runs without its compiled operators. {_problem}", RuntimeWarning, stacklevel=2)
