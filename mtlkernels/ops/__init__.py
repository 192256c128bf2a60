"""The public operators, one file each: checks, choice of backend, autograd."""

from .expert_linear import expert_linear
from .mix import Routes, adatt_mix, gated_mix, linear_mix, mix
from .partitioned_norm import partitioned_norm

__all__ = ["Routes", "adatt_mix", "expert_linear", "gated_mix", "linear_mix", "mix", "partitioned_norm"]
