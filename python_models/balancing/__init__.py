"""Training methods: how the losses of T tasks become one step. See :class:`Balancer` for their one interface."""

from .base import Balancer
from .gradnorm import GradNorm
from .uncertainty import UncertaintyWeighting
from .weights import DynamicWeightAverage, FixedWeights, ScheduledWeights

__all__ = [
    "Balancer",
    "DynamicWeightAverage",
    "FixedWeights",
    "GradNorm",
    "ScheduledWeights",
    "UncertaintyWeighting",
]
