"""snr_linear as a dispatcher op: gradcheck, torch.func, opcheck, shape functions, compile, export."""

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mtl
from mtlkernels.ops.snr_linear import _backward_fake, _forward_fake

from .cases import close, each_backend, native_only
from .test_snr_linear import CASES, Snr, each_skip, on


# Under finite differences a skipped gate of 0 would open, so that case has none.
@each_backend
@pytest.mark.parametrize("skip, closed", [(False, 0.5), (True, 0)])
def test_gradcheck(skip, closed, backend):
    inputs = [t.requires_grad_() for t in Snr(2, 2, 3, 2, 3, closed).tensors()]
    call = on(backend, "silu", skip)
    torch.autograd.gradcheck(call, inputs, check_batched_grad=True)
    torch.autograd.gradgradcheck(call, inputs)


@each_backend
@each_skip
def test_torch_func(skip, backend):
    """Batched gradients, vmap and forward mode agree with plain autograd."""
    plain = Snr(3, 2, 3, 2, 4, 0.5).tensors()
    inputs = [t.clone().requires_grad_() for t in plain]
    call = on(backend, "tanh", skip)
    out = call(*inputs)
    grads = torch.randn(3, *out.shape, dtype=out.dtype)
    singly = [torch.autograd.grad(out, inputs, g, retain_graph=True) for g in grads]
    together = torch.autograd.grad(out, inputs, grads, is_grads_batched=True)
    _, pullback = torch.func.vjp(call, *plain)
    for i, (a, b) in enumerate(zip(together, torch.func.vmap(pullback)(grads), strict=True)):
        close(a, torch.stack([g[i] for g in singly]))
        close(b, a)
    two = [torch.stack([t, t.flip(0)]) for t in plain]
    for i, found in enumerate(torch.func.vmap(call)(*two)):
        close(found, call(*(t[i] for t in two)))
    _, along = torch.func.jvp(call, tuple(plain), tuple(t.cos() for t in plain))
    _, wanted = torch.func.jvp(on("reference", "tanh", skip), tuple(plain), tuple(t.cos() for t in plain))
    close(along, wanted)


@native_only
def test_opcheck():
    ops = torch.ops.mtlkernels
    for activation, skip, dtype in (("gelu", True, torch.float32), ("relu", False, torch.bfloat16)):
        tensors = Snr(4, 2, 3, 3, 5).tensors(dtype, torch.float32)
        leaves = [t.clone().requires_grad_() for t in tensors]
        torch.library.opcheck(ops.snr_linear.default, (*leaves, activation, skip, True))
        y, z = ops.snr_linear_eager(*tensors, activation, skip, True)
        saved = z if activation == "gelu" else y
        back = (torch.ones_like(y), *tensors[:3], saved, activation, skip, 15)
        torch.library.opcheck(ops.snr_linear_backward.default, back)


@native_only
def test_fake_kernels_tell_the_truth():
    def compare(op, fake, args):
        meta = [a.to("meta") if isinstance(a, Tensor) else a for a in args]
        found = op(*args)
        for real, told in zip(found, fake(*meta), strict=True):
            assert real.shape == told.shape and real.dtype == told.dtype and real.stride() == told.stride()
        return found

    ops = torch.ops.mtlkernels
    for case in CASES.values():
        tensors = case.tensors(torch.float16, torch.float32)
        for save in (False, True):
            y, z = compare(ops.snr_linear_eager, _forward_fake, (*tensors, "silu", True, save))
        for needs in range(16):
            back = (torch.ones_like(y), *tensors[:3], z, "silu", True, needs)
            compare(ops.snr_linear_backward, _backward_fake, back)


X, W, G = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5, 4), torch.zeros(2, 3)
BIAS, Y = torch.zeros(2, 5), torch.zeros(2, 2, 5)
UNFIT = {
    "activation": ("snr_linear", (X, W, G, None, "swish", False, False)),
    "x": ("snr_linear", (X[:, :2], W, G, None, "", False, False)),
    "gate": ("snr_linear", (X, W, G[:1], None, "", False, False)),
    "gate int": ("snr_linear", (X, W, G.int(), None, "", False, False)),
    "weight dtype": ("snr_linear", (X, W.half(), G, None, "", False, False)),
    "bias": ("snr_linear", (X, W, G, BIAS[:1], "", False, False)),
    "bias dtype": ("snr_linear", (X, W, G, BIAS.double(), "", False, False)),
    "grad": ("snr_linear_backward", (Y[:1], X, W, G, Y, "", False, 15)),
    "saved": ("snr_linear_backward", (Y, X, W, G, Y[:1], "relu", False, 15)),
}


@native_only
@pytest.mark.parametrize("name, args", [pytest.param(*v, id=k) for k, v in UNFIT.items()])
def test_operators_refuse_what_does_not_fit(name, args):
    with pytest.raises((RuntimeError, ValueError)):
        getattr(torch.ops.mtlkernels, name)(*args)


class Level(nn.Module):
    """A routed level that learns its structure."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.bias = nn.Parameter(torch.randn(2, 3, 4, 5)), nn.Parameter(torch.randn(2, 4))
        self.log_alpha, self.backend = nn.Parameter(torch.tensor([[-9.0, 0.2, 9.0], [0.1, -0.3, -9.0]])), backend

    def forward(self, x):
        with mtl.use_backend(self.backend):
            gate = mtl.hard_concrete(self.log_alpha)
            y = mtl.snr_linear(x, self.weight, gate, self.bias, activation="silu", skip_closed=True)
            return y, mtl.hard_concrete_l0(self.log_alpha)


def step(module, level, x):
    y, penalty = module(x)
    return y.detach(), *torch.autograd.grad(y.square().sum() + penalty, [*level.parameters()])


@each_backend
def test_compile(backend):
    """One graph, no recompilation from one batch size to the next, eager's values and gradients."""
    torch._dynamo.reset()
    level = Level(backend)
    below = "aot_eager" if backend == "native" else "eager"
    compiled = torch.compile(level, fullgraph=True, backend=below, dynamic=True)
    x = torch.randn(70, 3, 5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (7, 4, 70):
            for a, b in zip(step(compiled, level, x[:batch]), step(level, level, x[:batch]), strict=True):
                close(a, b)
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=native_only)])
def test_export_keeps_gradients(backend):
    level = Level(backend)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(level, (torch.randn(4, 3, 5),), dynamic_shapes=({0: batch},))
    module = program.module()
    for rows in (4, 11):
        x = torch.randn(rows, 3, 5)
        for a, b in zip(step(module, module, x), step(level, level, x), strict=True):
            close(a, b)
    if backend == "native":
        targets = {str(node.target) for node in program.graph.nodes}
        assert {"mtlkernels.snr_linear.default", "mtlkernels.hard_concrete.default"} <= targets
