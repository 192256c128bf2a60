"""star_linear among torch's machinery: derivatives of derivatives, batches of gradients, compile, export, checks."""

import itertools
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import mtlkernels as mtl
from mtlkernels import backend as choice
from mtlkernels.ops import star_linear as star_op

from .cases import Outcome, close, each_backend, native_only, random_grad
from .test_star_linear import CASES, TINY

IDS = torch.tensor([2, 0, 3, 2])
X, W, V, C, D = TINY.tensors(torch.float32)


def call(backend, activation="silu"):
    """TINY as a function of its tensors alone. A domain has two of the four rows, another none."""
    return lambda x, *t: mtl.star_linear(x, IDS, *t, activation=activation, backend=backend)


def inputs(dtype=torch.float64):
    return [t.clone().requires_grad_() for t in TINY.tensors(dtype)]


@each_backend
@pytest.mark.parametrize("activation", [None, "gelu", "silu", "tanh", "sigmoid"])
def test_gradcheck(activation, backend):
    torch.autograd.gradcheck(call(backend, activation), inputs(), check_batched_grad=True)
    torch.autograd.gradgradcheck(call(backend, activation), inputs())


@each_backend
@pytest.mark.parametrize("given", [(True, False), (False, True), (False, False)])
def test_gradcheck_without_biases(given, backend):
    def without(x, w, v, *biases):
        left = iter(biases)
        return call(backend, "tanh")(x, w, v, *(next(left) if there else None for there in given))

    tensors, biases = inputs()[:3], inputs()[3:]
    torch.autograd.gradcheck(without, (*tensors, *(b for b, there in zip(biases, given, strict=True) if there)))


