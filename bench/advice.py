"""What to change in a step: loops over experts that one call replaces, copies, operators far from the machine's rates.

The lines that replace a loop are tried before they are printed: they have to give what the network's modules gave, and
they are timed beside them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.contest import relative_error
from bench.loops import Loop, evaluating, find
from bench.target import Target
from bench.timing import interleaved
from bench.watch import COPIES, Op, Step
from mtlkernels.nn import ExpertMLP

CLOSE = {torch.float64: 1e-10, torch.float32: 1e-5}  # relative; 16-bit types 2e-2
_WORTH, _FAR, _SHORT = 0.1, 0.3, 2e-5  # of the step; of the ceiling; seconds a call


@dataclass
class Advice:
    """One thing to change: what costs, its share of the step, and the lines to paste where there are any.

    error: relative, of what the lines give against what the network's modules gave. ms: both of them, forward and
    backward.
    """

    text: str
    share: float
    lines: list[str] = field(default_factory=list)
    error: float | None = None
    ms: tuple[float, float] | None = None


def advise(target: Target, step: Step, gflops: float, gb_s: float, seconds: float = 0.3) -> list[Advice]:
    """What to change, the largest share of the step first. seconds: of timing for a loop and its lines."""
    loops = find(target, step)
    experts = [loop for loop in loops if not any(loop.is_gate_of(other) for other in loops)]
    swapped = [loop for loop in experts if loop.share >= _WORTH / 2]
    found = [_swap(target, loop, loops, seconds) for loop in swapped]
    # What lies within these loops goes with them.
    inside = {id(op) for loop in loops for op in loop.ops if loop in swapped or any(map(loop.is_gate_of, swapped))}
    rest = [op for op in step.ops if id(op) not in inside and not op.is_view]
    return sorted([*found, *_copies(step, rest), *_slow(step, rest, gflops, gb_s)], key=lambda advice: -advice.share)


def _swap(target: Target, loop: Loop, loops: list[Loop], seconds: float) -> Advice:
    """The lines that run the experts in one call, and the mix too where the gates are found."""
    gates = next((other for other in loops if other.is_gate_of(loop)), None)
    tries = [(None, _outputs_alone(loop))]
    if gates is not None:
        tries.insert(0, (gates, _mixture(loop, gates)))
    for also, (lines, hint, expected) in tries:
        with evaluating(target.network):
            names = {"network": target.network, "x": loop.x}
            exec("\n".join(lines), names)
            error = expected(target, names["z"].detach())
        if error <= CLOSE.get(loop.x.dtype, 2e-2):
            ms = _times(names, lines[-1], loop, also, seconds)
            return Advice(*_cost(loop, also), [*lines[:-1], f"{lines[-1]}  # {hint}"], error, ms)
    text, share = _cost(loop, None)
    return Advice(f"{text}; what was tried in their place does not give the same numbers", share)


def _cost(loop: Loop, gates: Loop | None) -> tuple[str, float]:
    kind = "experts" if gates is not None or "expert" in loop.where else "modules"
    text, share, calls = f"the Python loop over the {len(loop.modules)} {kind} of {loop.where}", loop.share, loop.calls
    if gates is not None:
        text += f" and the {len(gates.modules)} gates of {gates.where}"
        share, calls = share + gates.share, calls + gates.calls
    return f"{text} takes {share:.0%} of the step, in {calls} operators", share


Try = tuple[list[str], str, Callable[[Target, Tensor], float]]


def _outputs_alone(loop: Loop) -> Try:
    units = "" if loop.units is None else f", experts_per_unit={loop.units}"
    lines = [
        "from mtlkernels.nn import ExpertMLP",
        f"{loop.word} = ExpertMLP.from_modules({loop.where}{units})",
        f"z = {loop.word}(x)",
    ]
    x = "[B,K]" if loop.units is None else f"[B,{len(loop.units)},K]"
    stacked = torch.stack([t.detach() for t in loop.outputs], 1)
    hint = f"x {x} -> [B,{len(loop.modules)},{stacked.shape[2]}], in place of the loop"
    return lines, hint, lambda target, z: relative_error(z, stacked)


def _mixture(loop: Loop, gates: Loop) -> Try:
    bank = f"[gate[:-1] for gate in {gates.where}]" if gates.softmax else gates.where
    lines = [
        "from mtlkernels import gated_mix; from mtlkernels.nn import ExpertMLP",
        f"experts, gates = ExpertMLP.from_modules({loop.where}), ExpertMLP.from_modules({bank})",
        "z = gated_mix(experts(x), gates(x))",
    ]
    rows, width = len(gates.modules), loop.outputs[0].shape[-1]
    return lines, f"x [B,K] -> [B,{rows},{width}], in place of both loops and the mix", _appears


class _Look(TorchDispatchMode):
    """How near the results of a network's operators come to each row of z [B,T,D], the nearest one kept."""

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        self.rows = [row.double() for row in z.unbind(1)]
        self.errors = [float("inf")] * len(self.rows)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                for candidate in self._rows_of(tensor.detach()):
                    for t, row in enumerate(self.rows):
                        self.errors[t] = min(self.errors[t], relative_error(candidate, row))
        return out

    def _rows_of(self, tensor: Tensor) -> list[Tensor]:
        size, count = self.rows[0].shape, len(self.rows)
        if tensor.numel() == size.numel() and tensor.shape[0] == size[0]:
            return [tensor.reshape(size)]
        if tensor.shape == (size[0], count, size[1]):
            return list(tensor.unbind(1))
        return list(tensor) if tensor.shape == (count, *size) else []


