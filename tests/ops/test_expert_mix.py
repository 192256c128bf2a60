"""expert_mix on every backend of a CPU: it is mix of expert_linear, in values, gradients, numerics and bad input."""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import mtlkernels as mtl
from mtlkernels import backend

from .cases import (
    GRAD_LAYOUTS,
    Linear,
    Mix,
    agree,
    close,
    each_backend,
    each_dtype,
    expected,
    halves,
    layouts,
    make_mix,
    native_only,
    outcome,
    over,
    same_bits,
    same_bits_with_any_threads,
)

ACTIVATIONS = [None, "relu", "gelu", "silu", "tanh", "sigmoid"]


class Fused(NamedTuple):
    """One call: the sizes of the experts, and what mixes them."""

    linear: Linear
    mixing: Mix

    def tensors(self, dtype: torch.dtype = torch.float64, weights: torch.dtype | None = None) -> list[Tensor | None]:
        """x, weight, bias, logits, static; the last two in `weights`, or in dtype too."""
        return [*self.linear.tensors(dtype), *self.mixing.tensors(weights or dtype)[1:]]

    def __call__(self, x, weight, bias=None, logits=None, static=None, *, activation=None, backend=None) -> Tensor:
        mask, routes, counts = self.mixing.mask, self.mixing.routes, self.linear.counts
        return mtl.expert_mix(x, weight, bias, logits, static, experts_per_unit=counts, mask=mask, routes=routes,
                              activation=activation, backend=backend)  # fmt: skip

    def unfused(self, x, weight, bias, logits, static, *, activation=None, backend=None) -> Tensor:
        h = self.linear(x, weight, bias, activation=activation, backend=backend)
        return self.mixing(h, logits, static, backend=backend)

    def op_args(self, tensors, activation: str) -> tuple:
        """What the dispatcher op takes."""
        columns = None if self.mixing.routes is None else self.mixing.routes.columns
        counts = None if self.linear.counts is None else list(self.linear.counts)
        return *tensors, self.mixing.mask, columns, counts, activation


FORMS = ["logits", "static", "both", "logits masked", "static masked", "both masked", "logits packed", "static packed",
         "both packed"]  # fmt: skip
# Sizes and T. A task of the kernel is 24 to 96 rows; a set 512 or 1024 columns; a part of backward 1024 rows and more.
SHAPES = {
    "one": (Linear(1, 1, 1, 1), 1),
    "odd": (Linear(5, 7, 20, 9), 3),
    "over a block": (Linear(101, 9, 33, 17), 4),
    "unequal": (Linear(13, 6, 5, 11, (2, 0, 3, 1)), 3),
    "a unit each": (Linear(7, 4, 5, 3, units=True), 2),
    "many rows": (Linear(3, 5, 6, 4), 17),
    "wide": (Linear(2, 3, 1100, 5), 3),
    "many experts": (Linear(4, 70, 5, 3), 2),
    "two parts": (Linear(2101, 4, 9, 6, (1, 3)), 2),
    "units over many sets": (Linear(30, 9, 300, 7, (2, 6, 1)), 2),
    "several phases": (Linear(26, 7, 300, 400), 2),
    "no rows": (Linear(0, 3, 4, 5), 2),
    "no rows of units": (Linear(0, 3, 4, 5, (1, 2)), 2),
    "no experts": (Linear(3, 0, 4, 5), 2),
    "no units": (Linear(3, 0, 4, 5, ()), 2),
    "no outputs": (Linear(3, 2, 0, 5), 2),
    "no features": (Linear(3, 2, 4, 0), 2),
    "no tasks": (Linear(3, 2, 4, 5), 0),
}


def make(form: str, shape: str) -> Fused:
    linear, tasks = SHAPES[shape]
    return Fused(linear, make_mix(form, linear.batch, tasks, linear.experts, linear.outputs))


