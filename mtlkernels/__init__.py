"""Fused kernels for multi-task networks: batched experts and expert mixing as torch operators."""

from ._library import build_info, empty_cache
from .backend import use_backend
from .ops import (
    Routes,
    adatt_mix,
    expert_linear,
    gated_mix,
    hard_concrete,
    hard_concrete_l0,
    linear_mix,
    mix,
    snr_linear,
)
from .ops.explain import explain

__all__ = [
    "Routes",
    "adatt_mix",
    "build_info",
    "empty_cache",
    "expert_linear",
    "explain",
    "gated_mix",
    "hard_concrete",
    "hard_concrete_l0",
    "linear_mix",
    "mix",
    "snr_linear",
    "use_backend",
]
