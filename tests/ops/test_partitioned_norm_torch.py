"""partitioned_norm beside the rest of torch: derivatives of every kind, opcheck, torch.compile, torch.export."""

import sys
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import mtlkernels as mtl

from .cases import close, each_backend, native_only, outcome, over, random_grad
from .norms import CASES, FEW, MODES, make

# None, one, two and four rows of a domain.
TINY = make(7, 2, 4, ids=torch.tensor([3, 1, 2, 3, 2, 3, 3]))
each_mode = pytest.mark.parametrize("training", MODES.values(), ids=MODES)


def tiny_call(training, backend=None):
    case = TINY._replace(training=training)
    return lambda *t: case(*t, backend=backend)


def tiny_inputs(dtype=torch.float64):
    return [t.requires_grad_() for t in TINY.tensors(dtype)]


@each_backend
@each_mode
def test_gradcheck(training, backend):
    call, inputs = tiny_call(training, backend), tiny_inputs()
    torch.autograd.gradcheck(call, inputs, check_batched_grad=True)
    torch.autograd.gradgradcheck(call, inputs)


@each_backend
@each_mode
def test_torch_func(training, backend):
    """grad, vjp under vmap, jvp and dual numbers; the running statistics come in as arguments, as batch_norm's do."""
    inputs = tiny_inputs()
    case = TINY._replace(training=training)
    wanted = torch.autograd.grad(case(*inputs, backend=backend).square().sum(), inputs)
    plain = [t.detach() for t in inputs]

    def loss(*t):
        return case(*t, backend=backend, running=[r.clone() for r in case.running()]).square().sum()

    for found, want in zip(torch.func.grad(loss, argnums=tuple(range(5)))(*plain), wanted, strict=True):
        close(found, want)
    out = case(*inputs, backend=backend)
    grads = torch.stack([random_grad(out), torch.ones_like(out)]).detach()
    singly = [torch.autograd.grad(out, inputs, g, retain_graph=True) for g in grads]
    batched = torch.autograd.grad(out, inputs, grads, is_grads_batched=True)
    for found, *rows in zip(batched, *singly, strict=True):
        close(found, torch.stack(rows))
    ones, step = [torch.ones_like(t) for t in plain], 1e-6
    ahead = [case(*(t + s * step for t in plain), backend="reference") for s in (1, -1)]
    with forward_ad.dual_level():
        out = case(*(forward_ad.make_dual(t, one) for t, one in zip(plain, ones, strict=True)), backend=backend)
        close(forward_ad.unpack_dual(out).tangent, (ahead[0] - ahead[1]) / (2 * step), 1e-7)


@native_only
@each_mode
def test_gradient_penalty(training):
    """The gradient of a squared gradient, as the reference gives it."""

    def penalty(backend):
        inputs = tiny_inputs()
        grads = torch.autograd.grad(tiny_call(training, backend)(*inputs).sin().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    for found, wanted in zip(penalty("native"), penalty("reference"), strict=True):
        close(found, wanted)


@native_only
def test_retain_graph_and_changed_inputs():
    inputs = tiny_inputs(torch.float32)
    out = tiny_call(True, "native")(*inputs)
    grad = random_grad(out)
    first = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    second = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with torch.no_grad():
        inputs[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, inputs, grad)


@native_only
def test_inference_mode():
    tensors, running, want = FEW.tensors(), FEW.running(), FEW.running()
    wanted = FEW(*tensors, running=want)
    with torch.inference_mode():
        assert torch.equal(FEW(*tensors, running=running), wanted)
    assert all(torch.equal(a, b) for a, b in zip(running, want, strict=True))


@native_only
@each_mode
@pytest.mark.parametrize("needs", [0, 1, 3])
def test_one_gradient_alone(training, needs):
    """Only what requires a gradient gets one, the same as with all."""
    call = tiny_call(training, "native")
    wanted = outcome(call, TINY.tensors())
    found = outcome(call, TINY.tensors(), needs=[i == needs for i in range(5)])
    assert torch.equal(found.grads[needs], wanted.grads[needs])
    assert sum(g is not None for g in found.grads) == 1


def test_meta_tensors():
    """Shapes alone."""
    case = TINY._replace(domain=TINY.domain.to("meta"))
    inputs = [t.detach().to("meta").requires_grad_() for t in TINY.tensors()]
    out = case(*inputs, running=[t.to("meta") for t in TINY.running()])
    out.sum().backward()
    assert out.is_meta and out.shape == (7, 2) and all(t.grad.shape == t.shape for t in inputs)


def op_args(case, dtype):
    tensors = case.tensors(dtype, torch.float32 if dtype.itemsize == 2 else dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return tensors[0], case.domain, *tensors[1:], *case.running(wide), case.training, 1e-5


@native_only
@each_mode
def test_opcheck(training):
    args = op_args(TINY._replace(training=training), torch.float32)
    for t in (args[0], *args[2:6]):
        t.requires_grad_()
    ops = torch.ops.mtlkernels
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.library.opcheck(ops.partitioned_norm.default, args)
        y, *kept = ops.partitioned_norm_eager(*(t.detach() if isinstance(t, torch.Tensor) else t for t in args))
        back = torch.ones_like(y), *args[:3], args[4], *kept, training, 1e-5, 31
        back = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in back)
        torch.library.opcheck(ops.partitioned_norm_backward.default, back)


@native_only
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_fake_kernels_tell_the_truth(dtype):
    """Shapes, dtypes and strides of the meta tensors are those of the real ones."""
    op = sys.modules[mtl.partitioned_norm.__module__]
    ops = torch.ops.mtlkernels

    def compare(real, fake, args):
        meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
        outputs = real(*args)
        for got, told in zip(outputs, fake(*meta), strict=True):
            assert got.shape == told.shape and got.dtype == told.dtype and got.stride() == told.stride()
        return outputs

    for case in CASES.values():
        args = op_args(case, dtype)
        y, *kept = compare(ops.partitioned_norm_eager, op._forward_fake, args)
        for needs in (0, 1, 2, 12, 31):
            back = y, *args[:3], args[4], *kept, case.training, 1e-5, needs
            compare(ops.partitioned_norm_backward, op._backward_fake, back)


X, IDS, W, T = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long), torch.zeros(3), torch.zeros(2, 3)
UNFIT = {
    "domain length": {1: IDS[:3]},
    "domain float": {1: X[:, 0]},
    "weight": {2: W[:2]},
    "bias": {3: W[:2]},
    "domain_weight": {4: T[:, :2]},
    "domain_bias": {5: T[:1]},
    "running_mean": {6: T[:1]},
    "running_var": {7: T[:, :2]},
    "x": {0: W},
}
UNFIT_BACKWARD = {
    "grad": {0: X[:, :2]},
    "grad dtype": {0: X.double()},
    "mean": {5: T[:1]},
    "mean dtype": {5: T.double()},
    "var": {6: T[:, :2]},
    "count": {7: IDS[:1]},
    "count dtype": {7: IDS[:2].int()},
}


