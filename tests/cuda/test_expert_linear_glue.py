"""The torch glue of the CUDA expert_linear (shapes, strides, dtypes, empty tensors), run over the emulated device."""

import mmap

import pytest
import torch
from emulated import build
from torch import Tensor

from mtlkernels.reference.expert_linear import ACTIVATIONS
from mtlkernels.reference.expert_linear import expert_linear as reference
from tests.ops.cases import GRAD_LAYOUTS, LINEAR, TOLERANCE, Linear, close, layouts, over, random_grad

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NEEDS_INPUT = ("gelu", "silu")


@pytest.fixture(scope="module")
def ops():
    torch.ops.load_library(str(build("operators")))
    return torch.ops.mtlkernels_emulated


def op_counts(case: Linear) -> list[int] | None:
    return None if case.counts is None else list(case.counts)


def compare(ops, tensors, counts, activation: str, grad_of=random_grad, needs: int = 7, floor: float = 1e-2) -> None:
    """Output and gradients against the reference in float64, of the same rounded tensors."""
    x, weight, bias = tensors
    y, z = ops.expert_linear(x, weight, bias, counts, activation, True)
    grad = grad_of(y)
    saved = z if activation in NEEDS_INPUT else y
    found = ops.expert_linear_backward(grad, x, weight, saved, counts, activation, needs)
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    want = reference(*leaves, counts, activation)
    gradients = iter(torch.autograd.grad(want, [t for t in leaves if t is not None], grad.double()))
    assert y.is_contiguous() and y.dtype == x.dtype
    assert z.shape == (y.shape if activation in NEEDS_INPUT else (0,))
    close(y, want.detach(), what="y", floor=floor)
    for bit, (leaf, got, like) in enumerate(zip(leaves, found, (x, weight, weight), strict=True)):
        expected = None if leaf is None else next(gradients)
        assert got.dtype == like.dtype
        if not needs >> bit & 1:
            assert got.shape == (0,)
        elif leaf is not None:
            close(got, expected, TOLERANCE[x.dtype], f"gradient {bit}", floor)


@pytest.mark.parametrize("case", over(LINEAR))
def test_shapes(ops, case: Linear) -> None:
    for dtype, activation in ((F32, "relu"), (BF16, "gelu"), (F16, "")):
        compare(ops, case.tensors(dtype), op_counts(case), activation)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(ops, activation: str, dtype: torch.dtype) -> None:
    case = Linear(29, 5, 16, 24, (2, 0, 3))
    x, weight, bias = case.tensors(dtype)
    compare(ops, (x, weight, bias), op_counts(case), activation)
    compare(ops, (x, weight, None), op_counts(case), activation)


@pytest.mark.parametrize("needs", range(7))
def test_what_is_not_needed_comes_back_empty(ops, needs: int) -> None:
    case = Linear(29, 5, 16, 24, (2, 0, 3))
    compare(ops, case.tensors(BF16), op_counts(case), "relu", needs=needs)
    case = Linear(1100, 2, 3, 4)  # two slices of the batch
    compare(ops, case.tensors(F16), op_counts(case), "", needs=needs)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_float32_weights(ops, dtype: torch.dtype) -> None:
    """As under autocast: they are rounded to x's dtype on the way in, their gradients stay float32."""
    case = Linear(600, 3, 16, 24, (2, 1))  # two slices of the batch
    x, weight, bias = case.tensors(F32)
    for activation in ("", "silu"):
        compare(ops, (x.to(dtype), weight, bias), op_counts(case), activation)
        compare(ops, (x.to(dtype)[:50], weight, bias), op_counts(case), activation)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["x", "weight", "bias"])
@pytest.mark.parametrize("counts", [None, (2, 0, 1)], ids=["shared", "units"])
def test_layouts(ops, which: int, counts: tuple[int, ...] | None) -> None:
    case = Linear(14, 3, 8, 16, counts)
    tensors = case.tensors(F16)
    for other in layouts(tensors[which]).values():
        compare(ops, (*tensors[:which], other, *tensors[which + 1 :]), op_counts(case), "tanh")


@pytest.mark.parametrize("layout", GRAD_LAYOUTS)
def test_gradient_layouts(ops, layout: str) -> None:
    case = Linear(21, 3, 9, 10)
    compare(ops, case.tensors(F32), None, "relu", GRAD_LAYOUTS[layout])


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_half_precision_is_as_good_as_torch(ops, activation: str, dtype: torch.dtype) -> None:
    """Error against float64 at most twice that of plain torch in the same dtype, output and every gradient."""
    tensors = Linear(300, 2, 24, 96).tensors(dtype)
    leaves = [t.detach().requires_grad_() for t in tensors]
    doubles = [t.detach().double().requires_grad_() for t in tensors]

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ACTIVATIONS[activation](torch.nn.functional.linear(x, weight.flatten(0, 1), bias.flatten())).view(
            len(x), *bias.shape
        )

    theirs, exact = plain(*leaves), plain(*doubles)
    grad = random_grad(theirs)
    their_gradients = torch.autograd.grad(theirs, leaves, grad)
    gradients = torch.autograd.grad(exact, doubles, grad.double())
    y, z = ops.expert_linear(*tensors, None, activation, True)
    saved = z if activation in NEEDS_INPUT else y
    ours = ops.expert_linear_backward(grad, tensors[0], tensors[1], saved, None, activation, 7)
    for name, got, their, want in zip(
        ("y", "dx", "dweight", "dbias"), (y, *ours), (theirs, *their_gradients), (exact, *gradients), strict=True
    ):
        error, bound = ((t.detach().double() - want).norm() for t in (got, their))
        assert error <= 2 * bound, (name, error / bound)


