"""Outputs that got no gradient: none, or all but the logsumexp of a mixture. One tensor alone that wants a gradient."""

import pytest
import torch

from tests.gpu.subjects import USUAL

from .cases import MIX, close, each_backend, native_only, outcome


class Nothing(torch.autograd.Function):
    """Gives no gradient: not zeros, but nothing, as a custom function may."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@each_backend
@pytest.mark.parametrize("name", USUAL)
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
def test_no_gradient_comes(name, traced, backend, monkeypatch):
    """By way of the eager call, and of the operator that compiled and exported graphs hold."""
    subject = USUAL[name]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: traced)
    leaves = [None if t is None else t.requires_grad_() for t in subject.make(torch.float32)]
    out = subject.bind("cpu")(*leaves, backend=backend)
    assert out.requires_grad
    Nothing.apply(out).sum().backward()
    assert all(leaf is None or leaf.grad is None or not leaf.grad.any() for leaf in leaves)


@each_backend
@pytest.mark.parametrize("name", [name for name in USUAL if name.startswith("partitioned_norm")])
def test_a_norm_without_gradient_passes_none_on(name, backend):
    leaves = [t.requires_grad_() for t in USUAL[name].make(torch.float32)]
    Nothing.apply(USUAL[name].bind("cpu")(*leaves, backend=backend)).sum().backward()
    assert all(leaf.grad is None for leaf in leaves)


@each_backend
@pytest.mark.parametrize("name", USUAL)
def test_one_tensor_alone_wants_a_gradient(name, backend):
    """By the short way as well, which the default backend takes once its kernel has been chosen."""
    subject = USUAL[name]
    tensors, call = subject.make(torch.float64), subject.bind("cpu")
    every = outcome(lambda *t: call(*t, backend="reference"), tensors, subject.grad)
    for given in (backend, None) if "hard" not in name else (backend,):
        call(*tensors, backend=given)
        for i, tensor in enumerate(tensors):
            if tensor is None:
                continue
            needs = [n == i for n in range(len(tensors))]
            alone = outcome(lambda *t, g=given: call(*t, backend=g), tensors, subject.grad, needs)
            close(alone.grads[i], every.grads[i], 1e-11, f"{given} {i}", subject.floor)


@native_only
@pytest.mark.parametrize("name", ["logits, odd", "both masked, odd"])
def test_gradient_of_the_logsumexp_of_a_mix(name):
    case = MIX[name]
    experts, logits, static, mask, columns, native = case.op_args(torch.float64)
    experts.requires_grad_(), logits.requires_grad_()
    _, lse = torch.ops.mtlkernels.mix(experts, logits, static, mask, columns, native)
    plain = logits if mask is None else logits.masked_fill(~mask, -torch.inf)
    some = torch.ones(logits.shape[1], dtype=torch.bool) if mask is None else mask.any(-1)
    wanted = torch.logsumexp(plain[:, some], -1)
    close(lse[:, some].detach(), wanted.detach())
    grad = torch.randn(wanted.shape, dtype=torch.float64)
    found = torch.autograd.grad(lse[:, some], (experts, logits), grad)
    assert not found[0].any()
    close(found[1], torch.autograd.grad(wanted, logits, grad)[0])
