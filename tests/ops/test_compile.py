"""Both operators under the compiler: opcheck, fake kernels, torch.compile, torch.export."""

import sys
import warnings

import pytest
import torch
from torch import nn

import mtlkernels as mtl
from mtlkernels import backend as choice
from mtlkernels.ops import expert_linear as linear_op
from mtlkernels.ops import mix as mix_op

from .cases import LINEAR, MIX, TINY, Linear, close, each_backend, native_only


def op_calls():
    """Dispatcher ops with arguments that stand for all: forward, twin and backward of both operators."""
    ops = torch.ops.mtlkernels
    for name in ("expert_linear units", "mix both masked", "mix both packed", "mix native", "mix channel"):
        case = TINY[name]
        tensors = [t if t is None else t.clone() for t in case.tensors(torch.float32)]
        if isinstance(case, Linear):
            counts = None if case.counts is None else list(case.counts)
            for activation, save in (("gelu", True), ("relu", False)):
                args = (*tensors, counts, activation, save)
                yield f"{name} {activation}", ops.expert_linear, args
                y, z = ops.expert_linear_eager(*args)
                back = (torch.ones_like(y), *tensors[:2], z if save else y, counts, activation, 7)
                yield f"{name} {activation} backward", ops.expert_linear_backward, back
        else:
            args = (*tensors, *case.op_args()[3:])
            yield name, ops.mix, args
            out, lse = ops.mix_eager(*args)
            needs = sum(bit for bit, t in zip((1, 2, 4), tensors, strict=True) if t is not None)
            yield f"{name} backward", ops.mix_backward, (torch.ones_like(out), None, *args, lse, needs)


@native_only
def test_opcheck():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, op, args in op_calls():
            args = [a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point()
                    and "backward" not in name else a for a in args]  # fmt: skip
            try:
                torch.library.opcheck(op.default, tuple(args))
            except Exception as error:
                raise AssertionError(f"{name}: {error}") from error


@native_only
def test_fake_kernels_tell_the_truth():
    """Shapes, dtypes and strides of the meta tensors are those of the real ones."""

    def compare(name, op, fake, args):
        meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
        for real, told in zip(op(*args), fake(*meta), strict=True):
            assert real.shape == told.shape and real.dtype == told.dtype and real.stride() == told.stride(), name
        return op(*args)

    ops = torch.ops.mtlkernels
    for name, case in MIX.items():
        for dtype in (torch.float64, torch.bfloat16):
            args = case.op_args(dtype)
            out, lse = compare(name, ops.mix_eager, mix_op_module()._forward_fake, args)
            for needs in range(8):
                back = torch.ones_like(out), None, *args, lse, needs
                compare(f"{name} backward {needs}", ops.mix_backward, mix_op_module()._backward_fake, back)
    for name, case in LINEAR.items():
        for dtype, activation in ((torch.float32, "silu"), (torch.float16, "tanh")):
            x, weight, bias = case.tensors(dtype)
            counts = None if case.counts is None else list(case.counts)
            for save in (False, True):
                args = x, weight, bias, counts, activation, save
                y, z = compare(name, ops.expert_linear_eager, linear_op_module()._forward_fake, args)
            saved = z if activation == "silu" else y
            for needs in range(8):
                back = torch.ones_like(y), x, weight, saved, counts, activation, needs
                compare(f"{name} backward {needs}", ops.expert_linear_backward, linear_op_module()._backward_fake, back)


X, W, H, L = torch.zeros(3, 4), torch.zeros(2, 5, 4), torch.zeros(3, 2, 5), torch.zeros(3, 4, 2)
MAY, R, LSE, OUT = torch.ones(4, 2, dtype=torch.bool), torch.zeros(3, 2), torch.zeros(3, 4), torch.zeros(3, 4, 5)
UNFIT = {
    "activation": ("expert_linear", (X, W, None, None, "swish", False)),
    "K": ("expert_linear", (X[:, :3], W, None, None, "", False)),
    "bias": ("expert_linear", (X, W, torch.zeros(3), None, "", False)),
    "bias dtype": ("expert_linear", (X, W, torch.zeros(2, 5).double(), None, "", False)),
    "counts": ("expert_linear", (torch.zeros(3, 2, 4), W, None, [1, 2], "", False)),
    "int": ("expert_linear", (X.int(), W.int(), None, None, "", False)),
    "saved": ("expert_linear_backward", (torch.zeros(3, 2, 5), X, W, torch.zeros(0), None, "relu", 7)),
    "grad": ("expert_linear_backward", (torch.zeros(3, 2, 4), X, W, torch.zeros(0), None, "", 7)),
    "native": ("mix", (H, L, None, None, None, [1, 3])),
    "logits batch": ("mix", (H, L[:2], None, None, None, None)),
    "logits int": ("mix", (H, L.int(), None, None, None, None)),
    "static": ("mix", (H, L, torch.zeros(1), None, None, None)),
    "neither": ("mix", (H, None, None, None, None, None)),
    "columns beyond logits": ("mix", (H, R, None, None, torch.tensor([[0, 7]], dtype=torch.int32), None)),
    "columns beyond static": ("mix", (H, None, R[0], None, torch.tensor([[0, 7]], dtype=torch.int32), None)),
    "columns shape": ("mix", (H, R, None, None, torch.tensor([[0]], dtype=torch.int32), None)),
    "columns int64": ("mix", (H, R, None, None, torch.tensor([[0, 1]]), None)),
    "mask shape": ("mix", (H, L, None, MAY[:2, :1], None, None)),
    "mask float": ("mix", (H, L, None, MAY.float(), None, None)),
    "mix grad": ("mix_backward", (OUT[..., :4], None, H, L, None, None, None, None, LSE, 7)),
    "mix grad dtype": ("mix_backward", (OUT.double(), None, H, L, None, None, None, None, LSE, 7)),
    "grad_lse": ("mix_backward", (OUT, LSE[0, :1], H, L, None, None, None, None, LSE, 7)),
}


