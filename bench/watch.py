"""Every operator of a step: which module called it, what it has to do, how long it takes, and what memory is alive.

The step may be a real one, or one on torch's fake tensors: then nothing is computed and no memory is taken, and the
same list says what the step would do. A backward operator belongs to the module whose forward made its autograd node:
nodes are numbered, and the numbers at which a module begins and ends are noted. What an operator needs inside itself
only while it runs is not seen.
"""

import statistics
import time
import weakref
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mtlkernels.costs import COSTS, cost

COPIES = frozenset("stack cat clone copy_ _to_copy contiguous select_backward slice_backward repeat".split())
_FILLS = frozenset("zeros zeros_like ones ones_like full full_like new_zeros new_ones zero_ fill_".split())
_NO_WORK = frozenset("device empty empty_like empty_strided new_empty new_empty_strided".split())
_OURS = ("mtlkernels", "mtlkernels_triton")


@dataclass
class Op:
    """One call of an operator.

    Attributes:
        name: without its namespace.
        ours: whether it is one of mtlkernels'.
        scope: path of the innermost module; "" is the network itself.
        backward: whether the autograd engine called it.
        node: number of its autograd node; a backward operator has that of its forward.
        flops, bytes: multiply-adds count 2, other arithmetic one an element; tensors in and out once. Views have none.
        shapes: of the tensors among its arguments.
        dtype: of its first result.
        live: bytes alive after it, beyond what was there before the step.
        seconds: the median over the steps; None on fake tensors.
    """

    name: str
    ours: bool
    scope: str
    backward: bool
    node: int
    flops: int
    bytes: int
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    live: int = 0
    seconds: float | None = None

    @property
    def is_view(self) -> bool:
        """Whether it moves nothing and computes nothing."""
        return not self.flops and not self.bytes

    def floor(self, gflops: float, gb_s: float) -> float:
        """The least seconds at these rates."""
        return max(self.flops / gflops, self.bytes / gb_s) / 1e9


@dataclass
class Step:
    """The operators of one step in the order they ran, and the seconds of whole steps that nobody watched."""

    ops: list[Op] = field(default_factory=list)
    seconds: float | None = None

    @property
    def watched(self) -> float:
        """Seconds inside operators."""
        return sum(op.seconds or 0.0 for op in self.ops)

    def peak(self) -> int:
        """The most bytes alive at a time beyond what was there before."""
        return max((op.live for op in self.ops), default=0)

    def kept(self) -> int:
        """Bytes alive when the forward pass ends: what backward needs, and the outputs."""
        return next((a.live for a, b in zip(self.ops, self.ops[1:], strict=False) if b.backward and not a.backward), 0)


