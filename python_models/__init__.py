"""Multi-task architectures on the fused operators, one file each."""

from .adatt import AdaTT
from .cross_stitch import CrossStitch
from .mmoe import MMoE
from .mrn import MRN
from .mtan import MTAN
from .multitask import MultiTaskModel, Towers
from .ple import CGC, PLE
from .shared_bottom import SharedBottom
from .sluice import Sluice
from .soft_ordering import SoftOrdering
from .soft_sharing import SoftSharing

__all__ = [
    "CGC",
    "MRN",
    "MTAN",
    "PLE",
    "AdaTT",
    "CrossStitch",
    "MMoE",
    "MultiTaskModel",
    "SharedBottom",
    "Sluice",
    "SoftOrdering",
    "SoftSharing",
    "Towers",
]
