"""SNR: sub-networks whose connections to the level above are learned, and end up open or closed."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtlkernels as mtl
from mtlkernels.arguments import count, per_layer
from mtlkernels.nn import ACTIVATIONS
from mtlkernels.norms import NORMS

from .connections import Connections
from .layers import Blocks, check_input, check_levels, check_per_level
from .snr_serving import SNRServing, prune, pruned_aver, pruned_trans

_ROUTING = ("beta", "gamma", "zeta", "delta", "clamp", "generator")


class SNRAver(nn.Module):
    """Sub-network routing with plain sums: [B,K] -> [B,T,D] (Ma et al., AAAI 2019).

    The sub-networks of the first level read x; one above reads ``v_i = sum_j z_ij u_j``, and so does the tower of a
    task, from the last level. z_ij in [0, 1] is learned: a hard-concrete sample at every forward in training, its
    estimator in evaluation (see :class:`python_models.connections.Connections`). Train with
    ``task losses + lambda * network.l0_penalty()``, and serve :meth:`for_serving`.

    Args:
        in_features: K.
        num_tasks: T.
        num_experts: sub-networks, one int or one a level.
        expert_dims: one list of widths a level.
        routed: whether connections are learned: one bool, or one for the connections above each level; False opens all.
        **options: beta, gamma, zeta, delta, clamp, generator of Connections; activation, dropout, norm, expert, device
            and dtype of :class:`python_models.layers.Blocks`.

    An x [B,T+1,K], as the other networks take, has the sub-networks' input last.

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
        routed: bool | Sequence[bool] = True,
        **options: Any,
    ) -> None:
        super().__init__()
        levels = check_levels(expert_dims)
        experts = check_per_level("num_experts", num_experts, len(levels), 1)
        self.in_features, self.num_tasks = count("in_features", in_features, 0), count("num_tasks", num_tasks, 1)
        if gates := [name for name in options if name.startswith("gate")]:
            raise TypeError(f"{type(self).__name__} has no gates; got {', '.join(gates)}")
        routing = {name: options.pop(name) for name in _ROUTING if name in options}
        build = Blocks(**options)
        above = self._above(levels)
        self.out_features = above[-1][-1] if above[-1] else levels[-1][-1]
        self.first = build.experts(in_features, levels[0], [1] * experts[0])
        self.levels = nn.ModuleList()
        widths = [dims[-1] for dims in levels]
        sizes = zip(experts, [*experts[1:], num_tasks], widths, above, strict=True)
        learned = per_layer("routed", routed, len(levels))
        for (lower, upper, width, dims), learn in zip(sizes, learned, strict=True):
            connections = Connections(upper, lower, learned=learn, device=build.device, dtype=build.dtype, **routing)
            self.levels.append(self._level(connections, width, dims, build))

    def _above(self, levels: list[list[int]]) -> list[list[int]]:
        """Widths of the layers behind the connections above each level."""
        return [*levels[1:], []]

    @staticmethod
    def _level(connections: Connections, width: int, dims: list[int], build: Blocks) -> nn.Module:
        return AverLevel(connections, width, dims, build)

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.num_tasks + 1, self.in_features)
        h = self.first(x if x.dim() == 2 else x[:, -1])
        for level in self.levels:
            h = level(h)
        return h

    def l0_penalty(self, cost: str | Sequence[Tensor | float] | None = None) -> Tensor:
        """Expected number of open connections, ``sum Pr(z != 0)``, a scalar (Louizos et al., eq. 12).

        Args:
            cost: weights of the connections: None is 1 each; "flops" is the multiply-adds a row of each; a list has one
                number or tensor [I,J] for the connections above each level.

        Raises ValueError for another cost.
        """
        if cost == "flops":
            cost = [level.work for level in self.levels]
        elif cost is None or isinstance(cost, str):
            if cost is not None:
                raise ValueError(f"cost must be None, 'flops' or a list with one entry a level; got {cost!r}")
            cost = [1.0] * len(self.levels)
        if len(cost) != len(self.levels):
            raise ValueError(f"cost has {len(cost)} entries for {len(self.levels)} levels")
        terms = [
            level.connections.l0(weight)
            for level, weight in zip(self.levels, cost, strict=True)
            if level.connections.log_alpha is not None
        ]
        return sum(terms) if terms else next(self.parameters()).new_zeros(())

    def connections(self) -> list[Tensor]:
        """The z that serve, one [I,J] for the connections above each level."""
        like = next(self.parameters())
        return [level.connections.estimate(like) for level in self.levels]

    def density(self) -> float:
        """Open connections among all, in [0, 1], as they serve."""
        gates = self.connections()
        return sum(int((z != 0).sum()) for z in gates) / sum(z.numel() for z in gates)

    def for_serving(self) -> SNRServing:
        """A network for evaluation with the same outputs to rounding, without what is closed, unread or constant.

        Its connection variables are inside the weights where there are any. Batch norms are folded, dropout is gone.
        Warns where every connection above a level is closed.
        """
        return prune(self)


