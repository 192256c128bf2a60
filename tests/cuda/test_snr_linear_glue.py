"""The torch glue of the CUDA snr_linear (shapes, strides, dtypes, empty tensors), run over the emulated device."""

import math
import mmap

import pytest
import torch
from emulated import build

from mtlkernels.reference.expert_linear import ACTIVATIONS, NEED_INPUT
from mtlkernels.reference.snr_linear import snr_linear as reference
from tests.ops.cases import GRAD_LAYOUTS, TOLERANCE, close, layouts, over, random_grad
from tests.ops.test_snr_linear import CASES, ODD, Snr

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
each_skip = pytest.mark.parametrize("skip", [False, True], ids=["all", "skip closed"])
# Of the batch two or more slices, and more than one tile either way.
SLICED = Snr(1100, 2, 3, 70, 20)


@pytest.fixture(scope="module")
def ops():
    torch.ops.load_library(str(build("operators")))
    return torch.ops.mtlkernels_emulated


def compare(ops, tensors, activation: str, skip: bool, grad_of=random_grad, needs: int = 15):
    """Output and gradients against the reference in float64, of the same rounded tensors; returns them."""
    x, weight, gate, bias = tensors
    y, z = ops.snr_linear(x, weight, gate, bias, activation, skip, True)
    grad = grad_of(y)
    saved = z if activation in NEED_INPUT else y
    found = ops.snr_linear_backward(grad, x, weight, gate, saved, activation, skip, needs)
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    want = reference(*leaves, activation, skip)
    asked = [t for t in leaves if t is not None]
    gradients = iter(torch.autograd.grad(want, asked, grad.double(), allow_unused=True, materialize_grads=True))
    assert y.is_contiguous() and y.dtype == x.dtype
    assert z.shape == (y.shape if activation in NEED_INPUT else (0,))
    close(y, want.detach(), what="y")
    for bit, (leaf, got, like) in enumerate(zip(leaves, found, (x, weight, gate, weight), strict=True)):
        expected = None if leaf is None else next(gradients)
        assert got.dtype == like.dtype
        if not needs >> bit & 1:
            assert got.shape == (0,)
        elif leaf is not None:
            close(got, expected, TOLERANCE[x.dtype], f"gradient {bit}")
    if skip and needs & 2:
        assert (found[1][gate == 0] == 0).all()
    if skip and needs & 4:
        assert (found[2][gate == 0] == 0).all()
    return y, found


@each_skip
@pytest.mark.parametrize("case", over(CASES))
def test_shapes(ops, case: Snr, skip: bool) -> None:
    for dtype, activation in ((F32, "relu"), (BF16, "gelu"), (F16, "")):
        compare(ops, case.tensors(dtype), activation, skip)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(ops, activation: str, dtype: torch.dtype) -> None:
    x, weight, gate, bias = ODD.tensors(dtype)
    compare(ops, [x, weight, gate, bias], activation, True)
    compare(ops, [x, weight, gate, None], activation, False)


@pytest.mark.parametrize("dtype", [F32, BF16])
@each_skip
def test_slices_of_the_batch(ops, skip: bool, dtype: torch.dtype) -> None:
    compare(ops, SLICED.tensors(dtype), "silu", skip)


@pytest.mark.parametrize("needs", range(15))
def test_what_is_not_needed_comes_back_empty(ops, needs: int) -> None:
    compare(ops, ODD.tensors(BF16), "relu", True, needs=needs)
    tensors = Snr(1100, 2, 2, 3, 4).tensors(F16)  # two slices of the batch
    compare(ops, tensors, "", True, needs=needs)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_float32_weights_and_gates(ops, dtype: torch.dtype) -> None:
    """As under autocast: weights are rounded to x's dtype for the products, all gradients of parameters are float32."""
    for case in (Snr(600, 2, 3, 16, 24), ODD):  # the first has two slices of the batch
        x, weight, gate, bias = case.tensors(F32)
        for activation in ("", "silu"):
            compare(ops, [x.to(dtype), weight, gate, bias], activation, True)
    x, weight, gate, bias = ODD.tensors(dtype, F32)
    compare(ops, [x, weight, gate, bias], "tanh", True)


