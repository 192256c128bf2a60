"""What a call has to do at least, and on which backend it ran: both from watching the dispatcher ops that it ran.

Time over the larger of operations / rate and bytes / bandwidth is what "share" in the tables says.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import mtlkernels
from bench.subjects import Operands

_BACKENDS = {"mtlkernels": "native", "mtlkernels_triton": "triton"}


class Cost(NamedTuple):
    """Floating-point operations and compulsory bytes of one call."""

    flops: int
    bytes: int


class Floor(NamedTuple):
    """The least milliseconds a call can take here, and what sets them."""

    ms: float
    by: str


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ours: list[tuple[str, str, tuple]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace in _BACKENDS:
            self.ours.append((func.namespace, func._schema.name.partition("::")[2], args))
        return func(*args, **(kwargs or {}))


def watched(call: Callable[[], Any]) -> tuple[str, Cost | None]:
    """The backend whose operators `call` ran, and their cost: None on the reference, or where one has no formula."""
    with _Watch() as watch:
        call()
    if not watch.ours:
        return "reference", None
    return " + ".join(dict.fromkeys(_BACKENDS[namespace] for namespace, _, _ in watch.ours)), _total(watch.ours)


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        self.flops += 0 if formula is None else formula(*args, **(kwargs or {}), out_val=out)
        return out


def all_flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products and of our operators, whoever runs them.

    FlopCounterMode would do, but for modules whose inputs want gradients while no gradients are recorded.
    """
    with _Count() as count:
        call()
    return count.flops


def _total(calls: list[tuple[str, str, tuple]]) -> Cost | None:
    formulas = getattr(mtlkernels, "costs", None)
    if formulas is None:
        return None
    try:
        found = [formulas.cost(name, *args) for _, name, args in calls]
    except KeyError:
        return None
    return Cost(sum(one.flops for one in found), sum(one.bytes for one in found))


def floor(cost: Cost | None, gemm_gflops: float, copy_gb_s: float) -> Floor | None:
    """The floor of a call of this cost on a machine of these ceilings."""
    if cost is None:
        return None
    arithmetic, traffic = cost.flops / gemm_gflops / 1e6, cost.bytes / copy_gb_s / 1e6
    return Floor(max(arithmetic, traffic), "arithmetic" if arithmetic > traffic else "memory")


def nbytes(operands: Operands) -> int:
    """The bytes of all tensors among the operands."""
    return sum(v.numel() * v.element_size() for v in operands.values() if isinstance(v, Tensor))
