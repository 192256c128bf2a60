"""Reading lists of ordinary ``torch.nn`` MLPs, and moving their tensors into and out of expert banks."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise

import torch
from torch import Tensor, nn

_ACTIVATIONS = {nn.ReLU: "relu", nn.GELU: "gelu", nn.SiLU: "silu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid"}
_LEAVES = (nn.Linear, nn.BatchNorm1d, nn.LayerNorm, nn.Dropout, *_ACTIVATIONS)


@dataclass
class Layer:
    """One layer of an MLP: what must agree between the experts of a bank, and the modules that hold its tensors."""

    in_features: int
    out_features: int
    bias: bool
    dtype: torch.dtype
    device: torch.device
    trainable: bool
    norm: str | None = None
    eps: float | None = None
    momentum: float | None = None
    activation: str | None = None
    dropout: float = 0.0
    linear: nn.Module | None = field(default=None, compare=False)
    normalise: nn.Module | None = field(default=None, compare=False)


def read(modules: Sequence[nn.Module]) -> tuple[list[Layer], list[list[Layer]]]:
    """The layers common to all modules, and each module's own.

    Raises:
        TypeError, ValueError: a module is unsupported or unequal; the message names its index and the difference.
    """
    if isinstance(modules, nn.Module) and not isinstance(modules, (nn.ModuleList, nn.Sequential)):
        raise TypeError(f"modules must be a list of modules or a ModuleList; got {type(modules).__name__}")
    sources = [_layers(f"modules[{i}]", module) for i, module in enumerate(modules)]
    if not sources:
        raise ValueError("modules must hold at least one module; got an empty list")
    for i, source in enumerate(sources):
        difference = _difference(source, sources[0])
        if difference:
            raise ValueError(f"modules[{i}] differs from modules[0]: {difference}")
        if modules[i].training != modules[0].training:
            raise ValueError(f"modules[{i}] differs from modules[0]: training is {modules[i].training}")
    return sources[0], sources


def _difference(found: list[Layer], expected: list[Layer]) -> str:
    if len(found) != len(expected):
        return f"{len(found)} layers, expected {len(expected)}"
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        for name in (f.name for f in fields(Layer) if f.compare):
            if getattr(a, name) != getattr(b, name):
                return f"layer {k} has {name}={getattr(a, name)!r}, expected {getattr(b, name)!r}"
    return ""


def _flatten(where: str, module: nn.Module) -> list[nn.Module]:
    """The leaves of a module in the order they run."""
    if isinstance(module, _LEAVES):
        return [module]
    if isinstance(module, nn.Identity):
        return []
    if isinstance(module, nn.Sequential):
        return [leaf for name, child in module.named_children() for leaf in _flatten(f"{where}.{name}", child)]
    children = list(module.named_children())
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    if len(children) != 1 or own or isinstance(children[0][1], (nn.ModuleList, nn.ModuleDict)):
        raise TypeError(
            f"{where} is a {type(module).__name__}; supported are Linear, BatchNorm1d, LayerNorm, Dropout, "
            f"{', '.join(a.__name__ for a in _ACTIVATIONS)}, Sequential, and modules around one of these"
        )
    leaves = _flatten(f"{where}.{children[0][0]}", children[0][1])
    _check_wrapper(where, module, leaves)
    return leaves


@torch.no_grad()
def _check_wrapper(where: str, module: nn.Module, leaves: list[nn.Module]) -> None:
    """A wrapper's forward could do more than call its child: two rows through both say whether it does."""
    linear = next((leaf for leaf in leaves if isinstance(leaf, nn.Linear)), None)
    if linear is None:
        return
    weight = linear.weight
    x = torch.linspace(-2, 2, 2 * linear.in_features, device=weight.device, dtype=weight.dtype)
    x = x.view(2, linear.in_features)
    modes = [(m, m.training) for m in module.modules()]
    try:
        module.eval()
        same = torch.equal(module(x), nn.Sequential(*leaves)(x))
    finally:
        for m, training in modes:
            m.training = training
    if not same:
        raise TypeError(f"{where} is a {type(module).__name__} that computes more than the layers inside it")


