"""The Triton partitioned_norm against the plain one in float64, with every fresh buffer full of NaN."""

import pytest
import torch

pytest.importorskip("triton")

from mtlkernels.reference import partitioned_norm as plain


@pytest.fixture
def ops(device, monkeypatch):
    """The launchers, with every fresh buffer full of NaN, or of a number that is no row."""
    from mtlkernels.triton import partitioned_norm

    def poisoned(*args, **kwargs):
        out = torch.zeros(*args, **kwargs)
        return out.fill_(torch.nan if out.is_floating_point() else -(2**40))

    monkeypatch.setattr(partitioned_norm.torch, "empty", poisoned)
    monkeypatch.setattr(plain, "_can_look", lambda domain: False)
    return partitioned_norm


def make(batch, width, domains, ids=None, dtype=torch.float32, parameters=None):
    """x, domain, weight, bias, domain_weight, domain_bias, running_mean, running_var."""
    gen = torch.Generator().manual_seed(batch + 7 * width + 31 * domains)

    def normal(*shape):
        return torch.randn(shape, generator=gen)

    domain = torch.randint(domains, (batch,), generator=gen) if ids is None else torch.tensor(ids)
    x = 2 * normal(batch, width) + 3 * normal(1, width)
    affine = normal(width), normal(width), normal(domains, width), normal(domains, width)
    running = normal(domains, width), normal(domains, width).abs() + 0.5
    return [x.to(dtype), domain, *(t.to(parameters or dtype) for t in affine), *running]


def close(found, wanted, tolerance, what=""):
    """Within `tolerance` of the largest element, or of 10 where terms of that size cancel."""
    scale = max(wanted.nan_to_num().abs().max().item(), 10) if wanted.numel() else 0
    torch.testing.assert_close(
        found.double().cpu(), wanted.double().cpu(), rtol=0, atol=tolerance * scale, equal_nan=True,
        msg=lambda m: f"{what}: {m}",
    )  # fmt: skip


def check(ops, device, args, training=True, eps=1e-5, grad=None):
    """Outputs and every gradient; returns them."""
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
    args = [a.to(device) for a in args]
    wide = [a.detach().double() if a.is_floating_point() else a for a in args]
    leaves = [wide[i].requires_grad_() for i in (0, 2, 3, 4, 5)]
    want = plain.partitioned_norm(*wide, training, eps)
    found = ops.partitioned_norm(*args, training, eps)
    for name, got, wanted in zip(("y", "mean", "var", "count"), found, want, strict=True):
        assert got.shape == wanted.shape
        close(got, wanted.detach(), tolerance[args[0].dtype] if name == "y" else 1e-5, name)
    assert found[0].dtype == args[0].dtype and found[1].dtype == found[2].dtype == torch.float32
    assert found[3].dtype == torch.int64
    grad = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(1)) if grad is None else grad
    grad = grad.to(device, args[0].dtype)
    wanted = torch.autograd.grad(want[0], leaves, grad.double())
    back = grad, *args[:3], args[4], *found[1:], training, eps
    gradients = ops.partitioned_norm_backward(*back, 31)
    for i, (got, one, of) in enumerate(zip(gradients, wanted, (args[0], *args[2:6]), strict=True)):
        assert got.shape == of.shape and got.dtype == of.dtype
        close(got, one, max(tolerance[of.dtype], tolerance[args[0].dtype]), f"gradient {i}")
    return found, gradients, back


# A tile has 32 rows at 128 columns and more, 128 rows at 32 and fewer.
SHAPES = [(1, 1, 1), (13, 7, 3), (9, 20, 1), (150, 130, 2), (300, 20, 3), (120, 9, 12), (0, 4, 2), (3, 0, 2)]
each_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@each_mode
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(ops, device, shape, training):
    check(ops, device, make(*shape), training)


