"""masked_bce: values and gradients against 50 digits and float64, masks, weights, bad input."""

import math

import mpmath
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mtlkernels as mtl

from .cases import (
    GRAD_LAYOUTS,
    close,
    each_backend,
    each_dtype,
    halves,
    layouts,
    native_only,
    outcome,
    over,
    random_grad,
)

SHAPES = [(1, 1), (3, 2), (65, 4), (700, 3), (9, 16), (5, 300), (2, 1000), (3000, 1), (130, 129), (9000, 2)]


def batch(shape: tuple[int, int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Logits in dtype, hard labels and a bool mask; the second task has no valid row."""
    gen = torch.Generator().manual_seed(sum(shape))
    logits = torch.randn(shape, generator=gen, dtype=torch.float64).mul(4).to(dtype)
    labels, mask = (torch.rand(shape, generator=gen) < p for p in (0.4, 0.7))
    mask[:, 1:2] = False
    return logits, labels, mask


def run(logits: Tensor, labels: Tensor, mask: Tensor | None, backend: str, grad=random_grad) -> list[Tensor]:
    """Loss and gradient."""
    found = outcome(lambda x: mtl.masked_bce(x, labels, mask, backend=backend), [logits], grad)
    return [found.out, found.grads[0]]


def agree(found: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and found[1].dtype == dtype
    for got, want, what in zip(found, wanted, ("loss", "gradient"), strict=True):
        close(got, want, what=what)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@each_backend
def test_fifty_digits(backend, dtype):
    """Every element a task of its own. Hard labels: relative to the loss itself, however small."""
    sizes = [s * m for m in (1e-3, 0.1, 0.7, 1, 3, 10, 17, 30, 50, 80, 90, 120, 200, 1e4) for s in (1, -1)]
    x = torch.tensor([v for v in sizes for _ in range(4)], dtype=dtype)
    y = torch.tensor([0, 1, 0.25, 0.9] * len(sizes), dtype=dtype)
    loss, grad = run(x[None], y[None], None, backend, torch.ones_like)
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    with mpmath.workdps(50):
        for xi, yi, li, gi in zip(x.tolist(), y.tolist(), loss.tolist(), grad[0].tolist(), strict=True):
            x_, y_ = mpmath.mpf(xi), mpmath.mpf(yi)
            straight, tail = max(x_, 0) - x_ * y_, mpmath.log1p(mpmath.exp(-abs(x_)))
            wanted = straight + tail
            slope = (1 - y_) / (1 + mpmath.exp(-x_)) - y_ / (1 + mpmath.exp(x_))
            unit = (6 if yi in (0, 1) else 2) * eps
            scale = 1 if yi in (0, 1) else max(1, abs(x_)) / abs(wanted)
            assert abs(li - wanted) <= unit * scale * abs(wanted) + tiny, (xi, yi, li, wanted)
            assert abs(gi - slope) <= 4 * eps * (abs(slope) if yi in (0, 1) else 1) + tiny, (xi, yi, gi, slope)


@native_only
def test_every_exponent():
    """softplus over the whole range of float32: within 4 units in the last place of the result."""
    x = torch.cat([torch.linspace(-87, 0, 40001), -torch.logspace(-20, 0, 2001)])
    loss = mtl.masked_bce(x[None], torch.zeros(1, len(x)), backend="native").double()
    wanted = torch.log1p(torch.exp(x.double()))
    assert ((loss - wanted).abs() <= 4 * 2.0**-24 * 2 * wanted).all()


@each_backend
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, backend):
    logits, labels, mask = batch(shape, dtype)
    weights = torch.where(mask, torch.rand(shape, generator=torch.Generator().manual_seed(1)), 0)
    for m in (None, mask, weights, (3 * weights).to(torch.float16), mask.long()):
        wanted = run(logits.double(), labels, m, "reference")
        agree(run(logits, labels, m, backend), wanted, dtype)


@each_backend
def test_means_torchs_cross_entropy(backend):
    """Task by task, torch's own mean over the rows the mask leaves; soft labels."""
    logits, _, mask = batch((90, 4))
    labels = torch.rand(90, 4, dtype=torch.float64)
    loss = mtl.masked_bce(logits, labels, mask, backend=backend)
    for t in (0, 2, 3):
        kept = mask[:, t]
        close(loss[t], F.binary_cross_entropy_with_logits(logits[kept, t], labels[kept, t]))
    weights = torch.rand(90, 4, dtype=torch.float64)
    weighted = F.binary_cross_entropy_with_logits(logits, labels, weights, reduction="none").sum(0) / weights.sum(0)
    close(mtl.masked_bce(logits, labels, weights, backend=backend), weighted)


@each_backend
@each_dtype
@pytest.mark.parametrize("kind", ["bool", "weights"])
def test_what_is_masked_is_never_read(kind, dtype, backend):
    """NaN and labels beyond [0,1] under a mask of 0 change nothing, and get a gradient of exactly 0."""
    logits, labels, mask = batch((300, 5), dtype)
    labels = labels.float()
    m = mask if kind == "bool" else mask * 0.3
    clean = run(logits, labels, m, backend)
    logits[~mask], labels[~mask] = math.nan, math.nan
    labels[::3][~mask[::3]] = 7
    found = run(logits, labels, m, backend)
    assert torch.equal(found[0], clean[0]) and torch.equal(found[1], clean[1])
    assert (found[1][~mask] == 0).all() and found[0][1] == 0


@each_backend
def test_a_task_without_rows(backend):
    """Loss 0 and gradient 0, also where what comes from above is infinite, as under a logarithm of the loss."""
    logits, labels, mask = batch((40, 3), torch.float32)
    grad = torch.tensor([1.0, math.inf, 2.0])
    found = run(logits, labels, mask, backend, lambda _: grad)
    assert found[0][1] == 0 and (found[1][:, 1] == 0).all() and found[1].isfinite().all()
    nothing = run(logits, labels, torch.zeros_like(mask), backend, lambda _: grad)
    assert (nothing[0] == 0).all() and (nothing[1] == 0).all()


@each_backend
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)], ids=str)
def test_empty(shape, backend):
    x = torch.zeros(shape)
    for mask in (None, x.bool(), x):
        loss, grad = run(x, x, mask, backend)
        assert torch.equal(loss, torch.zeros(shape[1])) and grad.shape == shape