@native_only
@pytest.mark.parametrize("name, args", [pytest.param(*v, id=k) for k, v in UNFIT.items()])
def test_operators_refuse_what_does_not_fit(name, args):
    """Below the public functions too: what would be read out of bounds, or as another type, raises."""
    with pytest.raises((RuntimeError, ValueError)):
        getattr(torch.ops.mtlkernels, name)(*args)


def mix_op_module():
    return sys.modules[mix_op.__module__]


def linear_op_module():
    return sys.modules[linear_op.__module__]


class Network(nn.Module):
    """Experts of two units, packed gates and their mix: both operators in a row."""

    def __init__(self, backend: str | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.bias = nn.Parameter(torch.randn(3, 6, 5)), nn.Parameter(torch.randn(3, 6))
        self.gate, self.static = nn.Parameter(torch.randn(4, 2, 5)), nn.Parameter(torch.randn(2, 3))
        self.routes, self.backend = mtl.Routes.by_unit((2, 1), [(0, 1), (1,)]), backend
        self.packed = nn.Parameter(torch.randn(1, 4, 5))

    def forward(self, x):
        b = self.backend
        h = mtl.expert_linear(
            torch.stack([x, x.sin()], 1), self.weight, self.bias, experts_per_unit=(2, 1), activation="silu", backend=b
        )
        packed = mtl.expert_linear(x, self.packed, backend=b).squeeze(1)
        logits = mtl.expert_linear(x, self.gate[:3].transpose(0, 1).contiguous(), activation="tanh", backend=b)
        one = mtl.gated_mix(h, packed, routes=self.routes, backend=b)
        two = mtl.mix(h, logits, self.static, backend=b)
        three = mtl.adatt_mix(h, logits, self.static.flatten()[:3], experts_per_unit=(2, 1), backend=b)
        four = mtl.linear_mix(h, self.static, backend=b)
        return one + two * three + four


def step(module, x, network=None):
    """Output, and gradients of x and the parameters."""
    x = x.detach().requires_grad_()
    out = module(x)
    params = dict((network or module).named_parameters())
    grads = torch.autograd.grad(out.square().sum(), [x, *params.values()])
    return out.detach(), dict(zip(["x", *params], grads, strict=True))


def assert_same_step(found, wanted):
    close(found[0], wanted[0])
    assert found[1].keys() == wanted[1].keys()
    for name, grad in wanted[1].items():
        close(found[1][name], grad, what=name)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@each_backend
def test_compile(backend, fresh_dynamo, monkeypatch):
    """One graph, no recompilation from one batch size to the next, eager's values and gradients."""
    monkeypatch.setattr(choice, "_chosen", {})  # as in a fresh process
    network = Network(backend)
    below = "aot_eager" if backend == "native" else "eager"
    compiled = torch.compile(network, fullgraph=True, backend=below, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (7, 4, 70):
            x = torch.randn(batch, 5)
            assert_same_step(step(compiled, x, network), step(network, x))
    with torch.no_grad():
        assert torch.equal(compiled(x), network(x))


@native_only
def test_compile_under_use_backend_and_autocast(fresh_dynamo):
    network = Network()

    def run(x):
        with mtl.use_backend("native"), torch.autocast("cpu", dtype=torch.bfloat16):
            return mtl.expert_linear(x, network.weight, network.bias, activation="relu")

    x = torch.randn(6, 5)
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    assert found.dtype == torch.bfloat16 and torch.equal(found, run(x))


@native_only
@pytest.mark.skipif(sys.platform != "linux", reason="needs a compiler")
def test_inductor(fresh_dynamo):
    network = Network("native")

    def run(x):
        h = mtl.expert_linear(x, network.weight, network.bias, activation="silu", backend="native")
        return mtl.mix(h, None, network.static, backend="native").relu()

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    x = torch.randn(9, 5)
    inputs = [x.requires_grad_(), network.weight, network.bias, network.static]
    found, wanted = (torch.autograd.grad(f(x).square().sum(), inputs) for f in (compiled, run))
    for a, b in zip(found, wanted, strict=True):
        close(a, b)


@pytest.mark.parametrize(
    "backend, strict",
    [("reference", False), *(pytest.param("native", strict, marks=native_only) for strict in (False, True))],
)
def test_export(backend, strict):
    """An exported module trains: its parameters get the same gradients, at another batch size too."""
    network = Network(backend)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(network, (torch.randn(4, 5),), dynamic_shapes=({0: batch},), strict=strict)
    module = program.module()
    for rows in (4, 11):
        x = torch.randn(rows, 5)
        assert_same_step(step(module, x), step(network, x))
    if backend == "native":
        targets = {str(node.target) for node in program.graph.nodes}
        assert {"mtlkernels.expert_linear.default", "mtlkernels.mix.default"} <= targets
