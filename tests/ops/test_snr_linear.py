"""snr_linear on every backend of a CPU: values, gradients, closed connections, numerics, compile, bad input."""

import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mtlkernels as mtl
from mtlkernels import backend as _backend

from .cases import (
    GRAD_LAYOUTS,
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
each_skip = pytest.mark.parametrize("skip", [False, True], ids=["all", "skip closed"])


class Snr(NamedTuple):
    """Sizes of an snr_linear, and which share of its gates is closed."""

    batch: int
    outputs: int
    inputs: int
    width: int
    features: int
    closed: float = 0.4

    def tensors(self, dtype: torch.dtype = torch.float64, gate_dtype: torch.dtype | None = None) -> list[Tensor]:
        """x, weight, gate, bias. Gates are rounded to 16 bit, so that every dtype has the same."""
        gen = torch.Generator().manual_seed(sum(self[:5]))
        shapes = self.x_shape, self.weight_shape, self.weight_shape[:2], (self.outputs, self.width)
        x, weight, gate, bias = (torch.randn(s, generator=gen, dtype=torch.float64) for s in shapes)
        gate[torch.rand(gate.shape, generator=gen) < self.closed] = 0
        scale = max(1, self.inputs * self.features) ** 0.5
        gate = gate.bfloat16().half().to(gate_dtype or dtype)
        return [x.to(dtype), (weight / scale).to(dtype), gate, bias.to(dtype)]

    @property
    def x_shape(self) -> tuple[int, ...]:
        return self.batch, self.inputs, self.features

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.outputs, self.inputs, self.width, self.features


# Kernel tiles: 6 or 12 rows, 8 to 32 columns; blocks of 12 to 480 batch rows; 256 rows and columns for dW.
CASES = {
    "one": Snr(1, 1, 1, 1, 1, 0),
    "one input": Snr(5, 3, 1, 4, 6),
    "one output": Snr(5, 1, 3, 4, 6),
    "odd": Snr(7, 3, 4, 5, 9),
    "over a tile": Snr(25, 2, 3, 33, 34),
    "whole tiles": Snr(24, 2, 2, 32, 32, 0),
    "over a batch block": Snr(300, 5, 3, 9, 17),
    "over two batch blocks": Snr(520, 2, 2, 3, 2),
    "wide": Snr(5, 2, 2, 300, 3),
    "deep": Snr(30, 2, 5, 3, 700),
    "all closed": Snr(6, 3, 2, 5, 4, 1),
    "no rows": Snr(0, 2, 3, 4, 5),
    "no outputs": Snr(3, 0, 3, 4, 5),
    "no inputs": Snr(3, 2, 0, 4, 5),
    "no width": Snr(3, 2, 3, 0, 5),
    "no features": Snr(3, 2, 3, 4, 0),
}
ODD = Snr(29, 3, 5, 19, 21)


def run(activation=None, skip=False):
    def call(x, weight, gate, bias=None, backend=None):
        return mtl.snr_linear(x, weight, gate, bias, activation=activation, skip_closed=skip, backend=backend)

    return call


def on(backend, activation=None, skip=False):
    return lambda *t: run(activation, skip)(*t, backend=backend)


@pytest.mark.parametrize("case", over({k: v for k, v in CASES.items() if v.batch * v.features * v.width < 2000}))
@each_skip
def test_the_reference_is_the_definition(case, skip):
    """One number at a time."""
    x, weight, gate, bias = case.tensors()
    y = np.empty((case.batch, case.outputs, case.width))
    for b, i, n in np.ndindex(y.shape):
        terms = (float(gate[i, j] * (x[b, j] @ weight[i, j, n])) for j in range(case.inputs))
        y[b, i, n] = max(sum(terms) + float(bias[i, n]), 0.0)
    close(on("reference", "relu", skip)(x, weight, gate, bias), torch.from_numpy(y), 1e-14)


@each_backend
@each_dtype
@each_skip
@pytest.mark.parametrize("case", over(CASES))
def test_shapes(case, skip, dtype, backend):
    tensors = case.tensors(dtype)
    for activation in ("relu", "gelu"):
        found = outcome(on(backend, activation, skip), tensors)
        agree(found, expected(run(activation, skip), tensors), tensors)
        if skip:
            closed = tensors[2] == 0
            assert (found.grads[1][closed] == 0).all() and (found.grads[2][closed] == 0).all()


@each_backend
@each_dtype
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, with_bias, dtype, backend):
    tensors = ODD.tensors(dtype)
    tensors[3] = tensors[3] if with_bias else None
    found = outcome(on(backend, activation, True), tensors)
    agree(found, expected(run(activation, True), tensors), tensors)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_float32_gates(dtype, backend):
    """Gates stay float32 beside activations of another type, and so does their gradient."""
    tensors = ODD.tensors(dtype, torch.float32)
    found = outcome(on(backend, "tanh", True), tensors)
    assert found.grads[2].dtype == torch.float32
    agree(found, expected(run("tanh", True), tensors), tensors)


