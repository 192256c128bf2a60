"""What both losses share with every operator: derivatives, compile, export, threads, autocast."""

import sys
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import mtlkernels as mtl
from mtlkernels import backend as choice

from .cases import close, each_backend, each_dtype, native_only, outcome, same_bits, same_bits_with_any_threads

GEN = torch.Generator().manual_seed(3)
CLICK = torch.tensor([1.0, 0, 1, 0.4, 0])
CONVERSION = torch.tensor([1.0, 0, 0, 0.7, 0])
LABELS = torch.rand(5, 3, generator=GEN)
MASK = torch.tensor([[1, 0, 1], [1, 0, 0], [0, 0, 1], [1, 0, 1], [1, 0, 1]]).bool()
LOSSES = {
    "esmm": (
        lambda a, c, backend=None: mtl.esmm_loss(a, c, CLICK, CONVERSION, ctcvr_weight=0.7, backend=backend),
        lambda: [torch.randn(5, generator=GEN, dtype=torch.float64) for _ in range(2)],
    ),
    "bce": (
        lambda x, backend=None: mtl.masked_bce(x, LABELS, backend=backend),
        lambda: [torch.randn(5, 3, generator=GEN, dtype=torch.float64)],
    ),
    "bce masked": (
        lambda x, backend=None: mtl.masked_bce(x, LABELS, MASK, backend=backend),
        lambda: [torch.randn(5, 3, generator=GEN, dtype=torch.float64)],
    ),
}
each_loss = pytest.mark.parametrize("call, inputs", [pytest.param(*v, id=k) for k, v in LOSSES.items()])


def leaves(inputs) -> list[torch.Tensor]:
    return [t.requires_grad_() for t in inputs()]


@each_backend
@each_loss
def test_derivatives(call, inputs, backend):
    def on_backend(*t):
        return call(*t, backend=backend)

    torch.autograd.gradcheck(on_backend, leaves(inputs), check_batched_grad=True)
    torch.autograd.gradgradcheck(on_backend, leaves(inputs))


@each_backend
def test_second_derivative_at_large_logits(backend):
    """Finite where an exponential of a difference of logits would overflow, and where both terms are equal."""
    a, c = (torch.tensor(v).requires_grad_() for v in ([200.0, -150, 200, 90], [200.0, 120, -120, 90]))
    zero = torch.zeros(4)
    loss = mtl.esmm_loss(a, c, zero, zero, backend=backend)
    first = torch.autograd.grad(loss, [a, c], create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in first), [a, c])
    assert all(g.isfinite().all() for g in second)


@each_backend
@each_loss
def test_functional_transforms(call, inputs, backend):
    """torch.func's grad, jvp and vmap, forward mode, and gradients in batches."""
    args = inputs()

    def total(*t):
        return call(*t, backend=backend).square().sum()

    wanted = torch.autograd.grad(total(*(leaf := [t.clone().requires_grad_() for t in args])), leaf)
    which = tuple(range(len(args)))
    for found, want in zip(torch.func.grad(total, which)(*args), wanted, strict=True):
        close(found, want)
    _, along = torch.func.jvp(total, tuple(args), tuple(torch.ones_like(t) for t in args))
    close(along, sum(g.sum() for g in wanted))
    with forward_ad.dual_level():
        out = total(*(forward_ad.make_dual(t, torch.ones_like(t)) for t in args))
        close(forward_ad.unpack_dual(out).tangent, along)
    several = [torch.stack([t, 2 * t]) for t in args]
    per_model = torch.func.vmap(torch.func.grad(total, which))(*several)
    for found, want in zip(per_model, wanted, strict=True):
        close(found[0], want)
    out = call(*leaf, backend=backend)
    grads = torch.stack([torch.ones_like(out), 2 * torch.ones_like(out)])
    batched = torch.autograd.grad(out, leaf, grads, is_grads_batched=True)
    for found, want in zip(batched, torch.autograd.grad(call(*leaf, backend=backend).sum(), leaf), strict=True):
        close(found[1], 2 * want)


