"""Multi-task architectures on the fused operators, one file each."""

from .adatt import AdaTT
from .esmm import ESMM
from .mmoe import MMoE
from .multitask import MultiTaskModel, Towers
from .ple import CGC, PLE
from .shared_bottom import SharedBottom
from .snr import SNRAver, SNRTrans
from .star import STAR

__all__ = [
    "CGC",
    "ESMM",
    "PLE",
    "STAR",
    "AdaTT",
    "MMoE",
    "MultiTaskModel",
    "SNRAver",
    "SNRTrans",
    "SharedBottom",
    "Towers",
]
