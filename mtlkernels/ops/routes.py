"""Routes: which experts each output row may use, when most rows use few."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import count, counts


class Routes:
    """The experts of each output row, packed: row t uses ``experts[offsets[t]:offsets[t+1]]``.

    Logits and static weights of a call with routes are packed the same way, [B,R] and [R], R = len(experts), so that
    CGC, PLE and soft ordering carry only the weights they have.

    Args:
        offsets: [T+1] integers, from 0, never falling, the last one R.
        experts: [R] integers in [0, num_experts), none twice in one row.
        num_experts: E of the experts [B,E,D] they will be used with.

    Attributes: ``num_rows`` (T), ``num_experts`` (E), ``num_routes`` (R), ``offsets``, ``experts`` (int64) and
    ``columns`` [T,E] int32: the place of (t,e) in the packed weights, -1 where t does not use e.

    Raises ValueError or TypeError naming the argument that does not fit.
    """

    def __init__(self, offsets: Tensor | Sequence[int], experts: Tensor | Sequence[int], num_experts: int) -> None:
        offsets = _integers("offsets", offsets)
        experts = _integers("experts", experts).to(offsets.device)
        count("num_experts", num_experts, 0)
        if offsets.dim() != 1 or offsets.numel() == 0 or offsets[0] != 0 or (offsets.diff() < 0).any():
            raise ValueError(f"offsets must be [T+1], from 0 and never falling; got {offsets.tolist()}")
        if experts.dim() != 1 or offsets[-1] != experts.numel():
            expected = f"[R] with R = offsets[-1] = {int(offsets[-1])}"
            raise ValueError(f"experts must be {expected}; got {list(experts.shape)}")
        if experts.numel() and (experts.min() < 0 or experts.max() >= num_experts):
            raise ValueError(f"experts must lie in [0, {num_experts}); got {experts.tolist()}")
        rows = torch.repeat_interleave(torch.arange(offsets.numel() - 1, device=offsets.device), offsets.diff())
        columns = torch.full((offsets.numel() - 1, num_experts), -1, dtype=torch.int32, device=offsets.device)
        columns[rows, experts] = torch.arange(experts.numel(), dtype=torch.int32, device=offsets.device)
        if int((columns >= 0).sum()) != experts.numel():
            raise ValueError("experts must not name an expert twice in one row")
        self.offsets, self.experts, self.columns = offsets, experts, columns
        self.num_rows, self.num_experts, self.num_routes = columns.shape[0], num_experts, experts.numel()

    @classmethod
    def from_mask(cls, mask: Tensor) -> "Routes":
        """From [T,E] bool, True where row t uses expert e; the packed order is row by row, experts rising."""
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.dtype != torch.bool:
            raise ValueError(f"mask must be a [T,E] bool tensor; got {getattr(mask, 'shape', mask)}")
        offsets = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        return cls(offsets, mask.nonzero()[:, 1], mask.shape[1])

    @classmethod
    def by_unit(cls, experts_per_unit: Sequence[int], units: Sequence[Sequence[int]]) -> "Routes":
        """Experts are ordered unit by unit; row t uses all experts of the units named in ``units[t]``, in that order.

        PLE with two tasks and a shared unit: ``by_unit((2, 2, 1), [(0, 2), (1, 2), (0, 1, 2)])``.
        """
        sizes = counts("experts_per_unit", experts_per_unit, 0)
        for t, row in enumerate(units):
            if not all(u in range(len(sizes)) for u in row):
                raise ValueError(f"units[{t}] must name units in [0, {len(sizes)}); got {list(row)}")
        begin = [sum(sizes[:u]) for u in range(len(sizes) + 1)]
        rows = [[e for u in row for e in range(begin[u], begin[u] + sizes[u])] for row in units]
        offsets = [sum(len(r) for r in rows[:t]) for t in range(len(rows) + 1)]
        return cls(offsets, [e for row in rows for e in row], begin[-1])

    def to(self, device: torch.device | str) -> "Routes":
        """The same routes with their tensors on `device`; itself where they are there already."""
        if self.columns.device == torch.device(device):
            return self
        moved = object.__new__(Routes)
        moved.__dict__.update(self.__dict__)
        for name in ("offsets", "experts", "columns"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    def __repr__(self) -> str:
        return f"Routes(rows={self.num_rows}, experts={self.num_experts}, routes={self.num_routes})"


def _integers(name: str, values: Tensor | Sequence[int]) -> Tensor:
    found = torch.as_tensor(values)
    if found.numel() and (found.is_floating_point() or found.dtype == torch.bool):
        raise TypeError(f"{name} must be integers; got {found.dtype}")
    return found.to(torch.int64)
