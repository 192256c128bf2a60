"""The torch glue of the CUDA expert_mix (shapes, strides, dtypes, backward, errors), run over the emulated device."""

import itertools
import math
import mmap
from collections.abc import Callable

import pytest
import torch
from emulated import build
from torch import Tensor

import mtlkernels as mtl
from tests.ops.cases import GRAD_LAYOUTS, Linear, Outcome, agree, close, layouts, make_mix, over, random_grad, same_bits
from tests.ops.test_expert_mix import ACTIVATIONS, FORMS, ODD, UNITS, Fused, make, wanted_of

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
each_dtype = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=lambda d: str(d).removeprefix("torch."))
TASKS = make_mix("both masked", 300, 9, 4, 6)


@pytest.fixture(scope="module")
def ops():
    torch.ops.load_library(str(build("operators")))
    return torch.ops.mtlkernels_emulated


def results(ops, case: Fused, tensors, activation, grad_of: Callable = random_grad, needs: int = 31) -> Outcome:
    """Forward, and the gradients of the tensors that are there and that `needs` asks for."""
    args = case.op_args(tensors, activation or "")
    out, lse = ops.expert_mix(*args)
    assert out.is_contiguous() and out.dtype == tensors[0].dtype and lse.dtype == F32
    assert lse.shape == ((0,) if tensors[3] is None else out.shape[:2])
    found = ops.expert_mix_backward(grad_of(out), None, *args, lse, needs)
    grads = []
    for i, (got, tensor) in enumerate(zip(found, tensors, strict=True)):
        wanted = tensor is not None and needs >> i & 1
        assert wanted or got.shape == (0,) and got.dtype == tensors[1 if i in (1, 2) else 0].dtype
        grads.append(got if wanted else None)
    return Outcome(out, grads)


def compare(ops, case: Fused, tensors, activation=None, grad_of: Callable = random_grad) -> None:
    """Against mix(expert_linear) in float64, of the same rounded tensors."""
    wanted = wanted_of(case, tensors, grad_of, activation=activation)
    agree(results(ops, case, tensors, activation, grad_of), wanted, tensors)


@each_dtype
@pytest.mark.parametrize("form", FORMS)
def test_forms(ops, form: str, dtype: torch.dtype) -> None:
    compare(ops, ODD[form], ODD[form].tensors(dtype), "relu")
    compare(ops, ODD[form], ODD[form].tensors(dtype, F32), "gelu")


SHAPES = ["one", "over a block", "unequal", "a unit each", "many rows", "no rows", "no rows of units", "no experts",
          "no units", "no outputs", "no features", "no tasks"]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(ops, shape: str) -> None:
    for form, dtype in (("both", F32), ("logits masked", BF16), ("static packed", F16)):
        case = make(form, shape)
        compare(ops, case, case.tensors(dtype), "silu")


@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(ops, activation: str | None, dtype: torch.dtype) -> None:
    tensors = UNITS.tensors(dtype)
    compare(ops, UNITS, tensors, activation)
    compare(ops, UNITS, [*tensors[:2], None, *tensors[3:]], activation)


@each_dtype
def test_more_tasks_than_one_kernel_serves(ops, dtype: torch.dtype) -> None:
    """Slabs of rows, the last one shorter."""
    case = Fused(Linear(300, 4, 6, 5, (3, 1)), TASKS)
    compare(ops, case, case.tensors(dtype), "relu")


def test_more_units_than_one_kernel_serves(ops) -> None:
    case = Fused(Linear(3, 258, 2, 3, (2, *(1,) * 256)), make_mix("static packed", 3, 2, 258, 2))
    compare(ops, case, case.tensors(F16), "tanh")


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_float32_weights(ops, dtype: torch.dtype) -> None:
    """As under autocast: they are rounded to x's dtype on the way in, their gradients stay float32."""
    for case in (UNITS, Fused(Linear(300, 4, 6, 5, (3, 1)), TASKS)):
        x, *rest = case.tensors(F32)
        found = results(ops, case, [x.to(dtype), *rest], "gelu")
        wanted = wanted_of(case, [x.to(dtype), *rest], lambda out: random_grad(out.to(dtype)), activation="gelu")
        assert found.out.dtype == dtype and all(g.dtype == F32 for g in found.grads[1:])
        for got, want in zip((found.out, *found.grads), (wanted.out, *wanted.grads), strict=True):
            close(got, want, 2e-2 if dtype == BF16 else 4e-3)


