"""Training methods: how the losses of T tasks become one step. See :class:`Balancer` for their one interface."""

from .auxiliary import AuxiliaryHeads
from .base import Balancer
from .bias import TaskBiasEmbedding
from .gradnorm import GradNorm
from .groups import param_groups
from .uncertainty import UncertaintyWeighting
from .weights import DynamicWeightAverage, FixedWeights, ScheduledWeights

__all__ = [
    "AuxiliaryHeads",
    "Balancer",
    "DynamicWeightAverage",
    "FixedWeights",
    "GradNorm",
    "ScheduledWeights",
    "TaskBiasEmbedding",
    "UncertaintyWeighting",
    "param_groups",
]
