"""A bank of experts and the mix of their outputs, as one node of the autograd graph where that saves memory.

What the experts' layers put out is seen by nobody else. So on a CPU its gradient can take its place, buffer by buffer,
while backward goes through the layers: a training step needs no memory for these gradients, and reads and writes that
much less. Everywhere else, and where a graph is to be kept or differentiated again, the operators run one by one.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .nn import ExpertLinear, ExpertMLP
from .ops import adatt_mix, expert_linear, mix
from .ops._operator import Operator
from .ops.routes import Routes
from .reference.expert_linear import NEED_INPUT

_LINEAR, _MIX = Operator.all["expert_linear"], Operator.all["mix"]
_PLAIN = frozenset((Tensor, nn.Parameter))


def mixture(
    bank: nn.Module,
    x: Tensor,
    logits: Tensor,
    static: Tensor | None = None,
    *,
    routes: Routes | None = None,
    experts_per_unit: Sequence[int] | None = None,
) -> Tensor:
    """``mix(bank(x), logits, static)``, or with experts_per_unit ``adatt_mix``, whose static weights may be None.

    Args:
        bank: an :class:`ExpertMLP`, or any module [B,K] or [B,U,K] -> [B,E,D].
        x: what the bank reads.
        logits, static, routes: as in :func:`mtlkernels.mix`.
        experts_per_unit: as in :func:`mtlkernels.adatt_mix`; static then holds its native weights.

    Returns:
        [B,T,D] in x's dtype.

    Raises:
        TypeError, ValueError: as the operators do.
    """
    counts = None if experts_per_unit is None else list(experts_per_unit)
    plan = _plan(bank, x, logits, static, None if routes is None else routes.columns, counts)
    if plan is not None:
        layers = [t for linear in bank.linears for t in (linear.weight, linear.bias)]
        try:
            return _apply(plan, x, logits, static, *layers)
        except RuntimeError:
            pass  # the operators, one by one, say what does not fit
    experts = bank(x)
    if experts_per_unit is not None:
        return adatt_mix(experts, logits, static, experts_per_unit=experts_per_unit)
    return mix(experts, logits, static, routes=routes)


class _Plan(NamedTuple):
    """A call's values: experts a unit and activation of each layer, and what the mix takes beside its tensors."""

    counts: list[list[int] | None]
    activations: list[str]
    columns: Tensor | None
    native: list[int] | None


