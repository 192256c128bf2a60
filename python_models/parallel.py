"""Networks on several ranks: their rows, their experts, or both spread over a device mesh."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.func import functional_call
from torch.utils._pytree import tree_map

import mtlkernels.sharding  # noqa: F401  its import registers the operators' rules
from mtlkernels.exchange import WHOLE, Axis, enter, own_counts, own_part, spread
from mtlkernels.nn import ExpertLinear, ExpertMLP, Towers

from .adatt import AdaTTLevel
from .layers import Gates
from .mmoe import MMoE
from .parallel_features import own, shard_features
from .ple import CGCLevel

PLANS = ("experts", "features", "data", "fsdp")


def parallelize(model: nn.Module, mesh: DeviceMesh, plan: str | Sequence[str]) -> nn.Module:
    """The model spread over a mesh, in place; every rank calls this on the same model and trains as before.

    Args:
        model: any network of this package, alone or in a :class:`MultiTaskModel`.
        mesh: one name a dimension; one or two of them.
        plan: what each dimension of the mesh is for, in order:

            "experts": its ranks read the same rows. Banks of experts, and the gates over them, lie on the ranks that
            run them; the ranks reduce what they mix, [B,T,D] a level. A softmax over all experts takes three numbers a
            row. Networks that read their experts' outputs in another way than by a gate get these gathered, [B,E,D].

            "features": its ranks read the same rows, and each has some of the features of every layer of two or more,
            towers and gates aside; see :mod:`python_models.parallel_features`. Takes every network.

            "data": its ranks read rows of their own, and average gradients (``DistributedDataParallel``'s meaning).

            "fsdp": the same, and parameters, gradients and optimizer states are sharded (``fully_shard``).

    Returns:
        The model; its parameters are DTensors where they are sharded, under the names they had.

    Raises:
        TypeError, ValueError: naming the argument; "experts" for a model without two experts anywhere, too, and
            "features" for one without a layer of two features, as where all experts are modules of the user's own.

    All ranks must start from equal parameters: seed them alike, or load one checkpoint.
    """
    plan = [plan] if isinstance(plan, str) else list(plan)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module; got {type(model).__name__}")
    if len(plan) != mesh.ndim or len(set(plan)) != len(plan) or not set(plan) <= set(PLANS):
        raise ValueError(
            f"plan must name one of {', '.join(PLANS)} for each of mesh's {mesh.ndim} dimensions; got {plan}"
        )
    if {"data", "fsdp"} <= set(plan):
        raise ValueError("plan has both data and fsdp: give fully_shard a mesh of two dimensions for that")
    if {"experts", "features"} <= set(plan):
        raise ValueError("plan has both experts and features: a bank is cut one way; put data or fsdp beside either")
    lines = {name: mesh if mesh.ndim == 1 else mesh[mesh.mesh_dim_names[i]] for i, name in enumerate(plan)}
    kind = type(model).__name__
    if "experts" in plan and not shard_experts(model, lines["experts"]):
        raise ValueError(f"plan 'experts': model {kind} has no bank of two experts or more; 'features' spreads it")
    if "features" in plan and not shard_features(model, lines["features"]):
        raise ValueError(f"plan 'features': model {kind} has no layer of two features or more")
    for name in ("data", "fsdp"):
        if name in plan:
            _over_rows(model, lines[name], name)
    return model


def _over_rows(model: nn.Module, mesh: DeviceMesh, plan: str) -> None:
    if plan == "fsdp":
        fully_shard(model, mesh=mesh)
    else:
        from torch.distributed._composable.replicate_with_fsdp import replicate

        replicate(model, mesh=mesh)


@dataclass(frozen=True)
class Mixed:
    """How a bank's outputs are mixed.

    Attributes:
        gates: of its rows.
        sharded: these lie on the ranks that have the experts; otherwise every rank has all logits.
        native: learned weights of AdaTT's residual, 0 where there are none.
        joint: experts and gates read one input in parts, so that its gradient is reduced once for both.
    """

    gates: Gates
    sharded: bool
    native: int = 0
    joint: bool = False


def mixed_banks(model: nn.Module) -> dict[nn.Module, Mixed]:
    """The banks that gates mix; other banks' outputs are read one by one."""
    found: dict[nn.Module, Mixed] = {}
    for module in model.modules():
        if isinstance(module, MMoE):
            pairs = [(bank, gates, 0) for bank, gates in zip(module.experts, module.gates, strict=True)]
        elif isinstance(module, (CGCLevel, AdaTTLevel)):
            native = getattr(module, "native", None)
            pairs = [(module.experts, module.gates, 0 if native is None else len(native))]
        else:
            continue
        # Hidden layers of gates are on every rank: their input has its whole gradient from each.
        joint = all(_follows(g, b) and g.hidden is None and b.num_experts > 1 for b, g, _ in pairs)
        for bank, gates, native in pairs:
            found[bank] = Mixed(gates, _follows(gates, bank), native, joint)
    return found


def _follows(gates: Gates, bank: nn.Module) -> bool:
    """Whether the gates can be cut as the experts are: one logit an expert in every row, and no norm over them."""
    if gates.packed or gates.norm is not None or gates.logits is None or not isinstance(bank, ExpertMLP):
        return False
    return gates.logits.weight.shape[:2] == (len(gates.routes), bank.num_experts)


def sharded_banks(model: nn.Module) -> list[nn.Module]:
    """The banks of two experts or more, towers and gates aside."""
    kept = {m for top in model.modules() if isinstance(top, (Towers, Gates)) for m in top.modules()}
    found: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, (ExpertMLP, ExpertLinear)) and module not in kept and module.num_experts > 1:
            found.append(module)
            kept.update(module.modules())
    return found


