"""The bad input table, continued: what goes beside an operator's own tensors, and rows as far apart as int64 counts."""

import mmap
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import mtlkernels as mtl
from tests.gpu.subjects import USUAL
from tests.ops.cases import native_only, outcome
from tests.ops.test_bad_input import SPOILS
from tests.ops.test_bad_input import backend as backend

GEN = torch.Generator().manual_seed(0)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GEN)


X, IDS, UNITS, BANK = draw(5, 4), torch.tensor([0, 1, 2, 1, 0]), draw(5, 3, 4), draw(3, 6, 4)
H, L, S = draw(5, 3, 4), draw(5, 2, 3), draw(2, 3)
MASK = torch.tensor([[True, False, True], [True, True, True]])
LABELS = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0], [0, 1]])


def norm(domain: Any = IDS, **others: Any) -> torch.Tensor:
    given = {"running_mean": torch.zeros(3, 4), "running_var": torch.ones(3, 4), "training": True} | others
    return mtl.partitioned_norm(X, domain, X[0], X[1], UNITS[0], UNITS[1], **given)


def without_backend(function: Callable) -> Callable:
    def call(*args: Any, backend: str = "auto", **options: Any) -> torch.Tensor:
        with mtl.use_backend(backend):
            return function(*args, **options)

    return call


gate, count = without_backend(mtl.hard_concrete), without_backend(mtl.hard_concrete_l0)
# Function and argument, the call that takes it by its name, and one that fits.
SIDE = {
    ("mix", "mask"): (lambda **o: mtl.mix(H, L, S, **o), MASK),
    ("mix", "routes"): (lambda **o: mtl.mix(H, L, S, **o), MASK),  # a tensor never is
    ("gated_mix", "mask"): (lambda **o: mtl.gated_mix(H, L, **o), MASK),
    ("gated_mix", "logits"): (lambda **o: mtl.gated_mix(H, **o), L),
    ("linear_mix", "weight"): (lambda **o: mtl.linear_mix(H, **o), S),
    ("adatt_mix", "mask"): (lambda **o: mtl.adatt_mix(H, L, S[0, :2], experts_per_unit=[1, 1, 1], **o), MASK),
    ("adatt_mix", "native"): (lambda **o: mtl.adatt_mix(H, L, experts_per_unit=[1, 1, 1], **o), S[0, :2]),
    ("expert_mix", "mask"): (lambda **o: mtl.expert_mix(X, BANK, None, L, S, **o), MASK),
    ("expert_mix", "routes"): (lambda **o: mtl.expert_mix(X, BANK, None, L, S, **o), MASK),
    ("star_linear", "domain"): (lambda domain, **o: mtl.star_linear(X, domain, BANK[0], BANK, **o), IDS),
    ("partitioned_norm", "domain"): (norm, IDS),
    ("partitioned_norm", "running_mean"): (norm, torch.zeros(3, 4)),
    ("partitioned_norm", "running_var"): (norm, torch.ones(3, 4)),
    ("hard_concrete", "noise"): (lambda noise, **o: gate(X, noise, **o), torch.full((5, 4), 0.3)),
    ("masked_bce", "labels"): (lambda **o: mtl.masked_bce(X[:, :2], **o), LABELS),
    ("masked_bce", "mask"): (lambda **o: mtl.masked_bce(X[:, :2], LABELS, **o), LABELS.bool()),
    ("esmm_loss", "click"): (lambda **o: mtl.esmm_loss(X[:, :2], X[:, 2:], conversion=LABELS * 0, **o), LABELS),
    ("esmm_loss", "conversion"): (lambda **o: mtl.esmm_loss(X[:, :2], X[:, 2:], LABELS * 0 + 1, **o), LABELS),
}
MORE = {
    "twice as long": lambda t: torch.cat([t, t]),
    "shorter": lambda t: t[:-1],
    "uint64": lambda t: t.to(torch.uint64),
    "requires a gradient": lambda t: t.detach().to(torch.float32, copy=True).requires_grad_(),
}
# (what, how) that are no fault.
FINE = {("labels", how) for how in ("int64", "bool")} | {("click", how) for how in ("int64", "bool")}
FINE |= {("conversion", how) for how in ("int64", "bool")} | {("domain", "int64"), ("mask", "bool")}
FINE |= {(what, "requires a gradient") for what in ("logits", "weight", "native", "noise")} | {
    ("weight", "twice as long"),
    ("weight", "shorter"),
}