@native_only
@each_loss
def test_graph_is_kept_and_guarded(call, inputs):
    """A second backward gives the same; an input changed in between is noticed."""
    given = leaves(inputs)
    loss = call(*given, backend="native").sum()
    first, second = (torch.autograd.grad(loss, given, retain_graph=True) for _ in range(2))
    assert all(torch.equal(f, s) for f, s in zip(first, second, strict=True))
    with torch.no_grad():
        given[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@native_only
@each_dtype
def test_threads_change_nothing(dtype):
    gen = torch.Generator().manual_seed(0)
    a, c = torch.randn(2, 60000, generator=gen).to(dtype)
    click = torch.rand(60000, generator=gen)
    x, y, m = (f(20000, 5, generator=gen) for f in (torch.randn, torch.rand, torch.rand))
    x = x.to(dtype)
    same_bits_with_any_threads(lambda a, c: mtl.esmm_loss(a, c, click, click, backend="native"), lambda: (a, c))
    for mask in (None, m < 0.6, m):
        same_bits_with_any_threads(lambda x, mask=mask: mtl.masked_bce(x, y, mask, backend="native"), lambda: (x,))


@native_only
@each_dtype
def test_equal_rows_get_equal_bits(dtype):
    """A row's gradient does not depend on where it stands, in a vector or in the rest behind the last one."""
    rows = 523
    a, c = torch.tensor([1.7, -0.3]).to(dtype)
    found = outcome(lambda a, c: mtl.esmm_loss(a, c, torch.ones(rows), torch.full((rows,), 0.3), backend="native"),
                    [a.expand(rows), c.expand(rows)])  # fmt: skip
    for grad in found.grads:
        assert (grad == grad[0]).all()
    x = torch.randn(1, 5).to(dtype).expand(rows, 5)
    grad = outcome(lambda x: mtl.masked_bce(x, LABELS[:1].repeat(rows, 2)[:, :5], backend="native"), [x]).grads[0]
    assert torch.equal(grad, grad[:1].expand_as(grad))


@each_backend
def test_autocast(backend):
    """The loss is in float32 and the same as outside; the logits' dtype is what the towers gave."""
    for call, inputs in LOSSES.values():
        given = [t.bfloat16() for t in inputs()]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = outcome(lambda *t, call=call: call(*t, backend=backend), given)
        assert found.out.dtype == torch.float32
        same_bits(found, outcome(lambda *t, call=call: call(*t, backend=backend), given))


def op_calls(dtype: torch.dtype = torch.float32):
    """The dispatcher ops with arguments that stand for all."""
    ops = torch.ops.mtlkernels
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    a, c, x = torch.randn(5).to(dtype), torch.randn(5).to(dtype), torch.randn(5, 3).to(dtype)
    yield ops.esmm_loss, (a, c, CLICK, CONVERSION, 0.5)
    yield ops.esmm_loss_backward, (torch.tensor(2.0, dtype=acc), *ops.esmm_loss(a, c, CLICK, CONVERSION, 0.5)[1:])
    for mask in (None, MASK, LABELS):
        yield ops.masked_bce, (x, LABELS, mask)
        loss, dlogits = ops.masked_bce(x, LABELS, mask)
        yield ops.masked_bce_backward, (torch.ones_like(loss), dlogits)


@native_only
def test_opcheck():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for op, args in op_calls():
            if "backward" not in str(op):
                logits = 2 if "esmm" in str(op) else 1
                args = [t.clone().requires_grad_() if i < logits else t for i, t in enumerate(args)]
            try:
                torch.library.opcheck(op.default, tuple(args))
            except Exception as error:
                raise AssertionError(f"{op}: {error}") from error


@native_only
@each_dtype
def test_fake_kernels_tell_the_truth(dtype):
    """Shapes, dtypes and strides of the meta tensors are those of the real ones."""
    modules = sys.modules["mtlkernels.ops.esmm_loss"], sys.modules["mtlkernels.ops.masked_bce"]
    for op, args in op_calls(dtype):
        module = modules["masked" in str(op)]
        fake = module._backward_fake if "backward" in str(op) else module._forward_fake
        meta = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in args]
        real, told = op(*args), fake(*meta)
        for one, other in zip(*((r if isinstance(r, tuple) else (r,)) for r in (real, told)), strict=True):
            assert one.shape == other.shape and one.dtype == other.dtype and one.stride() == other.stride(), op


