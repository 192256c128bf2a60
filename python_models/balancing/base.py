"""What every training method shares: from T task losses to .grad."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mtlkernels.arguments import count

Losses = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


class Balancer(nn.Module):
    """How T task losses become one step. This class weighs each by 1; subclasses weigh, or alter gradients.

    ::

        balancer.backward(task_losses, shared=model.shared_parameters())   # in place of loss.backward()
        optimizer.step()

    A weighting overrides :meth:`_weigh`, and :meth:`observe` if it learns from the step. A gradient method overrides
    :meth:`backward` and takes at most one weighting, whose :meth:`weigh`, :meth:`observe` and :meth:`end_epoch` it
    calls: losses, masks, weights, gradients, optimizer is the order. What is learned lies in parameters or buffers, so
    state_dict holds it. In eval mode nothing is weighed and nothing learned.

    Args:
        num_tasks: T.
    """

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.num_tasks = count("num_tasks", num_tasks, 1)

    def weigh(self, losses: Losses, active: Tensor | None = None) -> Tensor:
        """Weighted losses [T], differentiable in the losses and in learned weights; 0 where a task is not active.

        losses and active as in :meth:`backward`. It changes no state.
        """
        losses = self.as_losses(losses)
        active = self.as_active(active, losses)
        losses = _select(losses, active)
        # Selected twice: a missing loss may be NaN, and the weighting of a missing loss need not be 0.
        return _select(self._weigh(losses), active) if self.training else losses

    def backward(
        self,
        losses: Losses,
        *,
        shared: Iterable[Tensor] | None = None,
        representation: Tensor | None = None,
        penalty: Tensor | None = None,
        active: Tensor | None = None,
        scaler: torch.amp.GradScaler | None = None,
        backward: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        """Fill .grad of every parameter that the losses depend on, adding to what is there as Tensor.backward does.

        Args:
            losses: [T] floating point, or T scalars in a sequence or a dict; a dict's order is that of the tasks.
            shared: the parameters that every task shares, for the methods that look at their gradients.
            representation: [B, ...] in the graph between trunk and tasks, for the methods that work there.
            penalty: a scalar that is neither weighted nor altered, such as L0, the sluice's or MRN's.
            active: [T] bool, True where the task has a label in this batch; None: every task has. The loss of a task
                that is not active is not looked at, and may be NaN provided that its gradient is not.
            scaler: gradients are looked at unscaled and left scaled, for ``scaler.step`` to do the rest.
            backward: called with each scalar instead of Tensor.backward: Lightning's ``self.manual_backward``,
                accelerate's ``accelerator.backward``. These scale by themselves: then give no scaler.

        Returns:
            The total, a detached scalar in float32 (float64 for float64), unscaled: sum of weighted losses and penalty.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
        """
        total = self.total(self.weigh(losses, active), penalty)
        if self.training:
            self.observe(losses, active, shared=shared, scaler=scaler)
        run_backward(total, scaler, backward)
        return total.detach()

    def observe(
        self,
        losses: Losses,
        active: Tensor | None = None,
        *,
        shared: Iterable[Tensor] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Learn from a step. Called once a step in train mode, after :meth:`weigh` and while the graph is whole.

        Arguments as in :meth:`backward`, the losses unweighted. It leaves .grad of the model as it is, and the weights
        of this step too: they are already taken.
        """

    def end_epoch(self, losses: Losses | None = None) -> None:
        """Tell schedules that an epoch is over; losses are the tasks' means over it. Most methods ignore it."""

    def as_losses(self, losses: Losses) -> Tensor:
        """losses as [T] in float32 (float64 for float64), in the graph."""
        if isinstance(losses, Mapping):
            losses = list(losses.values())
        if not isinstance(losses, Tensor):
            losses = _stacked(losses)
        if not losses.is_floating_point():
            raise TypeError(f"losses must be floating point; got {losses.dtype}")
        if losses.shape != (self.num_tasks,):
            raise ValueError(f"losses must be [T] with T = {self.num_tasks}; got shape {tuple(losses.shape)}")
        return losses.to(torch.promote_types(losses.dtype, torch.float32))

    def as_scalars(self, losses: Losses) -> list[Tensor]:
        """losses as T scalars, each where it was made.

        For one gradient a task: that of an element of a stack goes, as zeros, through the other tasks' towers too.
        """
        if isinstance(losses, Tensor):
            return list(self.as_losses(losses).unbind())
        self.as_losses(losses)
        return list(losses.values() if isinstance(losses, Mapping) else losses)

    def as_active(self, active: Tensor | None, losses: Tensor) -> Tensor | None:
        """active checked, on the losses' device; None stays None."""
        if active is None:
            return None
        if not isinstance(active, Tensor) or active.dtype != torch.bool:
            what = active.dtype if isinstance(active, Tensor) else type(active).__name__
            raise TypeError(f"active must be a bool tensor; got {what}")
        if active.shape != (self.num_tasks,):
            raise ValueError(f"active must be [T] with T = {self.num_tasks}; got shape {tuple(active.shape)}")
        return active.to(losses.device)

    @staticmethod
    def total(weighted: Tensor, penalty: Tensor | None) -> Tensor:
        """The sum of [T] weighted losses, and of the penalty where there is one."""
        if penalty is None:
            return weighted.sum()
        if not isinstance(penalty, Tensor):
            raise TypeError(f"penalty must be a tensor; got {type(penalty).__name__}")
        if penalty.dim():
            raise ValueError(f"penalty must be a scalar; got shape {tuple(penalty.shape)}")
        return weighted.sum() + penalty

    def _weigh(self, losses: Tensor) -> Tensor:
        """Weighted losses [T] of losses [T]; those of tasks that are not active come as 0, and are 0 afterwards."""
        return losses


def run_backward(
    scalar: Tensor,
    scaler: torch.amp.GradScaler | None = None,
    backward: Callable[[Tensor], object] | None = None,
) -> None:
    """One backward of a scalar, scaled if there is a scaler, by the caller's means if there are any."""
    scalar = scalar if scaler is None else scaler.scale(scalar)
    (torch.Tensor.backward if backward is None else backward)(scalar)


def loss_scale(scaler: torch.amp.GradScaler | None, like: Tensor) -> Tensor:
    """What the scaler multiplies losses by, a float32 (float64) scalar on like's device; 1 without one. No sync."""
    one = torch.ones((), device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
    return one if scaler is None else scaler.scale(one)


def _select(values: Tensor, active: Tensor | None) -> Tensor:
    return values if active is None else torch.where(active, values, 0)


def _stacked(losses: Sequence[Tensor]) -> Tensor:
    if isinstance(losses, str) or not isinstance(losses, Sequence) or not losses:
        raise TypeError(f"losses must be a tensor [T], or T scalars in a sequence or a dict; got {losses!r}")
    for i, loss in enumerate(losses):
        if not isinstance(loss, Tensor):
            raise TypeError(f"losses[{i}] must be a tensor; got {type(loss).__name__}")
        if loss.dim():
            raise ValueError(f"losses[{i}] must be a scalar; got shape {tuple(loss.shape)}")
    wide = losses[0].dtype
    for loss in losses[1:]:
        wide = torch.promote_types(wide, loss.dtype)
    return torch.stack([loss.to(wide) for loss in losses])
