"""The Triton expert_mix against the plain form in float64: values, every gradient, and what must not be read."""

import pytest
import torch

import mtlkernels as mtl
from mtlkernels.reference import expert_mix as plain

pytest.importorskip("triton")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter: log(0), 1/0


@pytest.fixture
def ops(device, monkeypatch):
    """The launchers, with every fresh buffer full of NaN."""
    from mtlkernels.triton import expert_mix

    def poisoned(*args, **kwargs):
        out = torch.zeros(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)
    return expert_mix


def make(batch, counts, width, features, rows):
    """x, weight, bias, logits, static; counts: an int for x [B,K], else the experts of each unit."""
    generator = torch.Generator().manual_seed(batch + 7 * features + 31 * width + 101 * rows)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    shared = isinstance(counts, int)
    experts = counts if shared else sum(counts)
    x = normal(batch, width) if shared else normal(batch, len(counts), width)
    weight, bias = normal(experts, features, width) / max(width, 1) ** 0.5, normal(experts, features)
    return x, weight, bias, normal(batch, rows, experts), normal(rows, experts)


def check(ops, device, tensors, counts, activation="", mask=None, columns=None, dtype=torch.float32, tolerance=None):
    tolerance = tolerance or {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    counts = None if isinstance(counts, int) else list(counts)
    tensors = [t if t is None else t.to(device) for t in tensors]
    tensors[:3] = [t if t is None else t.to(dtype) for t in tensors[:3]]
    rest = (None if mask is None else mask.to(device), None if columns is None else columns.to(device), counts)
    wide = [t if t is None else t.double().requires_grad_() for t in tensors]
    with torch.enable_grad():
        out, lse = plain.expert_mix(*wide, *rest, activation)
    found, found_lse = ops.expert_mix(*tensors, *rest, activation)
    assert found.shape == out.shape and found.dtype == dtype and found_lse.shape == lse.shape
    close(found, out, tolerance)
    torch.testing.assert_close(found_lse.double(), lse.detach(), rtol=1e-5, atol=1e-5)
    grad = torch.randn(out.shape, device=device).to(dtype)
    given = [w for w in wide if w is not None]
    wanted = torch.autograd.grad(out, given, grad.double(), allow_unused=True)
    gradients = ops.expert_mix_backward(grad, None, *tensors, *rest, activation, found_lse, 31)
    gradients = [g for g, w in zip(gradients, wide, strict=True) if w is not None]
    for got, want, like in zip(gradients, wanted, [t for t in tensors if t is not None], strict=True):
        assert got.shape == like.shape and got.dtype == like.dtype
        close(got, torch.zeros_like(like).double() if want is None else want, 4 * tolerance)
    return found


def close(found, expected, tolerance):
    expected = expected.detach()
    scale = expected.abs().max().item() if expected.numel() else 0
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * max(scale, 1e-2))


CASES = [  # B, experts or experts_per_unit, K, D, T
    (1, 1, 1, 1, 1),
    (5, 6, 9, 7, 3),
    (67, 2, 40, 70, 2),  # more than one tile of rows, of D and of K
    (7, (2, 0, 3, 1), 12, 20, 5),  # two chunks of tasks
    (6, (1, 1, 1), 16, 24, 2),
    (4, 3, 5, 6, 9),  # more tasks than are fused
    (0, 3, 3, 4, 2),
    (3, 3, 0, 4, 2),
    (3, 3, 4, 0, 2),
    (3, 0, 4, 5, 2),
    (3, 3, 4, 5, 0),
]


@pytest.mark.parametrize("case", CASES)
def test_shapes(ops, device, case):
    batch, counts, width, features, rows = case
    x, weight, bias, logits, static = make(*case)
    check(ops, device, (x, weight, bias, logits, static), counts, "relu")
    check(ops, device, (x, weight, None, logits, None), counts, "gelu")
    check(ops, device, (x, weight, bias, None, static), counts)


@pytest.mark.parametrize("activation", ["silu", "tanh", "sigmoid"])
def test_activations(ops, device, activation):
    check(ops, device, make(9, (1, 2), 20, 10, 2), (1, 2), activation)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_dtypes(ops, device, dtype):
    tensors = make(9, (1, 2), 40, 24, 3)
    check(ops, device, tensors, (1, 2), "silu", dtype=dtype)


def test_mask_and_routes(ops, device):
    """An expert that no row uses is not read, one that some use is not read by the others."""
    tensors = list(make(9, (2, 3), 8, 12, 3))
    mask = torch.tensor([[1, 0, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 1, 0, 1]], dtype=torch.bool)
    clean = check(ops, device, tensors, (2, 3), "gelu", mask=mask)
    tensors[1][1], tensors[2][1] = torch.nan, torch.nan
    assert torch.equal(check(ops, device, tensors, (2, 3), "gelu", mask=mask), clean)
    packed = [*tensors[:3], tensors[3][:, mask], tensors[4][mask]]
    columns = mtl.Routes.from_mask(mask).columns
    assert torch.equal(check(ops, device, packed, (2, 3), "gelu", columns=columns), clean)
    tensors[1][3] = torch.nan  # row 0 alone uses expert 3
    args = [t.to(device) for t in (*tensors, mask)]
    out = ops.expert_mix(*args, None, [2, 3], "gelu")[0]
    assert out[:, 0].isnan().all() and torch.equal(out[:, 1:], clean[:, 1:])


def test_a_nan_stays_in_its_row(ops, device):
    x, weight, bias, logits, static = (t.to(device) for t in make(7, 3, 8, 12, 2))
    clean = ops.expert_mix(x, weight, bias, logits, static, None, None, None, "relu")[0]
    x[2, 1], logits[4, 1, 0] = torch.nan, torch.nan
    hurt = ops.expert_mix(x, weight, bias, logits, static, None, None, None, "relu")[0]
    assert hurt[2].isnan().all() and hurt[4, 1].isnan().all()
    hurt[2], hurt[4, 1] = clean[2], clean[4, 1]
    assert torch.equal(hurt, clean)


def test_large_logits_sum_to_one(ops, device):
    """The weights add up to 1 to float32's accuracy, whatever the size of the logits."""
    x, weight, bias, logits, _ = (t.to(device) for t in make(5, 3, 4, 6, 2))
    same = weight[:1].expand(3, -1, -1), bias[:1].expand(3, -1)
    out = ops.expert_mix(x, *same, 1e4 + logits, None, None, None, None, "")[0]
    one = ops.expert_mix(x, weight[:1], bias[:1], logits[..., :1], None, None, None, None, "")[0]
    torch.testing.assert_close(out, one, rtol=1e-6, atol=1e-6)


def test_the_public_function(device):
    """Forward and gradients through it."""
    tensors = [t.to(device).requires_grad_() for t in make(5, (1, 2), 6, 8, 2)]
    found, wanted = (
        torch.autograd.grad(
            mtl.expert_mix(*tensors, experts_per_unit=(1, 2), activation="silu", backend=backend).square().sum(),
            tensors,
        )
        for backend in ("triton", "reference")
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
