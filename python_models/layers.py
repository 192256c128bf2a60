"""What the expert networks share: their sizes, their experts, their gates and CGC's routed mix."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

import mtlkernels as mtl
from mtlkernels.arguments import count, counts
from mtlkernels.nn import ExpertLinear, ExpertMLP


@dataclass(frozen=True)
class Blocks:
    """How a network builds its experts and gates; every expert network takes these as keyword arguments.

    Attributes:
        activation, dropout, norm: of every layer of an expert, as in :class:`mtlkernels.nn.ExpertMLP`.
        gate_dims: widths of a gate's hidden layers; () is one linear layer, as in the papers.
        gate_bias: False gives the papers' gate, softmax(W x).
        gate_init: "zero_bias" draws weights as ``torch.nn.Linear`` does and starts the bias at 0, so that the function
            at step 0 is the papers'; "torch_default" draws the bias too; "zero" starts both at 0: equal gate weights.
        gate_activation: of the hidden layers; None is `activation`.
        gate_dropout, gate_norm: of the hidden layers.
        gate_logit_norm: True puts a ``BatchNorm1d`` over the logits, before the softmax.
        expert: ``expert(in_features, dims)`` makes a module [B,K] -> [B,dims[-1]], called once an expert.
        gate: ``gate(in_features, num_routes)`` makes a module [B,K] -> logits [B,num_routes], called once a gate.
            Modules of these two run as they are; the mix alone is fused.
        device, dtype: of the parameters.
    """

    activation: str | None = "relu"
    dropout: float = 0.0
    norm: str | None = None
    gate_dims: Sequence[int] = ()
    gate_bias: bool = True
    gate_init: str = "zero_bias"
    gate_activation: str | None = None
    gate_dropout: float = 0.0
    gate_norm: str | None = None
    gate_logit_norm: bool = False
    expert: Callable[[int, Sequence[int]], nn.Module] | None = None
    gate: Callable[[int, int], nn.Module] | None = None
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.gate_init not in ("zero_bias", "torch_default", "zero"):
            raise ValueError(f"gate_init must be 'zero_bias', 'torch_default' or 'zero'; got {self.gate_init!r}")
        if self.gate is not None and len(self.gate_dims):
            raise ValueError(f"gate_dims={list(self.gate_dims)} is for the built-in gates; gate= makes whole gates")
        counts("gate_dims", self.gate_dims, 0)
        for name in ("expert", "gate"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise TypeError(f"{name} must be a factory, a callable that makes modules; got {getattr(self, name)!r}")

    def experts(self, in_features: int, dims: Sequence[int], experts_per_unit: Sequence[int]) -> nn.Module:
        """A bank [B,K] or [B,U,K] -> [B,E,dims[-1]]."""
        if self.expert is not None:
            made = [self.expert(in_features, list(dims)) for _ in range(sum(experts_per_unit))]
            return ModuleBank(made, experts_per_unit)
        return ExpertMLP(
            sum(experts_per_unit),
            in_features,
            dims,
            activation=self.activation,
            experts_per_unit=experts_per_unit,
            dropout=self.dropout,
            norm=self.norm,
            device=self.device,
            dtype=self.dtype,
        )

    def without_gates(self) -> "Blocks":
        """Itself; ValueError where an option of the gates was given: for networks that have none."""
        for field in fields(self):
            if field.name.startswith("gate") and getattr(self, field.name) not in (field.default, []):
                raise ValueError(f"{field.name} is for networks with gates; this one has none")
        return self

    def gates(self, in_features: int, routes: Sequence[int], idle: int = 0, packed: bool = False) -> "Gates":
        """Gates of ``len(routes)`` rows; see :class:`Gates`."""
        return Gates(in_features, routes, self, idle=idle, packed=packed)


class ModuleBank(nn.Module):
    """Modules of the user's own in place of a bank: [B,K] or [B,U,K] -> [B,E,D], each run as it is."""

    def __init__(self, modules: Sequence[nn.Module], experts_per_unit: Sequence[int]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(modules)
        self.units = [u for u, n in enumerate(experts_per_unit) for _ in range(n)]

    def outputs(self, x: Tensor) -> list[Tensor]:
        # unbind and not slices: the gradient of T slices is T zero-filled copies of x, added up.
        inputs = x.unbind(1) if x.dim() == 3 else None
        return [
            expert(x if inputs is None else inputs[unit]) for expert, unit in zip(self.experts, self.units, strict=True)
        ]

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(self.outputs(x), 1)


class GateLinear(ExpertLinear):
    """The last layer of a level's gates; ``init`` is :class:`Blocks`' gate_init."""

    init = "torch_default"

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.init == "zero":
            nn.init.zeros_(self.weight)
        if self.init != "torch_default" and self.bias is not None:
            nn.init.zeros_(self.bias)


class Gates(nn.Module):
    """Gate logits of one level: row t reads unit t of x [B,U,K], or x [B,K], and has ``routes[t]`` logits.

    Gives [B,T,n] where every row has n routes, or, with `packed`, [B,sum(routes)] row by row. Rows with different
    numbers of routes are one bank of single-output experts, so that no logit exists that is not used.

    Args:
        in_features: K.
        routes: logits of each row.
        blocks: the gate options.
        idle: units of x behind the last row, which no gate reads.
        packed: the form of the result.
    """

    def __init__(
        self, in_features: int, routes: Sequence[int], blocks: Blocks, *, idle: int = 0, packed: bool = False
    ) -> None:
        super().__init__()
        self.routes, self.packed = list(routes), packed
        rows, width, nobody = len(self.routes), in_features, [0] * idle
        factory = {"device": blocks.device, "dtype": blocks.dtype}
        self.hidden = self.logits = self.custom = self.norm = None
        if blocks.gate_logit_norm:
            self.norm = nn.BatchNorm1d(sum(routes), **factory)
        if blocks.gate is not None:
            self.custom = ModuleBank([blocks.gate(in_features, n) for n in self.routes], [1] * rows + nobody)
            return
        if len(blocks.gate_dims):
            self.hidden = ExpertMLP(
                rows,
                in_features,
                blocks.gate_dims,
                activation=blocks.gate_activation or blocks.activation,
                experts_per_unit=[1] * rows + nobody,
                dropout=blocks.gate_dropout,
                norm=blocks.gate_norm,
                **factory,
            )
            width, nobody = blocks.gate_dims[-1], []
        if len(set(self.routes)) == 1:
            sizes, units = (rows, width, self.routes[0]), [1] * rows
        else:
            sizes, units = (sum(self.routes), width, 1), self.routes
        self.logits = GateLinear(*sizes, bias=blocks.gate_bias, experts_per_unit=units + nobody, **factory)
        self.logits.init = blocks.gate_init
        self.logits.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        if self.custom is not None:
            logits = torch.cat(self.custom.outputs(x), 1)
        else:
            logits = self.logits(x if self.hidden is None else self.hidden(x))
        if self.norm is not None:
            logits = self.norm(logits.flatten(1))
        if self.packed:
            return logits.flatten(1)
        return logits if logits.dim() == 3 else logits.unflatten(1, (len(self.routes), self.routes[0]))

    def extra_repr(self) -> str:
        return f"routes={self.routes}, packed={self.packed}"


class FixedRoutes(nn.Module):
    """Holds ``routes``, which move with the module and are not in its state_dict: the constructor says all about them.

    Args:
        routes: built on the CPU, for a module made on the meta device has no values to read them from.
        device: where they serve.
    """

    def __init__(self, routes: mtl.Routes, device: torch.device | str | None = None) -> None:
        super().__init__()
        self._built = routes
        columns = torch.empty(routes.columns.shape, dtype=torch.int32, device=device)
        self.register_buffer("columns", columns, persistent=False)
        self._place()

    def _place(self) -> None:
        self.columns = self._built.columns.to(self.columns.device)
        self.routes = copy.copy(self._built)
        self.routes.columns = self.columns

    def _apply(self, fn: Callable, recurse: bool = True) -> "FixedRoutes":
        super()._apply(fn, recurse)
        # Not what fn made of the buffer: to_empty leaves no values in it.
        self._place()
        return self

    def extra_repr(self) -> str:
        return str(self._built)


class RoutedMix(FixedRoutes):
    """``mix`` along fixed routes: experts [B,E,D] with packed logits [B,R], static weights [R] or both -> [B,T,D].

    Row t mixes all experts of ``units[t]``, in that order.
    """

    def __init__(
        self, experts_per_unit: Sequence[int], units: Sequence[Sequence[int]], device: torch.device | str | None = None
    ) -> None:
        with torch.device("cpu"):
            routes = mtl.Routes.by_unit(experts_per_unit, units)
        super().__init__(routes, device)

    def forward(self, experts: Tensor, logits: Tensor | None = None, static: Tensor | None = None) -> Tensor:
        return mtl.mix(experts, logits, static, routes=self.routes)


class Pick(RoutedMix):
    """Rows of x: [B,S,D] -> [B,len(rows),D], row t being x's row ``rows[t]``; a view where no copy is needed.

    A mix, for the gradient of an index that names a row twice is a sum by atomics on a GPU.
    """

    def __init__(self, num_rows: int, rows: Sequence[int], device: torch.device | str | None = None) -> None:
        super().__init__([1] * num_rows, [[row] for row in rows], device)
        self.rows, self.same = len(rows), list(rows) == list(range(num_rows))

    def forward(self, x: Tensor) -> Tensor:
        if self.same:
            return x
        if x.shape[1] == 1:
            return x.expand(-1, self.rows, -1)
        return super().forward(x, static=x.new_ones(self.rows))


def check_levels(expert_dims: Sequence[Sequence[int]]) -> list[list[int]]:
    """expert_dims as one list of widths a level; a flat list raises ValueError with both nestings."""
    if isinstance(expert_dims, (str, int)) or not isinstance(expert_dims, Sequence):
        raise TypeError(f"expert_dims must be one list of widths a level; got {expert_dims!r}")
    dims = list(expert_dims)
    if not dims:
        raise ValueError("expert_dims must have at least one level; got an empty list")
    if all(isinstance(width, int) for width in dims):
        raise ValueError(
            f"expert_dims must be one list of widths a level; got the flat list {dims}: write {[dims]} for one level "
            f"whose experts have {len(dims)} layers, or {[[width] for width in dims]} for {len(dims)} levels of "
            "one-layer experts"
        )
    levels = [counts(f"expert_dims[{i}]", level, 0) for i, level in enumerate(dims)]
    for i, level in enumerate(levels):
        if not level:
            raise ValueError(f"expert_dims[{i}] must name at least one layer; got an empty list")
    return levels


def check_per_level(name: str, value: int | Sequence[int], levels: int, least: int) -> list[int]:
    """An int for all levels, or one a level."""
    if isinstance(value, int):
        return [count(name, value, least)] * levels
    values = counts(name, value, least)
    if len(values) != levels:
        raise ValueError(f"{name} has {len(values)} entries for {levels} levels of expert_dims; got {values}")
    return values


def check_task_experts(
    value: int | Sequence[int] | Sequence[Sequence[int]], num_tasks: int, levels: int
) -> list[list[int]]:
    """task_experts as a count for each level and task: from one int, one int a task, or such a list for each level."""
    if isinstance(value, int):
        return [[count("task_experts", value, 0)] * num_tasks] * levels
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"task_experts must be an int, one int a task, or one such list a level; got {value!r}")
    nested = [value] * levels if all(isinstance(n, int) for n in value) else list(value)
    if len(nested) != levels:
        raise ValueError(f"task_experts has {len(nested)} lists for {levels} levels of expert_dims; got {value}")
    plan = []
    for i, level in enumerate(nested):
        if isinstance(level, int):
            raise TypeError(f"task_experts must not mix ints and lists; got {value}")
        plan.append(counts("task_experts" if nested[0] is value else f"task_experts[{i}]", level, 0))
        if len(plan[-1]) != num_tasks:
            raise ValueError(f"task_experts has {len(plan[-1])} entries for num_tasks={num_tasks}; got {plan[-1]}")
    return plan


