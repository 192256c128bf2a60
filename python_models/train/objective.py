"""Every task's loss by its kind, or as a configuration says, over the rows that have its label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from python_models.data import TaskData
from python_models.losses import TaskLosses
from python_models.settings import ConfigError, build, nearest

# The losses, words of TaskLosses, that fit the tasks of a kind; the first is what is taken if nothing is said.
_OF_KIND = {
    "binary": ("binary",),
    "regression": ("mse", "huber", "watch_time"),
    "multiclass": ("multiclass",),
}
_WORDS = {"mse": "regression"}


@dataclass(frozen=True)
class Loss:
    """A task's loss as a table; a string is its name."""

    name: str = ""
    delta: float = 1.0


def make_objective(data: TaskData, losses: dict[str, Any]) -> TaskLosses:
    """The losses of the data's tasks, `losses` those of some of them: {task: "huber"}, or {name, delta} for the word.

    Raises ConfigError for a task or a loss that is not there, or does not fit the labels.
    """
    chosen = [Loss(_OF_KIND[kind][0]) for kind in data.kinds]
    for task, said in losses.items():
        if task not in data.task_names:
            raise ConfigError(f"losses.{task}: there is no such task{nearest(task, data.task_names)}")
        at = data.task_names.index(task)
        loss = build(Loss, said if isinstance(said, dict) else {"name": said}, f"losses.{task}", "config")
        valid = _OF_KIND[data.kinds[at]]
        if loss.name not in valid:
            raise ConfigError(f"losses.{task} is {loss.name!r}, of a {data.kinds[at]} task{nearest(loss.name, valid)}")
        if loss.name == "watch_time" and (data.labels[:, at] < 0).any():
            raise ConfigError(f"losses.{task} is 'watch_time', whose labels are times; some are below 0")
        if not 0 < loss.delta < float("inf"):
            raise ConfigError(f"losses.{task}.delta must be positive and finite; got {loss.delta}")
        chosen[at] = loss
    return TaskLosses([_WORDS.get(loss.name, loss.name) for loss in chosen], delta=[loss.delta for loss in chosen])
