"""Updates of each task's parameters at the pace of that task's labels."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from mtlkernels.arguments import count, counts

Entry = Tensor | tuple[Tensor, int, int]


class AsyncTaskAccumulator:
    """UberNet's asynchronous updates (Kokkinos, CVPR 2017): a set of parameters steps when enough labels were seen.

    Gradients add up in ``.grad``. Each set counts rows: a task's those with a label for it, the shared set's those
    with a label for any task. Where a count has reached its effective batch the set is updated with its summed gradient
    divided by the count, and starts anew; the other sets wait. ::

        accumulator = AsyncTaskAccumulator(*model.parameter_sets(), [32, 256], 256, partial(torch.optim.SGD, lr=0.1))
        for x, labels, labelled in batches:          # labelled [B,T] bool
            loss = (bce(model(x), labels) * labelled).sum()         # a sum over rows, not a mean
            loss.backward()
            accumulator.step(labelled)

    Do not call ``zero_grad`` in between: that would drop what waits. Make it after the model is on its device.

    Args:
        shared: parameters, or (parameter, start, stop): a part of the flattened parameter, contiguous.
        tasks: such a list for each task. No two sets may overlap.
        effective_batch: rows after which a task's set steps, one a task.
        shared_batch: rows after which the shared set steps.
        optimizer: ``optimizer(list of tensors)`` makes an optimizer, called once a set that has parameters: the sets
            share no state, momentum say.

    Attributes: ``counts`` [T+1], rows since a set's last step, the shared set's last; ``optimizers`` likewise.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self,
        shared: Sequence[Entry],
        tasks: Sequence[Sequence[Entry]],
        effective_batch: Sequence[int],
        shared_batch: int,
        optimizer: Callable[[list[Tensor]], Optimizer],
    ) -> None:
        self.limits = [*counts("effective_batch", effective_batch, 1), count("shared_batch", shared_batch, 1)]
        if len(self.limits) != len(tasks) + 1:
            raise ValueError(f"effective_batch has {len(self.limits) - 1} entries for {len(tasks)} tasks")
        self.counts = [0] * len(self.limits)
        self._sets = [
            [_part("shared" if own is shared else f"tasks[{t}]", entry) for entry in own]
            for t, own in enumerate([*tasks, shared])
        ]
        # Parts of the parameters' own memory: what steps there steps in the model.
        self._views = [[p.detach().view(-1)[begin:end] for p, begin, end in own] for own in self._sets]
        self.optimizers = [optimizer(views) if views else None for views in self._views]

    @torch.no_grad()
    def step(self, labelled: Tensor) -> list[int]:
        """Counts the rows of a batch whose gradients are in, and updates the sets that are due.

        labelled: [B,T] bool, True where the row has a label for the task; on a GPU this waits for it.
        Returns the indices of the sets updated: tasks, and T for the shared one.
        """
        num_tasks = len(self.limits) - 1
        if not isinstance(labelled, Tensor) or labelled.dtype != torch.bool:
            raise TypeError(
                f"labelled must be a bool tensor; got {getattr(labelled, 'dtype', type(labelled).__name__)}"
            )
        if labelled.dim() != 2 or labelled.shape[1] != num_tasks:
            raise ValueError(f"labelled must be [B,T] = [B,{num_tasks}]; got {tuple(labelled.shape)}")
        rows = torch.cat((labelled.sum(0), labelled.any(1).sum().view(1))).tolist()
        self.counts = [seen + new for seen, new in zip(self.counts, rows, strict=True)]
        due = [i for i, (seen, limit) in enumerate(zip(self.counts, self.limits, strict=True)) if seen >= limit]
        for i in due:
            self._update(i)
        return due

    def _update(self, i: int) -> None:
        sums = [None if p.grad is None else p.grad.view(-1)[begin:end] for p, begin, end in self._sets[i]]
        for view, total in zip(self._views[i], sums, strict=True):
            view.grad = None if total is None else total / self.counts[i]
        if self.optimizers[i] is not None:
            self.optimizers[i].step()
        for view, total in zip(self._views[i], sums, strict=True):
            view.grad = None
            if total is not None:
                total.zero_()
        self.counts[i] = 0


def _part(name: str, entry: Entry) -> tuple[Tensor, int, int]:
    parameter, begin, end = (entry, 0, entry.numel()) if isinstance(entry, Tensor) else entry
    if not parameter.is_leaf or not parameter.is_contiguous():
        raise ValueError(f"{name} must hold contiguous parameters; got one of shape {tuple(parameter.shape)}")
    if not 0 <= begin <= end <= parameter.numel():
        raise ValueError(f"{name} must hold parts within their parameter; got {begin}:{end} of {parameter.numel()}")
    return parameter, begin, end
