"""expert_mix under autograd's finer tools and the compiler, and the memory that it takes."""

import itertools
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import mtlkernels as mtl

from .cases import close, each_backend, native_only, over
from .test_expert_mix import SHAPES, TINY, make

each_tiny = pytest.mark.parametrize("case", over(TINY))


def inputs_of(case, dtype=torch.float64):
    return [t.clone().requires_grad_() for t in case.tensors(dtype) if t is not None]


def call_of(case, backend, activation="silu"):
    given = [t is not None for t in case.tensors()]

    def call(*tensors):
        left = iter(tensors)
        every = [next(left) if there else None for there in given]
        return case(*every, activation=activation, backend=backend)

    return call


@each_backend
@each_tiny
def test_gradcheck(case, backend):
    torch.autograd.gradcheck(call_of(case, backend), inputs_of(case), check_batched_grad=True)
    torch.autograd.gradgradcheck(call_of(case, backend, "tanh"), inputs_of(case))


@each_backend
@each_tiny
def test_torch_func(case, backend):
    call, inputs = call_of(case, backend), inputs_of(case)
    wanted = torch.autograd.grad(call(*inputs).square().sum(), inputs)
    plain = [t.detach() for t in inputs]
    found = torch.func.grad(lambda *t: call(*t).square().sum(), argnums=tuple(range(len(plain))))(*plain)
    for a, b in zip(found, wanted, strict=True):
        close(a, b)
    two = [torch.stack([t, t.flip(0)]) for t in plain]
    for i, out in enumerate(torch.func.vmap(call)(*two)):
        close(out, call(*(t[i] for t in two)))
    _, along = torch.func.jvp(call, tuple(plain), tuple(torch.ones_like(t) for t in plain))
    ahead = [call(*(t + s * 1e-6 for t in plain)) for s in (1, -1)]
    close(along, (ahead[0] - ahead[1]) / 2e-6, 1e-7)


@native_only
@each_tiny
def test_retain_graph_and_changed_inputs(case):
    inputs = inputs_of(case, torch.float32)
    out = call_of(case, "native")(*inputs)
    first = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with torch.no_grad():
        inputs[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def op_calls(case, dtype, activation):
    """Every operator beneath, with its arguments."""
    ops = torch.ops.mtlkernels
    args = case.op_args([t if t is None else t.clone() for t in case.tensors(dtype)], activation)
    out, lse = ops.expert_mix_eager(*args)
    kept = ops.expert_mix_saving_eager(*args)[2]
    yield ops.expert_mix, args
    yield ops.expert_mix_saving, args
    for needs in (31, 0, 9, 22):
        needs = sum(bit for bit, t in zip((1, 2, 4, 8, 16), args, strict=False) if t is not None and needs & bit)
        yield ops.expert_mix_backward, (torch.ones_like(out), None, *args, lse, needs)
        yield ops.expert_mix_saving_backward, (torch.ones_like(out), None, *args, kept, needs)


@native_only
@each_tiny
def test_opcheck(case):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for op, args in op_calls(case, torch.float32, "gelu"):
            backward = "backward" in str(op)
            args = [a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() and not backward
                    else a for a in args]  # fmt: skip
            torch.library.opcheck(op.default, tuple(args))


@native_only
@pytest.mark.parametrize("shape", SHAPES)
def test_fake_kernels_tell_the_truth(shape):
    """Shapes, dtypes and strides of the meta tensors are those of the real ones."""
    for form, dtype in itertools.product(("both", "static packed"), (torch.float64, torch.bfloat16)):
        for op, args in op_calls(make(form, shape), dtype, "relu"):
            meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
            for real, told in zip(op(*args), op(*meta), strict=True):
                assert real.shape == told.shape and real.dtype == told.dtype and real.stride() == told.stride()


X, W, L = torch.zeros(3, 4), torch.zeros(2, 5, 4), torch.zeros(3, 6, 2)
COLUMNS = torch.zeros(6, 2, dtype=torch.int32)
UNFIT = {
    "activation": (X, W, None, L, None, None, None, None, "swish"),
    "K": (X[:, :3], W, None, L, None, None, None, None, ""),
    "bias": (X, W, torch.zeros(3), L, None, None, None, None, ""),
    "counts": (torch.zeros(3, 2, 4), W, None, L, None, None, None, [1, 2], ""),
    "logits batch": (X, W, None, L[:2], None, None, None, None, ""),
    "logits int": (X, W, None, L.int(), None, None, None, None, ""),
    "static": (X, W, None, L, torch.zeros(1), None, None, None, ""),
    "static a channel": (X, W, None, None, torch.zeros(6, 2, 5), None, None, None, ""),
    "neither": (X, W, None, None, None, None, None, None, ""),
    "columns beyond": (X, W, None, L[:, 0], None, None, COLUMNS + 2, None, ""),
    "columns int64": (X, W, None, L[:, 0], None, None, COLUMNS.long(), None, ""),
    "mask float": (X, W, None, L, None, torch.ones(6, 2), None, None, ""),
}


@native_only
@pytest.mark.parametrize("args", over(UNFIT))
def test_operators_refuse_what_does_not_fit(args):
    """Below the public function too: what would be read out of bounds, or as another type, raises."""
    for op in (torch.ops.mtlkernels.expert_mix, torch.ops.mtlkernels.expert_mix_saving):
        with pytest.raises((RuntimeError, ValueError)):
            op(*args)


@native_only
def test_backward_operators_refuse_what_does_not_fit():
    ops, args = torch.ops.mtlkernels, (X, W, None, L, None, None, None, None, "")
    grad, lse, kept = torch.zeros(3, 6, 5), torch.zeros(3, 6), torch.zeros(3, 2, 5)
    for bad in (grad[..., :4], grad.double()):
        with pytest.raises(RuntimeError, match="grad must be"):
            ops.expert_mix_backward(bad, None, *args, lse, 31)
    with pytest.raises(RuntimeError, match="grad_lse must be"):
        ops.expert_mix_backward(grad, lse[:1], *args, lse, 31)
    with pytest.raises(RuntimeError, match="saved must be"):
        ops.expert_mix_saving_backward(grad, None, *args, kept[:2], 31)


class Network(nn.Module):
    def __init__(self, backend: str | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.bias = nn.Parameter(torch.randn(3, 6, 5)), nn.Parameter(torch.randn(3, 6))
        self.gate, self.static = nn.Parameter(torch.randn(10, 5)), nn.Parameter(torch.randn(2, 3))
        self.routes, self.backend = mtl.Routes.by_unit((2, 1), [(0, 1), (1,)]), backend

    def forward(self, x):
        inputs, logits = torch.stack([x, x.sin()], 1), x @ self.gate.t()
        one = mtl.expert_mix(inputs, self.weight, self.bias, logits[:, :6].unflatten(1, (2, 3)), self.static,
                             experts_per_unit=(2, 1), activation="silu", backend=self.backend)  # fmt: skip
        return one + mtl.expert_mix(x, self.weight, None, logits[:, 6:], routes=self.routes, backend=self.backend)


def step(module, x, network):
    x = x.detach().requires_grad_()
    out = module(x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *network.parameters()])]


