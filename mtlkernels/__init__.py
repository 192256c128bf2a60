"""Fused kernels for multi-task networks: batched experts and expert mixing as torch operators."""

from ._library import build_info, empty_cache
from .backend import use_backend
from .ops import Routes, adatt_mix, expert_linear, expert_mix, gated_mix, linear_mix, mix
from .ops.explain import explain

__all__ = [
    "Routes",
    "adatt_mix",
    "build_info",
    "empty_cache",
    "expert_linear",
    "expert_mix",
    "explain",
    "gated_mix",
    "linear_mix",
    "mix",
    "use_backend",
]
