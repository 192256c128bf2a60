"""The public operators, one file each: checks, choice of backend, autograd."""

from .esmm_loss import esmm_loss
from .expert_linear import expert_linear
from .expert_mix import expert_mix
from .hard_concrete import hard_concrete, hard_concrete_l0
from .masked_bce import masked_bce
from .mix import Routes, adatt_mix, gated_mix, linear_mix, mix
from .partitioned_norm import partitioned_norm
from .snr_linear import snr_linear
from .star_linear import star_linear

__all__ = [
    "Routes",
    "adatt_mix",
    "esmm_loss",
    "expert_linear",
    "expert_mix",
    "gated_mix",
    "hard_concrete",
    "hard_concrete_l0",
    "linear_mix",
    "masked_bce",
    "mix",
    "partitioned_norm",
    "snr_linear",
    "star_linear",
]
