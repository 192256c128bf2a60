"""Soft parameter sharing: one network a task, and a penalty that keeps their weights alike."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtlkernels.arguments import count
from mtlkernels.nn import ExpertMLP

from .layers import check_input
from .static_mix import check_choice


class SoftSharing(nn.Module):
    """T networks of equal shape: [B,K] -> [B,T,dims[-1]], tied by :meth:`penalty` alone.

    Train with ``task losses + weight * network.penalty()``.

    Args:
        in_features: K.
        num_tasks: T.
        dims: widths of the layers.
        kind: of the penalty. "l2": the squared distance of every task's weights to their mean over the tasks (Duong et
            al., ACL 2015, for any number of tasks); "trace": the trace norm, the sum of singular values, of the matrix
            [T,N*K] with a task's weights in each row (Yang and Hospedales, ICLR 2017 workshop).
        activation, dropout, norm: as in :class:`mtlkernels.nn.ExpertMLP`.

    x may be per unit, [B,T,K].

    Raises:
        TypeError, ValueError: naming the argument, at construction, or for an x of another shape.
    """

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        dims: Sequence[int],
        *,
        kind: str = "l2",
        activation: str | None = "relu",
        dropout: float = 0.0,
        norm: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.num_tasks = count("in_features", in_features, 0), count("num_tasks", num_tasks, 1)
        self.kind = check_choice("kind", kind, ("l2", "trace"))
        self.experts = ExpertMLP(
            num_tasks, in_features, dims, activation=activation, dropout=dropout, norm=norm, device=device, dtype=dtype
        )
        self.out_features = self.experts.out_features

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.num_tasks, self.in_features)
        return self.experts(x)

    def penalty(self) -> Tensor:
        """The sum over the layers, a scalar, float32 at least. Biases and norms are free."""
        parts = []
        for linear in self.experts.linears:
            rows = linear.weight.flatten(1)
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            if self.kind == "l2":
                parts.append((rows - rows.mean(0)).square().sum())
            else:
                parts.append(torch.linalg.svdvals(rows).sum())
        return torch.stack(parts).sum()
