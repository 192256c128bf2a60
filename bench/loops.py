"""Equal modules that run side by side in a network: experts that are looped over, and their gates.

Found are equal MLPs with one parent, each called once in a step, none of which reads what another gives. The network
runs in evaluation mode meanwhile, so that dropout draws nothing and running statistics stay.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.target import Target
from bench.watch import Op, Step
from mtlkernels import stacking

_GATHERS = frozenset(("stack", "cat", "unbind"))


@dataclass
class Loop:
    """Equal modules side by side.

    Attributes:
        where: expression for the list of them; the whole network is `network`.
        names: their paths.
        modules, inputs, outputs: each module with what it read and gave.
        units: how many modules read each input, in turn; None where all read one.
        ops: what ran in them, and what gathered their outputs.
        share: of the watched step.
    """

    where: str
    names: list[str]
    modules: list[nn.Module]
    inputs: list[Tensor]
    outputs: list[Tensor]
    units: list[int] | None
    ops: list[Op]
    share: float

    @property
    def calls(self) -> int:
        """Operators that do something."""
        return sum(not op.is_view for op in self.ops)

    @property
    def word(self) -> str:
        """What the list is called."""
        last = self.names[0].split(".")
        last = [word.rstrip("0123456789_") for word in last if not word.isdigit()]
        return next((word for word in reversed(last) if word.isidentifier()), "modules")

    @property
    def softmax(self) -> bool:
        """Whether the modules are gates that end in their softmax."""
        return isinstance(self.modules[0], nn.Sequential) and isinstance(self.modules[0][-1], nn.Softmax)

    @property
    def x(self) -> Tensor:
        """What a bank in their place reads: [B,K], or [B,U,K]."""
        if self.units is None:
            return self.inputs[0].detach()
        firsts = [sum(self.units[:u]) for u in range(len(self.units))]
        return torch.stack([self.inputs[i].detach() for i in firsts], 1)

    def is_gate_of(self, other: "Loop") -> bool:
        """Whether its modules give a number for each module of the other, out of what these read."""
        if self is other or self.units is not None or other.units is not None:
            return False
        return self.outputs[0].shape[-1] == len(other.modules) and _key(self.inputs[0]) == _key(other.inputs[0])


def find(target: Target, step: Step) -> list[Loop]:
    """The loops of the network; `step` says what they cost."""
    return list(_find(target, step))


def _find(target: Target, step: Step) -> Iterator[Loop]:
    groups = list(_lists(target.network))
    seen = _calls(target, [module for _, _, modules in groups for module in modules])
    for where, names, modules in groups:
        calls = [seen[module] for module in modules]
        if any(len(own) != 1 or own[0] is None for own in calls):
            continue
        inputs, outputs = ([own[0][i] for own in calls] for i in (0, 1))
        if outputs[0].dim() == 2 and not _in_sequence(inputs, outputs):
            yield Loop(where, names, modules, inputs, outputs, _units(inputs), *_cost(step, names, outputs))


def _cost(step: Step, names: list[str], outputs: list[Tensor]) -> tuple[list[Op], float]:
    own = [op for op in step.ops if any(op.scope == name or op.scope.startswith(name + ".") for name in names)]
    shapes = [tuple(t.shape) for t in outputs]
    inside = {id(op) for op in own}
    own += [op for op in step.ops if op.name in _GATHERS and id(op) not in inside and _gathers(op, shapes)]
    return own, sum(op.seconds or 0.0 for op in own) / (step.watched or 1.0)


def _gathers(op: Op, shapes: list[tuple[int, ...]]) -> bool:
    """Whether the operator stacks tensors of these shapes, or takes such a stack apart."""
    numbers = sum(torch.Size(shape).numel() for shape in op.shapes)
    return numbers == sum(torch.Size(shape).numel() for shape in shapes)


def _lists(network: nn.Module) -> Iterator[tuple[str, list[str], list[nn.Module]]]:
    """Groups of two and more equal MLPs with one parent: the expression for the group, their paths, the modules."""
    for path, parent in network.named_modules():
        groups: list[tuple[list[stacking.Layer], list[tuple[str, nn.Module]]]] = []
        for name, child in parent.named_children():
            layers = _layers(child)
            if layers is None:
                continue
            group = next((members for other, members in groups if other == layers), None)
            if group is None:
                group = []
                groups.append((layers, group))
            group.append((f"{path}.{name}" if path else name, child))
        for _, members in groups:
            if len(members) < 2:
                continue
            names, modules = map(list, zip(*members, strict=True))
            whole = isinstance(parent, nn.ModuleList) and len(members) == len(parent)
            yield expression(path) if whole else f"[{', '.join(map(expression, names))}]", names, modules


def _layers(module: nn.Module) -> list[stacking.Layer] | None:
    """The layers of an MLP, or of a gate before its softmax; None for anything else."""
    if isinstance(module, nn.Sequential) and len(module) > 1 and isinstance(module[-1], nn.Softmax):
        module = module[:-1]
    try:
        return stacking.read([module])[0]
    except (TypeError, ValueError, RuntimeError):  # the last where a wrapper takes more than one tensor
        return None


def expression(path: str) -> str:
    """ "blocks.0.experts" as network.blocks[0].experts."""
    return "network" + "".join(f"[{word}]" if word.isdigit() else f".{word}" for word in path.split(".") if word)


def _calls(target: Target, modules: list[nn.Module]) -> dict[nn.Module, list[tuple[Tensor, Tensor] | None]]:
    """Each module's calls in one forward pass, (input, output); None for one with other arguments."""
    found: dict[nn.Module, list[tuple[Tensor, Tensor] | None]] = {module: [] for module in modules}

    def note(module: nn.Module, args: tuple, out: object) -> None:
        plain = len(args) == 1 and isinstance(args[0], Tensor) and isinstance(out, Tensor)
        found[module].append((args[0], out) if plain else None)

    hooks = [module.register_forward_hook(note) for module in found]
    try:
        with evaluating(target.network):
            target.outputs()
    finally:
        for hook in hooks:
            hook.remove()
    return found


class evaluating:
    """Evaluation mode, and back."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    def __enter__(self) -> None:
        self._modes = [(m, m.training) for m in self._network.modules()]
        self._network.eval()

    def __exit__(self, *_: object) -> None:
        for module, training in self._modes:
            module.training = training


def _in_sequence(inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Whether a module reads what another one gave: the layers of one network, and not experts."""
    made = {t.grad_fn for t in outputs}
    todo, seen = [t.grad_fn for t in inputs if t.grad_fn is not None], set()
    while todo:
        node = todo.pop()
        if node in made:
            return True
        if node not in seen:
            seen.add(node)
            todo += [below for below, _ in node.next_functions if below is not None]
    return False


def _key(t: Tensor) -> tuple:
    return t.data_ptr(), t.shape, t.stride()


def _units(inputs: list[Tensor]) -> list[int] | None:
    if len({_key(t) for t in inputs}) == 1:
        return None
    counts: list[int] = []
    before = None
    for t in inputs:
        if before is None or _key(t) != _key(before):
            counts.append(0)
        counts[-1] += 1
        before = t
    return counts
