"""explain: which backend would run a call."""

import inspect
from typing import Any

import torch
from torch import Tensor

from .. import backend as _backend
from .. import ops as _ops
from ._operator import Operator


def explain(op: str, *args: Any, **kwargs: Any) -> str:
    """Which backend would run ``op(*args, **kwargs)``, and why each other one would not, a line each.

    The call itself is not run. Raises ValueError for an unknown operator, TypeError without a tensor argument.
    """
    beneath = {name: operator for operator in Operator.all.values() for name in operator.public}
    if op not in beneath:
        raise ValueError(f"op must be one of {', '.join(beneath)}; got {op!r}")
    operator = beneath[op]
    signature = inspect.signature(getattr(_ops, op))
    given = signature.bind_partial(*args, **kwargs).arguments
    first = given.get(next(iter(signature.parameters)))
    if not isinstance(first, Tensor):
        raise TypeError(f"explain needs the call's arguments: the first argument of {op} must be a tensor")
    device, dtype = first.device, first.dtype
    if operator.autocast and dtype == torch.float32 and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    sizes = None if operator.sizes is None else operator.sizes(**given)
    return _backend.describe(operator.name, given.get("backend"), device, dtype, sizes)
