"""Embeddings that tasks do not share."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtlkernels.arguments import count, counts


class TaskBiasEmbedding(nn.Module):
    """Own embeddings a task of chosen fields, such as position or device, beside the shared ones.

    With ``dim=1`` the tasks' biases [B,T], ``sum_f b[t,f][id_f]``, for adding to the logits. With a larger dim
    [B,T,F*dim], the fields behind one another, for the input of each task's tower. One lookup serves all tasks: their
    vectors of an id lie side by side. ::

        logits = model(x) + bias(categorical)
        logits = model.towers(torch.cat((model.fusion(x), wide(categorical)), 2))

    Args:
        num_tasks: T.
        vocab_sizes: V of every field of the ids.
        fields: the F columns of the ids that are used; None uses all.
        dim: of an embedding.
        sparse: gradients of the table are sparse, for ``torch.optim.SparseAdam`` and large vocabularies.

    Biases start at 0, larger embeddings at N(0, 0.01^2). An id is at least 0 and below its field's V, as
    :class:`python_models.data.TaskData` checks once; here only the end of the table is checked.

    Raises:
        TypeError, ValueError: naming the argument, at construction or at a call.
    """

    parameter_group = "bias_embedding"

    def __init__(
        self,
        num_tasks: int,
        vocab_sizes: Sequence[int],
        fields: Sequence[int] | None = None,
        dim: int = 1,
        *,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_tasks, self.dim, self.sparse = count("num_tasks", num_tasks, 1), count("dim", dim, 1), sparse
        self.vocab_sizes = counts("vocab_sizes", vocab_sizes, 1)
        every = range(len(self.vocab_sizes))
        self.fields = list(every) if fields is None else counts("fields", fields, 0)
        if len(set(self.fields)) != len(self.fields) or not set(self.fields) <= set(every) or not self.fields:
            raise ValueError(f"fields must be different ones of the {len(every)} of vocab_sizes; got {self.fields}")
        sizes = torch.tensor([0, *(self.vocab_sizes[field] for field in self.fields)]).cumsum(0)
        for name, values in (("offsets", sizes[:-1]), ("columns", torch.tensor(self.fields))):
            self.register_buffer(name, values.to(device), persistent=False)
        self.table = nn.Parameter(torch.empty(int(sizes[-1]), num_tasks * dim, device=device, dtype=dtype))
        self.out_features = dim * len(self.fields) if dim > 1 else 1
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The start, anew."""
        nn.init.zeros_(self.table) if self.dim == 1 else nn.init.normal_(self.table, std=0.01)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, len(vocab_sizes)], integer -> [B,T], or [B,T,F*dim]."""
        if ids.dim() != 2 or ids.shape[1] != len(self.vocab_sizes):
            raise ValueError(f"ids must be [B,{len(self.vocab_sizes)}]; got shape {tuple(ids.shape)}")
        rows = ids.index_select(1, self.columns) + self.offsets
        if self.dim == 1:
            return F.embedding_bag(rows, self.table, mode="sum", sparse=self.sparse)
        found = F.embedding(rows, self.table, sparse=self.sparse)
        return found.unflatten(2, (self.num_tasks, self.dim)).transpose(1, 2).flatten(2)

    def extra_repr(self) -> str:
        return f"num_tasks={self.num_tasks}, fields={self.fields}, dim={self.dim}"
