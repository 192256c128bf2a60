"""The public operators, one file each: checks, choice of backend, autograd."""

from .esmm_loss import esmm_loss
from .expert_linear import expert_linear
from .masked_bce import masked_bce
from .mix import Routes, adatt_mix, gated_mix, linear_mix, mix

__all__ = ["Routes", "adatt_mix", "esmm_loss", "expert_linear", "gated_mix", "linear_mix", "masked_bce", "mix"]
