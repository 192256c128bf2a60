"""Weights that no gradient learns: fixed, falling with the epochs, or following the losses."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .base import Balancer, Losses

_TINY = 1e-12  # a loss below it says nothing of its rate of change


def per_task(name: str, values: float | Sequence[float] | Tensor, num_tasks: int, least: float = 0.0) -> Tensor:
    """One number for all tasks or one each, as float32 [T]; TypeError or ValueError otherwise, naming the argument."""
    if isinstance(values, Tensor):
        values = values.tolist()
    if not isinstance(values, (str, Sequence)):
        values = [values] * num_tasks
    if isinstance(values, str) or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in values):
        raise TypeError(f"{name} must be a number or {num_tasks} numbers; got {values!r}")
    if len(values) != num_tasks or not all(math.isfinite(v) and v >= least for v in values):
        raise ValueError(f"{name} must be {num_tasks} finite numbers of at least {least}; got {values}")
    return torch.tensor(values, dtype=torch.float32)


class FixedWeights(Balancer):
    """``L = sum_t w_t L_t`` with constant weights.

    Args:
        num_tasks: T.
        weights: one number for all tasks, or T; 1 as in MMoE, ESMM and AdaTT (Li et al., KDD 2023, section 4.2.2).
    """

    def __init__(self, num_tasks: int, weights: float | Sequence[float] | Tensor = 1.0) -> None:
        super().__init__(num_tasks)
        self.register_buffer("weights", per_task("weights", weights, num_tasks))

    def _weigh(self, losses: Tensor) -> Tensor:
        # A copy, since weights may change in place before the backward that needs them.
        return losses * self.weights.to(losses, copy=True)


class ScheduledWeights(FixedWeights):
    """``w_t = w_t0 gamma_t^epoch``, epoch counting the calls of ``end_epoch`` (Tang et al., RecSys 2020, section 4.3).

    Args:
        num_tasks: T.
        weights: w_t0, one number for all tasks, or T.
        gamma: likewise.
    """

    def __init__(
        self,
        num_tasks: int,
        weights: float | Sequence[float] | Tensor = 1.0,
        gamma: float | Sequence[float] | Tensor = 1.0,
    ) -> None:
        super().__init__(num_tasks, weights)
        self.register_buffer("initial", self.weights.clone())
        self.register_buffer("gamma", per_task("gamma", gamma, num_tasks))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))

    def end_epoch(self, losses: Losses | None = None) -> None:
        self.epoch += 1
        # From the first weights each time: a running product would round once an epoch.
        self.weights.copy_(self.initial.double() * self.gamma.double() ** self.epoch)


class DynamicWeightAverage(FixedWeights):
    """``w_t(e) = T softmax_t(r_t / tau)``, ``r_t = L_t(e-1) / L_t(e-2)``; 1 in the first two epochs.

    L_t(e) is the task's mean loss over epoch e: of the steps that went through :meth:`backward` in train mode, or as
    ``end_epoch(losses)`` gives it. A task without a finite loss in an epoch keeps the ratio it had, 1 at first.
    Liu et al., CVPR 2019 (MTAN), section 3.3.

    Args:
        num_tasks: T.
        temperature: tau; large values give equal weights.
    """

    def __init__(self, num_tasks: int, temperature: float = 2.0) -> None:
        super().__init__(num_tasks)
        self.temperature = float(temperature)
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be positive and finite; got {temperature!r}")
        for name in ("sums", "counts", "last", "before"):
            self.register_buffer(name, torch.zeros(num_tasks, dtype=torch.float64))

    @torch.no_grad()
    def observe(
        self,
        losses: Losses,
        active: Tensor | None = None,
        *,
        shared: Iterable[Tensor] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        losses = self.as_losses(losses)
        valid = losses.isfinite()
        if active is not None:
            valid &= self.as_active(active, losses)
        self.sums += torch.where(valid, losses, 0).to(self.sums)
        self.counts += valid.to(self.counts)

    @torch.no_grad()
    def end_epoch(self, losses: Losses | None = None) -> None:
        seen = self.counts > 0
        mean = self.sums / self.counts.clamp_min(1)
        if losses is not None:
            mean = self.as_losses(losses).to(self.sums)
            seen = mean.isfinite()
        self.before.copy_(torch.where(seen, self.last, self.before))
        self.last.copy_(torch.where(seen, mean, self.last))
        self.sums.zero_()
        self.counts.zero_()
        measured = self.before > _TINY  # not in the first two epochs, where it is the 0 of the start
        ratio = torch.where(measured, self.last / torch.where(measured, self.before, 1), 1)
        self.weights.copy_(self.num_tasks * torch.softmax(ratio / self.temperature, 0))
