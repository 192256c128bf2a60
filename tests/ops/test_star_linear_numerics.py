"""star_linear's numerics on every backend of a CPU: rounding, NaN, bits, autocast."""

import itertools
import math

import pytest
import torch

import mtlkernels as mtl

from .cases import (
    close,
    each_backend,
    each_dtype,
    expected,
    halves,
    native_only,
    outcome,
    same_bits,
    same_bits_with_any_threads,
)
from .test_star_linear import ACTIVATIONS, CASES, MIDDLE, Star, loop_over_domains


@native_only
@each_dtype
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_rows_in_another_order_give_the_same_bits(activation, dtype):
    """Outputs and dx follow the rows; sorted rows, which take another path, too."""
    case = Star(600, 4, 21, 37)
    x, weight, domain_weight, bias, domain_bias = case.tensors(dtype)
    grad = torch.randn(600, 21, dtype=torch.float64).to(dtype)

    def run(order):
        def call(x):
            return mtl.star_linear(
                x, case.domain[order], weight, domain_weight, bias, domain_bias, activation=activation, backend="native"
            )

        return outcome(call, [x[order]], lambda _: grad[order])

    plain = run(torch.arange(600))
    for order in (torch.randperm(600), torch.argsort(case.domain), torch.argsort(-case.domain)):
        found = run(order)
        assert torch.equal(found.out, plain.out[order]) and torch.equal(found.grads[0], plain.grads[0][order])
    for b in (0, 7, 599):  # whatever the batch around it
        assert torch.equal(run(torch.tensor([b])).out, plain.out[b : b + 1])


@each_backend
@each_dtype
def test_a_domain_without_rows_is_not_read(dtype, backend):
    """Its gradient is exactly 0, whatever its weight and the shared one hold."""
    case = Star(30, 6, 7, 5)
    tensors = list(case.tensors(dtype))
    ids = torch.tensor([0, 2, 5]).repeat(10)

    def call(*t):
        return mtl.star_linear(t[0], ids, *t[1:], activation="relu", backend=backend)

    clean = outcome(call, tensors)
    for grad in clean.grads[2], clean.grads[4]:
        assert (grad[[1, 3, 4]] == 0).all() and (grad[[0, 2, 5]] != 0).any()
    hurt = [t.clone() for t in tensors]
    hurt[2][[1, 3, 4]], hurt[4][[1, 3, 4]] = math.nan, math.inf
    same_bits(outcome(call, hurt), clean)
    hurt[1][0] = math.nan
    assert (outcome(call, hurt).grads[2][[1, 3, 4]] == 0).all()


@each_backend
@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_nan_stays_in_its_row(activation, dtype, backend):
    """In the row's output and dx, and in its own domain's gradient."""
    x, weight, domain_weight, bias, domain_bias = MIDDLE.tensors(dtype)
    row = 112
    p = int(MIDDLE.domain[row])
    hurt = x.clone()
    hurt[row, 3] = math.nan
    rows = [b for b in range(290) if b != row]

    def call(x, domain_weight):
        return MIDDLE(x, weight, domain_weight, bias, domain_bias, activation=activation, backend=backend)

    clean, found = outcome(call, [x, domain_weight]), outcome(call, [hurt, domain_weight])
    assert torch.equal(found.out[rows], clean.out[rows]) and found.out[row].isnan().all()
    assert torch.equal(found.grads[0][rows], clean.grads[0][rows])
    others = [q for q in range(5) if q != p]
    assert torch.equal(found.grads[1][others], clean.grads[1][others]) and found.grads[1][p, :, 3].isnan().all()


@each_backend
@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_far_from_zero(activation, dtype, backend):
    z = torch.tensor([0, 1e-30, 1e-4, 1, 5, 10, 17, 30, 80, 89, 104, 700, 2e4, math.inf], dtype=torch.float64)
    x, one = torch.cat([z, -z])[:, None].to(dtype), torch.ones(1, 1, dtype=dtype)
    domain = torch.arange(28) % 2

    def call(x, w, backend=backend):
        return mtl.star_linear(x, domain, w, w.expand(2, 1, 1), activation=activation, backend=backend)

    found, wanted = outcome(call, [x, one], torch.ones_like), expected(call, [x, one], torch.ones_like)
    torch.testing.assert_close(found.out, wanted.out.to(dtype), equal_nan=True)
    finite = torch.isfinite(x)
    close(found.grads[0][finite], wanted.grads[0][finite])


@native_only
@halves
def test_rounded_once(dtype):
    """Sums and W * W_p are float32: the output is as far from the exact one as its own rounding, and hardly farther."""
    unit = torch.finfo(dtype).eps / 2
    for case, activation in itertools.product((MIDDLE, CASES["deep"]), ACTIVATIONS):
        tensors = case.tensors(dtype)
        exact = expected(case, tensors, activation=activation).out
        error = (case(*tensors, activation=activation, backend="native").double() - exact).abs()
        assert (error <= unit * exact.abs() * 1.001 + 2e-6 * exact.abs().max()).all()


