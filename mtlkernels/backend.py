"""Who can run what, and why not: the choice of a backend for every call.

Each operator has, for every backend, a pure predicate over the call's :class:`Case`. ``auto`` takes the first backend
that can, in the operator's order; an explicit choice that cannot run raises with the predicate's reason. Under
torch.export it leaves Triton out, whose kernels are Python, and under torch.onnx.export takes the reference.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from . import _library
from . import triton as _triton  # its names and tables: the kernels are imported when first needed

BACKENDS = ("native", "triton", "reference")


class Sizes(NamedTuple):
    """The sizes of a call that a backend may decide on; 0 for those that the operator does not have."""

    experts: int = 0  # E
    tasks: int = 0  # T: output rows
    features: int = 0  # K: input width
    width: int = 0  # D, or N: output width


class Case(NamedTuple):
    """What a backend may decide on. Never the batch size: that would recompile with every new one."""

    device: str  # torch device type
    dtype: torch.dtype  # of the activations
    arch: int = 0  # compute capability of the GPU, 90 for an H200; 0 on a CPU
    sizes: Sizes | None = None  # None where the operator's predicates do not ask for them


class Support(NamedTuple):
    """A predicate's answer: whether the backend can run the call, and in any case why."""

    ok: bool
    reason: str


Predicate = Callable[[Case], Support]

_default = os.environ.get("MTLKERNELS_BACKEND", "auto")
_predicates: dict[str, dict[str, Predicate]] = {}
_chosen: dict[tuple[str, str, torch.device, torch.dtype, Sizes | None], str] = {}
_CPU = torch.device("cpu")


def register(op: str, predicates: dict[str, Predicate]) -> None:
    """Tell the chooser which backends `op` has, in the order in which ``auto`` tries them."""
    _predicates[op] = predicates


def check_name(name: str, argument: str = "backend") -> None:
    if name not in BACKENDS and name != "auto":
        raise ValueError(f"{argument} must be one of auto, {', '.join(BACKENDS)}; got {name!r}")


check_name(_default, "the environment variable MTLKERNELS_BACKEND")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator inside the block on `name`: "auto", "reference", "native" or "triton".

    A plain global, not a context variable, so that torch.compile can trace through it: threads share it. With
    "reference" torch.export gives a program of torch's own operators alone.

    Raises ValueError for an unknown name, here, and for a backend that cannot run, at the operator's call.
    """
    global _default
    check_name(name)
    before, _default = _default, name
    try:
        yield
    finally:
        _default = before


def choose(op: str, backend: str | None, tensor: torch.Tensor, sizes: Sizes | None = None) -> str:
    """The backend that runs `op` for tensors like this one. Raises ValueError if the one asked for cannot.

    Every new value of `sizes` is decided anew: give them only where a predicate of `op` looks at them.
    """
    name = _default if backend is None else backend
    return _lookup(op, name, _CPU if tensor.is_cpu else tensor.device, tensor.dtype, sizes)


def chosen_for_cpu(op: str, backend: str | None, dtype: torch.dtype) -> str | None:
    """What `choose` has answered before, for a tensor of this dtype on the CPU; None if it has not been asked."""
    name = _default if backend is None else backend
    try:
        return _chosen.get((op, name, _CPU, dtype, None))
    except TypeError:
        check_name(name)  # a list, say, which has no hash
        raise


# A constant to torch.compile: if it traced into this, its guards would watch the dictionary, and every entry recompile.
@torch.compiler.assume_constant_result
def _lookup(op: str, name: str, device: torch.device, dtype: torch.dtype, sizes: Sizes | None) -> str:
    if name == "auto" and torch.compiler.is_exporting():
        # ONNX has no operators like ours, but knows those of the plain form.
        if torch.onnx.is_in_onnx_export():
            return "reference"
        return _decide(op, name, _case(device, dtype, sizes), exporting=True)
    key = (op, name, device, dtype, sizes)
    try:
        found = _chosen.get(key)
    except TypeError:
        check_name(name)
        raise
    if found is None:
        found = _decide(op, name, _case(device, dtype, sizes))
        _chosen[key] = found
    return found


def _case(device: torch.device, dtype: torch.dtype, sizes: Sizes | None) -> Case:
    arch = 0
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        arch = 10 * major + minor
    return Case(device.type, dtype, arch, sizes)


def _decide(op: str, name: str, case: Case, exporting: bool = False) -> str:
    check_name(name)
    predicates = _predicates[op]
    if name != "auto":
        support = predicates[name](case)
        if not support.ok:
            raise ValueError(f"backend {name!r} cannot run {op} here: {support.reason}")
        return name
    # The interpreter is for tests, which ask for it by name; and a program with Triton kernels needs Python to run.
    serving = [b for b in predicates if b != "triton" or (case.device != "cpu" and not exporting)]
    return next(b for b in serving if predicates[b](case).ok)


def describe(op: str, backend: str | None, device: torch.device, dtype: torch.dtype, sizes: Sizes | None = None) -> str:
    """One line a backend: which one runs the call, and why each other one would not or stands behind."""
    case = _case(device, dtype, sizes)
    asked = _default if backend is None else backend
    chosen = _decide(op, asked, case)
    what = f"{op} on {case.device}, {str(dtype).removeprefix('torch.')}"
    lines = [f"{what}: {chosen}" + ("" if asked == "auto" else " (asked for)")]
    for name, can_run in _predicates[op].items():
        ok, reason = can_run(case)
        state = "runs" if name == chosen else "could run" if ok else "cannot run"
        lines.append(f"  {name:<9} {state}: {reason}")
    return "\n".join(lines)


def native_support(op: str, on_gpu: bool) -> Predicate:
    """The predicate of the C++ library: there, and with a kernel of `op` for this device and dtype."""

    def can_run(case: Case) -> Support:
        if not _library.loaded():
            return Support(False, _library.reason())
        if case.device == "cpu":
            ok = case.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
            return Support(ok, "C++ kernel" if ok else f"no C++ kernel for {case.dtype}")
        if case.device != "cuda":
            return Support(False, f"no kernel for device {case.device}")
        if not on_gpu:
            return Support(False, f"{op} has no CUDA C++ kernel yet")
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"mtlkernels::{op}", "CUDA"):
            return Support(False, "the library was built without nvcc")
        ok = case.dtype in (torch.float32, torch.bfloat16, torch.float16)
        return Support(ok, "CUDA C++ kernel" if ok else f"no CUDA kernel for {case.dtype}")

    return can_run


def triton_support(case: Case) -> Support:
    """The predicate of the Triton kernels."""
    ok, reason = _triton.available()
    if not ok:
        return Support(ok, reason)
    return Support(*_triton.supports(case.device, case.dtype, os.environ.get("TRITON_INTERPRET") == "1"))


def reference_support(case: Case) -> Support:
    return Support(True, "plain torch, any device and dtype")
