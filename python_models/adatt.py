"""AdaTT: every task mixes every task's experts, and keeps a residual of its own."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtlkernels.arguments import count
from mtlkernels.mixture import mixture

from .layers import (
    Blocks,
    check_input,
    check_levels,
    check_per_level,
    check_task_experts,
    gate_weights,
    plan_units,
    run_levels,
)


class AdaTT(nn.Module):
    """Adaptive task-to-task fusion: [B,K] -> [B,T,D] (Li et al., KDD 2023, eq. 1 to 11).

    ``f_u = (softmax(W_u f_u') + pad(v_u)) E``: at every level a unit's gate spans the experts of all units, and a
    learned static weight v_u [m_u] adds the unit's own. A unit's experts and gate read its output of the level before,
    x at first. ``shared_experts=0`` is AdaTT-sp; otherwise a shared unit fuses like a task below the last level, and
    only produces experts at the last.

    Args:
        in_features: K.
        num_tasks: T.
        task_experts: m_t: one int, one a task, or one list a level with one int a task. 0 leaves a task its gate.
        shared_experts: m_s, one int or one a level.
        expert_dims: one list of widths a level.
        gate_dims: widths of the gates' hidden layers; () is a linear gate.
        residual: False leaves v out, the paper's ablation.
        single_expert: "paper": where every unit of a level has one expert, v is the constant 1, with no parameter
            (one task with one expert then gives twice that expert); "per_unit": so in each unit with one expert.
        **blocks: activation, dropout, norm and the rest of :class:`python_models.layers.Blocks`.

    x may be per unit, [B,U,K]: the tasks' inputs, then the shared unit's where there are shared experts.
    ``return_gates=True`` gives ``(y, gates)``: each level's gate weights, the softmax alone, [B,rows,E], of the tasks
    and, below the last level, the shared unit. :meth:`AdaTTLevel.residual_weights` has v in the same form.

    Raises:
        TypeError, ValueError: naming the argument, at construction, or for an x of another shape.
    """

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        task_experts: int | Sequence[int] | Sequence[Sequence[int]],
        shared_experts: int | Sequence[int] = 0,
        expert_dims: Sequence[Sequence[int]] = ((256,), (128,)),
        gate_dims: Sequence[int] = (),
        residual: bool = True,
        *,
        single_expert: str = "paper",
        **blocks: Any,
    ) -> None:
        super().__init__()
        if single_expert not in ("paper", "per_unit"):
            raise ValueError(f"single_expert must be 'paper' or 'per_unit'; got {single_expert!r}")
        levels = check_levels(expert_dims)
        self.in_features, self.num_tasks = count("in_features", in_features, 0), count("num_tasks", num_tasks, 1)
        own = check_task_experts(task_experts, num_tasks, len(levels))
        shared = check_per_level("shared_experts", shared_experts, len(levels), 0)
        for i, (tasks, n) in enumerate(zip(own, shared, strict=True)):
            if sum(tasks) + n == 0:
                raise ValueError(f"task_experts and shared_experts give level {i} no expert at all")
        build = Blocks(gate_dims=gate_dims, **blocks)
        plan = plan_units(own, shared)
        self.num_units, self.out_features = len(plan[0][0]), levels[-1][-1]
        widths = [in_features, *(dims[-1] for dims in levels[:-1])]
        self.levels = nn.ModuleList(
            AdaTTLevel(width, dims, units, rows, build, residual, single_expert)
            for width, dims, (units, rows) in zip(widths, levels, plan, strict=True)
        )

    def forward(self, x: Tensor, *, return_gates: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        check_input(x, self.num_units, self.in_features)
        return run_levels(self.levels, x, return_gates)


class AdaTTLevel(nn.Module):
    """One level of AdaTT: [B,K] or [B,U,K] -> [B,rows,D].

    ``native`` holds the learned v, unit by unit, of the first `rows` units; it is None where no weight is learned.
    """

    def __init__(
        self,
        in_features: int,
        dims: Sequence[int],
        experts_per_unit: Sequence[int],
        rows: int,
        build: Blocks,
        residual: bool,
        single_expert: str,
    ) -> None:
        super().__init__()
        self.experts_per_unit, self.rows = list(experts_per_unit), rows
        self.experts = build.experts(in_features, dims, experts_per_unit)
        self.gates = build.gates(in_features, [sum(experts_per_unit)] * rows, idle=len(experts_per_unit) - rows)
        active = self.experts_per_unit[:rows]
        self.residual = residual and sum(active) > 0
        one = single_expert == "per_unit" or all(n == 1 for n in experts_per_unit)
        # Units in order: how many weights, and whether they are learned or the constant 1.
        self.weights = [(n, n > 1 or not one) for n in active if n]
        learned = sum(n for n, is_learned in self.weights if is_learned) if residual else 0
        self.register_parameter("native", None)
        if learned:
            self.native = nn.Parameter(torch.empty(learned, device=build.device, dtype=build.dtype))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """v_u ~ U(-1/sqrt(m_u), 1/sqrt(m_u)), as the authors' code draws it."""
        if self.native is None:
            return
        with torch.no_grad():
            for part in self.native.split([n for n, learned in self.weights if learned]):
                bound = 1 / math.sqrt(part.numel())
                part.uniform_(-bound, bound)

    def _static(self, like: Tensor) -> Tensor | None:
        """v [sum(experts_per_unit[:rows])], or None for unit weights."""
        if all(learned for _, learned in self.weights):
            return self.native
        if self.native is None and len(self.weights) == self.rows:
            return None
        learned = iter(() if self.native is None else self.native.split([n for n, kept in self.weights if kept]))
        one = like.new_ones(1) if self.native is None else self.native.new_ones(1)
        return torch.cat([next(learned) if kept else one for _, kept in self.weights])

    def residual_weights(self) -> Tensor:
        """v as the mix adds it to the gates: [rows,E], 0 for other units' experts, and throughout without residual."""
        counts, like = self.experts_per_unit[: self.rows], next(self.parameters())
        if not self.residual:
            return like.new_zeros(self.rows, sum(self.experts_per_unit))
        v = self._static(like)
        parts = (like.new_ones(sum(counts)) if v is None else v).split(counts)
        own = torch.block_diag(*(part.unsqueeze(0) for part in parts))
        return F.pad(own, (0, sum(self.experts_per_unit) - sum(counts)))

    def forward(self, x: Tensor, *, return_gates: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        logits = self.gates(x)
        if self.residual:
            out = mixture(self.experts, x, logits, self._static(x), experts_per_unit=self.experts_per_unit)
        else:
            out = mixture(self.experts, x, logits)
        return (out, gate_weights(logits)) if return_gates else out