def _layers(where: str, module: nn.Module) -> list[Layer]:
    layers: list[Layer] = []
    stage = 0
    for leaf in _flatten(where, module):
        if isinstance(leaf, nn.Linear):
            trainable = leaf.weight.requires_grad
            layers.append(
                Layer(
                    leaf.in_features,
                    leaf.out_features,
                    leaf.bias is not None,
                    leaf.weight.dtype,
                    leaf.weight.device,
                    trainable,
                    linear=leaf,
                )
            )
            stage = 0
            continue
        kind = 1 if isinstance(leaf, (nn.BatchNorm1d, nn.LayerNorm)) else 3 if isinstance(leaf, nn.Dropout) else 2
        if kind <= stage or not layers:
            raise TypeError(
                f"{where}: {type(leaf).__name__} comes where it cannot be stacked; "
                "a layer is Linear, then norm, then activation, then Dropout"
            )
        stage = kind
        _add(where, layers[-1], leaf)
    if not layers:
        raise TypeError(f"{where} holds no Linear layer")
    for k, (below, above) in enumerate(pairwise(layers)):
        if below.out_features != above.in_features:
            raise ValueError(
                f"{where}: layer {k + 1} takes {above.in_features} features, layer {k} gives {below.out_features}"
            )
    return layers


def _add(where: str, layer: Layer, leaf: nn.Module) -> None:
    if isinstance(leaf, nn.BatchNorm1d):
        if not (leaf.affine and leaf.track_running_stats and leaf.momentum is not None):
            raise TypeError(f"{where}: BatchNorm1d must be affine, with running statistics and a momentum; got {leaf}")
        layer.norm, layer.eps, layer.momentum, layer.normalise = "batch", leaf.eps, leaf.momentum, leaf
    elif isinstance(leaf, nn.LayerNorm):
        if leaf.weight is None or leaf.bias is None or leaf.normalized_shape != (layer.out_features,):
            raise TypeError(f"{where}: LayerNorm must be affine with a bias, over {layer.out_features}; got {leaf}")
        layer.norm, layer.eps, layer.normalise = "layer", leaf.eps, leaf
    elif isinstance(leaf, nn.Dropout):
        if not leaf.p < 1:
            raise TypeError(f"{where}: Dropout must have p below 1; got {leaf.p}")
        layer.dropout = leaf.p
    else:
        if isinstance(leaf, nn.GELU) and leaf.approximate != "none":
            raise TypeError(f"{where}: GELU must be the exact one; got approximate={leaf.approximate!r}")
        layer.activation = _ACTIVATIONS[type(leaf)]


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@torch.no_grad()
def stack(sources: Sequence[nn.Module], bank: nn.Module) -> None:
    """Copies equal modules' parameters and buffers into a bank's, one slice each."""
    held = [_tensors(source) for source in sources]
    for name, target in _tensors(bank).items():
        target.copy_(torch.stack([tensors[name] for tensors in held]))
        if isinstance(target, nn.Parameter):
            target.requires_grad_(held[0][name].requires_grad)


@torch.no_grad()
def unstack(e: int, linear: nn.Module, norm: nn.Module, activation: str | None, dropout: float) -> list[nn.Module]:
    """Expert e of one layer of a bank as ``torch.nn`` modules."""
    factory = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    parts = [nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, **factory)]
    kind = getattr(norm, "kind", None)
    if kind == "batch":
        parts.append(nn.BatchNorm1d(linear.out_features, norm.eps, norm.momentum, **factory))
    elif kind == "layer":
        parts.append(nn.LayerNorm(linear.out_features, norm.eps, **factory))
    for part, bank in zip(parts, (linear, norm), strict=False):
        banked = _tensors(bank)
        for name, target in _tensors(part).items():
            target.copy_(banked[name][e])
            target.requires_grad_(banked[name].requires_grad)
    if activation is not None:
        parts.append(next(module for module, name in _ACTIVATIONS.items() if name == activation)())
    if dropout:
        parts.append(nn.Dropout(dropout))
    return parts
