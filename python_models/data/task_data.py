"""Rows in memory with the labels of several tasks, and how they are split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

UNKNOWN_ID = 0
"""The id every categorical field keeps for a category that the training rows do not have."""

KINDS = ("binary", "regression", "multiclass")


@dataclass(frozen=True)
class TaskData:
    """Rows of numeric and categorical inputs with one label a task.

    numeric [N, n_num] float32; categorical [N, n_cat] int64, ``0 <= categorical[:, j] < vocab_sizes[j]``;
    labels [N, T] float32, in [0, 1] when ``kind`` is "binary", any finite number when it is "regression", a class from
    0 to ``num_classes[t] - 1`` when it is "multiclass". ``kind`` is that of all tasks, or one a task.
    weights [N, T] float32, at least 0: what a label counts, 0 where it is missing (the label is 0 then); None is 1.
    domain [N] int64 from 0 to ``num_domains - 1``, or None. group [N] int64, such as the row's user, for GAUC, or None.

    Raises ValueError where shapes, ids or labels do not fit together, and TypeError where a dtype is another one.
    """

    numeric: Tensor
    categorical: Tensor
    labels: Tensor
    vocab_sizes: tuple[int, ...]
    task_names: tuple[str, ...]
    numeric_names: tuple[str, ...] = ()
    categorical_names: tuple[str, ...] = ()
    kind: str | tuple[str, ...] = "binary"
    weights: Tensor | None = None
    domain: Tensor | None = None
    num_domains: int = 0
    num_classes: tuple[int, ...] = ()
    group: Tensor | None = None

    def __post_init__(self) -> None:
        rows, tasks = self.labels.shape[0], len(self.task_names)
        widths = {"numeric": None, "categorical": len(self.vocab_sizes), "labels": tasks, "weights": tasks}
        dtypes = {name: torch.int64 if name == "categorical" else torch.float32 for name in widths}
        for name, width in widths.items():
            tensor = getattr(self, name)
            if name == "weights" and tensor is None:
                continue
            if tensor.dtype != dtypes[name]:
                raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {dtypes[name]}")
            if tensor.dim() != 2 or tensor.shape[0] != rows or (width is not None and tensor.shape[1] != width):
                expected = f"[{rows}, {'n_num' if width is None else width}]"
                raise ValueError(f"{name}: got shape {list(tensor.shape)}, expected {expected}")
        if len(self.kinds) != tasks or not set(self.kinds) <= set(KINDS):
            raise ValueError(
                f"kind: got {self.kind!r}, expected one of {', '.join(KINDS)}, for all tasks or one a task"
            )
        for name, tensor in (("numeric", self.numeric), ("labels", self.labels), ("weights", self.weights)):
            if tensor is not None and not torch.isfinite(tensor).all():
                raise ValueError(f"{name}: got a NaN or an infinity, expected finite numbers")
        if self.weights is not None and (self.weights < 0).any():
            raise ValueError("weights: got a number below 0")
        self._check_labels()
        for name in ("domain", "group"):
            self._check_ids(name, rows)
        if self.domain is not None and rows and (self.domain.min() < 0 or self.domain.max() >= self.num_domains):
            low, high = (int(v) for v in self.domain.aminmax())
            raise ValueError(f"domain: got ids {low} to {high}, expected 0 to {self.num_domains - 1}")
        if rows and self.vocab_sizes:
            # An id past its field's vocabulary would read the next field's embedding in the packed table.
            sizes = torch.tensor(self.vocab_sizes, device=self.categorical.device)
            bad = ((self.categorical < 0) | (self.categorical >= sizes)).any(0).nonzero()
            if len(bad):
                j = int(bad[0])
                low, high = (int(v) for v in self.categorical[:, j].aminmax())
                size = self.vocab_sizes[j]
                raise ValueError(f"categorical: field {j} has ids {low} to {high}, expected 0 to {size - 1}")

    def _check_labels(self) -> None:
        if len(self.num_classes) not in (0, len(self.kinds)):
            raise ValueError(f"num_classes: got {self.num_classes}, expected one number a task")
        for t, kind in enumerate(self.kinds):
            labels = self.labels[:, t]
            if kind == "binary" and ((labels < 0) | (labels > 1)).any():
                raise ValueError("labels: got a value outside [0, 1], expected binary labels")
            if kind == "multiclass":
                classes = self.outputs[t]
                if classes < 2:
                    raise ValueError(f"num_classes: task {self.task_names[t]} has {classes}, expected 2 at least")
                if ((labels < 0) | (labels >= classes) | (labels != labels.floor())).any():
                    raise ValueError(f"labels: task {self.task_names[t]} has a class outside 0 to {classes - 1}")

    def _check_ids(self, name: str, rows: int) -> None:
        ids = getattr(self, name)
        if ids is None:
            return
        if ids.dtype != torch.int64:
            raise TypeError(f"{name}: got dtype {ids.dtype}, expected torch.int64")
        if ids.shape != (rows,):
            raise ValueError(f"{name}: got shape {list(ids.shape)}, expected [{rows}]")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every task."""
        return (self.kind,) * len(self.task_names) if isinstance(self.kind, str) else tuple(self.kind)

    @property
    def outputs(self) -> tuple[int, ...]:
        """What a network gives for every task: one number, or one a class."""
        classes = self.num_classes or (1,) * len(self.kinds)
        return tuple(n if kind == "multiclass" else 1 for n, kind in zip(classes, self.kinds, strict=True))

    def __len__(self) -> int:
        return self.labels.shape[0]

    def to(self, device: torch.device | str) -> TaskData:
        """The same rows on another device."""
        return self._each(lambda tensor: tensor.to(device))

    def select(self, rows: Tensor | np.ndarray) -> TaskData:
        """Rows by their indices, int64 [n]."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.labels.device)
        return self._each(lambda tensor: tensor.index_select(0, index))

    def _each(self, change: Callable[[Tensor], Tensor]) -> TaskData:
        columns = {
            name: getattr(self, name) for name in ("numeric", "categorical", "labels", "weights", "domain", "group")
        }
        return replace(self, **{name: change(tensor) for name, tensor in columns.items() if tensor is not None})


@dataclass(frozen=True)
class Splits:
    """Training, validation and test rows that share names, vocabularies and scaling."""

    train: TaskData
    validation: TaskData
    test: TaskData


def split_rows(rows: int, fractions: Sequence[float] = (0.6, 0.2, 0.2), *, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Cut a random permutation of ``range(rows)`` into disjoint index arrays, int64.

    Every part but the last has ``floor(fraction * rows)`` rows; the last takes what is left.
    """
    if any(f < 0 for f in fractions) or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(f"fractions: got {tuple(fractions)}, expected non-negative numbers that sum to 1")
    # The small offset keeps 0.2 * 10, which is a hair below 2 in some sums, at 2.
    ends = [int(np.floor(sum(fractions[: i + 1]) * rows + 1e-9)) for i in range(len(fractions) - 1)]
    return tuple(np.split(np.random.default_rng(seed).permutation(rows), ends))
