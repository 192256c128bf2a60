"""mix where floating point gets hard: extreme logits, 16 bit, NaN, equal bits, threads, autocast, huge tensors."""

import math

import pytest
import torch

import mtlkernels as mtl

from .cases import (
    MIX,
    ODD_MIX,
    agree,
    close,
    each_backend,
    each_dtype,
    expected,
    halves,
    make_mix,
    native_only,
    outcome,
    over,
    same_bits,
    same_bits_with_any_threads,
)

EXTREME = {
    "large": lambda t: t.fill_(1e4),
    "one far above": lambda t: t.select(-1, 1).fill_(1e4),
    "one far below": lambda t: t.select(-1, 2).fill_(-1e4),
    "large both ways": lambda t: t.copy_(torch.where(torch.arange(t.shape[-1]) % 2 == 0, 1e4, -1e4)),
    "all equal": lambda t: t.fill_(0.3),
    "one -inf": lambda t: t.select(-1, 2).fill_(-math.inf),
    "all but one -inf": lambda t: t.narrow(-1, 1, t.shape[-1] - 1).fill_(-math.inf),
    "at the overflow of exp": lambda t: t.copy_(88.6 + 0.1 * torch.arange(t.shape[-1])),
    "at its underflow": lambda t: t.mul_(35),
}


@each_backend
@each_dtype
@pytest.mark.parametrize("how", over(EXTREME))
@pytest.mark.parametrize("form", ["logits", "both", "both masked", "both packed", "native"])
def test_extreme_logits(form, how, dtype, backend):
    case = ODD_MIX[form]
    tensors = case.tensors(dtype)
    if form == "both masked":
        case = case._replace(mask=torch.tensor([[1, 1, 1, 0, 1, 1, 0], [0] * 7, [1] * 7]).bool())
    how(tensors[1])
    if form == "both packed":  # row 0 keeps a finite logit
        tensors[1][:, [0, -1]] = 1.0
    found, wanted = outcome(lambda *t: case(*t, backend=backend), tensors), expected(case, tensors)
    assert not found.out.isnan().any() and not any(g.isnan().any() for g in found.grads if g is not None)
    agree(found, wanted, tensors)


@each_backend
@each_dtype
def test_minus_infinity_everywhere_is_nan_there_alone(dtype, backend):
    """Softmax of a row of -inf has no meaning, and torch's gives NaN; the other rows do not hear of it."""
    case = ODD_MIX["logits"]
    experts, logits, _ = case.tensors(dtype)
    clean = case(experts, logits, backend=backend)
    logits[2, 1] = -math.inf
    out = case(experts, logits, backend=backend)
    assert out[2, 1].isnan().all()
    out[2, 1] = clean[2, 1]
    assert torch.equal(out, clean)


@each_backend
@each_dtype
@pytest.mark.parametrize("form", ["logits", "logits packed", "logits masked"])
def test_one_expert_is_exact(form, dtype, backend):
    """A softmax over one expert is exactly 1, its gradient exactly 0."""
    case = make_mix("logits", 9, 3, 1, 13)
    experts, logits, _ = case.tensors(dtype)
    logits[0], logits[1], logits[2] = 1e4, -1e4, 700
    if form != "logits":
        mask = torch.ones(3, 1, dtype=torch.bool)
        packed = form == "logits packed"
        case = case._replace(mask=None if packed else mask, routes=mtl.Routes.from_mask(mask) if packed else None)
        logits = logits[:, mask] if packed else logits
    found = outcome(lambda *t: case(*t, backend=backend), (experts, logits))
    assert torch.equal(found.out, experts.expand(-1, 3, -1)) and (found.grads[1] == 0).all()


@each_backend
@each_dtype
def test_identity_and_permutation_copy(dtype, backend):
    experts = torch.randn(67, 6, 21).to(dtype)
    order = torch.randperm(6)
    assert torch.equal(mtl.linear_mix(experts, torch.eye(6)[order], backend=backend), experts[:, order])
    wide = torch.eye(6)[order][..., None].expand(-1, -1, 21)
    assert torch.equal(mtl.linear_mix(experts, wide, backend=backend), experts[:, order])


@native_only
@halves
def test_rounded_once(dtype):
    unit = torch.finfo(dtype).eps / 2
    for form in ("logits", "static", "both", "both packed", "native", "channel"):
        case = MIX[f"{form}, over a block"]
        tensors = case.tensors(dtype, torch.float32)
        exact = expected(case, tensors).out
        error = (case(*tensors, backend="native").double() - exact).abs()
        assert (error <= unit * exact.abs() * 1.001 + 2e-6 * exact.abs().max()).all(), form


