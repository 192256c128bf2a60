"""The checks themselves, on a CPU: each finds the mistake that it is there for."""

import pytest
import torch

from . import checks
from .subjects import Subject

KEEP = torch.tensor([True, True, True, False, True])
F32 = torch.float32
_calls = []


def formula(x, w):
    return x * torch.where(KEEP, w, 0)


def hurt(tensors):
    x, w = tensors
    return [x, torch.where(KEEP, w, torch.nan)]


def make(dtype):
    gen = torch.Generator().manual_seed(0)
    return [torch.randn(7, 5, generator=gen).to(dtype), torch.randn(5, generator=gen).to(dtype)]


def subject(ours) -> Subject:
    """`formula` on the reference, `ours` on every other backend."""

    def bind(device):
        return lambda x, w, backend=None: formula(x, w) if backend == "reference" else ours(x, w)

    return Subject("", make, bind, unread=hurt)


def as_if_contiguous(x, w):
    return formula(x.as_strided(x.shape, (5, 1), x.storage_offset()), w)


def third_answer(x, w):
    """Right twice, as the check's own calls are; from the third call on always that answer."""
    _calls.append(formula(x, w).detach())
    return _calls[min(len(_calls), 3) - 1] + 0 * formula(x, w)


def breaks_the_graph(x, w):
    torch._dynamo.graph_break()
    return formula(x, w)


def other_under_compile(x, w):
    return formula(x, w) * (1.01 if torch.compiler.is_compiling() else 1)


EVERY = [checks.check_values, checks.check_layouts, checks.check_nan, checks.check_unread, checks.check_repeats,
         checks.check_compiled, checks.check_graph, checks.check_streams]  # fmt: skip
MISTAKES = {
    "a wrong value": (checks.check_values, lambda x, w: 1.001 * formula(x, w)),
    "a wrong gradient": (checks.check_values, lambda x, w: formula(x, w.detach()) + 0 * w),
    "the wrong dtype": (checks.check_values, lambda x, w: formula(x.double(), w.double())),
    "strides not looked at": (checks.check_layouts, as_if_contiguous),
    "NaN spread": (checks.check_nan, lambda x, w: formula(x, w) + 0 * x.sum()),
    "NaN lost": (checks.check_nan, lambda x, w: formula(x.nan_to_num(), w)),
    "a masked number read": (checks.check_unread, lambda x, w: x * (w * KEEP)),
    "chance": (checks.check_repeats, lambda x, w: formula(x, w) * (1 + 1e-6 * torch.rand(7, 5))),
    "two graphs": (checks.check_compiled, breaks_the_graph),
    "other numbers under compile": (checks.check_compiled, other_under_compile),
    "an answer kept, graph": (checks.check_graph, third_answer),
    "an answer kept, streams": (checks.check_streams, third_answer),
}


@pytest.mark.parametrize("check", EVERY, ids=lambda c: c.__name__)
def test_what_is_right_passes(check):
    check(subject(formula), "cpu", "native", F32)


@pytest.mark.parametrize("check, ours", [pytest.param(*v, id=k) for k, v in MISTAKES.items()])
def test_a_mistake_is_found(check, ours):
    _calls.clear()
    with pytest.raises((AssertionError, torch._dynamo.exc.Unsupported)):
        check(subject(ours), "cpu", "native", F32)


def test_rows_of_no_domain_are_looked_at():
    bad = torch.tensor([2, 4])
    known = torch.ones(7, dtype=torch.bool).index_fill(0, bad, False)

    def drops(fill):
        return lambda x, w: torch.where(known[:, None], formula(x, w), fill)

    checks.check_broken(subject(drops(torch.nan)), subject(formula), bad, "cpu", "native", F32)
    for wrong in (drops(0.0), lambda x, w: formula(x, w) + (drops(torch.nan)(x, w) - formula(x, w)).detach()):
        with pytest.raises(AssertionError):
            checks.check_broken(subject(wrong), subject(formula), bad, "cpu", "native", F32)


def test_fresh_memory_is_full_of_nan():
    assert torch.empty(9).isnan().all() and torch.zeros(3).new_empty(2, 3).isnan().all()
