"""The Triton expert_linear against torch in float64: values, every gradient, and what must not be read or written."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter: overflow in exp

ACTIVATIONS = {"": lambda z: z, "relu": torch.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh,
               "sigmoid": torch.sigmoid}  # fmt: skip


@pytest.fixture
def ops(device, monkeypatch):
    """The launchers, with every fresh buffer full of NaN."""
    from mtlkernels.triton import expert_linear

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: torch.zeros(*args, **kwargs).fill_(torch.nan))
    return expert_linear


def oracle(x, weight, bias, counts, activation):
    """One expert at a time."""
    counts = counts or [1] * weight.shape[0]
    unit = [u for u, n in enumerate(counts) for _ in range(n)]
    outputs = [(x if x.dim() == 2 else x[:, unit[e]]) @ weight[e].t() for e in range(weight.shape[0])]
    z = torch.stack(outputs, 1) if outputs else x.new_zeros(x.shape[0], *weight.shape[:2])
    return ACTIVATIONS[activation](z if bias is None else z + bias)


def check(ops, device, x, weight, bias, counts=None, activation="", grad=None, tolerance=1e-5):
    """Forward and gradients of the launchers. Tolerances are of the largest element; inputs count as given."""
    x, weight = x.to(device), weight.to(device)
    bias = None if bias is None else bias.to(device)
    # A float32 weight is rounded to x's dtype before the product.
    wide = [x.double().requires_grad_(), weight.to(x.dtype).double().requires_grad_()]
    wide += [] if bias is None else [bias.double().requires_grad_()]
    with torch.enable_grad():
        y = oracle(*wide, *([None] if bias is None else []), counts, activation)
    found, z = ops.expert_linear(x, weight, bias, counts, activation, True)
    assert found.shape == y.shape and found.dtype == x.dtype
    close(found, y, tolerance)
    keeps = activation in ("gelu", "silu")
    assert z.shape == (y.shape if keeps else (0,)) and z.dtype == x.dtype
    plain = ops.expert_linear(x, weight, bias, counts, activation, False)
    assert torch.equal(plain[0], found) and plain[1].shape == (0,)

    grad = torch.randn(y.shape, device=device, dtype=x.dtype) if grad is None else grad.to(device, x.dtype)
    expected = [None] * len(wide)
    if y.requires_grad:
        expected = torch.autograd.grad(y, wide, grad.double(), allow_unused=True)
    expected = [torch.zeros_like(w) if e is None else e for e, w in zip(expected, wide, strict=True)]
    saved = z if keeps else found
    needs = 3 if bias is None else 7
    gradients = ops.expert_linear_backward(grad, x, weight, saved, counts, activation, needs)
    for got, want, like in zip(gradients, expected, (x, weight, weight), strict=False):
        assert got.shape == want.shape and got.dtype == like.dtype
        close(got, want, 4 * tolerance)
    assert bias is not None or gradients[2].shape == (0,)
    return found, gradients


def close(found, expected, tolerance):
    expected = expected.detach()
    scale = expected.abs().max().item() if expected.numel() else 0
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * max(scale, 1e-3))


def make(batch, units, counts, width, features):
    generator = torch.Generator().manual_seed(batch + 7 * features + 31 * width)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    num_experts = sum(counts) if counts else 3 if units is None else units
    x = normal(batch, width) if units is None else normal(batch, units, width)
    return x, normal(num_experts, features, width) / max(width, 1) ** 0.5, normal(num_experts, features)


CASES = [  # B, U, experts_per_unit, K, N
    (1, None, None, 1, 1),
    (5, None, None, 70, 11),
    (7, 2, None, 20, 70),
    (9, 3, [1, 3, 2], 33, 10),
    (4, 3, [2, 0, 1], 8, 5),
    (6, 2, [2, 2], 16, 8),
    (0, 2, None, 4, 3),
    (4, 2, None, 0, 3),
    (4, 2, None, 3, 0),
    (4, 0, None, 3, 5),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("activation", ["", "gelu"])
def test_shapes(ops, device, case, activation):
    batch, units, counts, width, features = case
    x, weight, bias = make(batch, units, counts, width, features)
    check(ops, device, x, weight, bias, counts, activation)
    check(ops, device, x, weight, None, counts, activation)


@pytest.mark.parametrize("activation", ["relu", "silu", "tanh", "sigmoid"])
def test_activations(ops, device, activation):
    x, weight, bias = make(9, 2, [1, 2], 20, 10)
    check(ops, device, x, weight, bias, [1, 2], activation)
    check(ops, device, 30 * x, weight, bias, [1, 2], activation)


def test_no_experts(ops, device):
    check(ops, device, torch.randn(4, 3), torch.randn(0, 5, 3), torch.randn(0, 5))


@pytest.mark.parametrize("units", [None, 2])
def test_more_than_one_tile(ops, device, monkeypatch, units):
    """Every size crosses a tile, and the batch is cut for the parameters' gradients: 77 rows, the last chunk short."""
    monkeypatch.setattr(ops, "_MIN_ROWS", 20)
    x, weight, bias = make(77, units, None, 70, 65 if units else 25)
    check(ops, device, x, weight, bias, None, "tanh")


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16])
def test_float16(ops, device, weight_dtype):
    x, weight, bias = make(130, 2, [1, 2], 40, 24)
    check(ops, device, x.half(), weight.to(weight_dtype), bias.to(weight_dtype), [1, 2], "silu", tolerance=2e-3)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16(ops, device, weight_dtype):
    x, weight, bias = make(33, 2, [1, 2], 40, 24)
    x, weight, bias = x.bfloat16(), weight.to(weight_dtype), bias.to(weight_dtype)
    check(ops, device, x, weight, bias, [1, 2], "relu", tolerance=1.6e-2)


