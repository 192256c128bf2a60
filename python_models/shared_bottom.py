"""Shared bottom: one network for all tasks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtlkernels.arguments import count
from mtlkernels.nn import ExpertMLP

from .layers import check_input


class SharedBottom(nn.Module):
    """One MLP, the same features for every task: [B,K] -> [B,T,dims[-1]] (Caruana 1997; Ma et al., KDD 2018, 3.1).

    The result is expanded, not copied. An x [B,T+1,K], as the other networks take, has the bottom's input last.

    Args:
        in_features: K.
        num_tasks: T.
        dims: widths of the layers.
        activation, dropout, norm: as in :class:`mtlkernels.nn.ExpertMLP`.

    Raises:
        TypeError, ValueError: naming the argument, at construction, or for an x of another shape.
    """

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        dims: Sequence[int],
        *,
        activation: str | None = "relu",
        dropout: float = 0.0,
        norm: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.num_tasks = in_features, count("num_tasks", num_tasks, 1)
        self.bottom = ExpertMLP(
            1, in_features, dims, activation=activation, dropout=dropout, norm=norm, device=device, dtype=dtype
        )
        self.out_features = self.bottom.out_features

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.num_tasks + 1, self.in_features)
        return self.bottom(x if x.dim() == 2 else x[:, -1]).expand(-1, self.num_tasks, -1)