class SNRTrans(SNRAver):
    """Sub-network routing with a matrix a connection: [B,K] -> [B,T,D] (Ma et al., AAAI 2019).

    As :class:`SNRAver`, with ``act(sum_j z_ij W_ij u_j + c_i)`` for the sum: with z = 1 a level is one dense layer of
    the concatenated u. That is the first layer of a sub-network above, and all of a task's.

    Args:
        out_features: D; None is the width of the last level.

    Other arguments as in :class:`SNRAver`.
    """

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        num_experts: int | Sequence[int],
        expert_dims: Sequence[Sequence[int]],
        out_features: int | None = None,
        *,
        routed: bool | Sequence[bool] = True,
        **options: Any,
    ) -> None:
        self._last = None if out_features is None else count("out_features", out_features, 0)
        super().__init__(in_features, num_tasks, num_experts, expert_dims, routed=routed, **options)

    def _above(self, levels: list[list[int]]) -> list[list[int]]:
        return [*levels[1:], [levels[-1][-1] if self._last is None else self._last]]

    @staticmethod
    def _level(connections: Connections, width: int, dims: list[int], build: Blocks) -> nn.Module:
        return TransLevel(connections, width, dims, build)


class AverLevel(nn.Module):
    """``MLP_i(sum_j z_ij u_j)``, or the sum alone where dims is empty: [B,J,K] -> [B,I,N]."""

    def __init__(self, connections: Connections, in_features: int, dims: Sequence[int], build: Blocks) -> None:
        super().__init__()
        self.connections, self.work = connections, in_features
        self.tail = build.experts(in_features, dims, [1] * connections.upper) if dims else None

    def forward(self, u: Tensor) -> Tensor:
        v = mtl.linear_mix(u, self.connections(u))
        return v if self.tail is None else self.tail(v)

    pruned = pruned_aver


class TransLevel(nn.Module):
    """``MLP_i(act(sum_j z_ij W_ij u_j + c_i))``: [B,J,K] -> [B,I,N]. ``weight`` [I,J,dims[0],K], ``bias`` [I,dims[0]].

    A norm and dropout follow the sum as they follow the other layers; dims[1:] are the MLP.
    """

    def __init__(self, connections: Connections, in_features: int, dims: Sequence[int], build: Blocks) -> None:
        super().__init__()
        upper, lower, width = connections.upper, connections.lower, dims[0]
        factory = {"device": build.device, "dtype": build.dtype}
        self.connections, self.work = connections, in_features * width
        self.activation, self.dropout = build.activation, build.dropout
        self.weight = nn.Parameter(torch.empty(upper, lower, width, in_features, **factory))
        self.bias = nn.Parameter(torch.empty(upper, width, **factory))
        self.norm = None if build.norm is None else NORMS[build.norm](upper, width, **factory)
        self.tail = build.experts(width, dims[1:], [1] * upper) if dims[1:] else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """``torch.nn.Linear``'s rule for the whole row of blocks: U(-1/sqrt(JK), 1/sqrt(JK)), for the blocks add up."""
        fan_in = self.connections.lower * self.weight.shape[-1]
        bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, u: Tensor) -> Tensor:
        fused = self.activation if self.norm is None else None
        y = self.blocks(u, self.connections(u), fused)
        if self.norm is not None:
            y = self.norm(y)
            if self.activation is not None:
                y = ACTIVATIONS[self.activation](y)
        if self.dropout:
            y = F.dropout(y, self.dropout, self.training)
        return y if self.tail is None else self.tail(y)

    def blocks(self, u: Tensor, gate: Tensor, activation: str | None) -> Tensor:
        """``activation(sum_j z_ij W_ij u_j + c_i)`` [B,I,dims[0]], z being `gate`."""
        return mtl.snr_linear(u, self.weight, gate, self.bias, activation=activation, skip_closed=True)

    pruned = pruned_trans