@pytest.mark.parametrize("which", range(5), ids=["x", "weight", "bias", "logits", "static"])
def test_layouts(ops, which: int) -> None:
    for dtype in (F32, F16):
        tensors = UNITS.tensors(dtype)
        for other in layouts(tensors[which]).values():
            compare(ops, UNITS, [*tensors[:which], other, *tensors[which + 1 :]], "tanh")


@pytest.mark.parametrize("grad_of", over(GRAD_LAYOUTS))
def test_gradient_layouts(ops, grad_of: Callable[[Tensor], Tensor]) -> None:
    compare(ops, UNITS, UNITS.tensors(BF16), "silu", grad_of)


def test_each_gradient_alone(ops) -> None:
    tensors = UNITS.tensors(BF16)
    every = results(ops, UNITS, tensors, "gelu")
    for needs in range(31):
        same_bits(results(ops, UNITS, tensors, "gelu", needs=needs), every)


def test_outputs_share_no_memory(ops) -> None:
    args = UNITS.op_args(UNITS.tensors(F32), "relu")
    out, lse = ops.expert_mix(*args)
    for needs in (0, 8, 31):
        found = ops.expert_mix_backward(random_grad(out), None, *args, lse, needs)
        assert len({id(g) for g in found}) == 5
        filled = [g.data_ptr() for g in (out, lse, *found) if g.numel()]
        assert len(set(filled)) == len(filled)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_rounded_once(ops, dtype: torch.dtype) -> None:
    """The experts' outputs stay in float32: the result is as far from the exact one as its own rounding."""
    unit = torch.finfo(dtype).eps / 2
    for form, activation in itertools.product(("both", "logits masked", "static"), ("relu", "gelu")):
        case = make(form, "over a block")
        tensors = case.tensors(dtype, F32)
        exact = wanted_of(case, tensors, activation=activation).out
        error = (ops.expert_mix(*case.op_args(tensors, activation))[0].double() - exact).abs()
        assert (error <= unit * exact.abs() * 1.001 + 4e-6 * exact.abs().max()).all()


@each_dtype
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "sigmoid"])
def test_an_expert_that_no_row_uses_does_not_matter(ops, activation: str | None, dtype: torch.dtype) -> None:
    """Whatever stands in it or in x: the other results are the same bits, its gradients zero."""
    case = make("both masked", "odd")
    mask = case.mixing.mask.clone()
    mask[:, 3], mask[0, 2], mask[1:, 2] = False, True, False
    case = case._replace(mixing=case.mixing._replace(mask=mask))
    packed = case._replace(mixing=case.mixing._replace(mask=None, routes=mtl.Routes.from_mask(mask)))
    tensors = case.tensors(dtype)
    for used, rest in ((case, tensors[3:]), (packed, [tensors[3][:, mask], tensors[4][mask]])):
        clean = results(ops, used, [*tensors[:3], *rest], activation)
        hurt = [t.clone() for t in tensors[:3]]
        hurt[1][3, 5, 1], hurt[2][3, 2] = math.nan, math.nan
        found = results(ops, used, [*hurt, *rest], activation)
        same_bits(found, clean)
        hurt[1][2] = math.nan  # row 0 alone uses expert 2
        out = ops.expert_mix(*used.op_args([*hurt, *rest], activation or ""))[0]
        assert out[:, 0].isnan().all() and torch.equal(out[:, 1:], clean.out[:, 1:])
        hurt[0][2, 0] = math.inf
        found = results(ops, used, [*hurt, *rest], activation)
        assert (found.grads[1][3] == 0).all() and (found.grads[2][3] == 0).all()


