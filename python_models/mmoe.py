"""MMoE: shared experts, one gate a task."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mtlkernels.arguments import count
from mtlkernels.mixture import mixture

from .layers import Blocks, check_input, check_levels, check_per_level, gate_weights


class MMoE(nn.Module):
    """Multi-gate mixture of experts: [B,K] -> [B,T,D] (Ma et al., KDD 2018, section 4.2).

    ``z_t = sum_e softmax(W_t x)_e f_e(x)``. With several levels it is the multi-level MMoE of Li et al. (KDD 2023,
    section 4.1): below the last level each expert of the next level has a gate that makes its input, and every gate at
    every level reads the raw x.

    Args:
        in_features: K.
        num_tasks: T.
        num_experts: E, one int or one a level.
        expert_dims: one list of widths a level.
        gate_dims: widths of the gates' hidden layers; () is a linear gate.
        omoe: one gate for all tasks at the last level (OMoE); its mix is computed once and expanded.
        **blocks: activation, dropout, norm and the rest of :class:`python_models.layers.Blocks`.

    An x [B,T+1,K] gives every task's gate its own input; the experts, and the gates that no task owns, read the last.
    ``return_gates=True`` gives ``(y, gates)``: each level's gate weights, [B,rows,E], a row for each expert of the next
    level, and for each task at the last.

    Raises:
        TypeError, ValueError: naming the argument, at construction, or for an x of another shape.
    """

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        num_experts: int | Sequence[int],
        expert_dims: Sequence[Sequence[int]],
        gate_dims: Sequence[int] = (),
        *,
        omoe: bool = False,
        **blocks: Any,
    ) -> None:
        super().__init__()
        levels = check_levels(expert_dims)
        experts = check_per_level("num_experts", num_experts, len(levels), 1)
        self.in_features, self.num_tasks = count("in_features", in_features, 0), count("num_tasks", num_tasks, 1)
        self.omoe, self.out_features = omoe, levels[-1][-1]
        build = Blocks(gate_dims=gate_dims, **blocks)
        self.experts, self.gates = nn.ModuleList(), nn.ModuleList()
        width = in_features
        for i, dims in enumerate(levels):
            self.experts.append(build.experts(width, dims, [1] * experts[i]))
            rows = experts[i + 1] if i + 1 < len(levels) else 1 if omoe else num_tasks
            self.gates.append(build.gates(in_features, [experts[i]] * rows))
            width = dims[-1]

    def forward(self, x: Tensor, *, return_gates: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        check_input(x, self.num_tasks + 1, self.in_features)
        shared = tasks = x
        if x.dim() == 3:
            tasks, shared = x.split((self.num_tasks, 1), 1)
            shared = shared.squeeze(1)
            tasks = shared if self.omoe else tasks
        last, h, weights = len(self.experts) - 1, shared, []
        for i, (experts, gates) in enumerate(zip(self.experts, self.gates, strict=True)):
            logits = gates(tasks if i == last else shared)
            h = mixture(experts, h, logits)
            if return_gates:
                weights.append(gate_weights(logits))
        if self.omoe:
            h = h.expand(-1, self.num_tasks, -1)
            weights[-1:] = [w.expand(-1, self.num_tasks, -1) for w in weights[-1:]]
        return (h, weights) if return_gates else h