def shard_experts(model: nn.Module, mesh: DeviceMesh) -> int:
    """Spreads every one of :func:`sharded_banks` over a mesh of one dimension, in place; how many there were."""
    mixed, banks = mixed_banks(model), sharded_banks(model)
    entered = set()
    for module in model.modules():
        if isinstance(module, (MMoE, CGCLevel, AdaTTLevel)):
            module.register_forward_hook(_plain_output)
            first = module.experts[0] if isinstance(module, MMoE) else module.experts
            if mixed[first].joint:
                module.register_forward_pre_hook(partial(_enter_first, axis=(mesh, 0)))
                entered.add(first)
    for bank in banks:
        how = mixed.get(bank)
        _spread(bank, mesh, 0, gather=how is None, enters=bank not in entered)
        if how is not None and how.sharded:
            _spread(how.gates.logits, mesh, 1, gather=False, enters=not how.joint)
    return len(banks)


def _enter_first(module: nn.Module, args: tuple, axis: Axis) -> tuple:
    return (enter(args[0], axis), *args[1:])


def _plain_output(module: nn.Module, args: Any, output: Any) -> Any:
    """Gate weights, which come as the logits lie, whole."""
    return tree_map(lambda t: t.full_tensor() if isinstance(t, DTensor) else t, output)


def _spread(bank: nn.Module, mesh: DeviceMesh, dim: int, gather: bool, enters: bool) -> None:
    """Makes the bank's parameters and buffers DTensors sharded by `dim`, and its forward that of this rank's part."""
    local = copy.deepcopy(bank)
    begin, end = own_part(bank.num_experts if dim == 0 else bank.out_features, (mesh, 0))
    for name, module in list(bank.named_modules()):
        twin = local.get_submodule(name)
        if isinstance(twin, ExpertLinear) and twin.experts_per_unit is not None and dim == 0:
            twin.experts_per_unit = own_counts(twin.experts_per_unit, begin, end)
        for key, p in list(module.named_parameters(recurse=False)):
            cut = nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(dim)]), p.requires_grad)
            module.register_parameter(key, cut)
            twin.register_parameter(key, nn.Parameter(torch.empty(0, device="meta"), p.requires_grad))
        for key, b in list(module.named_buffers(recurse=False)):
            module.register_buffer(key, distribute_tensor(b, mesh, [Shard(dim)]))
            twin.register_buffer(key, torch.empty(0, device="meta"))
    bank.__class__ = _sharded(type(bank))
    # Not as submodules: the twins hold no state of their own.
    object.__setattr__(bank, "_part", _Part(local, mesh, dim, gather, enters, begin, end))


class _Part:
    """This rank's part of a bank, a bank of its own without parameters, and how its outputs lie."""

    def __init__(self, local, mesh, dim, gather, enters, begin, end) -> None:
        self.local, self.mesh, self.dim, self.gather, self.enters = local, mesh, dim, gather, enters
        self.begin, self.end = begin, end

    def __call__(self, bank: nn.Module, x: Tensor) -> Tensor:
        axis: Axis = (self.mesh, 0)
        x = enter(x, axis) if self.enters else x
        if self.dim == 0 and x.dim() == 3 and self._first(bank).experts_per_unit is None:
            x = x[:, self.begin : self.end]
        held = {k: own(v) for k, v in (*bank.named_parameters(), *bank.named_buffers())}
        self.local.train(bank.training)
        y = functional_call(self.local, held, (x,))
        out = spread(y, 1 + self.dim, bank.num_experts if self.dim == 0 else bank.out_features, axis)
        if self.gather:
            return out.full_tensor()
        setattr(out, WHOLE, True)
        return out

    @staticmethod
    def _first(bank: nn.Module) -> ExpertLinear:
        return bank if isinstance(bank, ExpertLinear) else bank.linears[0]


_CLASSES: dict[type, type] = {}


def _sharded(cls: type) -> type:
    """The class of a sharded bank: its own, with another forward."""
    if cls not in _CLASSES:

        def forward(self: nn.Module, x: Tensor) -> Tensor:
            return self._part(self, x)

        _CLASSES[cls] = type(f"Sharded{cls.__name__}", (cls,), {"forward": forward})
    return _CLASSES[cls]