@each_backend
def test_layouts(backend):
    logits, labels, mask = batch((12, 6))
    labels = labels.double()
    for name, x in layouts(logits).items():
        y, m = layouts(labels)[name], layouts(mask.double())[name]
        y, m = y.where(m != 0, 0), m  # the rubbish beside a slice is never part of it
        found, wanted = run(x, y, m, backend), run(x.contiguous(), y.contiguous(), m.contiguous(), "reference")
        agree(found, wanted, torch.float64)


@each_backend
@pytest.mark.parametrize("grad", over({k: v for k, v in GRAD_LAYOUTS.items() if k != "transposed"}))
def test_gradient_layouts(grad, backend):
    logits, labels, mask = batch((12, 6))
    agree(run(logits, labels, mask, backend, grad), run(logits, labels, mask, "reference", grad), torch.float64)


@each_backend
@pytest.mark.parametrize("weight", [1e-45, 1e-40, 1e-30, 1e30])
def test_extreme_weights(weight, backend):
    """Weights count relative to their sum, however small or large that is."""
    logits, labels, mask = batch((50, 4), torch.float32)
    found, wanted = (run(logits, labels, mask * w, backend) for w in (weight, 1.0))
    for got, want in zip(found, wanted, strict=True):
        close(got, want)


@each_backend
def test_weights_whose_sum_overflows_give_no_number(backend):
    logits, labels, mask = batch((50, 3), torch.float32)
    weights = mask * 2e37
    if backend == "native":
        with pytest.raises(RuntimeError, match="mask must hold weights whose sum is finite; got 7.4e"):
            mtl.masked_bce(logits, labels, weights, backend=backend)
    else:
        assert mtl.masked_bce(logits, labels, weights, backend=backend).isnan().tolist() == [True, False, True]


