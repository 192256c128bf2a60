"""snr_linear in plain torch."""

import torch
from torch import Tensor

from .expert_linear import ACTIVATIONS, accumulate_dtype, without_autocast


def snr_linear(
    x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor | None, activation: str, skip_closed: bool
) -> Tensor:
    """``Y[b,i,:] = act(sum_j gate[i,j] W_ij x[b,j,:] + c_i)``, accumulated in float32 (float64) and rounded once.

    x [B,J,K], weight [I,J,N,K], gate [I,J], bias [I,N] -> [B,I,N] in x's dtype. skip_closed: what a gate of 0 belongs
    to is not read, and gets no gradient.
    """
    acc = accumulate_dtype(x.dtype)
    xa, ga = x.to(acc), gate.to(acc)
    wa = weight.to(acc)
    # Matmuls of the caller's dtype run under autocast would round to 16 bit in the middle of the sum.
    with without_autocast(x.device.type):
        if skip_closed and weight.shape[0]:
            # Selected, not multiplied by zero: a closed connection may hold NaN.
            is_open = (ga != 0)[..., None]
            ga = torch.where(is_open, ga[..., None], 0)
            gated = ga[..., None] * torch.where(is_open[..., None], wa, 0)
            pairs = zip(is_open.unbind(0), gated.transpose(1, 2).flatten(2).unbind(0), strict=True)
            z = torch.stack([torch.where(seen, xa, 0).flatten(1) @ w.t() for seen, w in pairs], 1)
        else:
            gated = (ga[..., None, None] * wa).transpose(1, 2).flatten(2)
            z = (xa.flatten(1) @ gated.flatten(0, 1).t()).unflatten(1, gated.shape[:2])
        if bias is not None:
            z = z + bias.to(acc)
        return ACTIVATIONS[activation](z).to(x.dtype)