def test_a_nan_stays_in_its_row(ops) -> None:
    case = make("both", "over a block")
    tensors = case.tensors(BF16, F32)
    clean = results(ops, case, tensors, "relu")
    x, logits = tensors[0].clone(), tensors[3].clone()
    x[7, 3], logits[40, 2, 1] = math.nan, math.nan
    found = results(ops, case, [x, *tensors[1:3], logits, tensors[4]], "relu")
    others = torch.ones(len(x), dtype=torch.bool)
    others[7], others[40] = False, False
    assert found.out[7].isnan().all() and found.out[40, 2].isnan().all()
    same_bits(
        Outcome(found.out[others], [found.grads[0][others], found.grads[3][others]]),
        Outcome(clean.out[others], [clean.grads[0][others], clean.grads[3][others]]),
    )


def test_gradient_of_the_logsumexp(ops) -> None:
    """Alone: the logits' softmax. And where there are no logits, an empty gradient of an empty output is ignored."""
    case = make("logits", "unequal")
    args = case.op_args(case.tensors(F32), "silu")
    out, lse = ops.expert_mix(*args)
    zeros, grad_lse = torch.zeros_like(out), random_grad(lse)
    dlogits = ops.expert_mix_backward(zeros, grad_lse, *args, lse, 31)[3]
    close(dlogits, torch.softmax(args[3], 2) * grad_lse[..., None])
    case = make("static", "unequal")
    args = case.op_args(case.tensors(F32), "silu")
    out, lse = ops.expert_mix(*args)
    with_it, without = (ops.expert_mix_backward(out, g, *args, lse, 31) for g in (torch.empty(0), None))
    assert all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))


def test_offsets_beyond_31_bits(ops) -> None:
    """Three rows of x, the last one 2^31 elements away; the memory between them is never touched."""
    stride, no_reserve = 1 << 30, 0x4000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (2 * stride + 16), flags), dtype=F16)
    case = Fused(Linear(3, 2, 5, 16), make_mix("both", 3, 2, 2, 5))
    close_by, *rest = case.tensors(F16)
    x = memory.as_strided((3, 16), (stride, 1)).copy_(close_by)
    near, far = (ops.expert_mix(*case.op_args([t, *rest], "relu"))[0] for t in (close_by, x))
    assert torch.equal(near, far)


X, W, L = torch.zeros(3, 4), torch.zeros(2, 5, 4), torch.zeros(3, 6, 2)
CALL = dict(x=X, weight=W, bias=None, logits=L, static=None, mask=None, columns=None, counts=None, activation="")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=X.double(), weight=W.double()), "x: .*float64"),
        (dict(x=X[:, :3]), "x: K = 4"),
        (dict(weight=W[0]), "weight: "),
        (dict(bias=torch.zeros(3)), "bias: "),
        (dict(x=X[:, None].expand(3, 2, 4), counts=[1, 2]), "experts_per_unit: .*sum"),
        (dict(logits=L[:2]), "logits: "),
        (dict(logits=L.int()), "logits: "),
        (dict(logits=None), "one of logits, static"),
        (dict(logits=None, mask=torch.ones(6, 2, dtype=torch.bool)), "logits, static: one of the two"),
        (dict(static=torch.zeros(1)), "static: "),
        (dict(logits=None, static=torch.zeros(6, 2, 5)), "static: .*packed"),
        (dict(mask=torch.ones(6, 2)), "mask: bool"),
        (dict(logits=L[:, 0], columns=torch.zeros(6, 2, dtype=torch.int64)), "columns: int32"),
        (dict(activation="swish"), "activation .*swish"),
    ],
)
def test_errors_name_the_argument(ops, change: dict, message: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=message):
        ops.expert_mix(*(CALL | change).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(grad=torch.zeros(3, 6, 4)), "grad: "),
        (dict(grad=torch.zeros(3, 6, 5).half()), "grad: "),
        (dict(grad_lse=torch.zeros(2, 6)), "grad_lse: "),
        (dict(lse=torch.zeros(2, 6)), "lse: "),
        (dict(lse=torch.zeros(3, 6).double()), "lse: float32"),
    ],
)
def test_backward_errors_name_the_argument(ops, change: dict, message: str) -> None:
    call = dict(grad=torch.zeros(3, 6, 5), grad_lse=None, **CALL, lse=torch.zeros(3, 6), needs=31) | change
    with pytest.raises(RuntimeError, match=message):
        ops.expert_mix_backward(*call.values())
