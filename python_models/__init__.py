"""Multi-task architectures on the fused operators, one file each."""

from .adashare import AdaShare
from .adatt import AdaTT
from .branched import BranchedMTL
from .cross_stitch import CrossStitch
from .esmm import ESMM
from .learned_branching import LearnedBranching
from .mmoe import MMoE
from .mrn import MRN
from .mtan import MTAN
from .multitask import MultiTaskModel, Towers
from .ple import CGC, PLE
from .shared_bottom import SharedBottom
from .sluice import Sluice
from .snr import SNRAver, SNRTrans
from .soft_ordering import SoftOrdering
from .soft_sharing import SoftSharing
from .star import STAR
from .ubernet import UberNet

__all__ = [
    "CGC",
    "ESMM",
    "MRN",
    "MTAN",
    "PLE",
    "STAR",
    "AdaShare",
    "AdaTT",
    "BranchedMTL",
    "LearnedBranching",
    "CrossStitch",
    "MMoE",
    "MultiTaskModel",
    "SNRAver",
    "SNRTrans",
    "SharedBottom",
    "Sluice",
    "SoftOrdering",
    "SoftSharing",
    "Towers",
    "UberNet",
]
