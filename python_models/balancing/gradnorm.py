"""Weights that bring the tasks' gradient norms to a common scale."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .base import Losses, loss_scale
from .weights import FixedWeights, per_task

_LEAST_WEIGHT, _LEAST_INITIAL = 1e-6, 1e-12
_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # Adam's


class GradNorm(FixedWeights):
    """Weights stepped so that gradient norms follow training rates (Chen et al., ICML 2018, section 3, algorithm 1).

    ``n_t = |dL_t/dW|``, ``G_t = w_t n_t``, ``r_t = (L_t / L_t(0)) / mean_t(L_t / L_t(0))``; w descends
    ``sum_t |G_t - c_t|`` with the constant ``c_t = mean(G) r_t^alpha``, whose gradient is ``sign(G_t - c_t) n_t``:
    nothing is differentiated twice. Then w is scaled to sum to T. The model's step takes the weights as they were.

    A step costs one backward for all parameters, with the weighted sum, and before it T gradients of W alone: each
    goes from a loss down to W and no further, so choose W high, usually the last shared layer. What lies below W is
    passed once. Losses given as T separate scalars keep each of these gradients within its own task's tower.

    The weights are a buffer, which no optimizer steps. With one task the weight is 1. Losses should not be negative.
    A task that is not active keeps its weight and is in no mean; the others share what they had. If a gradient is not
    finite, this step leaves the weights. A task with ``L_t(0) < 1e-12`` has ``L_t / L_t(0)`` taken as 1. Weights stay
    at least 1e-6 before the scaling.

    Args:
        num_tasks: T.
        alpha: 1.5 in the paper's main study, 0.12 for its similar tasks; 0 makes the norms equal.
        lr: of the weights.
        measured_on: W, parameters or tensors of the graph; None takes ``shared`` of :meth:`backward`. With a gradient
            method around it, whose ``shared`` is all of the trunk, name the last layer here.
        initial: L_t(0), such as log C for C classes; None takes each task's first finite loss.
        optimizer: of the weights, "sgd" or "adam" (0.9, 0.999, 1e-8), whose step does not follow the losses' scale.
        batched: the T gradients as one batched pass (vmap), for losses out of one bank of towers.
    """

    def __init__(
        self,
        num_tasks: int,
        *,
        alpha: float = 1.5,
        lr: float = 0.025,
        measured_on: Iterable[Tensor] | None = None,
        initial: float | Sequence[float] | Tensor | None = None,
        optimizer: str = "sgd",
        batched: bool = False,
    ) -> None:
        super().__init__(num_tasks)
        for name, value in (("alpha", alpha), ("lr", lr)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be finite and at least 0; got {value!r}")
        if optimizer not in ("sgd", "adam"):
            raise ValueError(f"optimizer must be 'sgd' or 'adam'; got {optimizer!r}")
        self.alpha, self.lr, self.optimizer, self.batched = alpha, lr, optimizer, batched
        # In a tuple, which torch does not register: W stays the model's.
        self.measured_on = None if measured_on is None else _tensors("measured_on", measured_on)
        first = torch.zeros(num_tasks) if initial is None else per_task("initial", initial, num_tasks)
        self.register_buffer("initial", first)
        self.register_buffer("known", torch.full((num_tasks,), initial is not None))
        if optimizer == "adam":
            for name in ("first_moment", "second_moment", "steps"):
                self.register_buffer(name, torch.zeros(num_tasks))

    def observe(
        self,
        losses: Losses,
        active: Tensor | None = None,
        *,
        shared: Iterable[Tensor] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        if self.measured_on is None and shared is None:
            raise ValueError("shared must name the tensors that gradient norms are measured on; got None")
        on = self.measured_on if self.measured_on is not None else _tensors("shared", shared)
        values = self.as_losses(losses).detach()
        active = torch.ones_like(values, dtype=torch.bool) if active is None else self.as_active(active, values)
        self._keep_initial(values, active)
        if self.num_tasks > 1:
            self._step(values, self._norms(losses, on, scaler), active)

    def _norms(self, losses: Losses, on: tuple[Tensor, ...], scaler: torch.amp.GradScaler | None) -> Tensor:
        """n [T] in float64. The losses are scaled before, as small half-precision gradients need, and n after."""
        vector = self.as_losses(losses)
        scale = loss_scale(scaler, vector)
        if self.batched:
            rows = torch.eye(self.num_tasks, dtype=vector.dtype, device=vector.device) * scale
            found = torch.autograd.grad(vector, on, rows, retain_graph=True, allow_unused=True, is_grads_batched=True)
            squares = [_wide(g).flatten(1).square().sum(1) for g in found if g is not None]
            norms = sum(squares, torch.zeros_like(rows[0], dtype=torch.float64)).sqrt()
        else:
            norms = torch.stack([self._norm(loss, on, scale) for loss in self.as_scalars(losses)])
        return norms / scale

    @staticmethod
    def _norm(loss: Tensor, on: tuple[Tensor, ...], scale: Tensor) -> Tensor:
        none = torch.zeros((), dtype=torch.float64, device=scale.device)
        if not loss.requires_grad:
            return none
        scaled = loss * scale.to(loss.device)
        found = torch.autograd.grad(scaled, on, retain_graph=True, allow_unused=True)
        return sum((_wide(g).square().sum().to(none.device) for g in found if g is not None), none).sqrt()

    @torch.no_grad()
    def _keep_initial(self, losses: Tensor, active: Tensor) -> None:
        first = active & losses.isfinite() & ~self.known.to(losses.device)
        self.initial.copy_(torch.where(first, losses, self.initial.to(losses)))
        self.known |= first.to(self.known.device)

    @torch.no_grad()
    def _step(self, losses: Tensor, norms: Tensor, active: Tensor) -> None:
        """One step of w, all in float64: equal norms must give exactly their mean."""
        old, initial = self.weights.to(norms), self.initial.to(norms)
        usable = (losses.isfinite() & norms.isfinite() | ~active).all()
        zero = torch.zeros_like(norms)
        norms, losses = torch.where(active, norms, zero), torch.where(active, losses.to(norms), zero)
        gradient = torch.where(active, self.weight_gradient(old, norms, losses, initial, active), zero)
        change = active & usable
        new = torch.where(change, (old - self.lr * self._direction(gradient, change)).clamp_min(_LEAST_WEIGHT), old)
        # The active tasks keep their sum, so that all sum to T and the others keep their weights.
        share = torch.where(change, old, zero).sum() / torch.where(change, new, zero).sum()
        self.weights.copy_(torch.where(change, new * share, old))

    def weight_gradient(
        self, weights: Tensor, norms: Tensor, losses: Tensor, initial: Tensor, active: Tensor
    ) -> Tensor:
        """``sign(G_t - c_t) n_t`` [T] of the active tasks, from n, L, L(0); all [T], float64."""
        count = active.sum().clamp_min(1)
        scaled = weights * norms
        rate = torch.where(initial < _LEAST_INITIAL, 1, losses.clamp_min(0) / initial.clamp_min(_LEAST_INITIAL))
        mean_rate = torch.where(active, rate, 0).sum() / count
        rate = torch.where(mean_rate > 0, rate / torch.where(mean_rate > 0, mean_rate, 1), 1)
        target = torch.where(active, scaled, 0).sum() / count * rate**self.alpha
        difference = scaled - target
        # What the rounding of the mean leaves is no difference; its sign would be a whole step.
        same = difference.abs() <= 8 * torch.finfo(scaled.dtype).eps * target
        return torch.where(same, 0, difference.sign() * norms)

    def _direction(self, gradient: Tensor, change: Tensor) -> Tensor:
        if self.optimizer == "sgd":
            return gradient
        self.steps += change.to(self.steps)
        state = zip((self.first_moment, self.second_moment), (gradient, gradient.square()), _BETAS, strict=True)
        corrected = []
        for moment, value, beta in state:
            old = moment.to(gradient)
            moment.copy_(torch.where(change, beta * old + (1 - beta) * value, old))
            corrected.append(moment.to(gradient) / (1 - beta ** self.steps.to(gradient).clamp_min(1)))
        return corrected[0] / (corrected[1].sqrt() + _EPSILON)


def _wide(gradient: Tensor) -> Tensor:
    return gradient.to_dense().double() if gradient.is_sparse else gradient.double()


def _tensors(name: str, values: Iterable[Tensor]) -> tuple[Tensor, ...]:
    found = (values,) if isinstance(values, Tensor) else tuple(values)
    for i, value in enumerate(found):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}[{i}] must be a tensor; got {type(value).__name__}")
    found = tuple(value for value in found if value.requires_grad)
    if not found:
        raise ValueError(f"{name} must name tensors that require a gradient; got none")
    return found
