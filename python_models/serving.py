"""Banks of experts as they serve: fewer experts, no dropout, batch normalisation folded into the linear layers.

And what a pass of a network costs, which is what serving forms are for.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtlkernels.nn import ExpertMLP

from .layers import ModuleBank


@torch.no_grad()
def flops(model: nn.Module, *inputs: Any) -> int:
    """Floating point operations of one pass in evaluation mode, as ``torch.utils.flop_counter`` counts them.

    Of a network and of its ``for_serving()`` they say what serving saves: ``flops(served, x) / flops(model, x)``.
    Products alone, and the mixes: activations, norms and biases are not counted.
    """
    from torch.utils.flop_counter import FlopCounterMode  # it imports triton, which nothing else here needs

    modes = [(module, module.training) for module in model.modules()]
    try:
        with FlopCounterMode(display=False) as counter:
            model.eval()(*inputs)
    finally:
        for module, training in modes:
            module.training = training
    return counter.get_total_flops()


def norm_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(scale, shift) in float64, [E,N], of a bank's batch normalisation with its running statistics."""
    weight, bias, mean, var = (
        t.detach().double() for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    )
    scale = weight * (var + norm.eps).rsqrt()
    return scale, bias - scale * mean


@torch.no_grad()
def keep_norm(norm: nn.Module, keep: Sequence[int]) -> nn.Module:
    """A copy with the experts `keep` of every tensor [E,...]."""
    kept = copy.deepcopy(norm)
    for tensors in (kept._parameters, kept._buffers):
        for name, tensor in tensors.items():
            rows = tensor[list(keep)]
            tensors[name] = nn.Parameter(rows) if isinstance(tensor, nn.Parameter) else rows
    return kept


@torch.no_grad()
def serving_bank(bank: nn.Module, keep: Sequence[int] | None = None) -> nn.Module:
    """A copy of an ExpertMLP or ModuleBank with the experts `keep`, in evaluation mode: same outputs to rounding.

    Each expert reads all of x [B,K] or the unit of x [B,E,K] in its place. Linear layers take up their batch norms,
    activations are fused again where these stood between, and modules of the user's own are copied as they are.
    """
    if isinstance(bank, ModuleBank):
        kept = list(bank.experts) if keep is None else [bank.experts[e] for e in keep]
        return ModuleBank(copy.deepcopy(kept), [1] * len(kept)).eval()
    keep = list(range(bank.num_experts) if keep is None else keep)
    kinds = [getattr(norm, "kind", None) for norm in bank.norms]
    weight = bank.linears[0].weight
    served = ExpertMLP(
        len(keep),
        bank.in_features,
        [linear.out_features for linear in bank.linears],
        activation=bank.activations,
        norm=[None if kind == "batch" else kind for kind in kinds],
        bias=[kind == "batch" or linear.bias is not None for linear, kind in zip(bank.linears, kinds, strict=True)],
        device="meta",  # nothing is drawn for weights that are about to be replaced
        dtype=weight.dtype,
    ).to_empty(device=weight.device)
    for k, (linear, norm, target) in enumerate(zip(bank.linears, bank.norms, served.linears, strict=True)):
        weight, bias = linear.weight.double(), 0.0 if linear.bias is None else linear.bias.double()
        if kinds[k] == "batch":
            scale, shift = norm_affine(norm)
            weight, bias = scale[..., None] * weight, scale * bias + shift
        elif kinds[k] is not None:
            served.norms[k] = keep_norm(norm, keep)
        target.weight.copy_(weight[keep])
        if target.bias is not None:
            target.bias.copy_(bias[keep])
    return served.eval()
