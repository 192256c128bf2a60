"""Fused kernels for multi-task networks: batched experts and expert mixing as torch operators."""

from . import costs
from ._library import build_info, empty_cache
from .backend import use_backend
from .ops import Routes, adatt_mix, esmm_loss, expert_linear, gated_mix, linear_mix, masked_bce, mix
from .ops.explain import explain

__all__ = [
    "Routes",
    "adatt_mix",
    "build_info",
    "empty_cache",
    "esmm_loss",
    "expert_linear",
    "explain",
    "gated_mix",
    "linear_mix",
    "masked_bce",
    "mix",
    "use_backend",
]

costs.register()
