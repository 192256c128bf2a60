"""What the operators' argument checks share."""

import torch
from torch import Tensor

from ..reference import expert_linear as _plain

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = tuple(name for name in _plain.ACTIVATIONS if name)


def autocast(x: Tensor) -> Tensor:
    """x as autocast wants it: where it is on for x's device, float32 goes to 16 bit. Anything else comes back as it is,
    what is no tensor too: the checks, which come after, tell of that."""
    if not (torch._C._is_any_autocast_enabled() and isinstance(x, Tensor)):
        return x
    if x.dtype != torch.float32 or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def check_dense(**tensors: object) -> None:
    """Raises TypeError for a sparse or a nested tensor, naming it: the shapes of those do not say where numbers lie."""
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and (tensor.is_nested or tensor.layout is not torch.strided):
            kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
            raise TypeError(f"{name} must be a dense tensor; got {kind}")


def check_weight_dtype(x: Tensor, weight: Tensor) -> None:
    """x is floating point, and weight has its dtype, or is float32 beside a 16-bit x under autocast."""
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be float64, float32, bfloat16 or float16; got {x.dtype}")
    if weight.dtype != x.dtype and not (
        weight.dtype == torch.float32
        and x.dtype in (torch.bfloat16, torch.float16)
        and torch.is_autocast_enabled(x.device.type)
    ):
        raise TypeError(f"x is {x.dtype} but weight is {weight.dtype}: they must agree (or run under torch.autocast)")


def check_activation(activation: str | None) -> None:
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or one of {', '.join(ACTIVATIONS)}; got {activation!r}")
