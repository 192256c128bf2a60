"""Training methods: how the losses of T tasks become one step. See :class:`Balancer` for their one interface."""

from .base import Balancer

__all__ = ["Balancer"]
