"""What a model does on rows that it has not seen: losses and metrics of every task, by the task's kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from python_models import metrics
from python_models.data import TaskData

_BINARY = {
    "log_loss": metrics.log_loss,
    "ne": metrics.normalized_entropy,
    "calibration": metrics.calibration,
}
_BETTER_HIGH = ("auc", "gauc", "accuracy")


def column(outputs: Tensor | dict[str, Tensor], data: TaskData, task: int) -> Tensor:
    """One task's outputs: [N], or [N,n] where it has n classes."""
    if isinstance(outputs, Tensor):
        return outputs[:, task]
    found = outputs[data.task_names[task]]
    return found if data.outputs[task] > 1 else found.squeeze(1)


def task_metrics(
    outputs: Tensor | dict[str, Tensor], data: TaskData, losses: Sequence[str] | None = None
) -> dict[str, dict[str, float]]:
    """``{task: {metric: value}}`` over the rows that have the task's label, by their weights.

    Binary: auc, log_loss, ne, calibration, and gauc where the data has groups. Regression: mse. Multi-class: accuracy,
    log_loss. losses: the tasks' by the words of
    :class:`python_models.losses.TaskLosses`; "watch_time" predicts the exponential of its output.
    """
    found = {}
    for t, (task, kind) in enumerate(zip(data.task_names, data.kinds, strict=True)):
        out, labels = column(outputs, data, t), data.labels[:, t]
        weights = None if data.weights is None else data.weights[:, t]
        if kind == "binary":
            found[task] = binary_metrics(out, labels, weights, data.group)
        elif kind == "regression":
            if losses and losses[t] == "watch_time":
                out = out.double().exp()
            found[task] = {"mse": metrics.mean_squared_error(out, labels, weights)}
        else:
            found[task] = _multiclass(out, labels, weights)
    return found


def binary_metrics(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None, group: Tensor | None = None
) -> dict[str, float]:
    """The metrics of one binary task, all [N]. Those of an order are NaN where labels lie between 0 and 1."""
    found = {name: metric(logits, labels, weights) for name, metric in _BINARY.items()}
    hard = bool(((labels == 0) | (labels == 1)).all())
    orders = {"auc": metrics.auc(logits, labels, weights) if hard else math.nan}
    if group is not None:
        orders["gauc"] = metrics.gauc(logits, labels, group, weights) if hard else math.nan
    return {**orders, **found}


def _multiclass(outputs: Tensor, labels: Tensor, weights: Tensor | None) -> dict[str, float]:
    weights = torch.ones_like(labels) if weights is None else weights
    total = weights.double().sum()
    losses = F.cross_entropy(outputs.double(), labels.long(), reduction="none")
    right = (outputs.argmax(1) == labels).double()
    return {name: float((weights * each).sum() / total) for name, each in (("accuracy", right), ("log_loss", losses))}


def mean_metrics(tasks: dict[str, dict[str, float]]) -> dict[str, float]:
    """Every metric's mean over the tasks that have it."""
    names = dict.fromkeys(name for values in tasks.values() for name in values)
    columns = {name: [values[name] for values in tasks.values() if name in values] for name in names}
    return {name: sum(values) / len(values) for name, values in columns.items()}


def pick(evaluation: dict[str, Any], metric: str) -> float:
    """ "loss", "metric" (its mean) or "task.metric" of what an evaluation found."""
    if metric == "loss":
        return evaluation["loss"]
    if metric in evaluation["mean"]:
        return evaluation["mean"][metric]
    task, _, name = metric.rpartition(".")
    return evaluation["tasks"][task][name]


def valid_metrics(data: TaskData) -> list[str]:
    """What :func:`pick` knows of such data."""
    binary = ("auc", *(() if data.group is None else ("gauc",)), *_BINARY)
    kinds = {"binary": binary, "regression": ("mse",), "multiclass": ("accuracy", "log_loss")}
    pairs = [(task, name) for task, kind in zip(data.task_names, data.kinds, strict=True) for name in kinds[kind]]
    return ["loss", *dict.fromkeys(name for _, name in pairs), *(f"{task}.{name}" for task, name in pairs)]


def is_better(metric: str, value: float, best: float | None, margin: float) -> bool:
    """Whether a value beats the best by more than a margin; NaN never does. A calibration is better nearer to 1."""
    name = metric.rpartition(".")[2]
    if name == "calibration":
        value, best = abs(value - 1), None if best is None else abs(best - 1)
    if value != value:
        return False
    if best is None:
        return True
    return value > best + margin if name in _BETTER_HIGH else value < best - margin
