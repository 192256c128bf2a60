"""Checks of what the losses read beside their logits: labels and masks."""

import torch
from torch import Tensor

from ._arguments import FLOATS, check_dense

# What the kernels read as it is; other integers are converted.
_READ = (*FLOATS, torch.bool, torch.uint8, torch.int32, torch.int64)
_INTEGERS = (torch.int8, torch.int16, torch.uint16)


def check_logits(name: str, logits: Tensor) -> None:
    """Raises TypeError unless logits is a tensor of a dtype that the losses are defined for."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(logits).__name__}")
    check_dense(**{name: logits})
    if logits.dtype not in FLOATS:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16; got {logits.dtype}")


def as_target(name: str, target: Tensor, logits: Tensor, logits_name: str) -> Tensor:
    """The target as the kernels read it; TypeError or ValueError, naming the argument, where it does not fit logits."""
    if not isinstance(target, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(target).__name__}")
    check_dense(**{name: target})
    if target.shape != logits.shape:
        raise ValueError(f"{name} must have the shape of {logits_name}, {tuple(logits.shape)}; "
                         f"got {tuple(target.shape)}")  # fmt: skip
    if target.device != logits.device:
        raise ValueError(f"{name} is on {target.device}, {logits_name} on {logits.device}: they must be on one device")
    if target.requires_grad:
        raise ValueError(f"{name} requires a gradient, and the loss gives it none: pass {name}.detach()")
    if target.dtype in _INTEGERS:
        return target.to(torch.int32)
    if target.dtype not in _READ:
        raise TypeError(f"{name} must be bool, an integer or a floating-point tensor; got {target.dtype}")
    return target
