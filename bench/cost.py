"""What a call has to do at least: floating-point operations, and bytes that must cross the memory bus once.

One multiply-add counts 2, an exponential 1; every tensor is read or written once, caches hold the rest. Time over the
larger of operations / rate and bytes / bandwidth is what `share` in the tables says.
"""

import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.subjects import Operands, Subject


class Cost(NamedTuple):
    """Floating-point operations and compulsory bytes of one call."""

    flops: int
    bytes: int


class Floor(NamedTuple):
    """The least milliseconds a call can take here, and what sets them."""

    ms: float
    by: str


def cost(subject: Subject, operands: Operands, out: Tensor, backward: bool) -> Cost | None:
    """The cost of one call, forward or forward and backward, and None where there is no formula for it."""
    found = _from_library(subject, operands, backward)
    if found is not None:
        return found
    flops = _FLOPS.get(subject.op)
    if flops is None:
        return None
    size = sum(v.numel() * v.element_size() for v in operands.values() if isinstance(v, Tensor))
    written = out.numel() * out.element_size()
    gradients = sum(operands[name].numel() * operands[name].element_size() for name in subject.leaves)
    return Cost(flops(operands, out) * (3 if backward else 1), size + written + backward * (size + written + gradients))


def _from_library(subject: Subject, operands: Operands, backward: bool) -> Cost | None:
    """From mtlkernels.costs, once there is such a module: the only place that knows how it is called."""
    if importlib.util.find_spec("mtlkernels.costs") is None:
        return None
    return None


def _expert_linear(o: Operands, out: Tensor) -> int:
    return 2 * out.numel() * o["weight"].shape[2]


def _mix(o: Operands, out: Tensor) -> int:
    """A packed gate has a weight for each row's own experts only."""
    softmax = 4 * o["logits"].numel() if "logits" in o else 0
    routes = o.get("routes")
    rows = out.shape[1] if routes is None else 1
    weights = o["experts"].shape[1] if routes is None else routes.num_routes
    return 2 * len(out) * rows * weights * out.shape[2] + softmax


_FLOPS: dict[str, Any] = {"expert_linear": _expert_linear, "mix": _mix}


def floor(cost: Cost | None, gemm_gflops: float, copy_gb_s: float) -> Floor | None:
    """The floor of a call of this cost on a machine of these ceilings."""
    if cost is None:
        return None
    arithmetic, traffic = cost.flops / gemm_gflops / 1e6, cost.bytes / copy_gb_s / 1e6
    return Floor(max(arithmetic, traffic), "arithmetic" if arithmetic > traffic else "memory")


def nbytes(operands: Operands) -> int:
    """The bytes of all tensors among the operands."""
    return sum(v.numel() * v.element_size() for v in operands.values() if isinstance(v, torch.Tensor))