@native_only
def test_gradient_penalty():
    def penalty(backend):
        leaves = inputs()
        grads = torch.autograd.grad(call(backend)(*leaves).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    for found, wanted in zip(penalty("native"), penalty("reference"), strict=True):
        close(found, wanted)


@native_only
def test_retain_graph_and_changed_inputs():
    leaves = inputs(torch.float32)
    out = call("native")(*leaves)
    grad = random_grad(out)
    first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    second = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with torch.no_grad():
        leaves[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, leaves, grad)
    ids = IDS.clone()
    out = mtl.star_linear(*inputs()[:1], ids, *inputs()[1:3], backend="native")
    ids.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@each_backend
def test_batched_gradients_and_torch_func(backend):
    """is_grads_batched, vmap over a vjp, jacrev, grad, per-row gradients, jvp, an ensemble by vmap."""
    f, leaves = call(backend), inputs()
    out = f(*leaves)
    grads = torch.stack([random_grad(out), torch.ones_like(out), torch.zeros_like(out)]).detach()
    singly = [torch.autograd.grad(out, leaves, g, retain_graph=True) for g in grads]
    wanted = [torch.stack(g) for g in zip(*singly, strict=True)]
    plain = [t.detach() for t in leaves]
    _, pullback = torch.func.vjp(f, *plain)
    for found in (
        torch.autograd.grad(out, leaves, grads, is_grads_batched=True),
        torch.func.vmap(pullback)(grads),
    ):
        for a, b in zip(found, wanted, strict=True):
            close(a, b)
    for jacobian, b in zip(torch.func.jacrev(f, argnums=tuple(range(5)))(*plain), wanted, strict=True):
        close(torch.tensordot(grads, jacobian, out.dim()), b)
    _, along = torch.func.jvp(f, tuple(plain), tuple(torch.ones_like(t) for t in plain))
    ahead = [f(*(t + s * 1e-6 for t in plain)) for s in (1, -1)]
    close(along, (ahead[0] - ahead[1]) / 2e-6, 1e-7)
    two = [torch.stack([t, t.flip(0)]) for t in plain]
    found = torch.func.vmap(f)(*two)
    for i in range(2):
        close(found[i], f(*(t[i] for t in two)))


@each_backend
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode(requires_grad, backend):
    leaves = [t.detach().requires_grad_(requires_grad) for t in inputs()]
    ones = tuple(torch.ones_like(t) for t in leaves)
    _, wanted = torch.func.jvp(call("reference"), tuple(t.detach() for t in leaves), ones)
    with forward_ad.dual_level():
        out = call(backend)(*(forward_ad.make_dual(t, one) for t, one in zip(leaves, ones, strict=True)))
        close(forward_ad.unpack_dual(out).tangent.detach(), wanted)


@native_only
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_and_inference_mode(reentrant):
    leaves, f = inputs(), call("native")
    wanted = torch.autograd.grad(f(*leaves).square().sum(), leaves)
    checkpoint(f, *leaves, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(t.grad, w) for t, w in zip(leaves, wanted, strict=True))
    with torch.inference_mode():
        assert torch.equal(f(*leaves), f(*(t.detach() for t in leaves)))


def test_meta_tensors():
    leaves = [t.detach().to("meta").requires_grad_() for t in inputs()]
    out = mtl.star_linear(leaves[0], IDS.to("meta"), *leaves[1:], activation="gelu")
    assert out.is_meta and out.shape == (TINY.batch, TINY.outputs)
    out.sum().backward()
    assert all(t.grad.shape == t.shape for t in leaves)


@native_only
def test_opcheck():
    ops = torch.ops.mtlkernels
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for (activation, save), biases in itertools.product((("gelu", True), ("relu", False)), ((C, D), (None, D))):
            tensors = [t if t is None else t.clone().requires_grad_() for t in (X, W, V, *biases)]
            args = tensors[0], IDS, *tensors[1:], activation, save
            torch.library.opcheck(ops.star_linear.default, args)
            y, z = ops.star_linear_eager(*args)
            back = torch.ones_like(y), X, IDS, W, V, (z if save else y).detach(), activation, 31
            torch.library.opcheck(ops.star_linear_backward.default, back)


@native_only
def test_fake_kernels_tell_the_truth():
    fakes = sys.modules[star_op.__module__]

    def compare(op, fake, args):
        meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
        found = op(*args)
        for real, told in zip(found, fake(*meta), strict=True):
            assert real.shape == told.shape and real.dtype == told.dtype and real.stride() == told.stride()
        return found

    ops = torch.ops.mtlkernels
    for case in CASES.values():
        for dtype, activation in ((torch.float32, "silu"), (torch.float16, "tanh")):
            x, *rest = case.tensors(dtype)
            for save in (False, True):
                args = x, case.domain, *rest, activation, save
                y, z = compare(ops.star_linear_eager, fakes._forward_fake, args)
            for needs in (0, 1, 2, 4, 8, 16, 31):
                back = torch.ones_like(y), x, case.domain, *rest[:2], z if activation == "silu" else y, activation
                compare(ops.star_linear_backward, fakes._backward_fake, (*back, needs))


Y, NONE = torch.zeros(TINY.batch, TINY.outputs), torch.zeros(0)
UNFIT = {
    "activation": (X, IDS, W, V, None, None, "swish", False),
    "K": (X[:, :2], IDS, W, V, None, None, "", False),
    "N": (X, IDS, W[:1], V, None, None, "", False),
    "weight": (X, IDS, W.double(), V, None, None, "", False),
    "domain_weight": (X, IDS, W, V.double(), None, None, "", False),
    "domain": (X, IDS[:2], W, V, None, None, "", False),
    "domain float": (X, IDS.float(), W, V, None, None, "", False),
    "domain bool": (X, IDS.bool(), W, V, None, None, "", False),
    "bias": (X, IDS, W, V, C[:1], None, "", False),
    "bias dtype": (X, IDS, W, V, C.double(), None, "", False),
    "domain_bias": (X, IDS, W, V, None, C, "", False),
    "int": (X.int(), IDS, W.int(), V.int(), None, None, "", False),
    "saved": (Y, X, IDS, W, V, NONE, "relu", 31),
    "grad": (Y[:, :1], X, IDS, W, V, NONE, "", 31),
    "grad dtype": (Y.double(), X, IDS, W, V, NONE, "", 31),
}


@native_only
@pytest.mark.parametrize("args", [pytest.param(v, id=k) for k, v in UNFIT.items()])
def test_the_operator_refuses_what_does_not_fit(args):
    """Below the public function too: what would be read out of bounds, or as another type, raises."""
    op = torch.ops.mtlkernels.star_linear_backward if args[-1] == 31 else torch.ops.mtlkernels.star_linear
    with pytest.raises((RuntimeError, ValueError)):
        op(*args)


class Network(nn.Module):
    """Two layers of STAR."""

    def __init__(self, backend: str | None = None) -> None:
        super().__init__()
        gen = torch.Generator().manual_seed(0)
        shapes = (6, 5), (3, 6, 5), (6,), (3, 6), (1, 6), (3, 1, 6)
        self.params = nn.ParameterList(nn.Parameter(torch.randn(s, generator=gen)) for s in shapes)
        self.backend = backend

    def forward(self, x, domain):
        w, v, c, d, w2, v2 = self.params
        h = mtl.star_linear(x, domain, w, v, c, d, activation="silu", backend=self.backend)
        return mtl.star_linear(h, domain, w2, v2, backend=self.backend).squeeze(-1)


def batch(rows):
    gen = torch.Generator().manual_seed(rows)
    return torch.randn(rows, 5, generator=gen), torch.randint(3, (rows,), generator=gen)


def assert_same_step(found, wanted):
    close(found.out, wanted.out)
    for a, b in zip(found.grads, wanted.grads, strict=True):
        close(a, b, floor=1)


def step(module, network, rows):
    """Output, and gradients of x and the parameters."""
    x, domain = batch(rows)
    x.requires_grad_()
    out = module(x, domain)
    grads = torch.autograd.grad(out.square().sum(), [x, *network.parameters()])
    return Outcome(out.detach(), list(grads))


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
        for rows in (7, 4, 300):
            assert_same_step(step(compiled, network, rows), step(network, network, rows))
    with torch.no_grad():
        assert torch.equal(compiled(*batch(300)), network(*batch(300)))


@native_only
@pytest.mark.skipif(sys.platform != "linux", reason="needs a compiler")
def test_inductor(fresh_dynamo):
    network = Network("native")
    compiled = torch.compile(network, fullgraph=True, dynamic=True)
    assert_same_step(step(compiled, network, 9), step(network, network, 9))


@pytest.mark.parametrize(
    "backend, strict",
    [("reference", False), *(pytest.param("native", strict, marks=native_only) for strict in (False, True))],
)
def test_export(backend, strict):
    """An exported module trains: its parameters get the same gradients, at another batch size too."""
    network = Network(backend)
    rows = torch.export.Dim("rows", min=2)
    shapes = {"x": {0: rows}, "domain": {0: rows}}
    program = torch.export.export(network, batch(4), dynamic_shapes=shapes, strict=strict)
    module = program.module()
    for n in (4, 11, 300):
        assert_same_step(step(module, module, n), step(network, network, n))
    if backend == "native":
        assert "mtlkernels.star_linear.default" in {str(node.target) for node in program.graph.nodes}
        with pytest.raises(RuntimeError, match="domain must hold ids from 0 to P-1 = 2; got 9"):
            module(torch.zeros(2, 5), torch.tensor([0, 9]))
