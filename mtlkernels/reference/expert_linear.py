"""expert_linear in plain torch."""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu(z: Tensor) -> Tensor:
    """z times the normal distribution function. torch's own gives 0 at -6 and NaN at infinity where it uses AVX-512."""
    return z * (0.5 * torch.special.erfc(z * -math.sqrt(0.5)))


ACTIVATIONS = {
    "": lambda z: z,
    "relu": torch.relu,
    "gelu": gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
# Their derivative needs the value before the activation; the others' follows from the output.
NEED_INPUT = ("gelu", "silu")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float64 for float64, float32 for everything shorter."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device_type: str) -> AbstractContextManager:
    """A context in which products keep the dtype they are given; some devices, meta among them, have no autocast."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def expert_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, experts_per_unit: list[int] | None, activation: str
) -> Tensor:
    """``Y[b,e,:] = act(W_e x[b,unit(e),:] + c_e)``, accumulated in float32 (float64) and rounded once.

    x [B,K] or [B,U,K], weight [E,N,K], bias [E,N] -> [B,E,N] in x's dtype.
    """
    acc = accumulate_dtype(x.dtype)
    xa, wa = x.to(acc), weight.to(acc)
    # Matmuls of the caller's dtype run under autocast would round to 16 bit in the middle of the sum.
    with without_autocast(x.device.type):
        if x.dim() == 2:
            z = torch.einsum("bk,enk->ben", xa, wa)
        elif experts_per_unit is None or all(n == 1 for n in experts_per_unit):
            z = torch.einsum("bek,enk->ben", xa, wa)
        else:
            units = zip(xa.unbind(1), wa.split(list(experts_per_unit)), strict=True)
            z = torch.cat([torch.einsum("bk,enk->ben", xu, wu) for xu, wu in units], dim=1)
        if bias is not None:
            z = z + bias.to(acc)
        return ACTIVATIONS[activation](z).to(x.dtype)
