"""expert_mix in plain torch."""

import torch
from torch import Tensor

from .expert_linear import accumulate_dtype, expert_linear
from .mix import allowed_experts, mix


def expert_mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    static: Tensor | None,
    mask: Tensor | None,
    columns: Tensor | None,
    experts_per_unit: list[int] | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """``O[b,t,:] = sum_e (softmax(logits) + static)[b,t,e] act(W_e x[b,unit(e),:] + c_e)`` and the logits' logsumexp.

    x [B,K] or [B,U,K], weight [E,D,K], bias [E,D]; logits [B,T,E], or packed [B,R] with columns; static [T,E] or packed
    [R]. Returns out [B,T,D] in x's dtype, rounded once (the experts' outputs are not), and lse [B,T] (empty without
    logits).
    """
    acc = accumulate_dtype(x.dtype)
    weight, bias = weight.to(acc), None if bias is None else bias.to(acc)
    weight, bias = without_unused(weight, bias, allowed_experts(mask, columns))
    h = expert_linear(x.to(acc), weight, bias, experts_per_unit, activation)
    out, lse = mix(h, logits, static, mask, columns, None)
    return out.to(x.dtype), lse


def without_unused(weight: Tensor, bias: Tensor | None, allowed: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """weight and bias with zeros for the experts that no row uses, so that nothing in them matters, NaN included."""
    if allowed is None:
        return weight, bias
    used = allowed.any(0)
    return torch.where(used[:, None, None], weight, 0), None if bias is None else torch.where(used[:, None], bias, 0)