@each_backend
def test_compile(backend):
    """One graph, no recompilation from one batch size to the next, eager's values and gradients."""
    torch._dynamo.reset()
    network = Network(backend)
    below = "aot_eager" if backend == "native" else "eager"
    compiled = torch.compile(network, fullgraph=True, backend=below, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (7, 4, 70):
            x = torch.randn(batch, 5)
            for found, wanted in zip(step(compiled, x, network), step(network, x, network), strict=True):
                close(found, wanted)
    with torch.no_grad():
        assert torch.equal(compiled(x), network(x))
    torch._dynamo.reset()


@each_backend
def test_export_keeps_gradients(backend):
    network = Network(backend)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(network, (torch.randn(4, 5),), dynamic_shapes=({0: batch},), strict=False)
    module = program.module()
    for rows in (4, 11):
        x = torch.randn(rows, 5)
        for found, wanted in zip(step(module, x, module), step(network, x, network), strict=True):
            close(found, wanted)


# Bytes that the process has from malloc beyond those before the call, its output still alive: the scratch of the
# kernels stays with its thread, so they are counted.
MEMORY = """
import ctypes, sys, torch, mtlkernels as mtl
class Info(ctypes.Structure):
    _fields_ = [(n, ctypes.c_size_t) for n in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]
mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Info
def held():
    info = mallinfo2()
    return info.hblkhd + info.uordblks
torch.set_num_threads(1)
experts = int(sys.argv[1])
x, w, b = torch.randn(4096, 128), torch.randn(experts, 128, 128), torch.randn(experts, 128)
logits = torch.randn(4096, 4, experts)
mtl.expert_mix(x[:0], w[:1], b[:1], logits[:0, :, :1], backend="native")
before = held()
out = mtl.expert_mix(x, w, b, logits, activation="relu", backend="native")
print(held() - before - out.numel() * 4)
"""


@native_only
@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc's malloc")
def test_forward_takes_no_more_memory_for_more_experts():
    """From 8 experts to 256, which would put out 16 and 512 MiB: within 5 %, and a few MiB in all."""
    taken = []
    for experts in (8, 256):
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", MEMORY, str(experts)], capture_output=True,
                              text=True, timeout=300)  # fmt: skip
        if "mallinfo2" in done.stderr:
            pytest.skip("this C library has no mallinfo2")
        assert done.returncode == 0, done.stderr
        taken.append(int(done.stdout))
    assert 0 < taken[0] < 12 << 20
    assert taken[1] <= 1.05 * taken[0], taken