@native_only
@halves
@pytest.mark.parametrize("form", ["logits", "static", "both", "both masked", "channel"])
def test_half_precision_against_plain_torch(form, dtype):
    """At most twice the error of softmax and bmm in the same dtype, forward and every gradient."""
    case = make_mix(form, 130, 4, 12, 48)
    tensors = case.tensors(dtype)

    def plain(experts, logits, static):
        if form == "channel":
            return torch.einsum("ted,bed->btd", static, experts)
        if logits is None:
            return torch.matmul(static, experts)
        if case.mask is not None:
            some = case.mask.any(-1, keepdim=True)
            logits = torch.where(some, logits.masked_fill(~case.mask, -math.inf), 0)
        a = torch.softmax(logits, -1)
        a = a if static is None else a + static
        return torch.bmm(a if case.mask is None else torch.where(case.mask, a, 0), experts)

    exact = expected(case, tensors)
    ours, torchs = outcome(lambda *t: case(*t, backend="native"), tensors), outcome(plain, tensors)
    for a, b, e in zip((ours.out, *ours.grads), (torchs.out, *torchs.grads), (exact.out, *exact.grads), strict=True):
        if e is not None:
            mine, theirs = (a.double() - e).abs(), (b.double() - e).abs()
            assert mine.max() <= 2 * theirs.max() and mine.norm() <= 2 * theirs.norm()


@each_backend
@each_dtype
@pytest.mark.parametrize("form", ["both", "both packed", "native", "channel"])
def test_a_nan_stays_in_its_row(form, dtype, backend):
    case = MIX[f"{form}, over a block"]
    experts, logits, static = case.tensors(dtype)
    given = [t for t in (experts, logits) if t is not None]
    hurt = [t.clone() for t in given]
    hurt[0][3, 2, 4] = math.nan
    if logits is not None:
        hurt[1].flatten(1)[40, 1] = math.nan
    rows = [b for b in range(65) if b not in (3, 40)]

    def call(*t):
        return case(t[0], t[1] if logits is not None else None, static, backend=backend)

    clean, found = outcome(call, given), outcome(call, hurt)
    assert found.out[3, :, 4].isnan().any() and (logits is None or found.out[40].isnan().any())
    for a, b in zip((found.out, *found.grads), (clean.out, *clean.grads), strict=True):
        assert torch.equal(a[rows], b[rows])


@native_only
@each_dtype
@pytest.mark.parametrize("form", ODD_MIX)
def test_equal_rows_and_runs_agree_bit_for_bit(form, dtype):
    case = MIX[f"{form}, over a block"]
    experts, logits, static = case.tensors(dtype)
    equal = [None if t is None else t[:1].repeat(135, *(1,) * (t.dim() - 1)) for t in (experts, logits)]
    found = outcome(lambda *t: case(*t, backend="native"), (*equal, static), torch.ones_like)
    for rows in (found.out, *found.grads[:2]):
        if rows is not None:
            assert torch.equal(rows, rows[:1].expand_as(rows))
    same_bits(found, outcome(lambda *t: case(*t, backend="native"), (*equal, static), torch.ones_like))
    alone = case(*(None if t is None else t[:1] for t in (experts, logits)), static, backend="native")
    assert torch.equal(alone, found.out[:1])


@native_only
@each_dtype
@pytest.mark.parametrize("form", ["both", "both masked", "both packed", "native", "channel"])
def test_threads_change_nothing(form, dtype):
    case = make_mix(form, 300, 4, 6, 11)
    same_bits_with_any_threads(lambda *t: case(*t, backend="native"), lambda: case.tensors(dtype))


@each_backend
@halves
def test_autocast(dtype, backend):
    """Experts come as 16 bit from expert_linear; float32 logits and static weights stay float32."""
    case = MIX["both, over a block"]
    tensors = case.tensors(dtype, torch.float32)

    def call(*t):
        with torch.autocast("cpu", dtype=dtype):
            return case(*t, backend=backend)

    found = outcome(call, tensors)
    agree(found, expected(case, tensors), tensors)
    same_bits(found, outcome(lambda *t: case(*t, backend=backend), tensors))
    single = case.tensors(torch.float32)
    close(call(*single), expected(case, single).out, 1e-2)


@pytest.mark.slow
@native_only
def test_more_than_2_to_the_31_elements():
    """Offsets of experts and their gradient, then of the output, beyond 32 bits: the last row is right. 9 GB."""
    for batch, rows, experts in ((2**21 + 3, 1, 32), (2**21 + 3, 32, 1)):
        h = torch.zeros(batch, experts, 32, dtype=torch.bfloat16)
        h[-2:] = torch.randn(2, experts, 32)
        logits = torch.zeros(1, rows, experts).expand(batch, -1, -1)
        assert max(h.numel(), batch * rows * 32) > 2**31
        out = mtl.mix(h.requires_grad_(), logits, backend="native")
        last = h.detach()[-2:].double().requires_grad_()
        wanted = mtl.mix(last, logits[-2:], backend="reference")
        close(out[-2:].detach(), wanted.detach())
        out.backward(torch.ones((), dtype=out.dtype).expand_as(out))
        wanted.sum().backward()
        close(h.grad[-2:], last.grad)
        del out, h