def test_far_from_zero(ops) -> None:
    z = torch.tensor([0, 1e-30, 1e-4, 1, 5, 10, 17, 30, 80, 89, 104, 700, 2e4, torch.inf])
    x, weight = torch.cat([z, -z])[:, None], torch.ones(1, 1, 1)
    for activation in ACTIVATIONS:
        y, saved = ops.expert_linear(x, weight, None, None, activation, True)
        leaf = x.double().requires_grad_()
        want = reference(leaf, weight.double(), None, None, activation)
        torch.testing.assert_close(y, want.detach().float(), equal_nan=True)
        kept = saved if activation in NEEDS_INPUT else y
        dx, _, _ = ops.expert_linear_backward(torch.ones_like(y), x, weight, kept, None, activation, 1)
        (expected,) = torch.autograd.grad(want.sum(), leaf)
        finite = torch.isfinite(x)
        torch.testing.assert_close(dx[finite], expected[finite].float())


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_nan_stays_in_its_row(ops, activation: str, dtype: torch.dtype) -> None:
    case = Linear(70, 3, 12, 16, (2, 1))
    x, weight, bias = case.tensors(dtype)
    y, z = ops.expert_linear(x, weight, bias, [2, 1], activation, True)
    grad = random_grad(y)
    dirty = x.clone()
    dirty[3, 1, 5] = torch.nan
    y_dirty, z_dirty = ops.expert_linear(dirty, weight, bias, [2, 1], activation, True)
    assert y_dirty[3, 2].isnan().all()
    clean = torch.ones(70, 3, dtype=torch.bool)
    clean[3, 2] = False
    assert torch.equal(y_dirty[clean], y[clean])
    kept, kept_dirty = (z, z_dirty) if activation == "silu" else (y, y_dirty)
    grad_dirty = grad.clone()
    grad_dirty[3, 2] = torch.nan
    dx, _, _ = ops.expert_linear_backward(grad, x, weight, kept, [2, 1], activation, 1)
    found = ops.expert_linear_backward(grad_dirty, dirty, weight, kept_dirty, [2, 1], activation, 7)
    assert found[0][3, 1].isnan().all()
    clean = torch.ones(70, 2, dtype=torch.bool)
    clean[3, 1] = False
    assert torch.equal(found[0][clean], dx[clean])
    assert not found[1][:2].isnan().any() and not found[2][:2].isnan().any()


@pytest.mark.parametrize("dtype", [F32, F16])
def test_equal_rows_give_equal_bits(ops, dtype: torch.dtype) -> None:
    """In whatever tile and lane a batch row falls."""
    x, weight, bias = Linear(150, 2, 40, 37).tensors(dtype)
    x = x[:1].expand(150, -1)
    y, z = ops.expert_linear(x, weight, bias, None, "gelu", True)
    grad = random_grad(y)[:1].expand(y.shape)
    dx, _, _ = ops.expert_linear_backward(grad, x, weight, z, None, "gelu", 1)
    assert torch.equal(y, y[:1].expand_as(y)) and torch.equal(dx, dx[:1].expand_as(dx))


def test_offsets_beyond_31_bits(ops) -> None:
    """Three rows of x, the last one 2^31 elements away; the memory between them is never touched."""
    stride, no_reserve = 1 << 30, 0x4000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (2 * stride + 16), flags), dtype=F16)
    close_by, weight, bias = Linear(3, 2, 5, 16).tensors(F16)
    x = memory.as_strided((3, 16), (stride, 1)).copy_(close_by)
    y, _ = ops.expert_linear(x, weight, bias, None, "relu", False)
    assert torch.equal(y, ops.expert_linear(close_by, weight, bias, None, "relu", False)[0])
    grad = random_grad(y)
    _, found, _ = ops.expert_linear_backward(grad, x, weight, y, None, "relu", 2)
    _, wanted, _ = ops.expert_linear_backward(grad, close_by, weight, y, None, "relu", 2)
    assert torch.equal(found, wanted)


X, W = torch.zeros(3, 2, 4), torch.zeros(2, 5, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=X.double(), weight=W.double()), "x: .*float64"),
        (dict(x=X.half()[0, 0]), "x: "),
        (dict(x=X[..., :3]), "x: K = 4"),
        (dict(weight=W[0]), "weight: "),
        (dict(weight=W.half()), "weight: x's dtype"),
        (dict(bias=torch.zeros(3)), "bias: "),
        (dict(bias=torch.zeros(2, 5).half()), "bias: "),
        (dict(counts=[1, 2]), "experts_per_unit: .*sum"),
        (dict(counts=[2]), "experts_per_unit: 2 counts"),
        (dict(counts=[3, -1]), "experts_per_unit: .*negative"),
        (dict(x=X[:, 0], counts=[2]), "experts_per_unit: goes"),
        (dict(activation="swish"), "activation .*swish"),
    ],
)
def test_errors_name_the_argument(ops, change: dict, message: str) -> None:
    call = dict(x=X, weight=W, bias=None, counts=None, activation="", save=False) | change
    with pytest.raises((RuntimeError, ValueError), match=message):
        ops.expert_linear(*call.values())


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
    call = dict(grad=y, x=X, weight=W, saved=y, counts=None, activation="relu", needs=7) | change
    with pytest.raises(RuntimeError, match=message):
        ops.expert_linear_backward(*call.values())