@each_backend
@each_skip
def test_open_gates_make_a_dense_layer(skip, backend):
    """All gates 1: a linear layer over the inputs side by side, its weight cut in blocks."""
    x, weight, gate, bias = ODD.tensors()
    y = on(backend, "gelu", skip)(x, weight, torch.ones_like(gate), bias)
    whole = weight.transpose(1, 2).reshape(3 * 19, 5 * 21)
    close(y, F.gelu(F.linear(x.flatten(1), whole, bias.flatten())).view(29, 3, 19))


@each_backend
@each_dtype
@each_skip
def test_closed_gates_leave_the_bias(skip, dtype, backend):
    x, weight, gate, bias = ODD.tensors(dtype)
    found = outcome(on(backend, "relu", skip), [x, weight, torch.zeros_like(gate), bias])
    assert torch.equal(found.out, bias.relu().expand_as(found.out))
    assert (found.grads[0] == 0).all() and (found.grads[1] == 0).all()
    assert (found.grads[2] == 0).all() == skip
    assert (on(backend, None, skip)(x, weight, torch.zeros_like(gate)) == 0).all()


@each_backend
@each_dtype
def test_a_closed_connection_is_not_read(dtype, backend):
    """NaN in the weight of a closed connection, or in the input that only closed ones read, does not matter."""
    x, weight, gate, bias = ODD.tensors(dtype)
    gate[0, 2], gate[:, 4] = 0, 0
    clean = outcome(on(backend, "silu", True), [x, weight, gate, bias])
    hurt = [x.clone(), weight.clone(), gate, bias]
    hurt[0][:, 4], hurt[1][gate == 0] = math.nan, math.inf
    hurt[1][0, 2] = math.nan
    found = outcome(on(backend, "silu", True), hurt)
    same_bits(found, clean)
    assert not any(t.isnan().any() for t in (found.out, *found.grads))
    minus = [x, weight, torch.where(gate == 0, -0.0, gate), bias]
    same_bits(outcome(on(backend, "silu", True), minus), clean)
    assert on(backend, "silu", False)(*hurt).isnan().any()


@each_backend
@each_dtype
def test_a_gate_that_is_nan_is_not_closed(dtype, backend):
    x, weight, gate, bias = ODD.tensors(dtype)
    gate[1, 0] = math.nan
    y = on(backend, None, True)(x, weight, gate, bias)
    assert y[:, 1].isnan().all() and not y[:, [0, 2]].isnan().any()


@each_backend
def test_a_gate_at_zero_keeps_its_derivative(backend):
    """Without skip_closed: it is what finite differences say."""
    tensors = Snr(4, 2, 3, 3, 5, 0.5).tensors()
    assert (tensors[2] == 0).any()
    gate, step = tensors[2], 1e-5
    found = outcome(on(backend, "tanh"), tensors, torch.ones_like).grads[2]

    def total(moved):
        return on(backend, "tanh")(tensors[0], tensors[1], moved, tensors[3]).sum()

    moves = step * torch.eye(6, dtype=torch.float64).view(6, 2, 3)
    close(found.flatten(), torch.stack([(total(gate + m) - total(gate - m)) / (2 * step) for m in moves]), 1e-8)


@each_backend
@pytest.mark.parametrize("which", range(4), ids=["x", "weight", "gate", "bias"])
def test_layouts(which, backend):
    for dtype in (torch.float32, torch.bfloat16):
        tensors = Snr(14, 3, 4, 9, 10).tensors(dtype)
        for name, other in layouts(tensors[which]).items():
            strided = [*tensors[:which], other, *tensors[which + 1 :]]
            found = outcome(on(backend, "tanh", True), strided)
            agree(found, expected(run("tanh", True), strided), strided)
            if backend == "native":
                plain = outcome(on(backend, "tanh", True), [t.contiguous() for t in strided])
                assert torch.equal(found.out, plain.out), name


@each_backend
@pytest.mark.parametrize("grad", over(GRAD_LAYOUTS))
def test_gradient_layouts(grad, backend):
    for dtype, activation in itertools.product((torch.float64, torch.bfloat16), (None, "silu")):
        tensors = ODD.tensors(dtype)
        found = outcome(on(backend, activation, True), tensors, grad)
        agree(found, expected(run(activation, True), tensors, grad), tensors)


@each_backend
@each_skip
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_each_gradient_alone(activation, skip, backend):
    for dtype in (torch.float32, torch.bfloat16):
        tensors = ODD.tensors(dtype)
        every = outcome(on(backend, activation, skip), tensors)
        for needs in itertools.product((False, True), repeat=4):
            if any(needs):
                same_bits(outcome(on(backend, activation, skip), tensors, needs=needs), every)
    with torch.no_grad():
        plain = on(backend, activation, skip)(*(t.requires_grad_() for t in tensors))
    assert not plain.requires_grad and torch.equal(plain, every.out)