@pytest.mark.parametrize("how", SPOILS | MORE)
@pytest.mark.parametrize("function, what", SIDE)
def test_a_spoilt_side(backend, function, what, how):  # noqa: F811
    call, good = SIDE[function, what]
    if what != "routes":
        call(**{what: good}, backend=backend)
    if (what, how) in FINE or (function, what, how) == ("masked_bce", "mask", "int64"):
        pytest.skip("no fault")
    bad = (SPOILS | MORE)[how](good)
    with pytest.raises((TypeError, ValueError), match=rf"\b{what}\b"):
        call(**{what: bad}, backend=backend)


NUMBERS = ["1", None, True, [1.0], torch.tensor(1.0), 1j, float("nan"), float("inf"), -float("inf")]
COUNTS = [[2, -1, 2], [3], [1, 1, 0], [1, 1, 1, 1], "111", [1.0] * 3, 3, [[1]] * 3, [2**62, 3 - 2**62], [2**64, 1, 2]]
ACTIVATIONS = ["swish", "", 3, ["relu"], True, torch.relu, "RELU"]
LINEAR = {
    "expert_linear": lambda **o: mtl.expert_linear(X, BANK, **o),
    "expert_mix": lambda **o: mtl.expert_mix(X, BANK, None, L, S, **o),
    "snr_linear": lambda **o: mtl.snr_linear(H, draw(2, 3, 6, 4), S, **o),
    "star_linear": lambda **o: mtl.star_linear(X, IDS, BANK[0], BANK, **o),
}
VALUES = {
    **{(f"{function} {what}", what): (gate if function == "gate" else count, [X], values)
       for function in ("gate", "count")
       for what, values in (("beta", [0, -1]), ("gamma", [0, 1.0]), ("zeta", [1, 0.5]))},
    **{(name, "activation"): (call, [], ACTIVATIONS) for name, call in LINEAR.items()},
    ("snr_linear", "skip_closed"): (LINEAR["snr_linear"], [], [1, None, "yes", torch.tensor(True)]),
    ("esmm_loss", "ctcvr_weight"): (lambda **o: mtl.esmm_loss(X[0], X[1], X[0] > 0, X[0] > 9, **o), [], [-1, -1e-9]),
    ("partitioned_norm", "training"): (norm, [], [1, None, "yes", torch.tensor(True)]),
    ("partitioned_norm", "momentum"): (norm, [], [-0.1, 1.1]),
    ("partitioned_norm", "eps"): (norm, [], [-1e-5]),
    ("expert_linear", "experts_per_unit"): (lambda **o: mtl.expert_linear(UNITS, BANK, **o), [], COUNTS),
    ("expert_mix", "experts_per_unit"): (lambda **o: mtl.expert_mix(UNITS, BANK, None, L, S, **o), [], COUNTS),
    ("adatt_mix", "experts_per_unit"): (lambda **o: mtl.adatt_mix(H, L, S[0, :2], **o), [], [*COUNTS, None]),
}  # fmt: skip


@pytest.mark.parametrize("name, what", VALUES)
def test_a_wrong_value(backend, name, what):  # noqa: F811
    call, args, values = VALUES[name, what]
    numbers = [] if what in ("activation", "skip_closed", "training", "experts_per_unit") else NUMBERS
    for value in (*values, *numbers):
        with pytest.raises((TypeError, ValueError), match=rf"\b{what}\b"):
            call(*args, **{what: value}, backend=backend)
            pytest.fail(f"{what}={value!r} was taken")


@pytest.mark.parametrize("name", ["cuda", "", 3, ["native"], True, b"native"], ids=repr)
def test_a_backend_that_is_none(name):
    for call in (*LINEAR.values(), norm, *(call for call, _ in list(SIDE.values())[:1])):
        with pytest.raises(ValueError, match="^backend must be one of .*got " + re.escape(repr(name))):
            call(backend=name)


@native_only
@pytest.mark.parametrize("name", USUAL)
def test_rows_far_apart(name):
    """The last row lies more than 2**31 elements behind the first: the same numbers, without the memory in between."""
    subject = USUAL[name]
    first, *others = subject.make(torch.float16)
    rows, inner = first.shape[0], torch.empty(first.shape[1:]).stride()
    stride = 2**31 // (rows - 1) + 8
    # Pages that nothing touches take no memory; torch's own would be filled with rubbish here.
    there = torch.frombuffer(mmap.mmap(-1, 2 * ((rows - 1) * stride + first[0].numel())), dtype=torch.float16)
    far = there.as_strided(first.shape, (stride, *inner)).copy_(first)
    assert far[-1:].storage_offset() > 2**31
    call = subject.bind("cpu")
    found, wanted = (outcome(lambda *t: call(*t, backend="native"), [t, *others], subject.grad) for t in (far, first))
    for a, b in zip((found.out, *found.grads), (wanted.out, *wanted.grads), strict=True):
        assert a is b is None or torch.equal(a, b)
