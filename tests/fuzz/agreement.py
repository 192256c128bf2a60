"""Whether every backend does the same with a call: the reference's numbers, or an error of the same kind."""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from mtlkernels import backend
from mtlkernels.ops._operator import Operator
from tests.gpu.checks import right
from tests.gpu.subjects import Subject
from tests.ops.cases import TOLERANCE, Outcome, expected, outcome

from .calls import Call, build, spoilt

EMULATED = "emulated"  # the CUDA sources that ship, executed on the CPU
_NORM = importlib.import_module("mtlkernels.ops.partitioned_norm")  # the package has the function by that name
NAMED = (TypeError, ValueError)  # what a call that does not fit raises


def check(call: Call, names: tuple[str, ...]) -> str:
    """AssertionError where one of the backends `names` differs from the reference. Says what became of the call:
    "agreed", "refused", or "" where there is no such call.
    """
    made = build(call)
    if made is None:
        return ""
    subject, tensors, grad = made
    if call["dtype"] == "float64":  # no GPU kernel is for it
        names = tuple(name for name in names if name == "native")
    if call["dtype"] == "bfloat16":  # to which Triton's interpreter cuts numbers off where a GPU rounds
        names = tuple(name for name in names if name != "triton")
    if call["spoil"] != "sound":
        given = spoilt(call, tensors)
        wanted = _run(subject, given, grad, "reference")
        if isinstance(wanted, Exception):
            assert isinstance(wanted, NAMED) and str(wanted), f"reference: {wanted!r}"
        for name in names:
            found = _run(subject, given, grad, name)
            assert type(found) is type(wanted), f"{name}: {found!r}, reference: {wanted!r}"
            assert str(found) == str(wanted) or not isinstance(wanted, Exception), f"{name}: {found}; {wanted}"
        return "refused" if isinstance(wanted, Exception) else "agreed"
    floor = max([1.0, *_sizes(tensors)]) if _cancels(call) else 0.0
    if call["op"] == "partitioned_norm":  # a weight's gradient sums a term of size 1 from every row, which may cancel
        floor = float(call["sizes"]["B"])
    for name in names:
        found = _run(subject, tensors, grad, name)
        if isinstance(found, Exception):
            raise AssertionError(f"{name} refused what the reference takes: {found!r}") from found
        try:
            right(subject, found, tensors, grad, floor)
        except AssertionError as error:
            if not _stable(subject, found, tensors, grad, max(subject.floor, floor)):
                raise AssertionError(f"{name}: {error}") from error
    return "agreed"


def _cancels(call: Call) -> bool:
    """Whether gradients are differences of larger terms: a logit's of experts' outputs, tanh's and sigmoid's of 1."""
    return call["op"] in ("mix", "expert_mix") or call["sizes"].get("activation") in ("tanh", "sigmoid")


def _sizes(tensors: list[Tensor | None]) -> list[float]:
    return [float(t.abs().max()) for t in tensors if t is not None and t.numel()]


def _stable(subject: Subject, found: Outcome, tensors: list, grad: Callable, floor: float) -> bool:
    """Whether each tensor's numbers lie within its tolerance, or as near to the right ones as plain torch's of that
    dtype, within a factor of two, or as those of inputs that differ in their last bit: where sums cancel, that may be
    far. Infinite ones never do.
    """
    dtype = next(t.dtype for t in tensors if t is not None)
    call, gen = subject.bind("cpu"), torch.Generator().manual_seed(1)
    wanted, last_bit = expected(call, tensors, grad), torch.finfo(dtype).eps

    def shaken(t: Tensor | None) -> Tensor | None:
        return t if t is None else t.double() * (1 + last_bit * (2 * torch.rand(t.shape, generator=gen) - 1))

    def differences(other: Outcome) -> list[float]:
        pairs = zip((other.out, *other.grads), (wanted.out, *wanted.grads), strict=True)
        return [(a.double() - b).abs().max().item() for a, b in pairs if b is not None and b.numel()]

    moved = [0.0] * len(differences(wanted))
    for _ in range(4):
        again = outcome(lambda *t: call(*t, backend="reference"), [shaken(t) for t in tensors],
                        lambda out: shaken(grad(out.to(dtype))))  # fmt: skip
        moved = [max(pair) for pair in zip(moved, differences(again), strict=True)]
    plain = differences(outcome(lambda *t: call(*t, backend="reference"), tensors, grad))
    exact = [b for b in (wanted.out, *wanted.grads) if b is not None and b.numel()]
    within = [TOLERANCE[dtype] * max(floor, b.nan_to_num(0, 0, 0).abs().max().item()) for b in exact]
    limits = [max(4 * move, 2 * error, near) for move, error, near in zip(moved, plain, within, strict=True)]
    return all(error <= limit for error, limit in zip(differences(found), limits, strict=True))


def _run(subject: Subject, tensors: list, grad: Callable, name: str) -> Outcome | Exception:
    """The outcome, or the error; an error that is neither of NAMED is raised."""
    call, backend_name = subject.bind("cpu"), "auto" if name == EMULATED else name
    with emulated() if name == EMULATED else contextlib.nullcontext():
        try:
            if all(t is None or (isinstance(t, Tensor) and t.is_floating_point()) for t in tensors):
                return outcome(
                    lambda *t: call(*t, backend=backend_name), [t if t is None else t.detach() for t in tensors], grad
                )
            return Outcome(call(*tensors, backend=backend_name), [])
        except NAMED as error:
            return error


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """Inside, calls that name no backend run the CUDA sources that ship, glue and kernels, on the emulated device."""
    _register()
    with mock.patch.object(backend, "choose", lambda *_, **__: EMULATED):
        with mock.patch.object(backend, "chosen_for_cpu", lambda *_: None):
            with mock.patch.dict(_NORM._LIBRARY, {EMULATED: "mtlkernels_emulated"}):
                yield


def _register() -> None:
    if EMULATED in Operator.all["mix"]._eager:
        return
    sys.path.insert(0, str(Path(__file__).parents[1] / "cuda"))
    import emulated as device

    torch.ops.load_library(str(device.build("operators")))
    for operator in Operator.all.values():
        if hasattr(torch.ops.mtlkernels_emulated, operator.name):
            operator._add(EMULATED, torch.ops.mtlkernels_emulated, (_no_fake, _no_fake))


def _no_fake(*_: object) -> None:
    raise NotImplementedError("the emulated device runs in eager mode alone")
