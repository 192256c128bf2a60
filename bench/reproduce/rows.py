"""The rows of every kind of data that a setting names."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from bench.reproduce.plan import SYNTHETIC_ROWS
from python_models.data import Splits, TaskData, load_census, make_synthetic
from python_models.train.checkpoint import digest


class Rows:
    """Census-Income from a file or folder, and what is made of it; synthetic tasks need no file.

    Args:
        path: of Census-Income, as :func:`python_models.data.load_census` takes it; None where no setting wants it.
        synthetic: counts of training, validation and test rows of synthetic tasks.
    """

    def __init__(self, path: Path | None, synthetic: tuple[int, int, int] = SYNTHETIC_ROWS) -> None:
        self.path, self.synthetic = path, synthetic
        self._census = lru_cache(1)(lambda: load_census(path, seed=0))
        self._made = lru_cache(1)(self._make)

    def fingerprint(self, kind: str) -> str:
        """Of the rows that a results line was made with, or of how they are drawn."""
        if kind.startswith("synthetic"):
            return f"drawn {self.synthetic}"
        census = self._census()
        return self._digest(census)

    def splits(self, kind: str, seed: int) -> Splits:
        """The rows of a kind; only synthetic ones depend on the seed: each run has its own tasks."""
        return self._made(kind, seed if kind.startswith("synthetic") else 0)

    def _make(self, kind: str, seed: int) -> Splits:
        if kind.startswith("synthetic"):
            correlation, *scale = (float(number) for number in kind.split()[1:])
            return make_synthetic(self.synthetic, correlation=correlation, seed=seed, scale=scale[0] if scale else 0.3)
        census = self._census()
        change = {"census": lambda part: part, "census by domain": by_domain, "funnel": funnel}[kind]
        return Splits(*(change(part) for part in (census.train, census.validation, census.test)))

    @lru_cache(1)  # noqa: B019 - one object a process
    def _digest(self, census: Splits) -> str:
        return "".join(digest(part)[:8] for part in (census.train, census.validation, census.test))


def by_domain(data: TaskData) -> TaskData:
    """Every row once a task, the task being its domain: all rows of the first task, then those of the next."""
    tasks, rows = len(data.task_names), len(data)
    return replace(
        data.select(torch.arange(rows).repeat(tasks)),
        labels=data.labels.T.reshape(-1, 1),
        task_names=("any",),
        domain=torch.arange(tasks).repeat_interleave(rows),
        num_domains=tasks,
    )


def by_task(outputs: Tensor, tasks: int) -> Tensor:
    """What a network says of :func:`by_domain`'s rows, [tasks*N,1], as [N,tasks]."""
    return outputs.view(tasks, -1).T


def funnel(data: TaskData) -> TaskData:
    """Education, and income above 50 000 where education is: a second label only where the first is, as ESMM has it."""
    first, second = (data.labels[:, data.task_names.index(name)] for name in ("education", "income"))
    return replace(data, labels=torch.stack((first, first * second), 1), task_names=("education", "and income"))
