"""From table rows to one vector: numbers as they are, each category by its embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from python_models.data.task_data import UNKNOWN_ID, TaskData


class TableFeatures(nn.Module):
    """``(numeric [B, n_num], categorical [B, n_cat]) -> x [B, n_num + n_cat * embedding_dim]``.

    One embedding a field, all rows in a single table [sum(vocab_sizes), embedding_dim]: one lookup serves every field.
    Ids must lie below their field's vocabulary size, which :class:`~python_models.data.TaskData` checks once; here only
    the end of the table is checked.
    """

    def __init__(self, num_numeric: int, vocab_sizes: Sequence[int] = (), embedding_dim: int = 4) -> None:
        super().__init__()
        if num_numeric < 0 or embedding_dim < 0 or any(size < 1 for size in vocab_sizes):
            raise ValueError(
                f"got num_numeric {num_numeric}, vocab_sizes {tuple(vocab_sizes)}, embedding_dim {embedding_dim}, "
                "expected counts of at least 0 and vocabularies of at least 1"
            )
        self.num_numeric = num_numeric
        self.vocab_sizes = tuple(vocab_sizes)
        self.embedding_dim = embedding_dim
        self.out_features = num_numeric + len(self.vocab_sizes) * embedding_dim
        starts = torch.tensor((0, *self.vocab_sizes), dtype=torch.int64).cumsum(0)
        self.register_buffer("offsets", starts[:-1], persistent=False)
        self.table = nn.Parameter(torch.empty(sum(self.vocab_sizes), embedding_dim)) if self.vocab_sizes else None
        self.reset_parameters()

    @classmethod
    def of(cls, data: TaskData, embedding_dim: int = 4) -> TableFeatures:
        """The features that fit a data set."""
        return cls(data.numeric.shape[1], data.vocab_sizes, embedding_dim)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """N(0, 0.1) embeddings; the unknown category, which training never meets, is the zero vector."""
        if self.table is not None:
            nn.init.normal_(self.table, std=0.1)
            self.table[self.offsets + UNKNOWN_ID] = 0

    def forward(self, numeric: Tensor, categorical: Tensor) -> Tensor:
        for name, tensor, width in (
            ("numeric", numeric, self.num_numeric),
            ("categorical", categorical, len(self.vocab_sizes)),
        ):
            if tensor.dim() != 2 or tensor.shape[1] != width:
                raise ValueError(f"{name}: got shape {list(tensor.shape)}, expected [B, {width}]")
        if self.table is None:
            return numeric
        embedded = F.embedding(categorical + self.offsets, self.table).flatten(1)
        return torch.cat((numeric.to(embedded.dtype), embedded), 1)

    def extra_repr(self) -> str:
        return f"{self.num_numeric}, vocab_sizes={self.vocab_sizes}, embedding_dim={self.embedding_dim}"


class TableModel(nn.Module):
    """Features below any network on x: ``(numeric, categorical) -> network(features(numeric, categorical))``.

    Keyword arguments of a call, ``return_gates=True`` for one, go to the network.
    """

    def __init__(self, features: TableFeatures, network: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.network = network

    def forward(self, numeric: Tensor, categorical: Tensor, **options: Any) -> Any:
        return self.network(self.features(numeric, categorical), **options)
