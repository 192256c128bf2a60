"""Gradients projected off those that they conflict with."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .task_gradients import GradientMethod, gram


class PCGrad(GradientMethod):
    """The sum of gradients, each freed of what points against another (Yu et al., NeurIPS 2020, algorithm 1).

    For each task t, ``v = g_t``; for the others j in random order ``v -= (v.g_j / g_j.g_j) g_j`` where ``v.g_j < 0``,
    g_j as it was. Everything is told by the products ``g_i.g_j``, so the projections are done on T coefficients, not on
    gradients. ``shared`` are the parameters of the trunk; the others get their own gradients.

    Arguments as of :class:`GradientMethod`.
    """

    def combine(self, gradients: Tensor, tasks: Sequence[int], losses: Tensor) -> Tensor:
        coefficients = project(gram(gradients).cpu(), self.generator)
        return coefficients.to(gradients) @ gradients


def project(products: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The coefficients c [n] of ``sum_t v_t = sum_j c_j g_j``, from products [n,n] on the CPU."""
    n = len(products)
    table = products.tolist()
    total = [0.0] * n
    for t in range(n):
        own = [0.0] * n
        own[t] = 1.0
        for j in torch.randperm(n, generator=generator).tolist():
            along = sum(c * p for c, p in zip(own, table[j], strict=True))
            if j != t and along < 0 and table[j][j] > 0:
                own[j] -= along / table[j][j]
        total = [a + b for a, b in zip(total, own, strict=True)]
    return torch.tensor(total, dtype=products.dtype)