def _appears(target: Target, z: Tensor) -> float:
    """The worst row's distance from what the network computes somewhere."""
    with torch.no_grad(), _Look(z) as look:
        target.run(target.network, *target.inputs)
    return max(look.errors)


def _times(names: dict[str, Any], call: str, loop: Loop, gates: Loop | None, seconds: float) -> tuple[float, float]:
    """Milliseconds of the modules and of the line `call` in their place, forward and backward."""
    x, line = loop.x.requires_grad_(), compile(call.partition("=")[2].strip(), "<line>", "eval")
    above = torch.randn_like(names["z"])
    banks = [bank.train(loop.modules[0].training) for bank in names.values() if isinstance(bank, ExpertMLP)]
    ours = [p for bank in banks for p in bank.parameters()]
    theirs = [p for m in (*loop.modules, *(gates.modules if gates is not None else ())) for p in m.parameters()]

    def modules() -> Any:
        units = [x] if loop.units is None else x.unbind(1)
        inputs = [t for t, n in zip(units, loop.units or [len(loop.modules)], strict=True) for _ in range(n)]
        z = torch.stack([m(t) for m, t in zip(loop.modules, inputs, strict=True)], 1)
        if gates is not None:
            weights = torch.stack([gate(x) for gate in gates.modules], 1)
            z = torch.bmm(weights if gates.softmax else weights.softmax(-1), z)
        return torch.autograd.grad(z, [x, *theirs], above)

    def bank() -> Any:
        return torch.autograd.grad(eval(line, names | {"x": x}), [x, *ours], above)

    times = interleaved({"modules": modules, "bank": bank}, seconds=seconds, warmup_seconds=0.05, device=x.device)
    return times["modules"].median * 1e3, times["bank"].median * 1e3


def _copies(step: Step, ops: list[Op]) -> list[Advice]:
    copies = [op for op in ops if op.name in COPIES]
    share = _share(step, copies)
    if share < _WORTH:
        return []
    names = sorted({op.name for op in copies}, key=lambda name: -_share(step, [op for op in copies if op.name == name]))
    moved = sum(op.bytes for op in copies)
    return [Advice(f"{', '.join(names)} copy {moved / 1e6:.1f} MB and take {share:.0%} of the step", share)]


def _slow(step: Step, ops: list[Op], gflops: float, gb_s: float) -> list[Advice]:
    """Operators of one name that take much and reach little; those of many short calls are said to be so."""
    groups: dict[tuple[str, bool], list[Op]] = {}
    for op in ops:
        if op.name not in COPIES and op.seconds:
            groups.setdefault((op.name, op.backward), []).append(op)
    found = []
    for (name, backward), own in groups.items():
        spent, least = sum(op.seconds for op in own), sum(op.floor(gflops, gb_s) for op in own)
        share = _share(step, own)
        if share < _WORTH or least > _FAR * spent:
            continue
        text = f"{name}{' in backward' if backward else ''} takes {share:.0%} of the step"
        text += f" at {least / spent:.0%} of its ceiling"
        if spent / len(own) < _SHORT:
            text += f": {len(own)} calls of {spent / len(own) * 1e6:.0f} us, most of it the cost of a call"
        found.append(Advice(text, share))
    return found


def _share(step: Step, ops: list[Op]) -> float:
    return sum(op.seconds or 0.0 for op in ops) / (step.watched or 1.0)
