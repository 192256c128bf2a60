"""Counts the bytes that collectives send, as they are called."""

from fractions import Fraction

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.wire import ring

# Functional collectives, as our operators and DTensor call them, and those of process groups, as FSDP does.
KINDS = {
    "all_reduce": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
}


class Counted(TorchDispatchMode):
    """``bytes``: what this rank sent by ring algorithms; ``calls``: (kind, bytes of the whole tensor), in order."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks, self.calls = ranks, []

    @property
    def bytes(self) -> Fraction:
        return sum((ring(kind, size, self.ranks) for kind, size in self.calls), Fraction(0))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        namespace, name = func.namespace, func._schema.name.split("::")[1]
        if namespace in ("_c10d_functional", "c10d") and name not in ("wait_tensor", "_wrap_tensor_autograd"):
            if name not in KINDS:
                raise AssertionError(f"a collective that is not counted: {func}")
            tensors = [t for t in torch.utils._pytree.tree_leaves((args, out)) if isinstance(t, torch.Tensor)]
            # Of a gather's result and a scatter's argument, the larger is the whole.
            self.calls.append((KINDS[name], max(t.numel() * t.element_size() for t in tensors)))
        return out