def _plan(
    bank: nn.Module, x: Tensor, logits: Tensor, static: Tensor | None, columns: Tensor | None, native: list[int] | None
) -> _Plan | None:
    """None where the operators have to run one by one."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not _only_layers(bank):
        return None
    if not _LINEAR.goes_straight(x, None) or not _MIX.goes_straight(x, None):
        return None
    # Whoever packs what is saved, as checkpoints do, is to see it: it goes through save_for_backward.
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return None
    tensors = [t for linear in bank.linears for t in (linear.weight, linear.bias) if t is not None]
    if not (x.requires_grad or tensors[0].requires_grad) or any(t.dtype != x.dtype for t in tensors):
        return None
    others = [t for t in (logits, static, columns) if t is not None]
    if not all(type(t) in _PLAIN and t.is_cpu for t in (*tensors, *others)):
        return None
    if native is not None and static is None and native.count(1) != len(native):
        return None  # the op's weights of 1 suit any counts, adatt_mix's do not
    counts = [bank.linears[0].experts_per_unit if x.dim() == 3 else None, *[None] * (len(bank.linears) - 1)]
    return _Plan(counts, [linear.activation or "" for linear in bank.linears], columns, native)


def _only_layers(bank: nn.Module) -> bool:
    """Whether the bank is linear layers and activations by their output, which nobody watches."""
    if type(bank) is not ExpertMLP or nn.modules.module._has_any_global_hook():
        return False
    if bank.training and any(bank.dropouts):
        return False
    parts = zip(bank.linears, bank.norms, bank.activations, strict=True)
    return not _watched(bank) and all(
        type(linear) is ExpertLinear
        and type(norm) is nn.Identity
        and linear.activation == activation
        and activation not in NEED_INPUT
        and not _watched(linear)
        and not _watched(norm)
        for linear, norm, activation in parts
    )


def _watched(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _composed(plan: _Plan, x: Tensor, logits: Tensor, static: Tensor | None, *layers: Tensor | None) -> Tensor:
    """The same by the public operators, which can be differentiated any number of times, and batched."""
    for i, (counts, activation) in enumerate(zip(plan.counts, plan.activations, strict=True)):
        x = expert_linear(x, *layers[2 * i : 2 * i + 2], experts_per_unit=counts, activation=activation or None)
    return _MIX.reference(x, logits, static, None, plan.columns, plan.native)[0]


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, x: Tensor, logits: Tensor, static: Tensor | None, *layers: Tensor) -> Tensor:
        h, outputs = x, []
        for i, (counts, activation) in enumerate(zip(plan.counts, plan.activations, strict=True)):
            h = _LINEAR.kernel(h, layers[2 * i], layers[2 * i + 1], counts, activation, False)
            outputs.append(h)
        ctx.save_for_backward(x, logits, static, *layers)
        ctx.plan, ctx.outputs = plan, outputs  # not saved: backward overwrites them, and lets go of each when it can
        return _MIX.kernel(h, logits, static, None, plan.columns, plan.native)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, plan, needs = ctx.saved_tensors, ctx.plan, ctx.needs_input_grad[1:]
        if torch.is_grad_enabled() or forward_ad._current_level >= 0 or _transformed(grad):
            return None, *_again(plan, saved, needs, grad)
        if torch._C._autograd._get_current_graph_task_keep_graph():
            outputs = [h.clone() for h in ctx.outputs]
        else:
            outputs, ctx.outputs = ctx.outputs, None
        x, logits, static, *layers = saved
        op = torch.ops.mtlkernels
        found = op.mix_backward_into(
            grad,
            outputs[-1],
            logits,
            static,
            plan.columns,
            plan.native,
            plan.activations[-1],
            2 * needs[1] + 4 * needs[2],
        )
        of_mix = [g if need else None for g, need in zip(found, needs[1:3], strict=True)]
        if not (needs[0] or any(needs[3:])):  # the gates' alone were asked for
            return None, None, *of_mix, *(None for _ in layers)
        of_layers: list[Tensor | None] = []
        for i in reversed(range(1, len(plan.counts))):
            dz, need_w, need_b = outputs.pop(), needs[3 + 2 * i], needs[4 + 2 * i]
            dw, db = op.expert_linear_backward_into(
                dz, outputs[-1], layers[2 * i], plan.counts[i], plan.activations[i - 1], 2 * need_w + 4 * need_b
            )
            of_layers[:0] = dw if need_w else None, db if need_b else None
            del dz  # before the next layer asks for memory
        dz, (need_x, need_w, need_b) = outputs.pop(), (needs[0], *needs[3:5])
        wanted = need_x + 2 * need_w + 4 * need_b
        dx, dw, db = op.expert_linear_backward(dz, x, layers[0], dz, plan.counts[0], "", wanted)
        of_layers[:0] = dw if need_w else None, db if need_b else None
        return None, dx if need_x else None, *of_mix, *of_layers


_apply = super(torch.autograd.Function, _Mixture).apply  # the base class's, as for the operators


def _transformed(grad: Tensor) -> bool:
    functorch = torch._C._functorch
    batched = functorch.is_batchedtensor(grad) or functorch.is_legacy_batchedtensor(
        grad
    )  # the latter: is_grads_batched
    return batched or torch._C._are_functorch_transforms_active()


def _again(plan: _Plan, saved: Sequence[Tensor | None], needs: Sequence[bool], grad: Tensor) -> list[Tensor | None]:
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: logits may come from x, and what flows back that way is not this node's.
        views = [None if t is None else t.view_as(t) for t in saved]
        out = _composed(plan, *views)
    wanted = [t for t, need in zip(views, needs, strict=True) if need]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=create_graph, allow_unused=True))
    return [next(found) if need else None for need in needs]
