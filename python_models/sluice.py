"""Sluice networks: cross-stitch between subspaces, and a mix of all levels' outputs."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from mtlkernels.arguments import count
from mtlkernels.nn import ExpertMLP

from .layers import RoutedMix, check_input, check_levels
from .static_mix import Stitch, check_choice, equal, mostly_own


class Sluice(nn.Module):
    """Sluice network: [B,K] -> [B,T,D] (Ruder et al., AAAI 2019).

    The output of a task's level is cut into S blocks of columns, and alpha [T*S,T*S] mixes the blocks of all tasks,
    block t*S + a being task t's subspace a; what it gives is the next level's input. The result is
    ``sum_l beta[t,l] h~_t^l`` over the levels. Train with ``task losses + omega * network.penalty()``; the authors'
    example has omega 0.1, SGD.

    Args:
        in_features: K.
        num_tasks: T.
        expert_dims: one list of widths a level; the levels' last widths are equal, and multiples of S.
        num_subspaces: S. 1 is cross-stitch with the mix of levels, and no penalty.
        alpha_init: "own" is 0.9 on the diagonal, the rest of a row shares 0.1; "balanced" is 1/(T*S) everywhere;
            "reference" is the authors' "imbalanced" for two tasks and two subspaces, 0.95 and 0.05: rows sum to 2.
        beta_init: "imbalanced" is 0.9 for the last level, the others share 0.1; "balanced" is 1/L. With one level: 1.
        activation, dropout, norm: as in :class:`mtlkernels.nn.ExpertMLP`.

    x may be per unit, [B,T,K].

    Raises:
        TypeError, ValueError: naming the argument, at construction, or for an x of another shape.
    """

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        expert_dims: Sequence[Sequence[int]] = ((100,), (100,), (100,)),
        num_subspaces: int = 2,
        *,
        alpha_init: str = "own",
        beta_init: str = "imbalanced",
        activation: str | None = "tanh",
        dropout: float = 0.0,
        norm: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        levels = check_levels(expert_dims)
        self.in_features, self.num_tasks = count("in_features", in_features, 0), count("num_tasks", num_tasks, 1)
        self.num_subspaces, self.out_features = count("num_subspaces", num_subspaces, 1), levels[-1][-1]
        widths = [dims[-1] for dims in levels]
        if len(set(widths)) > 1:
            raise ValueError(f"expert_dims must end every level with the same width, for beta adds them; got {widths}")
        if self.out_features % num_subspaces:
            raise ValueError(f"num_subspaces={num_subspaces} must divide the width {self.out_features} of expert_dims")
        check_choice("alpha_init", alpha_init, ("own", "balanced", "reference"))
        self.beta_init = check_choice("beta_init", beta_init, ("imbalanced", "balanced"))
        if alpha_init == "reference" and (num_tasks, num_subspaces) != (2, 2):
            raise ValueError(
                "alpha_init='reference' is for num_tasks=2 and num_subspaces=2; "
                f"got num_tasks={num_tasks}, num_subspaces={num_subspaces}"
            )
        starts = {"own": partial(mostly_own, same=0.9), "balanced": equal, "reference": crossed}
        factory = {"device": device, "dtype": dtype}
        self.experts, self.stitches, width = nn.ModuleList(), nn.ModuleList(), in_features
        for dims in levels:
            self.experts.append(
                ExpertMLP(num_tasks, width, dims, activation=activation, dropout=dropout, norm=norm, **factory)
            )
            self.stitches.append(Stitch(num_tasks * num_subspaces, starts[alpha_init], **factory))
            width = dims[-1]
        self.beta = nn.Parameter(torch.empty(num_tasks, len(levels), **factory))
        rows = [range(t, len(levels) * num_tasks, num_tasks) for t in range(num_tasks)]
        self.mix = RoutedMix([1] * (len(levels) * num_tasks), rows, device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """beta as `beta_init` says, for all tasks alike."""
        levels = self.beta.shape[1]
        last = 0.9 if self.beta_init == "imbalanced" and levels > 1 else 1 / levels
        with torch.no_grad():
            self.beta.fill_((1 - last) / max(levels - 1, 1))
            self.beta[:, -1] = last

    def mixing_parameters(self) -> list[nn.Parameter]:
        """alpha of every level, then beta, for an optimizer group of their own."""
        return [*(stitch.weight for stitch in self.stitches), self.beta]

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.num_tasks, self.in_features)
        outputs = []
        blocks = (x.shape[0], self.num_tasks * self.num_subspaces, self.out_features // self.num_subspaces)
        for experts, stitch in zip(self.experts, self.stitches, strict=True):
            h = experts(x)
            x = stitch(h.reshape(blocks)).reshape(h.shape)
            outputs.append(x)
        return self.mix(torch.cat(outputs, 1), static=self.beta.flatten())

    def penalty(self) -> Tensor:
        """``sum ||G_a^T G_a'||_F^2`` over tasks, levels and pairs a < a' of subspaces, a scalar, float32 at least.

        G_a are the weights of a level's last layer that make subspace a. The penalty is 0 where their columns are
        orthogonal; with one subspace it is 0.
        """
        total = self.beta.new_zeros((), dtype=torch.promote_types(self.beta.dtype, torch.float32))
        if self.num_subspaces == 1:
            return total
        with torch.autocast(total.device.type, enabled=False):
            for experts in self.experts:
                weight = experts.linears[-1].weight.to(total.dtype)
                gram = weight @ weight.mT
                cut = (self.num_subspaces, self.out_features // self.num_subspaces)
                # Every pair twice, and each subspace with itself.
                pairs = gram.unflatten(2, cut).unflatten(1, cut).square().sum((2, 4))
                total = total + pairs.triu(1).sum()
        return total


def crossed(weight: Tensor) -> None:
    """The start of the authors' code, [4,4]: a block of task 0 reads the second subspaces, one of task 1 the first."""
    weight.fill_(0.05)
    weight[:2, 1::2] = 0.95
    weight[2:, 0::2] = 0.95
