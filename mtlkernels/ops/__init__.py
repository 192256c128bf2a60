"""The public operators, one file each: checks, choice of backend, autograd."""

from .expert_linear import expert_linear
from .mix import Routes, adatt_mix, gated_mix, linear_mix, mix
from .star_linear import star_linear

__all__ = ["Routes", "adatt_mix", "expert_linear", "gated_mix", "linear_mix", "mix", "star_linear"]
