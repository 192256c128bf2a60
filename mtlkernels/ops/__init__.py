"""The public operators, one file each: checks, choice of backend, autograd."""

from .expert_linear import expert_linear
from .expert_mix import expert_mix
from .mix import Routes, adatt_mix, gated_mix, linear_mix, mix

__all__ = ["Routes", "adatt_mix", "expert_linear", "expert_mix", "gated_mix", "linear_mix", "mix"]