@pytest.mark.parametrize("which", range(4), ids=["x", "weight", "gate", "bias"])
def test_layouts(ops, which: int) -> None:
    tensors = Snr(14, 3, 4, 9, 10).tensors(F16)
    for other in layouts(tensors[which]).values():
        compare(ops, [*tensors[:which], other, *tensors[which + 1 :]], "tanh", True)


@pytest.mark.parametrize("layout", GRAD_LAYOUTS)
def test_gradient_layouts(ops, layout: str) -> None:
    compare(ops, ODD.tensors(F32), "relu", True, GRAD_LAYOUTS[layout])


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_a_closed_connection_is_not_read(ops, dtype: torch.dtype) -> None:
    """NaN in the weight of a closed connection, or in the input that only closed ones read, does not matter."""
    x, weight, gate, bias = ODD.tensors(dtype)
    gate[0, 2], gate[:, 4], gate[1] = 0, 0, 0
    y, gradients = compare(ops, [x, weight, gate, bias], "silu", True)
    hurt = [x.clone(), weight.clone(), torch.where(gate == 0, -0.0, gate), bias]
    hurt[0][:, 4], hurt[1][gate == 0] = math.nan, math.inf
    found, theirs = compare(ops, hurt, "silu", True)
    for got, want in zip((found, *theirs), (y, *gradients), strict=True):
        assert torch.equal(got, want)
    assert ops.snr_linear(*hurt, "", False, False)[0].isnan().any()


def test_a_gate_that_is_nan_is_not_closed(ops) -> None:
    x, weight, gate, bias = ODD.tensors(BF16)
    gate[1, 0] = math.nan
    y, _ = ops.snr_linear(x, weight, gate, bias, "", True, False)
    assert y[:, 1].isnan().all() and not y[:, [0, 2]].isnan().any()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_nan_stays_in_its_row(ops, activation: str, dtype: torch.dtype) -> None:
    x, weight, gate, bias = Snr(70, 3, 4, 19, 21, 0).tensors(dtype)
    y, z = ops.snr_linear(x, weight, gate, bias, activation, True, True)
    hurt = x.clone()
    hurt[7, 1, 3] = math.nan
    y_hurt, z_hurt = ops.snr_linear(hurt, weight, gate, bias, activation, True, True)
    rows = [b for b in range(70) if b != 7]
    assert y_hurt[7].isnan().all() and torch.equal(y_hurt[rows], y[rows])
    grad = random_grad(y)
    kept, kept_hurt = (z, z_hurt) if activation in NEED_INPUT else (y, y_hurt)
    dx = ops.snr_linear_backward(grad, x, weight, gate, kept, activation, True, 1)[0]
    grad_hurt = grad.clone()
    grad_hurt[7] = math.nan
    dx_hurt = ops.snr_linear_backward(grad_hurt, hurt, weight, gate, kept_hurt, activation, True, 1)[0]
    assert dx_hurt[7].isnan().all() and torch.equal(dx_hurt[rows], dx[rows])


