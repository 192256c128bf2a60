"""Rows in memory with the labels of several tasks, and how they are split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

UNKNOWN_ID = 0
"""The id every categorical field keeps for a category that the training rows do not have."""


@dataclass(frozen=True)
class TaskData:
    """Rows of numeric and categorical inputs with one label a task.

    numeric [N, n_num] float32; categorical [N, n_cat] int64, ``0 <= categorical[:, j] < vocab_sizes[j]``;
    labels [N, T] float32, in [0, 1] when ``kind`` is "binary", any finite number when it is "regression".

    Raises ValueError where shapes, ids or labels do not fit together, and TypeError where a dtype is another one.
    """

    numeric: Tensor
    categorical: Tensor
    labels: Tensor
    vocab_sizes: tuple[int, ...]
    task_names: tuple[str, ...]
    numeric_names: tuple[str, ...] = ()
    categorical_names: tuple[str, ...] = ()
    kind: str = "binary"

    def __post_init__(self) -> None:
        rows = self.labels.shape[0]
        widths = {"numeric": None, "categorical": len(self.vocab_sizes), "labels": len(self.task_names)}
        dtypes = {"numeric": torch.float32, "categorical": torch.int64, "labels": torch.float32}
        for name, width in widths.items():
            tensor = getattr(self, name)
            if tensor.dtype != dtypes[name]:
                raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {dtypes[name]}")
            if tensor.dim() != 2 or tensor.shape[0] != rows or (width is not None and tensor.shape[1] != width):
                expected = f"[{rows}, {'n_num' if width is None else width}]"
                raise ValueError(f"{name}: got shape {list(tensor.shape)}, expected {expected}")
        if self.kind not in ("binary", "regression"):
            raise ValueError(f"kind: got {self.kind!r}, expected 'binary' or 'regression'")
        for name, tensor in (("numeric", self.numeric), ("labels", self.labels)):
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name}: got a NaN or an infinity, expected finite numbers")
        if self.kind == "binary" and ((self.labels < 0) | (self.labels > 1)).any():
            raise ValueError("labels: got a value outside [0, 1], expected binary labels")
        if rows and self.vocab_sizes:
            # An id past its field's vocabulary would read the next field's embedding in the packed table.
            sizes = torch.tensor(self.vocab_sizes, device=self.categorical.device)
            bad = ((self.categorical < 0) | (self.categorical >= sizes)).any(0).nonzero()
            if len(bad):
                j = int(bad[0])
                low, high = (int(v) for v in self.categorical[:, j].aminmax())
                size = self.vocab_sizes[j]
                raise ValueError(f"categorical: field {j} has ids {low} to {high}, expected 0 to {size - 1}")

    def __len__(self) -> int:
        return self.labels.shape[0]

    def to(self, device: torch.device | str) -> TaskData:
        """The same rows on another device."""
        return replace(
            self,
            numeric=self.numeric.to(device),
            categorical=self.categorical.to(device),
            labels=self.labels.to(device),
        )

    def select(self, rows: Tensor | np.ndarray) -> TaskData:
        """Rows by their indices, int64 [n]."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.labels.device)
        return replace(
            self,
            numeric=self.numeric.index_select(0, index),
            categorical=self.categorical.index_select(0, index),
            labels=self.labels.index_select(0, index),
        )


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
