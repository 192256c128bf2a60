"""Every task's loss by its kind, over the rows that have its label."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from python_models.data import TaskData
from python_models.settings import ConfigError
from python_models.train.evaluation import column


class Objective:
    """``(outputs, labels [B,T], weights [B,T] or None) -> [T]`` losses, in float32 at least.

    A task's loss is the weighted mean over its rows; 0 where no row of the batch has its label.
    """

    def __init__(self, data: TaskData, losses: dict[str, Any]) -> None:
        self.data = data
        if losses:
            raise ConfigError("losses: not yet")

    def __call__(self, outputs: Tensor | dict[str, Tensor], labels: Tensor, weights: Tensor | None = None) -> Tensor:
        found = []
        for t, kind in enumerate(self.data.kinds):
            out = column(outputs, self.data, t)
            out = out.to(torch.promote_types(out.dtype, torch.float32))
            if kind == "binary":
                each = F.binary_cross_entropy_with_logits(out, labels[:, t].to(out.dtype), reduction="none")
            elif kind == "regression":
                each = (out - labels[:, t]).square()
            else:
                each = F.cross_entropy(out, labels[:, t].long(), reduction="none")
            if weights is None:
                found.append(each.mean())
            else:
                weight = weights[:, t]
                # Where nothing is labelled, 0 / 1: a loss of 0 with zero gradients.
                found.append((weight * each).sum() / weight.sum().clamp_min(torch.finfo(weight.dtype).tiny))
        return torch.stack(found)
