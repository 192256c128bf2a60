"""Fused kernels for multi-task networks: batched experts and expert mixing as torch operators."""

from . import costs, ops
from ._library import build_info, empty_cache
from .backend import use_backend
from .ops import *  # noqa: F403  every public operator, by its own list
from .ops.explain import explain

__all__ = ["build_info", "empty_cache", "explain", "use_backend", *ops.__all__]

costs.register()
