"""The Triton snr_linear against the reference in float64: values, every gradient, and what must not be read."""

import pytest
import torch

pytest.importorskip("triton")

from mtlkernels.reference.snr_linear import snr_linear as plain

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter: overflow in exp

ACTIVATIONS = ["", "relu", "gelu", "silu", "tanh", "sigmoid"]


@pytest.fixture
def ops(device, monkeypatch):
    """The launchers, with every fresh buffer full of NaN."""
    from mtlkernels.triton import snr_linear

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: torch.zeros(*args, **kwargs).fill_(torch.nan))
    return snr_linear


def make(batch, outputs, inputs, width, features, closed=0.4):
    """x, weight, gate, bias; gates rounded to 16 bit."""
    gen = torch.Generator().manual_seed(batch + 7 * features + 31 * width)
    shapes = (batch, inputs, features), (outputs, inputs, width, features), (outputs, inputs), (outputs, width)
    x, weight, gate, bias = (torch.randn(s, generator=gen) for s in shapes)
    gate[torch.rand(gate.shape, generator=gen) < closed] = 0
    return [x, weight / max(inputs * features, 1) ** 0.5, gate.bfloat16().half().float(), bias]


def close(found, expected, tolerance):
    scale = expected.abs().max().item() if expected.numel() else 0
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * max(scale, 1e-3))


def check(ops, device, tensors, activation="", skip=True, grad=None, tolerance=1e-5):
    """Forward and gradients of the launchers. Tolerances are of the largest element; inputs count as given."""
    x, weight, gate, bias = (None if t is None else t.to(device) for t in tensors)
    # A float32 weight is rounded to x's dtype before the product.
    wide = [x.double(), weight.to(x.dtype).double(), gate.double(), None if bias is None else bias.double()]
    leaves = [t.requires_grad_() for t in wide if t is not None]
    y = plain(*wide, activation, skip)
    found, z = ops.snr_linear(x, weight, gate, bias, activation, skip, True)
    keeps = activation in ("gelu", "silu")
    assert found.shape == y.shape and found.dtype == x.dtype and z.shape == (y.shape if keeps else (0,))
    close(found, y.detach(), tolerance)
    grad = torch.randn(y.shape, device=device).to(x.dtype) if grad is None else grad.to(device, x.dtype)
    expected = torch.autograd.grad(y, leaves, grad.double(), allow_unused=True)
    saved, needs = z if keeps else found, 7 if bias is None else 15
    gradients = ops.snr_linear_backward(grad, x, weight, gate, saved, activation, skip, needs)
    for got, want, leaf, like in zip(gradients, expected, leaves, (x, weight, gate, weight), strict=False):
        assert got.shape == leaf.shape and got.dtype == like.dtype
        close(got, torch.zeros_like(leaf) if want is None else want, 4 * tolerance)
    assert bias is not None or gradients[3].shape == (0,)
    if skip:
        assert (gradients[1][gate == 0] == 0).all() and (gradients[2][gate == 0] == 0).all()
    return found, gradients


CASES = [  # B, I, J, N, K
    (1, 1, 1, 1, 1),
    (5, 3, 2, 7, 20),
    (7, 2, 4, 35, 11),
    (0, 2, 3, 4, 5),
    (3, 0, 3, 4, 5),
    (3, 2, 0, 4, 5),
    (3, 2, 3, 0, 5),
    (3, 2, 3, 4, 0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("skip", [False, True], ids=["all", "skip closed"])
def test_shapes(ops, device, case, skip):
    x, weight, gate, bias = make(*case)
    check(ops, device, [x, weight, gate, bias], "gelu", skip)
    check(ops, device, [x, weight, gate, None], "", skip)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(ops, device, activation):
    x, weight, gate, bias = make(9, 2, 3, 10, 20)
    check(ops, device, [x, weight, gate, bias], activation)
    check(ops, device, [30 * x, weight, gate, bias], activation)


def test_more_than_one_tile(ops, device, monkeypatch):
    """Every size crosses a tile, and the batch is cut for the parameters' gradients: 77 rows, the last chunk short."""
    monkeypatch.setattr(ops, "_MIN_ROWS", 20)
    check(ops, device, make(77, 2, 2, 70, 70), "tanh")


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16])
def test_float16(ops, device, weight_dtype):
    x, weight, gate, bias = make(130, 2, 3, 24, 40)
    tensors = [x.half(), weight.to(weight_dtype), gate.to(weight_dtype), bias.to(weight_dtype)]
    check(ops, device, tensors, "silu", tolerance=2e-3)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16(ops, device, weight_dtype):
    x, weight, gate, bias = make(33, 2, 3, 24, 40)
    tensors = [x.bfloat16(), weight.to(weight_dtype), gate, bias.to(weight_dtype)]
    check(ops, device, tensors, "relu", tolerance=1.6e-2)


