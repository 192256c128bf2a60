"""esmm_loss: values and gradients against 50 digits, labels, shapes, bad input."""

import itertools
import math

import mpmath
import pytest
import torch
from torch import Tensor

import mtlkernels as mtl

from .cases import close, each_backend, each_dtype, halves, native_only

SIZES = [sign * size for size in (0.1, 1, 10, 50, 90, 120, 200) for sign in (1, -1)]
LABELS = [(0, 0), (1, 0), (1, 1), (0.25, 0.5), (1, 0.125), (0.5, 0)]
WEIGHT = 0.75


def rows(batch: int, dtype: torch.dtype = torch.float64, scale: float = 4.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits in dtype, hard labels in float64."""
    gen = torch.Generator().manual_seed(batch)
    a, c = torch.randn(2, batch, generator=gen, dtype=torch.float64) * scale
    click = torch.rand(batch, generator=gen) < 0.5
    conversion = click & (torch.rand(batch, generator=gen) < 0.5)
    return a.to(dtype), c.to(dtype), click.double(), conversion.double()


def run(a: Tensor, c: Tensor, click: Tensor, conversion: Tensor, grad: float = 1.0, **options) -> list[Tensor]:
    """Loss and both gradients."""
    leaves = [t.detach().requires_grad_() for t in (a, c)]
    loss = mtl.esmm_loss(*leaves, click, conversion, **options)
    return [loss.detach(), *torch.autograd.grad(loss * grad, leaves)]


def exact(a: float, c: float, click: float, conversion: float) -> tuple:
    """The same row in probabilities, with enough digits for exp(-200)."""
    with mpmath.workdps(200):
        a, c, y, z = (mpmath.mpf(v) for v in (a, c, click, conversion))
        p, r = 1 / (1 + mpmath.exp(-a)), 1 / (1 + mpmath.exp(-c))
        w, joint = y * z, p * r
        loss = -y * mpmath.log(p) - (1 - y) * mpmath.log(1 - p)
        loss += WEIGHT * (-w * mpmath.log(joint) - (1 - w) * mpmath.log(1 - joint))
        by_joint = WEIGHT * (-w / joint + (1 - w) / (1 - joint))  # dloss / d(p r)
        return loss, p - y + by_joint * r * p * (1 - p), by_joint * p * r * (1 - r)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@each_backend
def test_fifty_digits(backend, dtype):
    """Row by row: within 4 units in the last place of 1 + loss, gradients of 1 + weight.

    The reference's gradients go through the exponential of a difference of logits: their units are the logits'.
    """
    eps = torch.finfo(dtype).eps
    for (a, c), (click, conversion) in itertools.product(itertools.product(SIZES, SIZES), LABELS):
        row = [torch.tensor([v], dtype=dtype) for v in (a, c, click, conversion)]
        found = run(*row, ctcvr_weight=WEIGHT, backend=backend)
        wanted = exact(*(t.item() for t in row))
        assert found[0] >= 0
        units = max(1, abs(a), abs(c)) if backend == "reference" else 1
        for got, want, scale in zip(found, wanted, (1 + wanted[0], units * (1 + WEIGHT), units * WEIGHT), strict=True):
            assert abs(got.item() - want) <= 4 * eps * scale, (a, c, click, conversion, got, mpmath.nstr(want, 20))


@native_only
def test_small_gradients_keep_their_digits():
    """Where the label is nearly certain the gradient is tiny, and right relative to its own size."""
    for a, c in itertools.product((9.0, 20.0, 60.0, 85.0), repeat=2):
        row = [torch.tensor([v]) for v in (a, c, 1.0, 1.0)]
        found, wanted = run(*row, ctcvr_weight=WEIGHT, backend="native"), exact(a, c, 1, 1)
        for got, want in zip(found, wanted, strict=True):
            assert abs(got.item() - want) <= 1e-6 * abs(want)


@each_backend
@each_dtype
@pytest.mark.parametrize("batch", [1, 3, 8, 17, 255, 256, 257, 2049, 5000])
def test_against_float64(batch, dtype, backend):
    a, c, click, conversion = rows(batch, dtype)
    found = run(a, c, click, conversion, batch, ctcvr_weight=WEIGHT, backend=backend)
    wanted = run(a.double(), c.double(), click, conversion, batch, ctcvr_weight=WEIGHT, backend="reference")
    assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and found[0].shape == ()
    close(found[0], wanted[0])
    for got, want in zip(found[1:], wanted[1:], strict=True):
        assert got.dtype == dtype
        close(got, want)


@each_backend
def test_no_rows(backend):
    for shape in ((0,), (0, 1), (3, 0)):
        nothing = torch.zeros(shape)
        found = run(*[nothing] * 4, backend=backend)
        assert found[0] == 0 and found[0].shape == () and found[1].shape == found[2].shape == shape


@each_backend
@pytest.mark.parametrize("label", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
                                   torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)  # fmt: skip
def test_label_dtypes(label, backend):
    a, c, click, conversion = rows(301, torch.float32)
    wanted = run(a, c, click, conversion, backend=backend)
    found = run(a, c, click.to(label), conversion.to(label), backend=backend)
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


@each_backend
def test_shapes_and_strides(backend):
    """Any shape; the mean is over all elements, and the gradients have the logits' shape."""
    wanted = run(*rows(24), backend=backend)
    for view in (
        lambda t: t.reshape(24, 1),
        lambda t: t.reshape(2, 3, 4),
        lambda t: t.reshape(2, 1, 3, 2, 2),
        lambda t: t.reshape(4, 6).T.contiguous().T,
        lambda t: torch.stack([t, torch.full_like(t, torch.nan)], 1)[:, 0],
    ):
        found = run(*(view(t) for t in rows(24)), backend=backend)
        close(found[0], wanted[0])
        for got, want in zip(found[1:], wanted[1:], strict=True):
            close(got, view(want))
    a, c, click, conversion = rows(1)
    one = mtl.esmm_loss(a[0], c[0], click[0], conversion[0], backend=backend)
    close(one, mtl.esmm_loss(a, c, click, conversion, backend=backend))
    close(mtl.esmm_loss(*(t.expand(7) for t in (a, c, click, conversion)), backend=backend), one)


@each_backend
def test_weight(backend):
    """0: the click's loss alone; otherwise affine in the weight."""
    a, c, click, conversion = rows(50)
    none, one, two = (run(a, c, click, conversion, ctcvr_weight=w, backend=backend) for w in (0, 1, 2.0))
    close(none[0], torch.nn.functional.binary_cross_entropy_with_logits(a, click))
    assert (none[2] == 0).all()
    for first, second, third in zip(none, one, two, strict=True):
        close(third - second, second - first)


@each_backend
def test_only_what_requires_a_gradient_gets_one(backend):
    a, c, click, conversion = rows(20)
    wanted = run(a, c, click, conversion, backend=backend)
    for which in (0, 1):
        logits = [a.detach().clone(), c.detach().clone()]
        logits[which].requires_grad_()
        loss = mtl.esmm_loss(*logits, click, conversion, backend=backend)
        loss.backward()
        close(logits[which].grad, wanted[1 + which])
        assert logits[1 - which].grad is None
    assert not mtl.esmm_loss(a, c, click, conversion, backend=backend).requires_grad


@each_backend
@each_dtype
def test_a_nan_stays_in_its_row(dtype, backend):
    a, c, click, conversion = rows(300, dtype)
    clean = run(a, c, click, conversion, backend=backend)
    a[7], c[280] = math.nan, math.nan
    found = run(a, c, click, conversion, backend=backend)
    assert found[0].isnan()
    others = [i for i in range(300) if i not in (7, 280)]
    for got, want in zip(found[1:], clean[1:], strict=True):
        assert torch.equal(got[others], want[others])
    assert found[1][[7, 280]].isnan().all() and found[2][[7, 280]].isnan().all()


@native_only
@halves
def test_half_precision_against_plain_torch(dtype):
    """At most twice the error of torch's functions in the same dtype."""
    import torch.nn.functional as F

    a, c, click, conversion = rows(500, dtype)
    leaves = [t.clone().requires_grad_() for t in (a, c)]
    y, z = click.to(dtype), conversion.to(dtype)
    log_a, w = F.logsigmoid(leaves[0]), y * z
    log_not = torch.logaddexp(F.logsigmoid(-leaves[0]), log_a + F.logsigmoid(-leaves[1]))
    plain = F.binary_cross_entropy_with_logits(leaves[0], y)
    plain = plain - (w * (log_a + F.logsigmoid(leaves[1])) + (1 - w) * log_not).mean()
    torchs = [plain.detach(), *torch.autograd.grad(plain * 500, leaves)]
    ours = run(a, c, click, conversion, 500, backend="native")
    wanted = run(a.double(), c.double(), click, conversion, 500, backend="reference")
    for one, other, want in zip(ours, torchs, wanted, strict=True):
        mine, theirs = (one.double() - want).abs(), (other.double() - want).abs()
        assert mine.max() <= 2 * theirs.max() and mine.norm() <= 2 * theirs.norm()


@each_backend
def test_loss_scale_of_float16(backend):
    """Gradients are rounded after the gradient from above: a loss scale saves those that float16 could not hold."""
    a = torch.full((4096,), -8.0, dtype=torch.float16)
    zero = torch.zeros(4096)
    found = run(a, a, zero, zero, 2.0**16, backend=backend)
    wanted = run(a.double(), a.double(), zero, zero, 2.0**16, backend="reference")
    for got, want in zip(found[1:], wanted[1:], strict=True):
        assert ((got.double() - want).abs() <= 2.0**-11 * want.abs() + 2.0**-25).all() and (got != 0).any()


BAD_ROWS = {
    "click 2": (2.0, 0.0, r"click must lie in \[0, 1\]; got 2 in row 3000"),
    "click negative": (-0.5, 0.0, r"click must lie in \[0, 1\]; got -0.5 in row 3000"),
    "click NaN": (math.nan, 0.0, r"click must lie in \[0, 1\]; got .*nan in row 3000"),
    "conversion 2": (1.0, 2.0, r"conversion must lie in \[0, 1\]; got 2 in row 3000"),
    "conversion NaN": (1.0, math.nan, r"conversion must lie in \[0, 1\]; got .*nan in row 3000"),
    "without a click": (0.0, 1.0, "conversion 1 without a click in row 3000"),
}


@pytest.mark.parametrize("click, conversion, message", [pytest.param(*v, id=k) for k, v in BAD_ROWS.items()])
def test_bad_labels(click, conversion, message):
    """The CPU kernel names the first such row; the reference makes it NaN."""
    row = rows(5000, torch.float32)
    for at in (3000, 4500):
        row[2][at], row[3][at] = click, conversion
    found = run(*row, backend="reference")
    assert found[0].isnan() and found[1].isnan().nonzero().flatten().tolist() == [3000, 4500]
    if "native" in mtl.explain("esmm_loss", *row).splitlines()[0]:
        with pytest.raises(RuntimeError, match=message):
            mtl.esmm_loss(*row)


A = torch.zeros(3)
UNFIT = {
    "ctr_logit type": (TypeError, "ctr_logit must be a tensor; got list", dict(ctr_logit=[0.0])),
    "ctr_logit dtype": (TypeError, "ctr_logit must be float64.*int64", dict(ctr_logit=A.long())),
    "cvr_logit type": (TypeError, "cvr_logit must be a tensor", dict(cvr_logit=None)),
    "cvr_logit dtype": (TypeError, "cvr_logit must have ctr_logit's dtype.*float32; got.*float64",
                        dict(cvr_logit=A.double())),
    "cvr_logit shape": (ValueError, r"cvr_logit must be like ctr_logit, \(3,\).*got \(3, 1\)",
                        dict(cvr_logit=A[:, None])),
    "cvr_logit device": (ValueError, "cvr_logit must be like ctr_logit.*meta", dict(cvr_logit=A.to("meta"))),
    "click shape": (ValueError, r"click must have the shape of ctr_logit, \(3,\); got \(2,\)", dict(click=A[:2])),
    "click type": (TypeError, "click must be a tensor; got int", dict(click=1)),
    "click dtype": (TypeError, "click must be bool.*complex64", dict(click=A.to(torch.complex64))),
    "click gradient": (ValueError, "click requires a gradient", dict(click=A.clone().requires_grad_())),
    "conversion device": (ValueError, "conversion is on meta, ctr_logit on cpu", dict(conversion=A.to("meta"))),
    "weight type": (TypeError, "ctcvr_weight must be a number; got Tensor", dict(ctcvr_weight=A[0])),
    "weight negative": (ValueError, "ctcvr_weight must be finite and at least 0; got -1", dict(ctcvr_weight=-1)),
    "weight NaN": (ValueError, "ctcvr_weight must be finite", dict(ctcvr_weight=math.nan)),
    "weight infinite": (ValueError, "ctcvr_weight must be finite", dict(ctcvr_weight=math.inf)),
    "backend": (ValueError, "backend must be one of", dict(backend="cuda")),
}  # fmt: skip


@pytest.mark.parametrize("error, message, change", [pytest.param(*v, id=k) for k, v in UNFIT.items()])
def test_bad_input(error, message, change):
    call = dict(ctr_logit=A, cvr_logit=A, click=A, conversion=A) | change
    with pytest.raises(error, match=message):
        mtl.esmm_loss(**call)
