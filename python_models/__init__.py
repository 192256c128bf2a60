"""Multi-task architectures on the fused operators, one file each."""

from .adashare import AdaShare
from .adatt import AdaTT
from .branched import BranchedMTL
from .esmm import ESMM
from .learned_branching import LearnedBranching
from .mmoe import MMoE
from .multitask import MultiTaskModel, Towers
from .ple import CGC, PLE
from .shared_bottom import SharedBottom
from .snr import SNRAver, SNRTrans
from .star import STAR
from .ubernet import UberNet

__all__ = [
    "CGC",
    "ESMM",
    "PLE",
    "STAR",
    "AdaShare",
    "AdaTT",
    "BranchedMTL",
    "LearnedBranching",
    "MMoE",
    "MultiTaskModel",
    "SNRAver",
    "SNRTrans",
    "SharedBottom",
    "Towers",
    "UberNet",
]