@native_only
@halves
def test_rounded_once(dtype):
    unit = torch.finfo(dtype).eps / 2
    for case, activation in itertools.product((ODD, CASES["deep"]), ACTIVATIONS):
        tensors = case.tensors(dtype)
        exact = expected(run(activation), tensors).out
        error = (on("native", activation)(*tensors).double() - exact).abs()
        assert (error <= unit * exact.abs() * 1.001 + 2e-6 * exact.abs().max()).all()


@native_only
@halves
def test_half_precision_against_plain_torch(dtype):
    """At most twice the error of the formula in the same dtype, forward and every gradient."""
    tensors = Snr(200, 3, 4, 24, 48).tensors(dtype)

    def plain(x, weight, gate, bias):
        parts = zip(weight.unbind(0), gate.unbind(0), bias.unbind(0), strict=True)
        return torch.stack([sum(g[j] * F.linear(x[:, j], w[j]) for j in range(4)) + b for w, g, b in parts], 1).tanh()

    exact = expected(run("tanh"), tensors)
    ours, torchs = outcome(on("native", "tanh"), tensors), outcome(plain, tensors)
    for a, b, e in zip((ours.out, *ours.grads), (torchs.out, *torchs.grads), (exact.out, *exact.grads), strict=True):
        mine, theirs = (a.double() - e).abs(), (b.double() - e).abs()
        assert mine.max() <= 2 * theirs.max() and mine.norm() <= 2 * theirs.norm()


@each_backend
@each_dtype
@each_skip
def test_a_nan_stays_in_its_row(skip, dtype, backend):
    x, weight, gate, bias = ODD.tensors(dtype)
    hurt = x.clone()
    hurt[7, 1, 3] = math.nan
    rows = [b for b in range(29) if b != 7]

    def call(x):
        return on(backend, "relu", skip)(x, weight, gate, bias)

    clean, found = outcome(call, [x]), outcome(call, [hurt])
    assert torch.equal(found.out[rows], clean.out[rows]) and torch.equal(found.grads[0][rows], clean.grads[0][rows])
    reads = (gate[:, 1] != 0) | (not skip)
    assert torch.equal(found.out[7].isnan(), reads[:, None].expand(3, 19)) and reads.any()


@native_only
@each_dtype
def test_equal_rows_and_runs_agree_bit_for_bit(dtype):
    x, weight, gate, bias = Snr(131, 3, 4, 21, 37).tensors(dtype)
    tensors = [x[:1].repeat(131, 1, 1), weight, gate, bias]
    found = outcome(on("native", "gelu", True), tensors, torch.ones_like)
    for rows in (found.out, found.grads[0]):
        assert torch.equal(rows, rows[:1].expand_as(rows))
    same_bits(found, outcome(on("native", "gelu", True), tensors, torch.ones_like))
    assert torch.equal(on("native", "gelu", True)(x[:1], weight, gate, bias), found.out[:1])


@native_only
@each_dtype
@pytest.mark.parametrize("name", ["over a batch block", "over two batch blocks", "wide", "over a tile"])
def test_threads_change_nothing(name, dtype):
    same_bits_with_any_threads(on("native", "silu", True), lambda: CASES[name].tensors(dtype))


@each_backend
@halves
def test_autocast(dtype, backend):
    """x goes to 16 bit; float32 weight, gate and bias enter as they are, and all gradients stay float32."""
    tensors = ODD.tensors(torch.float32)
    rounded = [tensors[0].to(dtype), *tensors[1:]]

    def call(*t):
        with torch.autocast("cpu", dtype=dtype):
            return on(backend, "gelu", True)(*t)

    found, wanted = outcome(call, tensors), expected(run("gelu", True), rounded)
    assert found.out.dtype == dtype and all(g.dtype == torch.float32 for g in found.grads)
    for got, want in zip((found.out, *found.grads), (wanted.out, *wanted.grads), strict=True):
        close(got, want, 1e-2 if dtype == torch.bfloat16 else 2e-3)
    with pytest.raises(TypeError, match="weight"):
        on(backend)(*rounded)