@each_backend
@halves
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_half_precision_against_plain_torch(activation, dtype, backend):
    """At most twice the error of a loop over the domains in the same dtype, forward and every gradient."""
    case = Star(400, 3, 24, 96, "skewed")
    tensors = case.tensors(dtype)
    exact = expected(case, tensors, activation=activation)
    ours = outcome(lambda *t: case(*t, activation=activation, backend=backend), tensors)
    torchs = outcome(lambda *t: loop_over_domains(case.domain, *t, activation), tensors)
    names = "out", "x", "weight", "domain_weight", "bias", "domain_bias"
    for name, a, b, e in zip(names, *((o.out, *o.grads) for o in (ours, torchs, exact)), strict=True):
        mine, theirs = (a.double() - e).abs(), (b.double() - e).abs()
        assert mine.max() <= 2 * theirs.max(), f"{name}: {mine.max()} against {theirs.max()}"
        assert mine.norm() <= 2 * theirs.norm(), f"{name}: {mine.norm()} against {theirs.norm()}"


@native_only
@each_dtype
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_equal_rows_and_runs_agree_bit_for_bit(activation, dtype):
    case = Star(83, 2, 21, 37)
    x, *rest = case.tensors(dtype)

    def call(*t):
        return case(*t, activation=activation, backend="native")

    tensors = x[:1].repeat(83, 1), *rest
    found = outcome(call, tensors, torch.ones_like)
    for p in range(2):
        for rows in (found.out[case.domain == p], found.grads[0][case.domain == p]):
            assert torch.equal(rows, rows[:1].expand_as(rows))
    same_bits(found, outcome(call, tensors, torch.ones_like))


@native_only
@each_dtype
@pytest.mark.parametrize(
    "name",
    ["one row each", "over a tile", "over a block", "cut among lanes", "many lanes", "a domain over all lanes",
     "over a gradient block", "over two gradient blocks", "wide"],
)  # fmt: skip
def test_threads_change_nothing(name, dtype):
    case = CASES[name]
    same_bits_with_any_threads(lambda *t: case(*t, activation="silu", backend="native"), lambda: case.tensors(dtype))


@each_backend
@halves
def test_autocast(dtype, backend):
    """x goes to 16 bit; float32 weights enter as they are, and their gradients stay float32."""
    tensors = MIDDLE.tensors(torch.float32)
    rounded = tensors[0].to(dtype), *tensors[1:]

    def call(*t):
        with torch.autocast("cpu", dtype=dtype):
            return MIDDLE(*t, activation="gelu", backend=backend)

    found = outcome(call, tensors)
    assert found.out.dtype == dtype and all(g.dtype == torch.float32 for g in found.grads)
    wanted = expected(MIDDLE, rounded, activation="gelu")
    for got, want in zip((found.out, *found.grads), (wanted.out, *wanted.grads), strict=True):
        close(got, want, 1e-2 if dtype == torch.bfloat16 else 2e-3)
    error = (found.out.double() - wanted.out).abs()
    assert (error <= torch.finfo(dtype).eps / 2 * wanted.out.abs() * 1.001 + 2e-6 * wanted.out.abs().max()).all()
    with torch.autocast("cpu", dtype=dtype):
        assert MIDDLE(*MIDDLE.tensors(dtype), backend=backend).dtype == dtype
        assert MIDDLE(*MIDDLE.tensors(torch.float64), backend=backend).dtype == torch.float64
        told = mtl.explain("star_linear", tensors[0])
    assert told.startswith(f"star_linear on cpu, {str(dtype).removeprefix('torch.')}")
    with pytest.raises(TypeError, match="weight"):
        MIDDLE(*rounded, backend=backend)


@pytest.mark.slow
@native_only
def test_more_than_2_to_the_31_elements():
    """Offsets of output, gradient and input beyond 32 bits: the last rows are right. 9 GB."""
    batch, outputs = 2**20 + 3, 2048
    domain = torch.arange(batch, dtype=torch.int32) % 2
    weight, domain_weight = torch.randn(outputs, 1).bfloat16(), torch.randn(2, outputs, 1).bfloat16()
    x = torch.randn(batch, 1).bfloat16().requires_grad_()
    y = mtl.star_linear(x, domain, weight, domain_weight, backend="native")
    assert y.numel() > 2**31
    product = weight.double() * domain_weight.double()
    close(y[-2:].detach(), (x.detach()[-2:, None].double() * product[domain[-2:].long()]).squeeze(-1))
    y.backward(torch.ones((), dtype=y.dtype).expand_as(y))
    close(x.grad[-2:], product.sum(1)[domain[-2:].long()])