ODD = {form: make(form, "odd") for form in FORMS}
UNITS = make("both masked", "unequal")
TINY = {
    "both": Fused(Linear(2, 3, 2, 3), make_mix("both", 2, 2, 3, 2)),
    "units packed": Fused(Linear(2, 3, 2, 2, (1, 0, 2)), make_mix("both packed", 2, 2, 3, 2)),
    "static masked": Fused(Linear(2, 3, 2, 2, units=True), make_mix("static masked", 2, 2, 3, 2)),
}


def wanted_of(case: Fused, tensors, grad=None, **options):
    """mix(expert_linear) in float64."""
    return expected(case.unfused, tensors, *(() if grad is None else (grad,)), **options)


@each_backend
@each_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_mix_of_expert_linear(shape, dtype, backend):
    forms = (
        FORMS if shape in ("odd", "unequal", "over a block", "no rows") else ("both", "logits masked", "static packed")
    )
    for form, activation in zip(forms, itertools.cycle(("relu", "gelu", None)), strict=False):
        case = make(form, shape)
        tensors = case.tensors(dtype)
        found = outcome(lambda *t, c=case, a=activation: c(*t, activation=a, backend=backend), tensors)
        try:
            agree(found, wanted_of(case, tensors, activation=activation), tensors)
        except AssertionError as error:
            raise AssertionError(f"{form} {activation}") from error


@each_backend
@each_dtype
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, with_bias, dtype, backend):
    tensors = UNITS.tensors(dtype)
    tensors[2] = tensors[2] if with_bias else None
    found = outcome(lambda *t: UNITS(*t, activation=activation, backend=backend), tensors)
    agree(found, wanted_of(UNITS, tensors, activation=activation), tensors)


@native_only
@each_dtype
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("shape", ["unequal", "over a block", "units over many sets", "two parts", "no rows"])
def test_backward_that_computes_the_experts_again(shape, activation, dtype):
    """The operator beneath has two backward passes: one reads what forward kept, one keeps nothing."""
    ops = torch.ops.mtlkernels
    case = make("both masked", shape)
    tensors = case.tensors(dtype)
    args = case.op_args(tensors, activation or "")
    out, lse = ops.expert_mix(*args)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    again = ops.expert_mix_backward(grad, None, *args, lse, 31)
    out_kept, lse_kept, kept = ops.expert_mix_saving(*args)
    assert torch.equal(out, out_kept) and torch.equal(lse, lse_kept)
    read = ops.expert_mix_saving_backward(grad, None, *args, kept, 31)
    wanted = wanted_of(case, tensors, lambda o: grad, activation=activation)
    for a, b, exact in zip(again, read, wanted.grads, strict=True):
        close(a, exact)
        close(b, exact)
        if dtype in (torch.float32, torch.float64) and activation != "gelu":
            assert torch.equal(a, b)


@native_only
def test_gradient_of_the_logsumexp():
    ops = torch.ops.mtlkernels
    case = make("logits masked", "odd")
    tensors = [t if t is None else t.requires_grad_() for t in case.tensors(torch.float64)]
    out, lse = ops.expert_mix(*case.op_args(tensors, "silu"))
    logits, mask = tensors[3], case.mixing.mask
    plain = torch.logsumexp(logits.masked_fill(~mask, -math.inf), -1)
    some = mask.any(-1)
    close(lse[:, some].detach(), plain[:, some].detach())
    assert (lse[:, ~some] == -math.inf).all()
    weight = torch.randn(lse[:, some].shape, dtype=torch.float64)
    (found,) = torch.autograd.grad((lse[:, some] * weight).sum(), logits, retain_graph=True)
    (wanted,) = torch.autograd.grad((plain[:, some] * weight).sum(), logits)
    close(found, wanted)


@each_backend
@pytest.mark.parametrize("which", range(5), ids=["x", "weight", "bias", "logits", "static"])
def test_layouts(which, backend):
    for dtype in (torch.float32, torch.bfloat16):
        tensors = UNITS.tensors(dtype)
        for name, other in layouts(tensors[which]).items():
            strided = [*tensors[:which], other, *tensors[which + 1 :]]
            found = outcome(lambda *t: UNITS(*t, activation="tanh", backend=backend), strided)
            try:
                agree(found, wanted_of(UNITS, strided, activation="tanh"), strided)
            except AssertionError as error:
                raise AssertionError(name) from error


