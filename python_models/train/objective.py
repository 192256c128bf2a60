"""Every task's loss by its kind, over the rows that have its label."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from python_models.data import TaskData
from python_models.settings import ConfigError, nearest
from python_models.train.evaluation import column

_ELEMENTWISE = {"binary": F.binary_cross_entropy_with_logits, "mse": F.mse_loss, "huber": F.huber_loss}
_KINDS = {"binary": "binary", "mse": "regression", "huber": "regression", "multiclass": "multiclass"}
_DEFAULT = {"binary": "binary", "regression": "mse", "multiclass": "multiclass"}


class Objective:
    """``(outputs, labels [B,T], weights [B,T] or None) -> T`` losses, scalars in float32 at least.

    A task's loss is the weighted mean over its rows; 0 where no row of the batch has its label.

    Args:
        data: whose tasks these are.
        losses: of some tasks, {task: "huber"}; the others have their kind's: cross entropy, or the squared error.

    Raises ConfigError for a task or a loss that is not there.
    """

    def __init__(self, data: TaskData, losses: dict[str, Any]) -> None:
        self.data = data
        self.losses = [_DEFAULT[kind] for kind in data.kinds]
        for task, loss in losses.items():
            if task not in data.task_names:
                raise ConfigError(f"losses.{task}: there is no such task{nearest(task, data.task_names)}")
            at = data.task_names.index(task)
            valid = [name for name, kind in _KINDS.items() if kind == data.kinds[at]]
            if loss not in valid:
                raise ConfigError(f"losses.{task} is {loss!r}, of a {data.kinds[at]} task{nearest(loss, valid)}")
            self.losses[at] = loss

    def __call__(
        self, outputs: Tensor | dict[str, Tensor], labels: Tensor, weights: Tensor | None = None
    ) -> list[Tensor]:
        found = []
        for t, loss in enumerate(self.losses):
            out, label = column(outputs, self.data, t), labels[:, t]
            out = out.to(torch.promote_types(out.dtype, torch.float32))
            if loss == "multiclass":
                each = F.cross_entropy(out, label.long(), reduction="none")
            else:
                each = _ELEMENTWISE[loss](out, label.to(out.dtype), reduction="none")
            if weights is None:
                found.append(each.mean())
            else:
                weight = weights[:, t]
                # Where nothing is labelled, 0 / tiny: a loss of 0 with zero gradients.
                found.append((weight * each).sum() / weight.sum().clamp_min(torch.finfo(weight.dtype).tiny))
        return found
