"""hard_concrete and its L0 penalty in plain torch."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .expert_linear import accumulate_dtype

NOISE_MIN, NOISE_MAX = 1e-6, 1 - 1e-6


def hard_concrete(
    log_alpha: Tensor, noise: Tensor | None, beta: float, gamma: float, zeta: float
) -> tuple[Tensor, Tensor]:
    """``z = min(1, max(0, s (zeta - gamma) + gamma))`` and s.

    ``s = sigmoid((log(noise) - log(1 - noise) + log_alpha) / beta)`` with noise, ``sigmoid(log_alpha)`` without.
    Returns z in log_alpha's dtype and s in float32 (float64).
    """
    acc = accumulate_dtype(log_alpha.dtype)
    phi = log_alpha.to(acc)
    if noise is not None:
        noise = noise.detach().to(acc).clamp(NOISE_MIN, NOISE_MAX)
        phi = (torch.log(noise) - torch.log1p(-noise) + phi) / beta
    s = torch.sigmoid(phi)
    # hardtanh: unlike clamp's, its derivative is 0 at the bounds themselves.
    return F.hardtanh(s * (zeta - gamma) + gamma, 0.0, 1.0).to(log_alpha.dtype), s


def hard_concrete_l0(log_alpha: Tensor, beta: float, gamma: float, zeta: float) -> tuple[Tensor, Tensor]:
    """``sum sigmoid(log_alpha - beta log(-gamma / zeta))``, a scalar, and its gradient, both in float32 (float64)."""
    shifted = log_alpha.to(accumulate_dtype(log_alpha.dtype)) - beta * math.log(-gamma / zeta)
    open_chance = torch.sigmoid(shifted)
    return open_chance.sum(), open_chance * torch.sigmoid(-shifted)