@each_backend
@pytest.mark.parametrize("grad", over(GRAD_LAYOUTS))
def test_gradient_layouts(grad, backend):
    for dtype in (torch.float64, torch.bfloat16):
        tensors = UNITS.tensors(dtype)
        found = outcome(lambda *t: UNITS(*t, activation="silu", backend=backend), tensors, grad)
        agree(found, wanted_of(UNITS, tensors, grad, activation="silu"), tensors)


@each_backend
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_each_gradient_alone(activation, backend):
    tensors = UNITS.tensors(torch.float32)

    def call(*t):
        return UNITS(*t, activation=activation, backend=backend)

    every = outcome(call, tensors)
    for needs in itertools.product((False, True), repeat=5):
        if any(needs):
            same_bits(outcome(call, tensors, needs=needs), every)
    with torch.no_grad():
        assert torch.equal(call(*tensors), every.out)


@native_only
@halves
def test_rounded_once(dtype):
    """The experts' outputs stay in float32: the result is as far from the exact one as its own rounding."""
    unit = torch.finfo(dtype).eps / 2
    for form, activation in itertools.product(("both", "logits masked", "static"), ("relu", "gelu")):
        for shape in ("over a block", "several phases"):
            case = make(form, shape)
            tensors = case.tensors(dtype, torch.float32)
            exact = wanted_of(case, tensors, activation=activation).out
            error = (case(*tensors, activation=activation, backend="native").double() - exact).abs()
            assert (error <= unit * exact.abs() * 1.001 + 4e-6 * exact.abs().max()).all()


@native_only
@halves
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_half_precision_against_plain_torch(activation, dtype):
    """At most twice the error of linear layers, softmax and bmm in the same dtype, forward and every gradient."""
    linear = Linear(130, 6, 48, 64)
    case = Fused(linear, make_mix("both", 130, 4, 6, 48))
    tensors = case.tensors(dtype)

    def plain(x, weight, bias, logits, static):
        z = torch.stack([torch.nn.functional.linear(x, w, b) for w, b in zip(weight, bias, strict=True)], 1)
        return torch.bmm(torch.softmax(logits, -1) + static, getattr(torch.nn.functional, activation)(z))

    exact = wanted_of(case, tensors, activation=activation)
    ours = outcome(lambda *t: case(*t, activation=activation, backend="native"), tensors)
    torchs = outcome(plain, tensors)
    for a, b, e in zip((ours.out, *ours.grads), (torchs.out, *torchs.grads), (exact.out, *exact.grads), strict=True):
        mine, theirs = (a.double() - e).abs(), (b.double() - e).abs()
        assert mine.max() <= 2 * theirs.max() and mine.norm() <= 2 * theirs.norm()


@each_backend
@each_dtype
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_nan_stays_in_its_row(activation, dtype, backend):
    case = make("both", "over a block")
    x, weight, bias, logits, static = case.tensors(dtype)
    hurt_x, hurt_logits = x.clone(), logits.clone()
    hurt_x[7, 3], hurt_logits[40, 2, 1] = math.nan, math.nan
    rows = [b for b in range(101) if b not in (7, 40)]

    def call(x, logits):
        return case(x, weight, bias, logits, static, activation=activation, backend=backend)

    clean, found = outcome(call, [x, logits]), outcome(call, [hurt_x, hurt_logits])
    for a, b in zip((found.out, *found.grads), (clean.out, *clean.grads), strict=True):
        assert torch.equal(a[rows], b[rows])
    assert found.out[7].isnan().all() and found.out[40, 2].isnan().all()
    assert torch.equal(found.out[40, [0, 1, 3]], clean.out[40, [0, 1, 3]])


