"""The torch glue of the CUDA star_linear (sort, strides, dtypes, empty tensors), run over the emulated device."""

import itertools
import mmap

import pytest
import torch
from emulated import build
from torch import Tensor

from mtlkernels.reference.expert_linear import ACTIVATIONS
from mtlkernels.reference.star_linear import star_linear as reference
from tests.ops.cases import GRAD_LAYOUTS, TOLERANCE, close, layouts, over, random_grad
from tests.ops.test_star_linear import CASES, MIDDLE, Star, loop_over_domains

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NEEDS_INPUT = ("gelu", "silu")
BIG = {"over a tile": Star(70, 3, 35, 34)} | {n: c for n, c in CASES.items() if c.batch * c.outputs * c.features < 4e4}


@pytest.fixture(scope="module")
def ops():
    torch.ops.load_library(str(build("operators")))
    return torch.ops.mtlkernels_emulated


def both(ops, ids: Tensor, tensors, activation: str, grad: Tensor | None = None, needs: int = 31):
    """y, what backward gets, and the gradients."""
    x, weight, own, bias, own_bias = tensors
    y, z = ops.star_linear(x, ids, weight, own, bias, own_bias, activation, True)
    assert y.is_contiguous() and z.shape == (y.shape if activation in NEEDS_INPUT else (0,))
    saved = z if activation in NEEDS_INPUT else y
    grad = random_grad(y) if grad is None else grad
    return y, saved, ops.star_linear_backward(grad, x, ids, weight, own, saved, activation, needs)


def compare(ops, ids: Tensor, tensors, activation: str, grad: Tensor | None = None, needs: int = 31) -> None:
    """Output and gradients against the reference in float64, of the same rounded tensors."""
    x, weight = tensors[:2]
    y, _, found = both(ops, ids, tensors, activation, grad, needs)
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    want = reference(leaves[0], ids, *leaves[1:], activation)
    grad = random_grad(y) if grad is None else grad
    gradients = iter(torch.autograd.grad(want, [t for t in leaves if t is not None], grad.double()))
    assert y.dtype == x.dtype
    close(y, want.detach(), what="y", floor=0.1)
    for bit, (leaf, got) in enumerate(zip(leaves, found, strict=True)):
        expected = None if leaf is None else next(gradients)
        assert got.dtype == (weight.dtype if bit else x.dtype)
        if not needs >> bit & 1:
            assert got.shape == (0,)
        elif leaf is not None:
            close(got, expected, TOLERANCE[x.dtype], f"gradient {bit}", 0.1)


@pytest.mark.parametrize("case", over(BIG))
def test_shapes(ops, case: Star) -> None:
    for dtype, activation in ((F32, "relu"), (BF16, "gelu"), (F16, "")):
        compare(ops, case.domain, case.tensors(dtype), activation)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_biases(ops, activation: str, dtype: torch.dtype) -> None:
    case = Star(29, 4, 16, 24)
    *rest, bias, own_bias = case.tensors(dtype)
    for one, other in itertools.product((bias, None), (own_bias, None)):
        compare(ops, case.domain, (*rest, one, other), activation)


@pytest.mark.parametrize("needs", range(31))
def test_what_is_not_needed_comes_back_empty(ops, needs: int) -> None:
    case = Star(29, 4, 16, 24)
    compare(ops, case.domain, case.tensors(BF16), "relu", needs=needs)


