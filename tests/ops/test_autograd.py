"""What both operators share: gradients of gradients, batched gradients, compile, export, threads, processes."""

import multiprocessing
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mtlkernels as mtl
from mtlkernels import backend as choice
from mtlkernels.ops import expert_linear as linear_op
from mtlkernels.ops import mix as mix_op

from .cases import (
    FORMS,
    LINEAR,
    MIX,
    SHAPES,
    TINY,
    Linear,
    close,
    each_backend,
    native_only,
    outcome,
    over,
    random_grad,
    tiny_call,
    tiny_inputs,
)

each_tiny = pytest.mark.parametrize("name", TINY)
SOME = ["expert_linear", "expert_linear units", "mix both", "mix both packed", "mix native masked", "mix channel"]
some = pytest.mark.parametrize("name", SOME)


@each_backend
@each_tiny
def test_gradcheck(name, backend):
    torch.autograd.gradcheck(tiny_call(name, backend), tiny_inputs(name), check_batched_grad=True)


@each_backend
@pytest.mark.parametrize("activation", [None, "gelu", "tanh", "sigmoid"])
def test_gradcheck_of_activations(activation, backend):
    call = tiny_call("expert_linear units", backend, activation)
    inputs = tiny_inputs("expert_linear units")
    torch.autograd.gradcheck(call, inputs)
    torch.autograd.gradgradcheck(call, inputs)


@each_backend
@each_tiny
def test_double_backward(name, backend):
    torch.autograd.gradgradcheck(tiny_call(name, backend), tiny_inputs(name))