@native_only
@pytest.mark.parametrize("change", over(UNFIT))
def test_the_operator_refuses_what_does_not_fit(change):
    """Below the public function too: what would be read out of bounds, or as another type, raises."""
    args = [X, IDS, W, W, T, T, T, T, True, 1e-5]
    torch.ops.mtlkernels.partitioned_norm(*args)
    for i, value in change.items():
        args[i] = value
    with pytest.raises(RuntimeError):
        torch.ops.mtlkernels.partitioned_norm(*args)


@native_only
@pytest.mark.parametrize("change", over(UNFIT_BACKWARD))
def test_its_backward_refuses_what_does_not_fit(change):
    args = [X, X, IDS, W, T, T, T, IDS[:2], True, 1e-5, 31]
    torch.ops.mtlkernels.partitioned_norm_backward(*args)
    for i, value in change.items():
        args[i] = value
    with pytest.raises(RuntimeError):
        torch.ops.mtlkernels.partitioned_norm_backward(*args)


class Network(nn.Module):
    """A layer, the normalisation with its buffers, another layer."""

    def __init__(self, backend: str | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        # No bias before the normalisation: its gradient is zero but for rounding.
        self.inner, self.outer, self.backend = nn.Linear(5, 6, bias=False), nn.Linear(6, 2), backend
        shapes = {"weight": (6,), "bias": (6,), "domain_weight": (3, 6), "domain_bias": (3, 6)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.register_buffer("running_mean", torch.zeros(3, 6))
        self.register_buffer("running_var", torch.ones(3, 6))

    def forward(self, x, domain):
        y = mtl.partitioned_norm(
            self.inner(x), domain, self.weight, self.bias, self.domain_weight, self.domain_bias,
            self.running_mean, self.running_var, training=self.training, backend=self.backend,
        )  # fmt: skip
        return self.outer(y.relu())


def step(module, network, x, domain):
    """Output, gradients and the buffers afterwards; the buffers start anew."""
    network.running_mean.zero_(), network.running_var.fill_(1)
    x = x.detach().requires_grad_()
    out = module(x, domain)
    params = dict(network.named_parameters())
    grads = torch.autograd.grad(out.square().sum(), [x, *params.values()])
    buffers = {name: t.clone() for name, t in network.named_buffers()}
    return {"out": out.detach(), **dict(zip(["x", *params], grads, strict=True)), **buffers}


def assert_same_step(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        close(found[name], tensor, what=name)


def batch(rows):
    gen = torch.Generator().manual_seed(rows)
    return torch.randn(rows, 5, generator=gen), torch.randint(3, (rows,), generator=gen)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@each_backend
@each_mode
def test_compile(training, backend, fresh_dynamo):
    """One graph for every batch size; values, gradients and running statistics of eager."""
    network = Network(backend).train(training)
    below = "aot_eager" if backend == "native" else "eager"
    compiled = torch.compile(network, fullgraph=True, backend=below, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (7, 40, 300):
            assert_same_step(step(compiled, network, *batch(rows)), step(network, network, *batch(rows)))
    assert torch.equal(network.running_mean, torch.zeros(3, 6)) != training


@native_only
@pytest.mark.skipif(sys.platform != "linux", reason="needs a compiler")
def test_inductor(fresh_dynamo):
    network = Network("native")
    compiled = torch.compile(network, fullgraph=True, dynamic=True)
    assert_same_step(step(compiled, network, *batch(50)), step(network, network, *batch(50)))


@each_backend
@each_mode
def test_export(training, backend):
    """An exported module trains: the same gradients and buffers, at another batch size too."""
    network = Network(backend).train(training)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(network, batch(4), dynamic_shapes=({0: rows}, {0: rows}))
    module = program.module()
    for n in (4, 90):
        exported = dict(module.named_buffers())
        exported["running_mean"].zero_(), exported["running_var"].fill_(1)
        x, domain = batch(n)
        x.requires_grad_()
        out = module(x, domain)
        params = dict(module.named_parameters())
        grads = torch.autograd.grad(out.square().sum(), [x, *params.values()])
        found = {"out": out.detach(), **dict(zip(["x", *params], grads, strict=True)), **exported}
        wanted = step(network, network, *batch(n))
        assert_same_step({name: found[name].detach() for name in wanted}, wanted)
    if backend == "native":
        targets = {str(node.target) for node in program.graph.nodes}
        assert "mtlkernels.partitioned_norm.default" in targets