@each_backend
@each_dtype
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "sigmoid"])
@pytest.mark.parametrize("form", ["both masked", "both packed"])
def test_an_expert_that_no_row_uses_does_not_matter(form, activation, dtype, backend):
    """Whatever stands in it: the other results are the same bits, its gradients zero."""
    case = make("both masked", "odd")
    mask = case.mixing.mask.clone()
    mask[:, 3], mask[0, 2], mask[1:, 2] = False, True, False
    case = case._replace(mixing=case.mixing._replace(mask=mask))
    tensors = case.tensors(dtype)
    if form == "both packed":
        case = case._replace(mixing=case.mixing._replace(mask=None, routes=mtl.Routes.from_mask(mask)))
        tensors[3:] = tensors[3][:, mask], tensors[4][mask]

    def call(*t):
        return case(*t, activation=activation, backend=backend)

    clean = outcome(call, tensors)
    hurt = [t.clone() for t in tensors]
    hurt[1][3, 5, 1], hurt[2][3, 2] = math.nan, math.nan
    found = outcome(call, hurt)
    same_bits(found, clean)
    assert (found.grads[1][3] == 0).all() and (found.grads[2][3] == 0).all()
    hurt[1][2] = math.nan  # row 0 alone uses expert 2
    out = call(*hurt)
    assert out[:, 0].isnan().all() and torch.equal(out[:, 1:], clean.out[:, 1:])


@each_backend
@each_dtype
def test_one_expert_is_exact(dtype, backend):
    """A softmax over one expert is exactly 1, its gradient exactly 0."""
    case = Fused(Linear(9, 1, 13, 4), make_mix("logits", 9, 3, 1, 13))
    tensors = case.tensors(dtype)
    tensors[3][0], tensors[3][1] = 1e4, -1e4
    found = outcome(lambda *t: case(*t, activation="relu", backend=backend), tensors)
    h = case.linear(*tensors[:3], activation="relu", backend=backend)
    assert torch.equal(found.out, h.expand(-1, 3, -1)) and (found.grads[3] == 0).all()


@native_only
@each_dtype
@pytest.mark.parametrize("shape", ["over a block", "unequal", "two parts", "units over many sets", "several phases"])
def test_threads_change_nothing(shape, dtype):
    case = make("both masked", shape)
    same_bits_with_any_threads(
        lambda *t: case(*t, activation="silu", backend="native"), lambda: case.tensors(dtype, torch.float32)
    )


@native_only
@each_dtype
def test_equal_rows_agree_bit_for_bit(dtype):
    case = make("both", "over a block")
    x, weight, bias, logits, static = case.tensors(dtype)
    equal = x[:1].repeat(135, 1), weight, bias, logits[:1].repeat(135, 1, 1), static

    def call(*t):
        return case(*t, activation="gelu", backend="native")

    found = outcome(call, equal, torch.ones_like)
    for rows in (found.out, found.grads[0], found.grads[3]):
        assert torch.equal(rows, rows[:1].expand_as(rows))
    alone = call(x[:1], weight, bias, logits[:1], static)
    assert torch.equal(alone, found.out[:1])


@each_backend
@halves
def test_autocast(dtype, backend):
    """x goes to 16 bit; all float32 weights enter as they are, and their gradients stay float32."""
    tensors = UNITS.tensors(torch.float32)
    rounded = tensors[0].to(dtype), *tensors[1:]

    def call(*t):
        with torch.autocast("cpu", dtype=dtype):
            return UNITS(*t, activation="gelu", backend=backend)

    found = outcome(call, tensors)
    assert found.out.dtype == dtype and all(g.dtype == torch.float32 for g in found.grads)
    wanted = wanted_of(UNITS, [t.double() for t in rounded], activation="gelu")
    for got, want in zip((found.out, *found.grads), (wanted.out, *wanted.grads), strict=True):
        close(got, want, 2e-2 if dtype == torch.bfloat16 else 4e-3)
    with pytest.raises(TypeError, match="weight"):
        UNITS(*rounded, backend=backend)


