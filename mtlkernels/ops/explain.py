"""explain: which backend would run a call."""

from typing import Any

import torch
from torch import Tensor

from .. import backend as _backend

# The dispatcher op behind each public function.
_BENEATH = {
    "expert_linear": "expert_linear",
    "expert_mix": "expert_mix",
    "mix": "mix",
    "gated_mix": "mix",
    "adatt_mix": "mix",
    "linear_mix": "mix",
}

# Those whose first tensor is x, which autocast takes to 16 bit.
_OF_X = ("expert_linear", "expert_mix")


def explain(op: str, *args: Any, **kwargs: Any) -> str:
    """Which backend would run ``op(*args, **kwargs)``, and why each other one would not, a line each.

    The call itself is not run. Raises ValueError for an unknown operator, TypeError without a tensor argument.
    """
    if op not in _BENEATH:
        raise ValueError(f"op must be one of {', '.join(_BENEATH)}; got {op!r}")
    first = args[0] if args else kwargs.get("x" if op in _OF_X else "experts")
    if not isinstance(first, Tensor):
        raise TypeError(f"explain needs the call's arguments: the first argument of {op} must be a tensor")
    device, dtype = first.device, first.dtype
    if op in _OF_X and dtype == torch.float32 and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return _backend.describe(_BENEATH[op], kwargs.get("backend"), device, dtype)
