"""Multi-task architectures on the fused operators, one file each."""

from .adashare import AdaShare
from .adatt import AdaTT
from .branched import BranchedMTL
from .learned_branching import LearnedBranching
from .mmoe import MMoE
from .multitask import MultiTaskModel, Towers
from .ple import CGC, PLE
from .shared_bottom import SharedBottom
from .ubernet import UberNet

__all__ = [
    "CGC",
    "PLE",
    "AdaShare",
    "AdaTT",
    "BranchedMTL",
    "LearnedBranching",
    "MMoE",
    "MultiTaskModel",
    "SharedBottom",
    "Towers",
    "UberNet",
]
