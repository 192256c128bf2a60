"""expert_linear on every backend of a CPU: values, gradients, numerics, bad input."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mtlkernels as mtl

from .cases import (
    GRAD_LAYOUTS,
    LINEAR,
    SMALL_LINEAR,
    Linear,
    Outcome,
    agree,
    close,
    each_backend,
    each_dtype,
    expected,
    halves,
    layouts,
    native_only,
    outcome,
    over,
    same_bits,
    same_bits_with_any_threads,
)

ACTIVATIONS = [None, "relu", "gelu", "silu", "tanh", "sigmoid"]
MIDDLE = Linear(29, 5, 19, 21, (2, 0, 3))


def loop(x, weight, bias, counts, activation):
    """The definition, one number at a time."""
    acts = {
        None: lambda z: z,
        "relu": lambda z: max(z, 0.0),
        "gelu": lambda z: z * 0.5 * (1 + math.erf(z / math.sqrt(2))),
        "silu": lambda z: z / (1 + math.exp(-z)),
        "tanh": math.tanh,
        "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
    }
    x, weight = x.numpy(), weight.numpy()
    unit = range(len(weight)) if counts is None else [u for u, n in enumerate(counts) for _ in range(n)]
    y = np.empty((x.shape[0], *weight.shape[:2]))
    for b, e, n in np.ndindex(y.shape):
        row = x[b] if x.ndim == 2 else x[b, unit[e]]
        z = sum(float(row[k]) * float(weight[e, n, k]) for k in range(len(row)))
        y[b, e, n] = acts[activation](z + (0.0 if bias is None else float(bias[e, n])))
    return torch.from_numpy(y)


@pytest.mark.parametrize("case", over(SMALL_LINEAR))
def test_the_reference_is_the_definition(case):
    x, weight, bias = case.tensors()
    for activation, b in itertools.product(ACTIVATIONS, (bias, None)):
        found = case(x, weight, b, activation=activation, backend="reference")
        close(found, loop(x, weight, b, case.counts, activation), 1e-14)


@each_backend
@each_dtype
@pytest.mark.parametrize("case", over(LINEAR))
def test_shapes(case, dtype, backend):
    tensors = case.tensors(dtype)
    for activation in ("relu", "gelu"):
        found = outcome(lambda *t, a=activation: case(*t, activation=a, backend=backend), tensors)
        agree(found, expected(case, tensors, activation=activation), tensors)


@each_backend
@each_dtype
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, with_bias, dtype, backend):
    x, weight, bias = MIDDLE.tensors(dtype)
    tensors = x, weight, bias if with_bias else None
    found = outcome(lambda *t: MIDDLE(*t, activation=activation, backend=backend), tensors)
    agree(found, expected(MIDDLE, tensors, activation=activation), tensors)


@each_backend
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
@each_dtype
def test_far_from_zero(activation, dtype, backend):
    """Activations and their derivatives where exponentials over- and underflow."""
    z = torch.tensor([0, 1e-30, 1e-4, 1, 5, 10, 17, 30, 80, 89, 104, 700, 2e4, math.inf], dtype=torch.float64)
    tensors = [torch.cat([z, -z])[:, None].to(dtype), torch.ones(1, 1, 1, dtype=dtype), None]

    def call(*t, backend=backend):
        return mtl.expert_linear(*t, activation=activation, backend=backend)

    found, wanted = outcome(call, tensors, torch.ones_like), expected(call, tensors, torch.ones_like)
    torch.testing.assert_close(found.out, wanted.out.to(dtype), equal_nan=True)
    finite = torch.isfinite(tensors[0])
    close(found.grads[0][finite], wanted.grads[0][finite])


@each_backend
@pytest.mark.parametrize("which", ["x", "weight", "bias"])
@pytest.mark.parametrize("counts", [None, (2, 0, 1)], ids=["shared", "units"])
def test_layouts(which, counts, backend):
    case = Linear(14, 3, 9, 10, counts)
    position = ["x", "weight", "bias"].index(which)
    for dtype in (torch.float32, torch.bfloat16):
        tensors = list(case.tensors(dtype))
        for name, other in layouts(tensors[position]).items():
            strided = [*tensors[:position], other, *tensors[position + 1 :]]
            found = outcome(lambda *t: case(*t, activation="tanh", backend=backend), strided)
            wanted = outcome(lambda *t: case(*t, activation="tanh", backend=backend), [t.contiguous() for t in strided])
            try:
                agree(found, expected(case, strided, activation="tanh"), strided)
                if backend == "native":
                    same_bits(found, wanted)
            except AssertionError as error:
                raise AssertionError(f"{which} {name}") from error


@each_backend
@pytest.mark.parametrize("grad", over(GRAD_LAYOUTS))
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradient_layouts(grad, activation, backend):
    for dtype in (torch.float64, torch.bfloat16):
        tensors = MIDDLE.tensors(dtype)
        found = outcome(lambda *t: MIDDLE(*t, activation=activation, backend=backend), tensors, grad)
        agree(found, expected(MIDDLE, tensors, grad, activation=activation), tensors)


@each_backend
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_each_gradient_alone(activation, backend):
    tensors = MIDDLE.tensors(torch.float32)

    def call(*t):
        return MIDDLE(*t, activation=activation, backend=backend)

    every = outcome(call, tensors)
    for needs in itertools.product((False, True), repeat=3):
        if any(needs):
            same_bits(outcome(call, tensors, needs=needs), every)
    with torch.no_grad():
        plain = call(*(t.requires_grad_() for t in tensors))
    assert not plain.requires_grad and torch.equal(plain, every.out)


@each_backend
def test_default_is_one_expert_a_unit(backend):
    x, weight, bias = LINEAR["a unit each"].tensors(torch.float32)
    listed = mtl.expert_linear(x, weight, bias, experts_per_unit=[1] * 4, backend=backend)
    assert torch.equal(mtl.expert_linear(x, weight, bias, backend=backend), listed)


@native_only
@halves
def test_rounded_once(dtype):
    """Sums are float32: the output is as far from the exact one as its own rounding, and hardly farther."""
    unit = torch.finfo(dtype).eps / 2
    for case, activation in itertools.product((MIDDLE, LINEAR["deep"]), ACTIVATIONS):
        tensors = case.tensors(dtype)
        exact = expected(case, tensors, activation=activation).out
        error = (case(*tensors, activation=activation, backend="native").double() - exact).abs()
        assert (error <= unit * exact.abs() * 1.001 + 2e-6 * exact.abs().max()).all()


@native_only
@halves
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_half_precision_against_plain_torch(dtype, activation):
    """At most twice the error of F.linear and the activation in the same dtype, forward and every gradient."""
    case = Linear(200, 3, 24, 96)
    tensors = case.tensors(dtype)

    def plain(x, weight, bias):
        z = torch.stack([F.linear(x, w, b) for w, b in zip(weight, bias, strict=True)], 1)
        return z if activation is None else getattr(F, activation, getattr(torch, activation, None))(z)

    exact = expected(case, tensors, activation=activation)
    ours = outcome(lambda *t: case(*t, activation=activation, backend="native"), tensors)
    torchs = outcome(plain, tensors)
    assert_no_worse(ours, torchs, exact)


def assert_no_worse(ours: Outcome, torchs: Outcome, exact: Outcome) -> None:
    for name, a, b, e in zip(("out", 0, 1, 2), *((o.out, *o.grads) for o in (ours, torchs, exact)), strict=True):
        if e is None:
            continue
        mine, theirs = (a.double() - e).abs(), (b.double() - e).abs()
        assert mine.max() <= 2 * theirs.max(), f"{name}: {mine.max()} against {theirs.max()}"
        assert mine.norm() <= 2 * theirs.norm(), f"{name}: {mine.norm()} against {theirs.norm()}"


@each_backend
@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_nan_stays_in_its_row(activation, dtype, backend):
    x, weight, bias = MIDDLE.tensors(dtype)
    hurt = x.clone()
    hurt[7, 1, 3], hurt[12, 2, 0] = math.nan, math.nan  # unit 1 feeds nobody
    rows = [b for b in range(29) if b != 12]

    def call(x):
        return MIDDLE(x, weight, bias, activation=activation, backend=backend)

    clean, found = outcome(call, [x]), outcome(call, [hurt])
    assert torch.equal(found.out[rows], clean.out[rows])
    assert torch.equal(found.grads[0][rows], clean.grads[0][rows])
    assert found.out[12, 2:].isnan().all() and not found.out[12, :2].isnan().any()
    gone = torch.where(found.out.isnan(), math.nan, random_like(found.out))
    again = outcome(call, [x], lambda _: gone)
    assert torch.equal(again.grads[0][rows].isnan(), torch.zeros_like(x[rows], dtype=torch.bool))


def random_like(t):
    return torch.randn(t.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(t.dtype)


@each_backend
@each_dtype
def test_relu_of_nan_is_nan(dtype, backend):
    x = torch.tensor([[math.nan], [-math.inf], [math.inf], [-1.0], [0.0]], dtype=dtype)
    one = torch.ones(1, 1, 1, dtype=dtype)
    y = mtl.expert_linear(x, one, activation="relu", backend=backend).flatten()
    assert y[0].isnan() and y[1:].tolist() == [0, math.inf, 0, 0]
    bias = torch.full((1, 1), math.nan, dtype=dtype)
    assert mtl.expert_linear(x, one, bias, activation="relu", backend=backend).isnan().all()


@each_backend
def test_relu_gradient_at_zero_is_zero(backend):
    x = torch.zeros(3, 2, requires_grad=True)
    mtl.expert_linear(x, torch.ones(2, 4, 2), activation="relu", backend=backend).sum().backward()
    assert (x.grad == 0).all()


@native_only
@each_dtype
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_equal_rows_and_runs_agree_bit_for_bit(activation, dtype):
    case = Linear(83, 3, 21, 37)
    x, weight, bias = case.tensors(dtype)

    def call(*t):
        return case(*t, activation=activation, backend="native")

    tensors = x[:1].repeat(83, 1), weight, bias
    found = outcome(call, tensors, torch.ones_like)
    for rows in (found.out, found.grads[0]):
        assert torch.equal(rows, rows[:1].expand_as(rows))
    one = outcome(call, tensors, torch.ones_like)
    same_bits(found, one)
    alone = call(x[:1], weight, bias)
    assert torch.equal(alone, found.out[:1])  # whatever the batch around it


@native_only
@each_dtype
@pytest.mark.parametrize("name", ["unequal", "over two batch blocks", "over a gradient block", "one row", "wide"])
def test_threads_change_nothing(name, dtype):
    case = LINEAR[name]
    same_bits_with_any_threads(lambda *t: case(*t, activation="silu", backend="native"), lambda: case.tensors(dtype))


@each_backend
@halves
def test_autocast(dtype, backend):
    """x goes to 16 bit; float32 weights enter as they are, and all gradients stay float32."""
    tensors = MIDDLE.tensors(torch.float32)
    rounded = tensors[0].to(dtype), *tensors[1:]

    def call(*t):
        with torch.autocast("cpu", dtype=dtype):
            return MIDDLE(*t, activation="gelu", backend=backend)

    found = outcome(call, tensors)
    assert found.out.dtype == dtype and all(g.dtype == torch.float32 for g in found.grads)
    wanted = expected(MIDDLE, rounded, activation="gelu")
    for got, want in zip((found.out, *found.grads), (wanted.out, *wanted.grads), strict=True):
        close(got, want, 1e-2 if dtype == torch.bfloat16 else 2e-3)
    # Rounded once, the weights not at all.
    error = (found.out.double() - wanted.out).abs()
    assert (error <= torch.finfo(dtype).eps / 2 * wanted.out.abs() * 1.001 + 2e-6 * wanted.out.abs().max()).all()
    with torch.autocast("cpu", dtype=dtype):
        assert MIDDLE(*MIDDLE.tensors(dtype), backend=backend).dtype == dtype
        assert MIDDLE(*MIDDLE.tensors(torch.float64), backend=backend).dtype == torch.float64
    with pytest.raises(TypeError, match="weight"):
        MIDDLE(*rounded, backend=backend)


X, X3, W, BIAS = torch.zeros(2, 4), torch.zeros(2, 2, 4), torch.zeros(3, 5, 4), torch.zeros(3, 5)
BAD = {
    "x no tensor": (TypeError, "x", ([[1.0]], W), {}),
    "weight no tensor": (TypeError, "weight", (X, None), {}),
    "bias no tensor": (TypeError, "bias", (X, W, 1.0), {}),
    "x one dimension": (ValueError, "x must be", (X[0], W), {}),
    "x four dimensions": (ValueError, "x must be", (X[None, None], W), {}),
    "weight two dimensions": (ValueError, "weight must be", (X, W[0]), {}),
    "K": (ValueError, "x has 3 features.*K=4", (X[:, :3], W), {}),
    "x int": (TypeError, "x must be float64.*int64", (X.long(), W.long()), {}),
    "x complex": (TypeError, "x must be float64.*complex64", (X + 0j, W + 0j), {}),
    "weight double": (TypeError, "weight is torch.float64", (X, W.double()), {}),
    "weight half": (TypeError, "weight is torch.float16", (X, W.half()), {}),
    "x half": (TypeError, "x is torch.float16", (X.half(), W), {}),
    "weight elsewhere": (ValueError, "weight is on meta", (X, W.to("meta")), {}),
    "bias shape": (ValueError, r"bias must be \[E,N\] = \(3, 5\); got shape \(5,\)", (X, W, BIAS[0]), {}),
    "bias dtype": (TypeError, "bias is torch.float64", (X, W, BIAS.double()), {}),
    "bias elsewhere": (TypeError, "bias is torch.float32 on meta", (X, W, BIAS.to("meta")), {}),
    "activation": (ValueError, "activation must be None or one of.*'swish'", (X, W), {"activation": "swish"}),
    "units": (ValueError, "2 units and weight 3 experts: give experts_per_unit", (X3, W), {}),
    "counts for a shared x": (ValueError, "experts_per_unit goes with x", (X, W), {"experts_per_unit": [3]}),
    "too few counts": (ValueError, "experts_per_unit has 1 counts", (X3, W), {"experts_per_unit": [3]}),
    "sum": (ValueError, r"experts_per_unit must be counts.*\[1, 1\]", (X3, W), {"experts_per_unit": [1, 1]}),
    "negative": (ValueError, "experts_per_unit must be counts", (X3, W), {"experts_per_unit": [4, -1]}),
    "counts no ints": (TypeError, "experts_per_unit", (X3, W), {"experts_per_unit": [1.5, 1.5]}),
    "counts no sequence": (TypeError, "experts_per_unit", (X3, W), {"experts_per_unit": 3}),
    "backend": (ValueError, "backend must be one of.*'cuda'", (X, W), {"backend": "cuda"}),
}


@pytest.mark.parametrize("error, match, args, options", [pytest.param(*v, id=k) for k, v in BAD.items()])
def test_bad_input(error, match, args, options):
    with pytest.raises(error, match=match):
        mtl.expert_linear(*args, **options)


@pytest.mark.slow
@native_only
def test_more_than_2_to_the_31_elements():
    """Offsets of output, gradient and input beyond 32 bits: the last row is right. 9 GB."""
    batch, experts, outputs = 2**20 + 3, 2, 1024
    weight, bias = torch.randn(experts, outputs, 1).bfloat16(), torch.randn(experts, outputs).bfloat16()
    x = torch.randn(batch, 1).bfloat16().requires_grad_()
    y = mtl.expert_linear(x, weight, bias, backend="native")
    assert y.numel() > 2**31
    close(y[-2:].detach(), mtl.expert_linear(x.detach()[-2:].double(), weight.double(), bias.double()))
    y.backward(torch.ones((), dtype=y.dtype).expand_as(y))
    close(x.grad[-2:], weight.double().sum().expand(2, 1))
    del y, x
    x = torch.zeros(2**20 + 3, 2, 1024, dtype=torch.bfloat16)
    x[-2:] = torch.randn(2, 2, 1024)
    weight = torch.randn(2, 1, 1024).bfloat16()
    y = mtl.expert_linear(x.requires_grad_(), weight, backend="native")
    close(y[-2:].detach(), mtl.expert_linear(x.detach()[-2:].double(), weight.double()))
    y.backward(torch.ones((), dtype=y.dtype).expand_as(y))
    close(x.grad[-2:], weight.double()[None, :, 0].expand(2, -1, -1))
