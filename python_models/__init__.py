"""Multi-task architectures on the fused operators, one file each."""

from .adatt import AdaTT
from .cross_stitch import CrossStitch
from .esmm import ESMM
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

__all__ = [
    "CGC",
    "ESMM",
    "MRN",
    "MTAN",
    "PLE",
    "STAR",
    "AdaTT",
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
]
