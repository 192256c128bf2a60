"""The public operators, one file each: checks, choice of backend, autograd."""

from .expert_linear import expert_linear
from .hard_concrete import hard_concrete, hard_concrete_l0
from .mix import Routes, adatt_mix, gated_mix, linear_mix, mix
from .snr_linear import snr_linear

__all__ = [
    "Routes",
    "adatt_mix",
    "expert_linear",
    "gated_mix",
    "hard_concrete",
    "hard_concrete_l0",
    "linear_mix",
    "mix",
    "snr_linear",
]
