"""CGC and PLE: every task's own experts beside shared ones."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mtlkernels.arguments import count
from mtlkernels.mixture import mixture

from .layers import (
    Blocks,
    RoutedMix,
    check_input,
    check_levels,
    check_per_level,
    check_task_experts,
    gate_weights,
    plan_units,
    run_levels,
)


class PLE(nn.Module):
    """Progressive layered extraction: [B,K] -> [B,T,D] (Tang et al., RecSys 2020, section 4).

    At every level a task's gate mixes the task's own experts, then the shared ones. Below the last level the shared
    unit's gate mixes all experts. A unit's experts and gate read that unit's output of the level before, x at first.

    Args:
        in_features: K.
        num_tasks: T.
        task_experts: own experts: one int, one a task, or one list a level with one int a task. 0 is legal where there
            are shared experts.
        shared_experts: shared experts, one int or one a level. 0 everywhere leaves T separate mixtures.
        expert_dims: one list of widths a level.
        gate_dims: widths of the gates' hidden layers; () is a linear gate.
        **blocks: activation, dropout, norm and the rest of :class:`python_models.layers.Blocks`.

    x may be per unit, [B,U,K]: the tasks' inputs, then the shared unit's where there are shared experts.
    ``return_gates=True`` gives ``(y, gates)``: each level's gate weights, [B,rows,E], of the tasks and, below the last
    level, the shared unit; 0 for experts that a row does not read.

    Raises:
        TypeError, ValueError: naming the argument, at construction, or for an x of another shape.
    """

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        task_experts: int | Sequence[int] | Sequence[Sequence[int]],
        shared_experts: int | Sequence[int],
        expert_dims: Sequence[Sequence[int]],
        gate_dims: Sequence[int] = (),
        **blocks: Any,
    ) -> None:
        super().__init__()
        levels = check_levels(expert_dims)
        self.in_features, self.num_tasks = count("in_features", in_features, 0), count("num_tasks", num_tasks, 1)
        own = check_task_experts(task_experts, num_tasks, len(levels))
        shared = check_per_level("shared_experts", shared_experts, len(levels), 0)
        for i, (tasks, n) in enumerate(zip(own, shared, strict=True)):
            if n == 0 and 0 in tasks:
                raise ValueError(
                    f"task_experts gives task {tasks.index(0)} no expert at level {i}, which has no shared_experts"
                )
        build = Blocks(gate_dims=gate_dims, **blocks)
        plan = plan_units(own, shared)
        self.num_units, self.out_features = len(plan[0][0]), levels[-1][-1]
        widths = [in_features, *(dims[-1] for dims in levels[:-1])]
        self.levels = nn.ModuleList(
            CGCLevel(width, dims, units, rows, num_tasks, build)
            for width, dims, (units, rows) in zip(widths, levels, plan, strict=True)
        )

    def forward(self, x: Tensor, *, return_gates: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        check_input(x, self.num_units, self.in_features)
        return run_levels(self.levels, x, return_gates)


class CGC(PLE):
    """Customized gate control, PLE with one level: [B,K] -> [B,T,D] (Tang et al., RecSys 2020, section 4.1).

    Args:
        expert_dims: widths of the experts' layers, a flat list (or a list with one level).

    Other arguments as in :class:`PLE`.
    """

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        task_experts: int | Sequence[int] | Sequence[Sequence[int]],
        shared_experts: int | Sequence[int],
        expert_dims: Sequence[int],
        gate_dims: Sequence[int] = (),
        **blocks: Any,
    ) -> None:
        if isinstance(expert_dims, Sequence) and all(isinstance(width, int) for width in expert_dims):
            expert_dims = [expert_dims]
        if len(check_levels(expert_dims)) > 1:
            raise ValueError(f"expert_dims must have one level in CGC; got {expert_dims}, which is PLE's")
        super().__init__(in_features, num_tasks, task_experts, shared_experts, expert_dims, gate_dims, **blocks)


class CGCLevel(nn.Module):
    """One level of PLE: [B,K] or [B,U,K] -> [B,rows,D].

    Args:
        experts_per_unit: U counts, the tasks' first.
        rows: units with an output: the tasks, and the shared unit where a later level reads it.
    """

    def __init__(
        self,
        in_features: int,
        dims: Sequence[int],
        experts_per_unit: Sequence[int],
        rows: int,
        num_tasks: int,
        build: Blocks,
    ) -> None:
        super().__init__()
        self.experts_per_unit = list(experts_per_unit)
        units = range(len(experts_per_unit))
        reads = [(u, *units[num_tasks:]) if u < num_tasks else tuple(units) for u in range(rows)]
        routes = [sum(experts_per_unit[u] for u in row) for row in reads]
        # Without own experts every row mixes all of them in order: MMoE, which needs no routes.
        dense = all(n == sum(experts_per_unit) for n in routes)
        self.experts = build.experts(in_features, dims, experts_per_unit)
        self.gates = build.gates(in_features, routes, idle=len(units) - rows, packed=not dense)
        self.mix = None if dense else RoutedMix(experts_per_unit, reads, build.device)

    def forward(self, x: Tensor, *, return_gates: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        logits = self.gates(x)
        out = mixture(self.experts, x, logits, routes=self.mix and self.mix.routes)
        return (out, gate_weights(logits, self.mix and self.mix.routes)) if return_gates else out
