"""One sign a number: gradients of the other sign are dropped."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .base import Balancer
from .task_gradients import GradientMethod, Representation


class GradDrop(GradientMethod):
    """Keeps, feature by feature, gradients of one drawn sign (Chen et al., NeurIPS 2020, algorithm 1).

    Of ``representation`` A [B, ...]: ``G_t = sum_b sign(A) dL_t/dA``; ``P = (1 + sum_t G_t / sum_t |G_t|) / 2``, or 1/2
    where all are 0; one U ~ U(0, 1) a feature. Task t keeps its gradient of a feature where ``f(P) > U`` and
    ``G_t > 0``, or ``f(P) < U`` and ``G_t < 0``, or ``G_t = 0``; else the share ``leak`` of it.

    Args:
        num_tasks: T.
        leak: in [0, 1], one number or one a task; 1 is the plain sum.
        sharpness: None, ``f(P) = P``; k, ``f(P) = sigmoid(4 k (P - 1/2))``.
        keep_norm: rescales the result to the norm of the plain sum.
        weighting, seed: as of :class:`GradientMethod`.
    """

    def __init__(
        self,
        num_tasks: int,
        *,
        leak: float | Sequence[float] = 0.0,
        sharpness: float | None = None,
        keep_norm: bool = False,
        weighting: Balancer | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(num_tasks, weighting=weighting, seed=seed)
        leaks = torch.as_tensor(leak, dtype=torch.float32).expand(num_tasks) if _fits(leak, num_tasks) else None
        if leaks is None or not ((leaks >= 0) & (leaks <= 1)).all():
            raise ValueError(f"leak must be one number in [0, 1], or one for each of {num_tasks} tasks; got {leak!r}")
        self.sharpness, self.keep_norm = sharpness, keep_norm
        self.register_buffer("leak", leaks.clone(), persistent=False)
        self._sign: Tensor | None = None

    def combine(self, gradients: Tensor, tasks: Sequence[int], losses: Tensor) -> Tensor:
        sign = self._sign.to(gradients)  # [B,F]
        each = gradients.view(len(gradients), *sign.shape)
        towards = (each * sign).sum(1)  # [n,F]
        size = towards.abs().sum(0)
        purity = torch.where(size > 0, 0.5 * (1 + towards.sum(0) / torch.where(size > 0, size, 1)), 0.5)
        if self.sharpness is not None:
            purity = torch.sigmoid(4 * self.sharpness * (purity - 0.5))
        # In float64: rounded to float32, U can be 1, and would drop what all agree on.
        drawn = torch.rand(purity.shape, generator=self.generator, dtype=torch.float64).to(purity.device)
        kept = torch.where(purity > drawn, towards >= 0, (purity < drawn) & (towards < 0) | (towards == 0))
        leak = self.leak.to(gradients)[list(tasks)].unsqueeze(1)
        mask = torch.where(kept, 1, leak).unsqueeze(1)
        dropped = (mask * each).sum(0)
        if self.keep_norm:
            norm = dropped.norm()
            dropped = dropped * torch.where(norm > 0, gradients.sum(0).norm() / torch.where(norm > 0, norm, 1), 1)
        return dropped.flatten()

    def _place(self, shared: Iterable[Tensor] | None, representation: Tensor | None) -> Representation:
        if representation is None:
            raise ValueError("representation must be the tensor [B, ...] between trunk and tasks; got None")
        place = Representation(representation)
        if representation.dim() < 2:
            raise ValueError(f"representation must be [B, ...]; got shape {tuple(representation.shape)}")
        self._sign = representation.detach().flatten(1).sign()
        return place


def _fits(leak: object, tasks: int) -> bool:
    if isinstance(leak, (int, float)) and not isinstance(leak, bool):
        return True
    return isinstance(leak, (list, tuple)) and len(leak) == tasks and all(isinstance(v, (int, float)) for v in leak)
