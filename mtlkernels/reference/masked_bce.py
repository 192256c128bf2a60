"""masked_bce in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .expert_linear import accumulate_dtype


def masked_bce(logits: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """``loss_t = sum_b mask[b,t] bce(logits[b,t], labels[b,t]) / sum_b mask[b,t]``, 0 for a task whose mask is all 0.

    logits, labels, mask [B,T]; no mask: all 1. A label outside [0,1] becomes NaN where the mask is not 0. Returns the
    loss [T] in float32 (float64 for float64), and its derivative by the logits: empty here, where autograd gives it.
    """
    acc = accumulate_dtype(logits.dtype)
    x, y = logits.to(acc), labels.to(acc)
    weight = torch.ones_like(y) if mask is None else mask.to(acc)
    # Selected, not multiplied by zero: neither the value nor the gradient of what is masked is read.
    used = weight != 0
    x = torch.where(used, x, 0)
    y = torch.where(used, torch.where((y >= 0) & (y <= 1), y, torch.nan), 0)
    weight = torch.where(used & ~(weight > 0), torch.nan, weight)
    total = weight.sum(0)
    total = torch.where(total < torch.inf, torch.where(total == 0, 1, total), torch.nan)
    # Divided before the sum, in which weights near the ends of the number range would be lost.
    terms = weight / total * (-y * F.logsigmoid(x) - (1 - y) * F.logsigmoid(-x))
    return terms.sum(0), x.new_empty(0)
