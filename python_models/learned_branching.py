"""Learned branching: every block chooses one parent among the blocks of the level below."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import mtlkernels as mtl
from mtlkernels.arguments import count

from .branched import BranchedMTL, Partition, check_partitions
from .layers import Blocks, ModuleBank, check_input, check_levels, check_per_level
from .sampling import Temperature, one_hot, relaxed_choice, wide


class LearnedBranching(nn.Module):
    """Branching learned with Gumbel-softmax: [B,K] -> [B,T,D] (Guo et al., ICML 2020).

    ``v_j = sum_i d_ji y_i``: child j, a block of the next level or at last a task, reads one parent i of its level's
    blocks y, drawn from ``softmax(theta_j)`` once a forward for the whole batch. In evaluation it is the parent with
    the largest theta. At an infinite :attr:`temperature`, the warm-up, all parents count the same, 1/I, and theta is
    left as it is.

    Args:
        in_features: K.
        num_tasks: T.
        num_experts: I, blocks of a level, one int or one a level.
        expert_dims: one list of widths a level, those of its blocks.
        temperature: of the draw at first. :class:`python_models.sampling.InverseRootTemperature` is the usual schedule:
            ``model.temperature = schedule(epoch)``.
        hard: children read the parent that was drawn, and theta has the gradient of the softmax (straight-through);
            False mixes the parents by the softmax.
        **blocks: activation, dropout, norm, expert, device, dtype of :class:`python_models.layers.Blocks`.

    A level with one block leaves nothing to choose and has no theta. x may be per unit, [B,U,K], one for each block of
    the first level.

    Raises:
        TypeError, ValueError: naming the argument, at construction, or for an x of another shape.
    """

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        num_experts: int | Sequence[int],
        expert_dims: Sequence[Sequence[int]],
        *,
        temperature: float = 1.0,
        hard: bool = True,
        **blocks: Any,
    ) -> None:
        super().__init__()
        self.expert_dims = check_levels(expert_dims)
        sizes = check_per_level("num_experts", num_experts, len(self.expert_dims), 1)
        self.in_features, self.num_tasks = count("in_features", in_features, 0), count("num_tasks", num_tasks, 1)
        self.num_units, self.out_features = sizes[0], self.expert_dims[-1][-1]
        build = Blocks(**blocks).without_gates()
        self._options = {"activation": build.activation, "dropout": build.dropout, "norm": build.norm}
        self._temperature = Temperature(temperature, build.device)
        self.levels, self.choices, width = nn.ModuleList(), nn.ModuleList(), in_features
        for dims, parents, children in zip(self.expert_dims, sizes, [*sizes[1:], num_tasks], strict=True):
            self.levels.append(build.experts(width, dims, [1] * parents))
            self.choices.append(ParentChoice(parents, children, hard, build))
            width = dims[-1]

    @property
    def temperature(self) -> float:
        """Of the next draws, above 0; ``math.inf`` is the warm-up."""
        return self._temperature.value

    @temperature.setter
    def temperature(self, value: float) -> None:
        self._temperature.set(value)

    def search_parameters(self) -> list[nn.Parameter]:
        """The thetas, which have an optimizer of their own."""
        return [choice.theta for choice in self.choices if choice.theta is not None]

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.num_units, self.in_features)
        for level, choice in zip(self.levels, self.choices, strict=True):
            x = choice(level(x), self._temperature.tensor)
        return x

    def paths(self) -> list[list[int]]:
        """Of each level, the block that each task's branch goes through: [levels][T]."""
        at, found = list(range(self.num_tasks)), []
        for choice in reversed(self.choices):
            parents = choice.parents()
            at = [parents[child] for child in at]
            found.insert(0, at)
        return found

    def partitions(self) -> list[Partition]:
        """The tree as :class:`python_models.BranchedMTL` takes it, to train it from scratch."""
        levels = [[[t for t, b in enumerate(path) if b == block] for block in set(path)] for path in self.paths()]
        return check_partitions(levels, self.num_tasks)

    def blocks_in_use(self) -> list[list[int]]:
        """Of each level, the blocks that are in the tree, in the order of :meth:`partitions`' clusters."""
        return [
            [path[cluster[0]] for cluster in clusters]
            for path, clusters in zip(self.paths(), self.partitions(), strict=True)
        ]

    @torch.no_grad()
    def for_serving(self) -> BranchedMTL:
        """The tree alone, blocks that nobody uses left out: a copy, in evaluation mode.

        A per-unit x has the units ``blocks_in_use()[0]`` there, in this order.
        """
        sizes = (self.in_features, self.num_tasks, self.expert_dims, self.partitions())
        used = list(zip(self.levels, self.blocks_in_use(), strict=True))
        if isinstance(self.levels[0], ModuleBank):
            copies = [copy.deepcopy(bank.experts[block]) for bank, blocks in used for block in blocks]
            return BranchedMTL(*sizes, expert=lambda *_: copies.pop(0), device=self._temperature.tensor.device).eval()
        weight = self.levels[0].linears[0].weight
        tree = BranchedMTL(*sizes, **self._options, device=weight.device, dtype=weight.dtype)
        for (bank, blocks), kept in zip(used, tree.levels, strict=True):
            kept.load_state_dict({name: entry[blocks] for name, entry in bank.state_dict().items()})
        return tree.eval()


class ParentChoice(nn.Module):
    """What each child reads: blocks [B,I,D] -> [B,J,D]; ``theta`` [J,I] is None where there is one block."""

    def __init__(self, parents: int, children: int, hard: bool, build: Blocks) -> None:
        super().__init__()
        self.num_children, self.hard = children, hard
        self.register_parameter("theta", None)
        if parents > 1:
            self.theta = nn.Parameter(torch.empty(children, parents, device=build.device, dtype=build.dtype))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """0: every parent is as likely."""
        if self.theta is not None:
            nn.init.zeros_(self.theta)

    def parents(self) -> list[int]:
        """The parent of each child in evaluation, the first of equal ones."""
        return [0] * self.num_children if self.theta is None else self.theta.argmax(-1).tolist()

    def forward(self, blocks: Tensor, temperature: Tensor) -> Tensor:
        if self.theta is None:
            return blocks.expand(-1, self.num_children, -1)
        theta = wide(self.theta)
        if not self.training:
            return mtl.linear_mix(blocks, one_hot(theta))
        drawn = relaxed_choice(theta, temperature, self.hard)
        return mtl.linear_mix(blocks, torch.where(temperature.isinf(), 1 / theta.shape[1], drawn))

    def extra_repr(self) -> str:
        return f"children={self.num_children}, hard={self.hard}"