V, M = torch.zeros(4), torch.zeros(4, 2)
UNFIT = {
    "two dimensions": ("esmm_loss", (M, M, M, M, 1.0)),
    "lengths": ("esmm_loss", (V, V, V[:3], V, 1.0)),
    "dtypes": ("esmm_loss", (V, V.double(), V, V, 1.0)),
    "int logits": ("esmm_loss", (V.int(), V.int(), V, V, 1.0)),
    "label dtype": ("esmm_loss", (V, V, V.to(torch.int16), V, 1.0)),
    "esmm grad": ("esmm_loss_backward", (V, V, V)),
    "esmm grad dtype": ("esmm_loss_backward", (V[0].double(), V, V)),
    "one dimension": ("masked_bce", (V, V, None)),
    "labels": ("masked_bce", (M, M[:3], None)),
    "mask": ("masked_bce", (M, M, M[:, :1])),
    "bce grad": ("masked_bce_backward", (V, M)),
    "bce grad dtype": ("masked_bce_backward", (V[:2].double(), M)),
    "saved dtype": ("masked_bce_backward", (V[:2].half(), M.half())),
}


@native_only
@pytest.mark.parametrize("name, args", [pytest.param(*v, id=k) for k, v in UNFIT.items()])
def test_operators_refuse_what_does_not_fit(name, args):
    with pytest.raises(RuntimeError):
        getattr(torch.ops.mtlkernels, name)(*args)


class Network(nn.Module):
    """Two towers and both losses of them."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.towers, self.backend = nn.Linear(4, 2), backend

    def forward(self, x, labels, mask):
        logits = self.towers(x)
        click, conversion = labels.unbind(1)
        esmm = mtl.esmm_loss(logits[:, 0], logits[:, 1:].squeeze(1), click, conversion * click, backend=self.backend)
        return esmm + mtl.masked_bce(logits, labels, mask, backend=self.backend).sum()


def step(module, network, rows: int) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 4, generator=gen)
    labels, mask = (torch.rand(rows, 2, generator=gen) < 0.5 for _ in range(2))
    loss = module(x, labels.float(), mask)
    return [loss.detach(), *torch.autograd.grad(loss, list(network.parameters()))]


@each_backend
def test_compile(backend, monkeypatch):
    """One graph, no recompilation from one batch size to the next, eager's values and gradients."""
    monkeypatch.setattr(choice, "_chosen", {})  # as in a fresh process
    torch._dynamo.reset()
    network = Network(backend)
    below = "aot_eager" if backend == "native" else "eager"
    compiled = torch.compile(network, fullgraph=True, backend=below, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (7, 4, 70):
            for found, want in zip(step(compiled, network, rows), step(network, network, rows), strict=True):
                close(found, want)
    torch._dynamo.reset()


@each_backend
def test_export_keeps_gradients(backend):
    network = Network(backend)
    shape = ({0: torch.export.Dim("batch", min=2)},) * 3
    example = torch.randn(4, 4), torch.ones(4, 2), torch.ones(4, 2, dtype=torch.bool)
    program = torch.export.export(network, example, dynamic_shapes=shape)
    module = program.module()
    for rows in (4, 11):
        for found, want in zip(step(module, module, rows), step(network, network, rows), strict=True):
            close(found, want)
    if backend == "native":
        targets = {str(node.target) for node in program.graph.nodes}
        assert {"mtlkernels.esmm_loss.default", "mtlkernels.masked_bce.default"} <= targets


@native_only
def test_explain():
    assert mtl.explain("masked_bce", M, M).startswith("masked_bce on cpu, float32: native")
    assert "esmm_loss on cpu, float64: reference" in mtl.explain("esmm_loss", V.double(), backend="reference")
