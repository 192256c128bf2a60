"""The shortest convex combination of the tasks' gradients."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .base import Balancer
from .task_gradients import GradientMethod, Representation, Shared, gram

NORMALISATIONS = ("none", "l2", "loss", "loss+")


class MGDA(GradientMethod):
    """``sum_t a_t g_t`` of least norm over the simplex: no task gets worse (Sener and Koltun, NeurIPS 2018, alg. 2).

    Given ``shared``, g_t are the gradients of these parameters. Given ``representation`` Z, those of Z: this is
    MGDA-UB, an upper bound for one backward through the trunk. Task parameters get their own, unweighted gradients.

    Args:
        num_tasks: T.
        normalisation: what g_t is divided by in the choice of a: "none"; "l2", its norm; "loss", L_t; "loss+", both.
        weighting, seed: as of :class:`GradientMethod`.

    ``coefficients`` [T] holds the last a; 0 for tasks that were not active.
    """

    def __init__(
        self, num_tasks: int, *, normalisation: str = "none", weighting: Balancer | None = None, seed: int = 0
    ) -> None:
        super().__init__(num_tasks, weighting=weighting, seed=seed)
        if normalisation not in NORMALISATIONS:
            raise ValueError(f"normalisation must be one of {', '.join(NORMALISATIONS)}; got {normalisation!r}")
        self.normalisation = normalisation
        self.register_buffer("coefficients", torch.full((num_tasks,), 1 / num_tasks))

    def combine(self, gradients: Tensor, tasks: Sequence[int], losses: Tensor) -> Tensor:
        products = gram(gradients).cpu()
        sizes = torch.ones(len(products), dtype=products.dtype)
        if self.normalisation in ("l2", "loss+"):
            sizes = sizes * products.diagonal().clamp_min(0).sqrt()
        if self.normalisation in ("loss", "loss+"):
            sizes = sizes * losses.cpu().double()
        sizes = torch.where(sizes > 0, sizes, 1)
        chosen = least_norm(products / torch.outer(sizes, sizes))
        self.coefficients.zero_()[list(tasks)] = chosen.to(self.coefficients)
        return chosen.to(gradients) @ gradients

    def _place(self, shared: Iterable[Tensor] | None, representation: Tensor | None) -> Shared | Representation:
        return super()._place(shared, None) if representation is None else Representation(representation)


def least_norm(products: Tensor, tolerance: float = 1e-10) -> Tensor:
    """The a [n] in the simplex that makes ``a^T products a`` least, exact up to rounding: Wolfe's method on n points.

    products [n,n] in float64 on the CPU, positive semi-definite; where one is not finite, equal parts.

    Wolfe, Mathematical Programming 11, 1976: the points in use are an affinely independent set; the least norm of their
    affine hull is a small linear system, and a point with a negative part leaves the set on the way there.
    """
    n = len(products)
    if not products.isfinite().all():
        return torch.full((n,), 1 / n, dtype=products.dtype)
    slack = tolerance * products.diagonal().max().clamp_min(torch.finfo(products.dtype).tiny)
    start = int(products.diagonal().argmin())
    used, parts = [start], torch.zeros(n, dtype=products.dtype).index_fill(0, torch.tensor([start]), 1.0)
    for _ in range(16 * n + 16):
        along = products @ parts
        best = int(along.argmin())
        if along[best] >= parts @ along - slack or best in used:
            break
        used.append(best)
        while True:
            wanted = _affine_least(products[used][:, used])
            if (wanted >= -1e-14).all():
                parts = torch.zeros_like(parts).index_copy(0, torch.tensor(used), wanted.clamp_min(0))
                break
            now = parts[used]
            falling = wanted < 0
            step = (now[falling] / (now[falling] - wanted[falling])).min()
            now = now + step * (wanted - now)
            now[falling & (now <= 1e-15)] = 0
            if (now > 0).all():
                now[now.argmin()] = 0
            parts = torch.zeros_like(parts).index_copy(0, torch.tensor(used), now)
            used = [t for t in used if parts[t] > 0]
    return parts / parts.sum()


def _affine_least(products: Tensor) -> Tensor:
    """The point of least norm in the affine hull: parts that sum to 1, maybe negative."""
    n = len(products)
    system = torch.zeros(n + 1, n + 1, dtype=products.dtype)
    system[:n, :n], system[n, :n], system[:n, n] = products, 1, 1
    right = torch.zeros(n + 1, dtype=products.dtype)
    right[n] = 1
    return torch.linalg.lstsq(system, right.unsqueeze(1), driver="gelsd").solution[:n, 0]
