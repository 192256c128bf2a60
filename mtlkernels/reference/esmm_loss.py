"""esmm_loss in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .expert_linear import accumulate_dtype


def esmm_loss(
    ctr_logit: Tensor, cvr_logit: Tensor, click: Tensor, conversion: Tensor, ctcvr_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over rows of the click's cross entropy and, times ``ctcvr_weight``, that of click and conversion.

    All [B]. A row whose labels do not fit becomes NaN. Returns the loss in float32 (float64 for float64), and its
    derivatives by both logits: empty here, where autograd gives them.
    """
    acc = accumulate_dtype(ctr_logit.dtype)
    a, c, y, z = (t.to(acc) for t in (ctr_logit, cvr_logit, click, conversion))
    fits = (y >= 0) & (y <= 1) & (z >= 0) & (z <= 1) & ((y > 0) | (z == 0))
    y = torch.where(fits, y, torch.nan)
    w = y * z
    log_a, log_not_a = F.logsigmoid(a), F.logsigmoid(-a)
    log_p = log_a + F.logsigmoid(c)
    # 1 - pCTCVR: no click, or a click without conversion. logsumexp, for the second derivative of logaddexp overflows.
    log_not_p = torch.logsumexp(torch.stack([log_not_a, log_a + F.logsigmoid(-c)]), 0)
    ctr = -y * log_a - (1 - y) * log_not_a
    ctcvr = -w * log_p - (1 - w) * log_not_p
    loss = (ctr + ctcvr_weight * ctcvr).sum() / max(a.shape[0], 1)
    return loss, a.new_empty(0), a.new_empty(0)
