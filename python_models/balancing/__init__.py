"""Training methods: how the losses of T tasks become one step. See :class:`Balancer` for their one interface."""

from .auxiliary import AuxiliaryHeads
from .base import Balancer
from .bias import TaskBiasEmbedding
from .graddrop import GradDrop
from .gradnorm import GradNorm
from .groups import param_groups
from .mgda import MGDA
from .pcgrad import PCGrad
from .rotograd import RotoGrad
from .task_gradients import GradientMethod
from .uncertainty import UncertaintyWeighting
from .weights import DynamicWeightAverage, FixedWeights, ScheduledWeights

__all__ = [
    "AuxiliaryHeads",
    "Balancer",
    "DynamicWeightAverage",
    "FixedWeights",
    "GradDrop",
    "GradNorm",
    "GradientMethod",
    "MGDA",
    "PCGrad",
    "RotoGrad",
    "ScheduledWeights",
    "TaskBiasEmbedding",
    "UncertaintyWeighting",
    "param_groups",
]