def plan_units(task_experts: list[list[int]], shared_experts: list[int]) -> list[tuple[list[int], int]]:
    """Each level's experts per unit, and how many of its units have an output, which the next level reads.

    The shared unit is there as long as a level from here on has shared experts, and has an output as long as a later
    one does: nothing would read it otherwise, and its gate would never be trained.
    """
    plan = []
    for i, tasks in enumerate(task_experts):
        units = tasks + shared_experts[i : i + 1] if any(shared_experts[i:]) else list(tasks)
        plan.append((units, len(tasks) + any(shared_experts[i + 1 :])))
    return plan


def check_input(x: Tensor, units: int, in_features: int) -> None:
    """x must be [B,in_features] or [B,units,in_features]."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor; got {type(x).__name__}")
    shape = tuple(x.shape)
    if shape[1:] != (in_features,) and shape[1:] != (units, in_features):
        raise ValueError(f"x must be [B,{in_features}] or [B,{units},{in_features}] (per unit); got {shape}")


def gate_weights(logits: Tensor, routes: mtl.Routes | None = None) -> Tensor:
    """The weights a gate gives every expert, [B,T,E] in float32 (float64 for float64), 0 where it has no route.

    logits are as the mix takes them: [B,T,E], or packed [B,R] with routes.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if routes is not None:
        logits = logits[:, routes.columns.clamp(min=0)].masked_fill(routes.columns < 0, -torch.inf)
    return logits.softmax(-1)


def run_levels(levels: nn.ModuleList, x: Tensor, return_gates: bool) -> Tensor | tuple[Tensor, list[Tensor]]:
    """x through all levels; with return_gates also the gate weights of each."""
    gates = []
    for level in levels:
        x = level(x, return_gates=return_gates)
        if return_gates:
            x, weights = x
            gates.append(weights)
    return (x, gates) if return_gates else x