def test_layouts(ops, device):
    x, weight, gate, bias = make(6, 2, 3, 9, 12)
    check(ops, device, [x.transpose(0, 1).contiguous().transpose(0, 1), weight, gate, bias], "relu")
    check(ops, device, [x.mT.contiguous().mT, weight.mT.contiguous().mT, gate.T.contiguous().T, bias], "relu")
    check(ops, device, [x[:, :1].expand(-1, 3, -1), weight, gate, bias[:1].expand(2, -1)], "gelu")
    check(ops, device, [x, weight, gate, bias], grad=torch.tensor(2.0).expand(6, 2, 9))
    check(ops, device, [x, weight, gate, bias], "tanh", grad=torch.randn(2, 9, 6).permute(2, 0, 1))


def test_a_closed_connection_is_not_read(ops, device):
    """NaN in a closed connection's weight, or in the input that only closed ones read, does not matter."""
    x, weight, gate, bias = make(6, 3, 3, 9, 12)
    gate[0, 1], gate[:, 2] = 0, 0
    clean, gradients = check(ops, device, [x, weight, gate, bias], "silu")
    x[:, 2], weight[gate == 0] = torch.nan, torch.nan
    hurt = [t.to(device) for t in (x, weight, gate, bias)]
    y, z = ops.snr_linear(*hurt, "silu", True, True)
    assert torch.equal(y, clean)
    grad = torch.ones_like(y)
    found = ops.snr_linear_backward(grad, *hurt[:3], z, "silu", True, 15)
    assert not any(g.isnan().any() for g in found)
    assert ops.snr_linear(*hurt, "silu", False, False)[0].isnan().any()
    hurt[2][1, 0] = torch.nan  # a gate that is NaN is not closed
    y, _ = ops.snr_linear(*hurt, "", True, False)
    assert y[:, 1].isnan().all() and not y[:, [0, 2]].isnan().any()


def test_closed_gates_leave_the_bias(ops, device):
    x, weight, gate, bias = (t.to(device) for t in make(6, 2, 3, 9, 12))
    for skip in (False, True):
        y, _ = ops.snr_linear(x, weight, torch.zeros_like(gate), bias, "relu", skip, False)
        assert torch.equal(y, bias.relu().expand_as(y))


def test_a_nan_stays_in_its_row(ops, device):
    x, weight, gate, bias = (t.to(device) for t in make(6, 2, 3, 9, 12, closed=0))
    clean = ops.snr_linear(x, weight, gate, bias, "relu", True, False)[0]
    x[2, 1, 4] = torch.nan
    hurt = ops.snr_linear(x, weight, gate, bias, "relu", True, False)[0]
    assert hurt[2].isnan().all()
    hurt[2] = clean[2]
    assert torch.equal(hurt, clean)


def test_needs(ops, device):
    """Each gradient alone is the same as all together, and what is not asked for is empty."""
    x, weight, gate, bias = (t.to(device) for t in make(9, 2, 3, 10, 20))
    y = ops.snr_linear(x, weight, gate, bias, "relu", True, True)[0]
    grad = torch.randn(y.shape, device=device)
    everything = ops.snr_linear_backward(grad, x, weight, gate, y, "relu", True, 15)
    for needs in range(15):
        some = ops.snr_linear_backward(grad, x, weight, gate, y, "relu", True, needs)
        for i, (one, other) in enumerate(zip(some, everything, strict=True)):
            assert torch.equal(one, other) if needs >> i & 1 else one.shape == (0,)


def test_a_dtype_without_kernel_is_named(ops, device):
    x, weight, gate, bias = (t.to(device).double() for t in make(2, 2, 2, 3, 4))
    with pytest.raises(ValueError, match="float64"):
        ops.snr_linear(x, weight, gate, bias, "", False, False)