@native_only
@each_tiny
def test_gradient_penalty(name):
    """The gradient of a squared gradient, as the reference gives it."""

    def penalty(backend):
        inputs = tiny_inputs(name)
        grads = torch.autograd.grad(tiny_call(name, backend)(*inputs).square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    for found, wanted in zip(penalty("native"), penalty("reference"), strict=True):
        close(found, wanted)


@native_only
@each_tiny
def test_retain_graph(name):
    """A second backward through the same graph gives the same again; without retain_graph torch refuses it."""
    inputs = tiny_inputs(name, torch.float32)
    out = tiny_call(name, "native")(*inputs)
    grad = random_grad(out)
    first = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    second = torch.autograd.grad(out, inputs, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, inputs, grad)


@native_only
@each_tiny
def test_an_input_changed_in_between_is_noticed(name):
    inputs = tiny_inputs(name)
    out = tiny_call(name, "native")(*inputs)
    with torch.no_grad():
        inputs[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@each_backend
@each_tiny
def test_batched_gradients(name, backend):
    """Jacobian rows in one backward pass: is_grads_batched, vmap over a vjp, jacrev."""
    call, inputs = tiny_call(name, backend), tiny_inputs(name)
    out = call(*inputs)
    grads = torch.stack([random_grad(out), torch.ones_like(out), torch.zeros_like(out)]).detach()
    singly = [torch.autograd.grad(out, inputs, g, retain_graph=True) for g in grads]
    wanted = [torch.stack(g) for g in zip(*singly, strict=True)]
    plain = [t.detach() for t in inputs]
    _, pullback = torch.func.vjp(call, *plain)
    for found in (
        torch.autograd.grad(out, inputs, grads, is_grads_batched=True),
        torch.func.vmap(pullback)(grads),
    ):
        for a, b in zip(found, wanted, strict=True):
            close(a, b)
    jacobians = torch.func.jacrev(call, argnums=tuple(range(len(plain))))(*plain)
    for jacobian, b in zip(jacobians, wanted, strict=True):
        close(torch.tensordot(grads, jacobian, out.dim()), b)


@each_backend
@each_tiny
def test_torch_func(name, backend):
    """grad, per-row gradients by vmap over grad, jvp; values equal autograd's."""
    call = tiny_call(name, backend)
    inputs = tiny_inputs(name)
    wanted = torch.autograd.grad(call(*inputs).square().sum(), inputs)
    plain = [t.detach() for t in inputs]
    found = torch.func.grad(lambda *t: call(*t).square().sum(), argnums=tuple(range(len(plain))))(*plain)
    for a, b in zip(found, wanted, strict=True):
        close(a, b)
    rows = torch.func.vmap(torch.func.grad(lambda *t: call(*t).square().sum()), in_dims=(0, *(None for _ in plain[1:])))
    several = torch.stack([plain[0], 2 * plain[0]])
    assert torch.allclose(rows(several, *plain[1:])[0], wanted[0])
    out, along = torch.func.jvp(call, tuple(plain), tuple(torch.ones_like(t) for t in plain))
    step = 1e-6
    ahead = [call(*(t + s * step for t in plain)) for s in (1, -1)]
    close(along, (ahead[0] - ahead[1]) / (2 * step), 1e-7)


@each_backend
@each_tiny
def test_vmap(name, backend):
    """An ensemble: vmap over every tensor at once."""
    call = tiny_call(name, backend)
    two = [torch.stack([t.detach(), t.detach().flip(0)]) for t in tiny_inputs(name)]
    found = torch.func.vmap(call)(*two)
    for i in range(2):
        close(found[i], call(*(t[i] for t in two)))


@native_only
@each_tiny
def test_checkpoint(name):
    inputs = tiny_inputs(name)
    call = tiny_call(name, "native")
    wanted = torch.autograd.grad(call(*inputs).square().sum(), inputs)
    for reentrant in (False, True):
        out = checkpoint(call, *inputs, use_reentrant=reentrant)
        if reentrant:
            for t in inputs:
                t.grad = None
            out.square().sum().backward()
            found = [t.grad for t in inputs]
        else:
            found = torch.autograd.grad(out.square().sum(), inputs)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def op_calls():
    """Dispatcher ops with arguments that stand for all: forward, twin and backward of both operators."""
    ops = torch.ops.mtlkernels
    for name in (*SOME, "mix static packed", "mix unit native"):
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


@each_backend
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, backend):
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


@native_only
@some
def test_many_threads_at_once(name):
    """Python threads share nothing that they could hurt in each other's calls."""
    call = tiny_call(name, "native")
    big = MIX["both, over two blocks"]
    wide = LINEAR["over a batch block"]

    def work(i):
        small = torch.autograd.grad(call(*inputs).square().sum(), inputs)
        mixed = outcome(lambda *t: big(*t, backend="native"), big.tensors(torch.float32))
        linear = outcome(lambda *t: wide(*t, activation="gelu", backend="native"), wide.tensors(torch.bfloat16))
        return [*small, mixed.out, *mixed.grads, linear.out, *linear.grads]

    inputs = tiny_inputs(name)
    wanted = work(0)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(work, range(24)):
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@native_only
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_fork_after_use():
    """A child forked after the kernels ran, as data loaders fork, gives the same."""
    case = MIX["both, over two blocks"]
    linear = LINEAR["over a batch block"]

    def work():
        return [
            *(outcome(lambda *t: case(*t, backend="native"), case.tensors(torch.float32)).grads),
            *(outcome(lambda *t: linear(*t, activation="gelu", backend="native"), linear.tensors(torch.float32)).grads),
        ]

    wanted = work()

    def child():
        torch.set_num_threads(1)
        same = all(torch.equal(a, b) for a, b in zip(work(), wanted, strict=True))
        sys.exit(0 if same else 3)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(30)
    stuck = process.is_alive()
    if stuck:
        process.kill()
        process.join()
    assert not stuck and process.exitcode == 0
    assert all(torch.equal(a, b) for a, b in zip(work(), wanted, strict=True))


def test_the_table_is_whole():
    """Every form meets every shape that allows it."""
    missing = {f"{form}, {shape}" for form in FORMS for shape in SHAPES} - MIX.keys()
    assert all(name.startswith("unit native") for name in missing), missing
    assert over(TINY) and len(TINY) == len(FORMS) + 2