@each_mode
@pytest.mark.parametrize("parameters", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_short_dtypes(ops, device, dtype, parameters, training):
    check(ops, device, make(50, 12, 3, dtype=dtype, parameters=parameters), training)


def test_long_batches(ops, device, monkeypatch):
    """Several tiles a chunk, and more chunks of a domain than the merge takes at a time."""
    monkeypatch.setattr(ops, "_SLOTS", 3)
    check(ops, device, make(2000, 5, 3))
    monkeypatch.setattr(ops, "_SLOTS", 256)
    monkeypatch.setattr(ops, "_MERGED", 2)
    check(ops, device, make(1300, 5, 2), eps=1e-3)


@each_mode
def test_few_rows(ops, device, training):
    """Domains with none, one, two and three rows."""
    found, gradients, _ = check(ops, device, make(6, 10, 4, [3, 1, 2, 3, 2, 3]), training)
    assert found[3].tolist() == ([0, 1, 2, 3] if training else [0] * 4)
    assert (gradients[3][0] == 0).all() and (gradients[4][0] == 0).all()


@each_mode
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_an_id_out_of_range(ops, device, training, dtype):
    """Such rows are NaN and without gradient; the rest is as without them."""
    args = make(9, 6, 4, [0, -1, 3, 4, 3, 2**31 - 1, 0, 2, -(2**31)])
    args[1] = args[1].to(dtype)
    found, gradients, _ = check(ops, device, args, training)
    bad = torch.tensor([1, 3, 5, 8])
    assert found[0][bad].isnan().all() and (gradients[0][bad] == 0).all()


@each_mode
def test_layouts(ops, device, training):
    args = make(20, 12, 3)
    x = args[0]
    for one in (x.t().contiguous().t(), torch.stack([x, x], -1)[..., 0], torch.cat([x, x], -1)[:, 3:15]):
        check(ops, device, [one, torch.stack([args[1], args[1]], -1)[:, 0], *args[2:]], training)
    check(ops, device, [x, *args[1:4], args[4].t().contiguous().t(), *args[5:]], training)
    check(ops, device, args, training, grad=torch.tensor(2.0).expand(20, 12))
    check(ops, device, args, training, grad=torch.randn(1, 12).expand(20, 12))
    check(ops, device, args, training, grad=torch.randn(12, 20).t())


def test_large_offsets(ops, device):
    """Mean and variance beside an offset many deviations away."""
    args = [a.to(device) for a in make(1500, 8, 3)]
    args[0] += 1e4
    wide = [a.double() if a.is_floating_point() else a for a in args]
    found, wanted = (f(*a, True, 1e-5) for f, a in ((ops.partitioned_norm, args), (plain.partitioned_norm, wide)))
    close(found[1], wanted[1], 1e-7)
    torch.testing.assert_close(found[2].double(), wanted[2], rtol=1e-5, atol=0)


def test_a_nan_stays_where_it_is(ops, device):
    """In its column of its domain in training, in its row alone outside, and where a domain has one row."""
    args = [a.to(device) for a in make(6, 10, 4, [3, 1, 2, 3, 2, 3])]
    clean = {mode: ops.partitioned_norm(*args, mode, 1e-5) for mode in (True, False)}
    args[0][1, 3] = args[0][2, 4] = torch.nan
    for mode, hurt_rows in ((True, [(1, 3), (2, 4), (4, 4)]), (False, [(1, 3), (2, 4)])):
        hurt = torch.zeros(6, 10, dtype=torch.bool, device=device)
        for at in hurt_rows:
            hurt[at] = True
        found = ops.partitioned_norm(*args, mode, 1e-5)
        assert torch.equal(found[0].isnan(), hurt) and torch.equal(found[0][~hurt], clean[mode][0][~hurt])
        grad = torch.ones_like(args[0])
        dx = ops.partitioned_norm_backward(grad, *args[:3], args[4], *found[1:], mode, 1e-5, 1)[0]
        other = ops.partitioned_norm_backward(grad, *args[:3], args[4], *clean[mode][1:], mode, 1e-5, 1)[0]
        assert torch.equal(dx[~hurt], other[~hurt])


@each_mode
def test_needs(ops, device, training):
    """Each gradient alone is the same as all together, and what is not asked for is empty."""
    _, every, back = check(ops, device, make(30, 10, 3), training)
    for needs in (0, 1, 2, 4, 8, 16, 30):
        some = ops.partitioned_norm_backward(*back, needs)
        for i, (one, other) in enumerate(zip(some, every, strict=True)):
            assert torch.equal(one, other) if needs >> i & 1 else one.shape == (0,)


def test_a_dtype_without_kernel_is_named(ops, device):
    with pytest.raises(ValueError, match="float64"):
        ops.partitioned_norm(*(a.to(device) for a in make(2, 3, 1, dtype=torch.float64)), True, 1e-5)


def test_through_the_public_function(device):
    """Autograd and the running statistics, on this backend."""
    import mtlkernels as mtl

    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        args = [a.to(device, dtype) if a.is_floating_point() else a.to(device) for a in make(40, 6, 3)]
        leaves = [args[i].requires_grad_() for i in (0, 2, 3, 4, 5)]
        out = mtl.partitioned_norm(*args, training=True, momentum=0.3, backend=backend)
        results.append([out.detach(), *torch.autograd.grad(out.sin().sum(), leaves), *args[6:]])
    for found, wanted in zip(*results, strict=True):
        close(found, wanted, 1e-5)