def test_layouts(ops, device):
    """x, weight and gradients of any strides."""
    x, weight, bias = make(6, 3, None, 12, 9)
    check(ops, device, x.transpose(0, 1).contiguous().transpose(0, 1), weight, bias, activation="relu")
    check(ops, device, x.mT.contiguous().mT, weight.mT.contiguous().mT, bias.t().contiguous().t(), activation="relu")
    check(ops, device, x[:, :1].expand(-1, 3, -1), weight, bias[:1].expand(3, -1), activation="gelu")
    check(ops, device, torch.stack([x, x], -1)[..., 0], weight, bias, grad=torch.tensor(2.0).expand(6, 3, 9))
    check(ops, device, x, weight, bias, grad=torch.randn(3, 9, 6).permute(2, 0, 1), activation="tanh")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_nan_stays_in_its_row(ops, device, activation):
    """relu(NaN) is NaN too."""
    x, weight, bias = (a.to(device) for a in make(6, 2, None, 12, 9))
    clean = ops.expert_linear(x, weight, bias, None, activation, False)[0]
    x[2, 1, 4] = torch.nan
    hurt = ops.expert_linear(x, weight, bias, None, activation, False)[0]
    assert hurt[2, 1].isnan().all()
    hurt[2, 1] = clean[2, 1]
    assert torch.equal(hurt, clean)


def test_needs(ops, device):
    """Each gradient alone is the same as all together, and what is not asked for is empty."""
    x, weight, bias = (a.to(device) for a in make(9, 2, [1, 2], 20, 10))
    y = ops.expert_linear(x, weight, bias, [1, 2], "relu", True)[0]
    grad = torch.randn(y.shape, device=device)
    everything = ops.expert_linear_backward(grad, x, weight, y, [1, 2], "relu", 7)
    for needs in range(7):
        some = ops.expert_linear_backward(grad, x, weight, y, [1, 2], "relu", needs)
        for i, (one, other) in enumerate(zip(some, everything, strict=True)):
            assert torch.equal(one, other) if needs >> i & 1 else one.shape == (0,)


def test_tanh_is_accurate_near_zero(ops, device):
    """Relative accuracy: the gates' tanh must not lose its small values to 1 - exp."""
    x = torch.cat([torch.logspace(-6, 1, 60), -torch.logspace(-6, 1, 60), torch.tensor([0.0, 100, -100])])[:, None]
    one = torch.ones(1, 1, 1)
    y = ops.expert_linear(x.to(device), one.to(device), None, None, "tanh", False)[0][:, 0].cpu()
    torch.testing.assert_close(y.double(), torch.tanh(x.double()), rtol=1e-6, atol=0)


def test_a_dtype_without_kernel_is_named(ops, device):
    x, weight, bias = (a.to(device).double() for a in make(2, 2, None, 3, 4))
    with pytest.raises(ValueError, match="float64"):
        ops.expert_linear(x, weight, bias, None, "", False)
