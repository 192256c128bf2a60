"""Networks cut by features: a layer's outputs spread over ranks, and the inputs of the layer behind it.

Two layers of an MLP with nothing but an activation between them are a pair, as Megatron-LM has them (Shoeybi et al.
2019, section 3): every rank has some outputs of the first and the inputs of the second that read these, and the ranks
add up what the second gives. A layer that stands alone has its outputs gathered. What is behind either, norms, dropout
and the rest, every rank does alike, on the whole.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.func import functional_call

import mtlkernels as mtl
from mtlkernels.exchange import enter, spread, summed
from mtlkernels.nn import ACTIVATIONS, ExpertLinear, ExpertMLP, Towers

from .layers import Gates
from .snr import TransLevel
from .star_layers import StarLinear
from .ubernet import UberNet

# How a layer is cut. "inner" is the first of a pair, "inputs" the second.
OUTPUTS, INNER, INPUTS = "outputs", "inner", "inputs"


def feature_cuts(model: nn.Module) -> dict[nn.Module, str]:
    """The layers that are cut, and how: those of two outputs or more, towers, gates and UberNet's scores aside."""
    read_outs = [
        part.skips if isinstance(part, UberNet) else part
        for part in model.modules()
        if isinstance(part, (Towers, Gates, UberNet))
    ]
    done = {module for part in read_outs for module in part.modules()}
    found: dict[nn.Module, str] = {}
    for module in model.modules():
        if module in done:
            continue
        if isinstance(module, ExpertMLP):
            found.update(_of_mlp(module))
            done.update(module.linears)
        elif isinstance(module, (ExpertLinear, TransLevel, StarLinear)) and width(module) > 1:
            found[module] = OUTPUTS
    return found


def _of_mlp(mlp: ExpertMLP) -> dict[nn.Module, str]:
    linears, found, k = list(mlp.linears), {}, 0
    while k < len(linears):
        # A norm reads all features; a dropout's mask must be the one that is drawn for all.
        apart = k + 1 == len(linears) or not isinstance(mlp.norms[k], nn.Identity) or mlp.dropouts[k]
        if width(linears[k]) > 1:
            found[linears[k]] = OUTPUTS if apart else INNER
            if not apart:
                found[linears[k + 1]] = INPUTS
                k += 1
        k += 1
    return found


def width(layer: nn.Module) -> int:
    """Outputs of a layer."""
    if isinstance(layer, TransLevel):
        return layer.bias.shape[-1]
    return layer.out_features if isinstance(layer, ExpertLinear) else layer.domain_bias.shape[-1]


def shard_features(model: nn.Module, mesh: DeviceMesh) -> int:
    """Cuts every one of :func:`feature_cuts` over a mesh of one dimension, in place; how many there were."""
    cuts = feature_cuts(model)
    for layer, how in cuts.items():
        if isinstance(layer, StarLinear):
            _star(layer, mesh)
        elif isinstance(layer, TransLevel):
            _cut(layer, mesh, {"weight": 2, "bias": 1}, "blocks", partial(_blocks, size=width(layer)))
        elif how == INPUTS:
            _cut(layer, mesh, {"weight": 2}, "forward", _inputs)
        else:
            size = layer.out_features if how == OUTPUTS else None
            _cut(layer, mesh, {"weight": 1, "bias": 1}, "forward", partial(_outputs, size=size))
    return len(cuts)


def _cut(layer: nn.Module, mesh: DeviceMesh, dims: dict[str, int], name: str, run: Callable[..., Tensor]) -> None:
    """Makes parameters DTensors, sharded by the dimensions given, and `run` the layer's method of that name."""
    for key, dim in dims.items():
        p = getattr(layer, key)
        if p is not None:
            cut = nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(dim)]), p.requires_grad)
            layer.register_parameter(key, cut)

    def method(self: nn.Module, *args: Any, **options: Any) -> Tensor:
        return run(self, *args, axis=(mesh, 0), **options)

    layer.__class__ = type(f"Cut{type(layer).__name__}", (type(layer),), {name: method})


def _outputs(layer: ExpertLinear, x: Tensor, *, axis, size: int | None) -> Tensor:
    """This rank's outputs, or with `size` all of them."""
    units = layer.experts_per_unit if x.dim() == 3 else None
    weight, bias = own(layer.weight), own(layer.bias)
    y = mtl.expert_linear(enter(x, axis), weight, bias, experts_per_unit=units, activation=layer.activation)
    return y if size is None else spread(y, 2, size, axis).full_tensor()


def _inputs(layer: ExpertLinear, x: Tensor, *, axis) -> Tensor:
    """All outputs, from this rank's inputs: bias and activation are of the sum."""
    y = summed(mtl.expert_linear(x, own(layer.weight)), axis)
    if layer.bias is not None:
        y = y + layer.bias.to(y.dtype)
    return y if layer.activation is None else ACTIVATIONS[layer.activation](y)


def _blocks(level: TransLevel, u: Tensor, gate: Tensor, activation: str | None, *, axis, size: int) -> Tensor:
    """All outputs of a level of SNRTrans; its connections, which every rank has, are read by all."""
    u, gate = enter(u, axis), enter(gate, axis)
    y = mtl.snr_linear(u, own(level.weight), gate, own(level.bias), activation=activation, skip_closed=True)
    return spread(y, 2, size, axis).full_tensor()


def _star(layer: StarLinear, mesh: DeviceMesh) -> None:
    size, twin = width(layer), copy.deepcopy(layer)
    for key, p in list(twin.named_parameters()):
        # The twin runs this rank's part, and holds nothing itself.
        twin.register_parameter(key, nn.Parameter(torch.empty(0, device="meta"), p.requires_grad))

    def run(self: nn.Module, x: Tensor, *args: Any, axis, **options: Any) -> Tensor:
        held = {key: own(p) for key, p in self.named_parameters()}
        y = functional_call(twin, held, (enter(x, axis), *args), options)
        return spread(y, 1, size, axis).full_tensor()

    _cut(layer, mesh, {"weight": 0, "bias": 0, "domain_weight": 1, "domain_bias": 1}, "forward", run)


def own(tensor: Tensor | None) -> Tensor | None:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