X, W, G = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5, 4), torch.zeros(2, 3)
BIAS, Y = torch.zeros(2, 5), torch.zeros(2, 2, 5)
BAD = {
    "x no tensor": (TypeError, "x must be a tensor; got list", ([1.0], W, G), {}),
    "weight no tensor": (TypeError, "weight must be a tensor; got NoneType", (X, None, G), {}),
    "gate no tensor": (TypeError, "gate must be a tensor; got float", (X, W, 1.0), {}),
    "bias no tensor": (TypeError, "bias must be a tensor; got float", (X, W, G, 1.0), {}),
    "weight three dimensions": (ValueError, r"weight must be \[I,J,N,K\].*\(3, 5, 4\)", (X, W[0], G), {}),
    "x two dimensions": (ValueError, r"x must be \[B,J,K\] = \[B, 3, 4\].*\(2, 12\)", (X.flatten(1), W, G), {}),
    "inputs": (ValueError, r"x must be \[B,J,K\] = \[B, 3, 4\].*\(2, 2, 4\)", (X[:, :2], W, G), {}),
    "features": (ValueError, r"x must be .*\(2, 3, 3\)", (X[..., :3], W, G), {}),
    "gate shape": (ValueError, r"gate must be \[I,J\] = \(2, 3\); got shape \(3,\)", (X, W, G[0]), {}),
    "gate dtype": (TypeError, "gate must be float32 or x's dtype torch.float32; got torch.float64",
                   (X, W, G.double()), {}),
    "gate half": (TypeError, "gate must be float32.*got torch.float16", (X, W, G.half()), {}),
    "gate elsewhere": (ValueError, "gate is on meta, x on cpu", (X, W, G.to("meta")), {}),
    "weight elsewhere": (ValueError, "weight is on meta, x on cpu", (X, W.to("meta"), G), {}),
    "x int": (TypeError, "x must be float64.*int64", (X.long(), W.long(), G), {}),
    "x half": (TypeError, "x is torch.float16 but weight is torch.float32", (X.half(), W, G), {}),
    "weight half": (TypeError, "weight is torch.float16", (X, W.half(), G), {}),
    "bias shape": (ValueError, r"bias must be \[I,N\] = \(2, 5\); got shape \(5,\)", (X, W, G, BIAS[0]), {}),
    "bias dtype": (TypeError, "bias is torch.float64", (X, W, G, BIAS.double()), {}),
    "bias elsewhere": (TypeError, "bias is torch.float32 on meta", (X, W, G, BIAS.to("meta")), {}),
    "activation": (ValueError, "activation must be None or one of.*'swish'", (X, W, G), {"activation": "swish"}),
    "skip_closed": (TypeError, "skip_closed must be a bool; got 1", (X, W, G), {"skip_closed": 1}),
    "backend": (ValueError, "backend must be one of.*'cuda'", (X, W, G), {"backend": "cuda"}),
}  # fmt: skip


@pytest.mark.parametrize("error, match, args, options", [pytest.param(*v, id=k) for k, v in BAD.items()])
def test_bad_input(error, match, args, options):
    with pytest.raises(error, match=match):
        mtl.snr_linear(*args, **options)


def test_explain_and_meta():
    assert "snr_linear on cpu, float32" in mtl.explain("snr_linear", X, W, G)
    leaves = [t.to("meta").requires_grad_() for t in (X, W, G, BIAS)]
    out = mtl.snr_linear(*leaves, skip_closed=True)
    out.sum().backward()
    assert out.is_meta and out.shape == Y.shape and all(t.grad.shape == t.shape for t in leaves)


@native_only
def test_explain_on_a_gpu():
    """Both libraries of kernels serve a GPU; Triton's is tried first."""
    predicates = _backend._predicates["snr_linear"]
    assert list(predicates) == ["triton", "native", "reference"]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ok, reason = predicates["native"](_backend.Case("cuda", dtype, 90))
        assert reason == ("CUDA C++ kernel" if ok else "the library was built without nvcc")
    assert not predicates["native"](_backend.Case("cuda", torch.float64, 90)).ok
    assert mtl.explain("snr_linear", X, W, G).startswith("snr_linear on cpu, float32: native")


@pytest.mark.slow
@native_only
def test_more_than_2_to_the_31_elements():
    """Offsets of output, gradient and input beyond 32 bits: the last row is right. 9 GB."""
    for inputs, outputs in ((1, 2), (2, 1)):
        weight = torch.randn(outputs, inputs, 1024 if outputs == 2 else 1, 1 if outputs == 2 else 1024).bfloat16()
        gate = torch.rand(outputs, inputs)
        x = torch.zeros(2**20 + 3, inputs, weight.shape[3], dtype=torch.bfloat16)
        x[-2:] = torch.randn(2, *x.shape[1:])
        y = mtl.snr_linear(x.requires_grad_(), weight, gate, backend="native")
        assert max(x.numel(), y.numel()) > 2**31
        last = x.detach()[-2:].double().requires_grad_()
        wanted = mtl.snr_linear(last, weight.double(), gate.double(), backend="reference")
        close(y[-2:].detach(), wanted.detach())
        y.backward(torch.ones((), dtype=y.dtype).expand_as(y))
        wanted.sum().backward()
        close(x.grad[-2:], last.grad)
        del x, y