X, W, BIAS, L, S = torch.zeros(2, 4), torch.zeros(3, 5, 4), torch.zeros(3, 5), torch.zeros(2, 6, 3), torch.zeros(6, 3)
ROUTES = mtl.Routes.from_mask(torch.ones(6, 3, dtype=torch.bool))
BAD = {
    "x no tensor": (TypeError, "x", ([[1.0]], W, None, L), {}),
    "K": (ValueError, "x has 3 features.*K=4", (X[:, :3], W, None, L), {}),
    "weight double": (TypeError, "weight is torch.float64", (X, W.double(), None, L), {}),
    "bias shape": (ValueError, r"bias must be \[E,N\] = \(3, 5\)", (X, W, BIAS[0], L), {}),
    "activation": (ValueError, "activation must be None or one of.*'swish'", (X, W, BIAS, L), {"activation": "swish"}),
    "counts": (ValueError, "experts_per_unit goes with x", (X, W, BIAS, L), {"experts_per_unit": [3]}),
    "neither": (ValueError, "give logits, static, or both", (X, W, BIAS), {}),
    "logits rows": (ValueError, r"logits must be \[B,T,E\]", (X, W, BIAS, L[:1]), {}),
    "logits int": (TypeError, "logits must be float64.*int64", (X, W, BIAS, L.long()), {}),
    "logits elsewhere": (ValueError, "logits is on meta", (X, W, BIAS, L.to("meta")), {}),
    "static shape": (ValueError, r"static must be \[T,E\] = \[6, 3\]; got \(6, 2\)", (X, W, BIAS, L, S[:, :2]), {}),
    "static a channel": (ValueError, r"static must be \[T,E\].*channel", (X, W, BIAS, None, torch.zeros(6, 3, 5)), {}),
    "mask": (TypeError, "mask must be a bool tensor", (X, W, BIAS, L), {"mask": S}),
    "mask shape": (ValueError, r"mask must be \[T,E\]", (X, W, BIAS, L), {"mask": S[:2].bool()}),
    "mask and routes": (ValueError, "give mask or routes", (X, W, BIAS, L), {"mask": S.bool(), "routes": ROUTES}),
    "routes": (TypeError, "routes must be a mtlkernels.Routes", (X, W, BIAS, L), {"routes": S}),
    "routes elsewhere": (ValueError, "routes is on meta", (X, W, BIAS, L), {"routes": ROUTES.to("meta")}),
    "packed logits": (ValueError, r"logits must be packed \[B,R\]", (X, W, BIAS, L), {"routes": ROUTES}),
    "backend": (ValueError, "backend must be one of.*'cuda'", (X, W, BIAS, L), {"backend": "cuda"}),
}


@pytest.mark.parametrize("error, match, args, options", [pytest.param(*v, id=k) for k, v in BAD.items()])
def test_bad_input(error, match, args, options):
    with pytest.raises(error, match=match):
        mtl.expert_mix(*args, **options)


def test_explain():
    lines = mtl.explain("expert_mix", X, W, BIAS, L)
    assert lines.startswith("expert_mix on cpu, float32")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mtl.explain("expert_mix", X, W, BIAS, L).startswith("expert_mix on cpu, bfloat16")


@native_only
def test_explain_on_a_gpu():
    """Both libraries of kernels serve a GPU; Triton's is tried first."""
    predicates = backend._predicates["expert_mix"]
    assert list(predicates) == ["triton", "native", "reference"]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ok, reason = predicates["native"](backend.Case("cuda", dtype, 90))
        assert reason == ("CUDA C++ kernel" if ok else "the library was built without nvcc")
    assert not predicates["native"](backend.Case("cuda", torch.float64, 90)).ok
    assert mtl.explain("expert_mix", X, W, BIAS, L).startswith("expert_mix on cpu, float32: native")


@native_only
def test_only_a_cpu_keeps_the_experts_outputs(monkeypatch):
    monkeypatch.setattr(backend, "choose", lambda *args: "native")
    for device, keeps in (("cpu", True), ("meta", False)):
        tensors = [t.detach().to(device).requires_grad_() for t in (X, W, BIAS, L)]
        out = mtl.expert_mix(*tensors)
        assert ("saving" in out.grad_fn._forward_cls.__name__) == keeps
        out.sum().backward()
        assert all(t.grad.shape == t.shape for t in tensors)