@each_backend
@each_dtype
def test_a_nan_stays_in_its_place(dtype, backend):
    logits, labels, mask = batch((300, 3), dtype)
    mask[7, 2] = True
    clean = run(logits, labels, mask, backend)
    logits[7, 2] = math.nan
    found = run(logits, labels, mask, backend)
    assert found[0].isnan().tolist() == [False, False, True] and torch.equal(found[0][:2], clean[0][:2])
    assert found[1].isnan().nonzero().tolist() == [[7, 2]]
    found[1][7, 2] = clean[1][7, 2]
    assert torch.equal(found[1], clean[1])


@native_only
@halves
@pytest.mark.parametrize("masked", [False, True])
def test_half_precision_against_plain_torch(masked, dtype):
    """At most twice the error of torch's loss in the same dtype."""
    logits, labels, mask = batch((600, 4), dtype)
    mask[:, 1] = True
    m = mask if masked else None

    def plain(x):
        terms = F.binary_cross_entropy_with_logits(x, labels.to(dtype), reduction="none")
        return terms.mean(0) if m is None else torch.where(m, terms, 0).sum(0) / m.sum(0).to(dtype)

    exact = run(logits.double(), labels, m, "reference", torch.ones_like)
    torchs = outcome(plain, [logits], torch.ones_like)
    ours = run(logits, labels, m, "native", torch.ones_like)
    for one, other, want in zip(ours, (torchs.out, torchs.grads[0]), exact, strict=True):
        mine, theirs = (one.double() - want).abs(), (other.double() - want).abs()
        assert mine.max() <= 2 * theirs.max() and mine.norm() <= 2 * theirs.norm()


@native_only
def test_bad_labels_and_weights():
    """The CPU kernel names the first; the reference makes the place, or of a weight the whole task, NaN."""
    logits, labels, mask = batch((5000, 3), torch.float32)
    mask[:] = True
    labels, weights = labels.float(), mask.float()
    labels[4000, 2], labels[4900, 0] = 1.5, -1
    with pytest.raises(RuntimeError, match=r"labels must lie in \[0, 1\]; got 1.5 at \[4000, 2\]"):
        mtl.masked_bce(logits, labels, mask, backend="native")
    found = run(logits, labels, mask, "reference")
    assert found[0].isnan().tolist() == [True, False, True]
    assert found[1].isnan().nonzero().tolist() == [[4000, 2], [4900, 0]]
    labels[4000, 2] = labels[4900, 0] = 1
    for bad in (-0.5, math.nan, math.inf):
        weights[3000, 1] = bad
        with pytest.raises(RuntimeError, match=r"mask must hold finite weights of at least 0; got .* at \[3000, 1\]"):
            mtl.masked_bce(logits, labels, weights, backend="native")
        assert mtl.masked_bce(logits, labels, weights, backend="reference").isnan().tolist() == [False, True, False]


X = torch.zeros(3, 2)
UNFIT = {
    "logits type": (TypeError, "logits must be a tensor; got list", dict(logits=[[0.0]])),
    "logits dtype": (TypeError, "logits must be float64.*bool", dict(logits=X.bool())),
    "logits shape": (ValueError, r"logits must be \[B,T\]; got shape \(3,\)", dict(logits=X[:, 0])),
    "labels type": (TypeError, "labels must be a tensor; got NoneType", dict(labels=None)),
    "labels shape": (ValueError, r"labels must have the shape of logits, \(3, 2\); got \(2, 3\)", dict(labels=X.T)),
    "labels dtype": (TypeError, "labels must be bool.*complex64", dict(labels=X.to(torch.complex64))),
    "labels gradient": (ValueError, "labels requires a gradient", dict(labels=X.clone().requires_grad_())),
    "mask shape": (ValueError, r"mask must have the shape of logits, \(3, 2\); got \(3, 1\)", dict(mask=X[:, :1])),
    "mask device": (ValueError, "mask is on meta, logits on cpu", dict(mask=X.to("meta"))),
    "mask type": (TypeError, "mask must be a tensor; got list", dict(mask=[True])),
}


@pytest.mark.parametrize("error, message, change", [pytest.param(*v, id=k) for k, v in UNFIT.items()])
def test_bad_input(error, message, change):
    with pytest.raises(error, match=message):
        mtl.masked_bce(**(dict(logits=X, labels=X) | change))