class Watch(TorchDispatchMode):
    """Lists the operators that run while it is entered. clock: "cpu", "cuda" or None, no times."""

    def __init__(self, network: nn.Module, clock: str | None = None) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self._clock, self._events = clock, []
        self._names: dict[nn.Module, str] = {}
        for name, module in network.named_modules():
            self._names.setdefault(module, name)
        # Not by the parameter itself: its == compares numbers.
        self._owners = {id(p): self._names[m] for m in network.modules() for p in m.parameters(recurse=False)}
        self._stack, self._changes = [""], [(0, "")]
        self._sizes: dict[int, int] = {}
        self._live = 0
        self._hooks: list[Any] = []

    def __enter__(self) -> "Watch":
        for module in self._names:
            self._hooks.append(module.register_forward_pre_hook(self._begin))
            self._hooks.append(module.register_forward_hook(self._end, always_call=True))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()
        if self._clock == "cuda":
            torch.cuda.synchronize()
            for op, (first, last) in zip(self.ops, self._events, strict=True):
                op.seconds = first.elapsed_time(last) / 1e3

    def _begin(self, module: nn.Module, _: Any) -> None:
        self._stack.append(self._names[module])
        self._changes.append((torch.autograd._get_sequence_nr(), self._stack[-1]))

    def _end(self, module: nn.Module, *_: Any) -> None:
        self._stack.pop()
        self._changes.append((torch.autograd._get_sequence_nr(), self._stack[-1]))

    def _where(self) -> tuple[bool, int, str]:
        node = torch._C._current_autograd_node()
        if node is None:
            return False, torch.autograd._get_sequence_nr() - 1, self._stack[-1]
        number = node._sequence_nr()
        if number > 1 << 62:  # an AccumulateGrad: all have the same, the largest
            return True, -1, self._owners.get(id(getattr(node, "variable", None)), "")
        place = bisect_right(self._changes, number, key=lambda change: change[0]) - 1
        return True, number, self._changes[max(place, 0)][1]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if self._clock == "cuda":
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            out = func(*args, **kwargs)
            events[1].record()
            self._events.append(events)
            spent = None
        else:
            start = time.perf_counter()
            out = func(*args, **kwargs)
            spent = time.perf_counter() - start if self._clock == "cpu" else None
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        name = func._schema.name.partition("::")[2]
        flops, moved = work(func, args, kwargs, out, inputs, outputs)
        backward, node, scope = self._where()
        for tensor in outputs:
            self._note(tensor)
        shapes = tuple(tuple(t.shape) for t in inputs)
        dtype = str(outputs[0].dtype).removeprefix("torch.") if outputs else ""
        ours = func.namespace in _OURS
        self.ops.append(Op(name, ours, scope, backward, node, flops, moved, shapes, dtype, self._live, spent))
        return out

    def _note(self, tensor: Tensor) -> None:
        """Counts a new storage until it dies."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes or tensor.is_leaf and isinstance(tensor, nn.Parameter):
            return
        self._sizes[key] = storage.nbytes()
        self._live += storage.nbytes()
        weakref.finalize(storage, self._gone, key)

    def known(self, tensors: list[Tensor]) -> None:
        """These were there before: they do not count."""
        for tensor in tensors:
            self._sizes[tensor.untyped_storage()._cdata] = 0

    def _gone(self, key: int) -> None:
        self._live -= self._sizes.pop(key, 0)


def work(
    func: Any, args: tuple, kwargs: dict[str, Any], out: Any, inputs: list[Tensor], outputs: list[Tensor]
) -> tuple[int, int]:
    """Operations and bytes of one call of the operator `func`."""
    name = func._schema.name.partition("::")[2]
    if func.namespace in _OURS:
        plain = name.removesuffix("_eager").removesuffix("_only")
        return tuple(cost(name, *args)) if plain in COSTS else (0, _bytes(inputs) + _bytes(outputs))
    if name in _NO_WORK or not func._schema.is_mutable and _aliases(inputs, outputs):
        return 0, 0
    read = [] if name in _FILLS else inputs[1:] if name == "copy_" else inputs
    moved = _bytes(read) + _bytes(outputs)
    if func._overloadpacket in flop_registry:
        return flop_registry[func._overloadpacket](*args, **kwargs, out_val=out), moved
    if name in COPIES or name in _FILLS:
        return 0, moved
    return max((t.numel() for t in (*inputs, *outputs)), default=0), moved


def _aliases(inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    held = {t.untyped_storage()._cdata for t in inputs}
    return bool(outputs) and all(t.untyped_storage()._cdata in held for t in outputs)


def _bytes(tensors: list[Tensor]) -> int:
    """Of all of them; what is expanded counts once."""
    total = 0
    for tensor in tensors:
        numbers = 1 if tensor.numel() else 0
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            numbers *= size if stride or size == 0 else 1
        total += numbers * tensor.element_size()
    return total


def watch(
    network: nn.Module, step: Callable[[], Any], *, clock: str | None = None, rounds: int = 1, before: Any = ()
) -> Step:
    """The operators of ``step()``, with the median of their times over `rounds` steps where there is a clock.

    before: tensors whose memory was there before. Steps that do not run the same operators have the times of the last.
    """
    runs: list[list[Op]] = []
    for _ in range(rounds):
        mode = Watch(network, clock)
        mode.known([*before, *network.parameters(), *network.buffers()])
        mode.known([p.grad for p in network.parameters() if p.grad is not None])
        with mode:
            step()
        runs.append(mode.ops)
    last = runs[-1]
    if clock is not None and all([op.name for op in ops] == [op.name for op in last] for ops in runs):
        for op, *others in zip(last, *runs[:-1], strict=True):
            op.seconds = statistics.median([op.seconds, *(other.seconds for other in others)])
    return Step(last)
