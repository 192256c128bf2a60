"""What is profiled or planned: a network by name or a module of the user's own, with its inputs and its step."""

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bench.papers import ARCHITECTURES, TINY, Sizes


@dataclass
class Target:
    """A network with the inputs of a step.

    Attributes:
        name: as given.
        network: in training mode.
        inputs: tensors; those of floating point want their gradient.
        run: one call.
        above: the gradients that came from above in the last step.
    """

    name: str
    network: nn.Module
    inputs: tuple[Tensor, ...]
    run: Callable[..., Any]
    above: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def title(self) -> str:
        """The name without the folders of a file."""
        return Path(self.name).name

    def outputs(self, *inputs: Tensor) -> list[Tensor]:
        """The results that want a gradient, out of whatever the network gives; of these inputs, or its own."""
        found = self.run(self.network, *(inputs or self.inputs))
        return [t for t in tree_leaves(found) if isinstance(t, Tensor) and t.requires_grad]

    def step(self) -> None:
        """Forward and backward, with a gradient from above that is no constant: one would be an expanded scalar."""
        outputs = self.outputs()
        if not outputs:
            raise ValueError(f"{self.name}: no output depends on a parameter or on an input that wants a gradient")
        if [t.shape for t in self.above] != [t.shape for t in outputs]:  # once: making it is no part of the step
            self.above = [_above(t) for t in outputs]
        torch.autograd.backward(outputs, self.above)

    def release(self) -> None:
        """Drops all gradients."""
        self.network.zero_grad(set_to_none=True)
        for tensor in self.inputs:
            tensor.grad = None

    @property
    def rows(self) -> int:
        """B, the rows of the first input."""
        return len(self.inputs[0])


def _above(out: Tensor) -> Tensor:
    """Numbers that differ, the same every time."""
    return torch.linspace(-1, 1, out.numel(), dtype=torch.float32, device=out.device).to(out.dtype).view(out.shape)


def load(
    name: str,
    *,
    sizes: dict[str, int] | None = None,
    inputs: Sequence[str] = (),
    arguments: dict[str, Any] | None = None,
    plain: bool = False,
    small: bool = False,
    dtype: str = "float32",
    device: str = "cpu",
) -> Target:
    """The target of this name.

    Args:
        name: of `bench.papers.ARCHITECTURES`, or "package.module:thing" or "file.py:thing": a module, or a class or
            function that makes one.
        sizes: letters of `bench.papers.Sizes`, of a network by name.
        inputs: of a module of the user's own, as in `tensor`.
        arguments: keywords with which `thing` is called.
        dtype: by its name, so that all of this can be handed to another process.
        plain: of a network by name, the modules that people write.

    Raises:
        ValueError: there is no such network, module or thing, or what belongs to the other kind was given.
    """
    torch.manual_seed(0)
    if ":" not in name:
        if name not in ARCHITECTURES:
            raise ValueError(
                f"name: got {name!r}, expected one of {', '.join(ARCHITECTURES)}, or module:thing or file.py:thing"
            )
        if inputs or arguments:
            raise ValueError(f"{name} takes sizes; inputs and arguments are for a module of your own")
        return _named(name, sizes or {}, plain, small, getattr(torch, dtype), device)
    if sizes or plain:
        raise ValueError(f"{name} takes inputs and arguments; sizes and plain are for a network by name")
    if not inputs:
        raise ValueError(f"inputs: {name} needs the shape of a batch, as in 512,64")
    network = _own(name, arguments or {})
    tensors = tuple(tensor(text, getattr(torch, dtype), device) for text in inputs)
    return Target(name, _moved(network, device, getattr(torch, dtype)), tensors, nn.Module.__call__)


def _named(name: str, changes: dict[str, int], plain: bool, small: bool, dtype: torch.dtype, device: str) -> Target:
    known = {letter.name for letter in fields(Sizes)}
    if unknown := set(changes) - known:
        raise ValueError(f"sizes: got {', '.join(sorted(unknown))}, expected some of {', '.join(sorted(known))}")
    z = replace(TINY if small else Sizes(), **changes)
    found = ARCHITECTURES[name]
    network = found.make(z)
    run = found.run or nn.Module.__call__
    if plain:
        network, run = found.rival(network), nn.Module.__call__
    extras = tuple(t.to(device) for t in found.extras(z))
    x = torch.randn(z.B, z.K).to(device, dtype).requires_grad_()
    return Target(f"{name}, plain" if plain else name, _moved(network, device, dtype), (x, *extras), run)


def _moved(network: nn.Module, device: str, dtype: torch.dtype) -> nn.Module:
    """In training mode, on the device, in the dtype; untouched where it is: modules of fake tensors cannot be moved."""
    there = all(p.dtype == dtype and p.device.type == torch.device(device).type for p in network.parameters())
    return (network if there else network.to(device, dtype)).train()


def _own(name: str, arguments: dict[str, Any]) -> nn.Module:
    where, _, thing = name.rpartition(":")
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(where).stem, where)
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # dataclasses look their module up
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise ValueError(f"name: got {name!r}, but {where} cannot be imported: {error}") from None
    if not hasattr(module, thing):
        raise ValueError(f"name: got {name!r}, but {where} has no {thing}")
    found = getattr(module, thing)
    if not isinstance(found, nn.Module) and callable(found):
        found = found(**arguments)
    if not isinstance(found, nn.Module):
        raise ValueError(f"name: {name} must be or make an nn.Module; got {type(found).__name__}")
    return found


def tensor(text: str, dtype: torch.dtype, device: str) -> Tensor:
    """ "512,64" is normal numbers of that shape, "512,8:1000" whole ones below 1000. ValueError for anything else."""
    shape, _, below = text.partition(":")
    try:
        sizes, limit = [int(word) for word in shape.split(",")], int(below) if below else None
    except ValueError:
        raise ValueError(
            f"inputs: got {text!r}, expected a shape as in 512,64, or 512,8:1000 for numbers of rows"
        ) from None
    if limit is not None:
        return torch.randint(limit, sizes, device=device)
    return torch.randn(sizes).to(device, dtype).requires_grad_()


def keywords(text: str, option: str) -> dict[str, Any]:
    """ "E=64, dims=[32,16]" as keywords and values that are plain Python. ValueError, with `option`, for others."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if call.args or any(word.arg is None for word in call.keywords):
            raise ValueError
        return {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError):
        raise ValueError(f"{option}: got {text!r}, expected keywords as in E=64,T=4") from None