@pytest.mark.parametrize("ids", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_rows_of_no_domain(ops, ids: torch.dtype) -> None:
    """Of every integer type, sorted or not; NaN, and no part in any gradient."""
    case = Star(70, 3, 9, 16)
    domain = case.domain.to(ids)
    domain[5], domain[11], domain[69] = 3, torch.iinfo(ids).max, torch.iinfo(ids).min or 200
    for tensors in (case.tensors(F32), case.tensors(F16)):
        compare(ops, domain, tensors, "tanh")
        compare(ops, domain.sort().values, tensors, "gelu")
        y, _, (dx, *_) = both(ops, domain, tensors, "relu")
        bad = torch.tensor([5, 11, 69])
        assert y[bad].isnan().all() and (dx[bad] == 0).all() and y.isnan().sum() == y[bad].numel()
    compare(ops, torch.stack([domain, domain], 1)[:, 1], case.tensors(F32), "")
    compare(ops, torch.full_like(domain, 3), case.tensors(F32), "relu")


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_float32_weights(ops, dtype: torch.dtype) -> None:
    """As under autocast: their product is rounded to x's dtype on the way in, their gradients stay float32."""
    for case in (Star(150, 3, 18, 24), Star(40, 2, 7, 5)):
        x, *parameters = case.tensors(F32)
        for activation in ("", "silu"):
            compare(ops, case.domain, (x.to(dtype), *parameters), activation)


def test_the_product_is_rounded_once(ops) -> None:
    """Of float32 weights beside 16-bit x: rounded first, the factors would give another number."""
    weight, own = torch.tensor([[1 + 2.0**-8 + 2.0**-12]]), torch.tensor([[[1 - 2.0**-10]]])
    y, _ = ops.star_linear(torch.ones(1, 1, dtype=BF16), torch.zeros(1).long(), weight, own, None, None, "", False)
    assert y.item() == 1 and (weight.bfloat16() * own.bfloat16()).item() != 1


@pytest.mark.parametrize("which", range(5), ids=["x", "weight", "domain_weight", "bias", "domain_bias"])
def test_layouts(ops, which: int) -> None:
    case = Star(14, 3, 8, 16)
    tensors = case.tensors(F16)
    for other in layouts(tensors[which]).values():
        compare(ops, case.domain, (*tensors[:which], other, *tensors[which + 1 :]), "tanh")


@pytest.mark.parametrize("layout", GRAD_LAYOUTS)
def test_gradient_layouts(ops, layout: str) -> None:
    case = Star(21, 3, 9, 10)
    compare(ops, case.domain, case.tensors(F32), "relu", GRAD_LAYOUTS[layout](torch.zeros(21, 9)))


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_half_precision_is_as_good_as_torch(ops, activation: str, dtype: torch.dtype) -> None:
    """Error against float64 at most twice that of plain torch in the same dtype, output and every gradient."""
    tensors = MIDDLE.tensors(dtype)
    leaves = [t.detach().requires_grad_() for t in tensors]
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    theirs, exact = (loop_over_domains(MIDDLE.domain, *ts, activation) for ts in (leaves, doubles))
    y, _, ours = both(ops, MIDDLE.domain, tensors, activation)
    grad = random_grad(y)
    their_gradients = torch.autograd.grad(theirs, leaves, grad)
    gradients = torch.autograd.grad(exact, doubles, grad.double())
    for name, got, their, want in zip(
        ("y", "dx", "dweight", "down_weight", "dbias", "down_bias"),
        (y, *ours), (theirs, *their_gradients), (exact, *gradients), strict=True,
    ):  # fmt: skip
        error, bound = ((t.detach().double() - want).norm() for t in (got, their))
        assert error <= 2 * bound, (name, error / bound)


@pytest.mark.parametrize("dtype", [F32, F16])
def test_rows_in_another_order_give_the_same_bits(ops, dtype: torch.dtype) -> None:
    """In whatever tile, lane and batch a row falls."""
    case = Star(150, 3, 21, 37)
    x, *parameters = case.tensors(dtype)
    ids = case.domain
    y, _, (dx, *_) = both(ops, ids, (x, *parameters), "gelu")
    grad = random_grad(y)
    for order in (torch.randperm(150), torch.argsort(ids), torch.argsort(-ids), torch.tensor([7])):
        found, _, (dx_found, *_) = both(ops, ids[order], (x[order], *parameters), "gelu", grad[order])
        assert torch.equal(found, y[order]) and torch.equal(dx_found, dx[order])


def test_offsets_beyond_31_bits(ops) -> None:
    """Three rows of x, the last one 2^31 elements away; the memory between them is never touched."""
    stride, no_reserve = 1 << 30, 0x4000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (2 * stride + 16), flags), dtype=F16)
    ids = torch.tensor([1, 0, 1])
    close_by, *parameters = Star(3, 2, 5, 16).tensors(F16)
    x = memory.as_strided((3, 16), (stride, 1)).copy_(close_by)
    for found, wanted in zip(
        both(ops, ids, (x, *parameters), "relu"), both(ops, ids, (close_by, *parameters), "relu"), strict=True
    ):
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b)


X, IDS, W, V = torch.zeros(3, 4), torch.zeros(3, dtype=torch.long), torch.zeros(5, 4), torch.zeros(2, 5, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=X.double(), weight=W.double(), own=V.double()), "x: .*float64"),
        (dict(x=X[0]), "x: "),
        (dict(x=X[:, :3]), "weight: .*K = 3"),
        (dict(weight=W[0]), "weight: "),
        (dict(weight=W.half(), own=V.half()), "weight: x's dtype"),
        (dict(own=V.half()), "domain_weight: weight's dtype"),
        (dict(own=V[:, :4]), "domain_weight: .*5,4"),
        (dict(own=V[:0]), "domain_weight: .*P > 0"),
        (dict(domain=IDS[:2]), "domain: .*3"),
        (dict(domain=IDS.float()), "domain: an integer type"),
        (dict(domain=IDS.bool()), "domain: an integer type"),
        (dict(bias=torch.zeros(3)), "bias: "),
        (dict(bias=torch.zeros(5).half()), "bias: "),
        (dict(own_bias=torch.zeros(5)), "domain_bias: "),
        (dict(activation="swish"), "activation .*swish"),
    ],
)
def test_errors_name_the_argument(ops, change: dict, message: str) -> None:
    call = dict(x=X, domain=IDS, weight=W, own=V, bias=None, own_bias=None, activation="", save=False)
    ops.star_linear(*call.values())
    with pytest.raises((RuntimeError, ValueError), match=message):
        ops.star_linear(*(call | change).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(grad=torch.zeros(3, 4)), "grad: "),
        (dict(grad=torch.zeros(3, 5).half()), "grad: "),
        (dict(saved=torch.zeros(0)), "saved: "),
    ],
)
def test_backward_errors_name_the_argument(ops, change: dict, message: str) -> None:
    y = torch.zeros(3, 5)
    call = dict(grad=y, x=X, domain=IDS, weight=W, own=V, saved=y, activation="relu", needs=31)
    ops.star_linear_backward(*call.values())
    with pytest.raises(RuntimeError, match=message):
        ops.star_linear_backward(*(call | change).values())