@pytest.mark.parametrize("dtype", [F32, F16])
def test_equal_rows_give_equal_bits(ops, dtype: torch.dtype) -> None:
    """In whatever tile and lane a batch row falls."""
    x, weight, gate, bias = Snr(150, 2, 3, 37, 40).tensors(dtype)
    x = x[:1].expand(150, -1, -1)
    y, z = ops.snr_linear(x, weight, gate, bias, "gelu", True, True)
    grad = random_grad(y)[:1].expand(y.shape)
    dx, *_ = ops.snr_linear_backward(grad, x, weight, gate, z, "gelu", True, 1)
    assert torch.equal(y, y[:1].expand_as(y)) and torch.equal(dx, dx[:1].expand_as(dx))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_half_precision_is_as_good_as_torch(ops, dtype: torch.dtype) -> None:
    """Error against float64 at most twice that of the plain formula in the same dtype, output and every gradient."""
    tensors = Snr(200, 3, 4, 24, 48).tensors(dtype)

    def plain(x, weight, gate, bias):
        gated = torch.einsum("ij,bjk,ijnk->bin", gate, x, weight)
        return torch.tanh(gated + bias)

    def gradients_of(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        out = plain(*leaves)
        return out, *torch.autograd.grad(out, leaves, random_grad(out.to(tensors[0].dtype)).to(dtype))

    theirs, exact = gradients_of(dtype), gradients_of(torch.float64)
    y, _ = ops.snr_linear(*tensors, "tanh", True, True)
    ours = y, *ops.snr_linear_backward(random_grad(y), *tensors[:3], y, "tanh", False, 15)
    for name, got, their, want in zip(("y", "dx", "dweight", "dgate", "dbias"), ours, theirs, exact, strict=True):
        error, bound = ((t.detach().double() - want).norm() for t in (got, their))
        assert error <= 2 * bound, (name, error / bound)


def test_offsets_beyond_31_bits(ops) -> None:
    """Three rows of x, the last one 2^31 elements away; the memory between them is never touched."""
    stride, no_reserve = 1 << 30, 0x4000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (2 * stride + 32), flags), dtype=F16)
    close_by, weight, gate, bias = Snr(3, 2, 2, 5, 16).tensors(F16)
    x = memory.as_strided((3, 2, 16), (stride, 16, 1)).copy_(close_by)
    y, _ = ops.snr_linear(x, weight, gate, bias, "relu", True, False)
    assert torch.equal(y, ops.snr_linear(close_by, weight, gate, bias, "relu", True, False)[0])
    grad = random_grad(y)
    found, wanted = (ops.snr_linear_backward(grad, t, weight, gate, y, "relu", True, 6) for t in (x, close_by))
    for got, want in zip(found, wanted, strict=True):
        assert torch.equal(got, want)


X, W, G = torch.zeros(3, 2, 4), torch.zeros(2, 2, 5, 4), torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=X.double(), weight=W.double()), "x: .*float64"),
        (dict(x=X[0]), "x: "),
        (dict(x=X[..., :3]), r"x: \[B,J,K\] = \[B, 2, 4\]"),
        (dict(x=X[:, :1]), r"x: \[B,J,K\]"),
        (dict(weight=W[0]), "weight: "),
        (dict(weight=W.half()), "weight: x's dtype"),
        (dict(gate=G[0]), r"gate: \[I,J\] = \[2, 2\]"),
        (dict(gate=G[:1]), r"gate: \[I,J\]"),
        (dict(gate=G.int()), "gate: "),
        (dict(bias=torch.zeros(3)), "bias: "),
        (dict(bias=torch.zeros(2, 5).half()), "bias: "),
        (dict(activation="swish"), "activation .*swish"),
    ],
)
def test_errors_name_the_argument(ops, change: dict, message: str) -> None:
    call = dict(x=X, weight=W, gate=G, bias=None, activation="", skip_closed=False, save=False) | change
    with pytest.raises((RuntimeError, ValueError), match=message):
        ops.snr_linear(*call.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(grad=torch.zeros(3, 2, 4)), "grad: "),
        (dict(grad=torch.zeros(3, 2, 5).half()), "grad: "),
        (dict(saved=torch.zeros(0)), "saved: "),
    ],
)
def test_backward_errors_name_the_argument(ops, change: dict, message: str) -> None:
    y = torch.zeros(3, 2, 5)
    call = dict(grad=y, x=X, weight=W, gate=G, saved=y, activation="relu", skip_closed=True, needs=15) | change
    with pytest.raises(RuntimeError, match=message):
        ops.snr_linear_backward(*call.values())


def test_two_runs_agree_bit_for_bit(ops) -> None:
    tensors = SLICED.tensors(F16)
    for skip in (False, True):
        y, _ = ops.snr_linear(*tensors, "", skip, False)
        found = [ops.snr_linear_backward(random_grad(y), *tensors[:3], y, "", skip, 15) for _ in range(2)]
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)
