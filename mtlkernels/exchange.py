"""Mixing over experts that lie on several ranks: what a sharding rule cannot say, as explicit collectives.

A rule (:mod:`mtlkernels.sharding`) runs an operator on what every rank has, on all ranks alike. Some calls are not like
that: a softmax over experts of several ranks, whose parts must be rescaled; a bank whose units have other counts on
every rank; a mean over rows. These are functions of DTensors here, with collectives that know their gradients.
"""

from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.utils.weak import WeakIdKeyDictionary

Axis = tuple[DeviceMesh, int]  # one dimension of a mesh, as functional collectives take it


class _Enter(torch.autograd.Function):
    """A tensor that is equal on all ranks, which read different things from it: their gradients are summed."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return funcol.wait_tensor(funcol.all_reduce(grad.contiguous(), "sum", ctx.axis)), None


class _Summed(torch.autograd.Function):
    """The sum of all ranks' tensors, which has one gradient, the same on all ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        return funcol.wait_tensor(funcol.all_reduce(tensor.contiguous(), "sum", axis))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Shares(torch.autograd.Function):
    """``c_r = exp(lse_r) / sum_q exp(lse_q)``: this rank's share of every row's softmax over all ranks' experts.

    Ranks exchange a row's largest lse and the sum of the rest, in the backward pass one sum: three numbers a row, where
    the logits would be one an expert. A row without experts anywhere has share 0.
    """

    @staticmethod
    def forward(ctx: Any, lse: Tensor, axis: Axis) -> Tensor:
        largest = funcol.wait_tensor(funcol.all_reduce(lse, "max", axis))
        own = torch.exp(lse - largest.masked_fill(largest == -torch.inf, 0))
        total = funcol.wait_tensor(funcol.all_reduce(own, "sum", axis))
        share = own / total.masked_fill(total == 0, 1)
        ctx.axis = axis
        ctx.save_for_backward(share)
        return share

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (share,) = ctx.saved_tensors
        weighted = share * grad
        return weighted - share * funcol.wait_tensor(funcol.all_reduce(weighted, "sum", ctx.axis)), None


def enter(tensor: Tensor, axis: Axis) -> Tensor:
    """The tensor, equal on all ranks of the axis; its gradient becomes the sum of theirs."""
    return _Enter.apply(tensor, axis) if tensor.requires_grad else tensor


def summed(tensor: Tensor, axis: Axis) -> Tensor:
    """The sum of what the ranks of the axis have, on all of them; all go on alike, so its gradient is each one's."""
    return _Summed.apply(tensor, axis)


def spread(part: Tensor, dim: int, size: int, axis: Axis) -> DTensor:
    """The tensor of which every rank of the axis has :func:`own_part` along `dim`, `size` being all of it."""
    mesh, _ = axis
    shape = [*part.shape[:dim], size, *part.shape[dim + 1 :]]
    return DTensor.from_local(
        part, mesh, [Shard(dim)], run_check=False, shape=torch.Size(shape), stride=_contiguous(shape)
    )


def own_part(size: int, axis: Axis) -> tuple[int, int]:
    """The half-open range of `size` entries that this rank of the axis has, as DTensor cuts: the last may have none."""
    mesh, dim = axis
    width = -(-size // mesh.size(dim))
    begin = min(mesh.get_local_rank(dim) * width, size)
    return begin, min(begin + width, size)


def own_counts(counts: list[int], begin: int, end: int) -> list[int]:
    """How many of the experts [begin, end) belong to each unit, experts being ordered unit by unit."""
    found, start = [], 0
    for n in counts:
        found.append(max(0, min(end, start + n) - max(begin, start)))
        start += n
    return found


def sharded_dim(tensor: DTensor, dim: int) -> int | None:
    """The mesh dimension along which a tensor dimension is sharded."""
    found = [i for i, p in enumerate(tensor.placements) if p.is_shard(dim)]
    if len(found) > 1:
        raise ValueError(f"one mesh dimension at most may shard the experts; got {tensor.placements}")
    return found[0] if found else None


# An attribute of experts whose mix is to come back reduced, a plain tensor, for modules that know no DTensor.
WHOLE = "mixes_to_whole"


def mix(operator: Any, which: str, args: tuple) -> Tensor:
    """The mix op on experts [B,E,D] sharded by E along one mesh dimension: partial sums [B,T,D], to be reduced.

    Every rank mixes its own experts by its own softmax, then scales by its share of the whole. Dense logits [B,T,E] may
    be sharded as the experts are, by their last dimension; packed ones, static weights and routes are needed whole.
    Other mesh dimensions may shard the batch or the features.
    """
    experts, logits, static, mask, columns, native = args
    mesh, at = experts.device_mesh, sharded_dim(experts, 1)
    axis = (mesh, at)
    others = [p.is_shard(0) for p in experts.placements]
    begin, end = own_part(experts.shape[1], axis)
    dense_static = static is not None and static.dim() == 3
    features = [p.is_shard(2) for p in experts.placements]

    def local(tensor: Any, batched: bool, last: int | None = None, width: int | None = None) -> Tensor | None:
        """The rank's part: rows as the experts', `last` the dimension of the experts if it is to be cut there."""
        if tensor is None:
            return None
        own = isinstance(tensor, DTensor)
        cut = own and last is not None and tensor.placements[at].is_shard(last)
        wanted, grads = [], []
        for i in range(mesh.ndim):
            here = Replicate()
            if i == at and cut:
                here = Shard(last)
            elif batched and others[i]:
                here = Shard(0)
            elif width is not None and features[i]:
                here = Shard(width)
            wanted.append(here)
            # What several ranks read whole has a gradient from each.
            grads.append(Partial() if here.is_replicate() else here)
        if not own:
            tensor = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
        part = tensor.redistribute(placements=wanted).to_local(grad_placements=grads)
        return part if cut or last is None else part.narrow(last, begin, end - begin)

    h = experts.to_local()
    mask, packed = local(mask, False, 1), columns is not None
    logits = local(logits, True, None if packed else 2)
    if native is None:
        static = local(static, False, None if packed else 1, 2 if dense_static else None)
    if packed:
        chosen, columns = own_routes(columns, begin, end)
        logits = None if logits is None else logits.index_select(1, chosen)
        static = None if static is None else static.index_select(0, chosen)

    parts = []
    if logits is not None:
        run = operator.reference if which == "reference" else operator._forward[which]
        out, lse = run(h, logits, None, mask, columns, None)
        parts.append(_Shares.apply(lse, axis)[..., None] * out)
    if native is not None:
        parts.append(_native(operator, which, h, local(static, False), native, args[1].shape[1], begin, end, mask))
    elif static is not None:
        parts.append(operator(which, _wants(h, static), h, None, static, mask, columns, None))
    out = (parts[0] if len(parts) == 1 else parts[0] + parts[1]).to(h.dtype)
    placements = [Partial() if i == at else p for i, p in enumerate(experts.placements)]
    shape = (experts.shape[0], out.shape[1], experts.shape[2])
    mixed = DTensor.from_local(out, mesh, placements, run_check=False, shape=shape, stride=_contiguous(shape))
    return mixed.full_tensor() if getattr(experts, WHOLE, False) else mixed


def _native(operator, which, h, native, counts, rows, begin, end, mask) -> Tensor:
    """AdaTT's residual of the experts [begin, end): v of the units that lie there, each in its unit's row."""
    own = own_counts(counts, begin, end)
    units = torch.tensor([u for u, n in enumerate(own) for _ in range(n)], dtype=torch.long, device=h.device)
    belongs = units == torch.arange(rows, device=h.device)[:, None]
    static = h.new_ones(end - begin) if native is None else native
    if native is not None:
        static = torch.nn.functional.pad(native, (0, max(0, end - native.shape[0])))[begin:end]
    # Masked like a static weight of 0: it is not read there.
    mask = belongs if mask is None else belongs & mask
    return operator(which, _wants(h, static), h, None, static.expand(rows, -1), mask, None, None)


def _wants(*tensors: Tensor) -> bool:
    return any(t.requires_grad for t in tensors)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


_ROUTES = WeakIdKeyDictionary()  # columns -> {range of experts: its routes}: reading them waits for a GPU


def own_routes(columns: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """The packed weights that routes to the experts [begin, end) have, and routes [T, end - begin] into these alone."""
    whole = columns.full_tensor() if isinstance(columns, DTensor) else columns
    known = _ROUTES.setdefault(columns, {})
    if (begin, end) not in known:
        part = whole[:, begin:end]
        used = part >= 0
        chosen, own = part[used].long(), torch.full_like(part, -1)
        own[used] = torch.arange(chosen.shape[0], dtype=part.dtype, device=part.device)
        known[begin, end] = chosen, own
    return known[begin, end]


def bank(operator: Any, which: str, args: tuple) -> DTensor:
    """The expert_linear op on units x [B,U,K] with weights [E,N,K] sharded by E: outputs [B,E,N], sharded likewise.

    A unit's experts may lie on several ranks, so every rank reads all units' inputs.
    """
    x, weight, bias, counts, activation, save = args
    mesh, at = weight.device_mesh, sharded_dim(weight, 0)
    begin, end = own_part(weight.shape[0], (mesh, at))
    wanted = [Shard(0) if i != at and p.is_shard(0) else Replicate() for i, p in enumerate(x.placements)]
    only = [Shard(0) if i == at else Replicate() for i in range(mesh.ndim)]
    grads = [Partial() if p.is_replicate() else p for p in wanted]
    h = x.redistribute(placements=wanted).to_local(grad_placements=grads)
    sums = [p if p.is_shard() else Partial() for p in only]
    w, b = (
        None if t is None else t.redistribute(placements=only).to_local(grad_placements=sums) for t in (weight, bias)
    )
    y = operator(which, _wants(h, w), h, w, b, own_counts(counts, begin, end), activation, save)
    placements = [Shard(1) if i == at else p for i, p in enumerate(wanted)]
    shape = (x.shape[0], *weight.shape[:2])
    return DTensor.from_local(y, mesh, placements, run_check=False, shape=shape, stride=_contiguous(shape))


def by_rows(operator: Any, which: str, args: tuple) -> DTensor:
    """masked_bce and esmm_loss on rows sharded along mesh dimensions: this rank's part of the mean over all rows.

    A rank's own mean counts by its share of the rows, or by its share of every task's mask: that is what is exchanged.
    """
    logits, rest = args[0], args[1:]
    mesh, rows = logits.device_mesh, [p if p.is_shard(0) else Replicate() for p in logits.placements]
    parts = [t.redistribute(placements=rows).to_local() if isinstance(t, DTensor) else t for t in (logits, *rest)]
    own = operator(which, parts[0].requires_grad, *parts)
    if operator.name == "esmm_loss" or args[2] is None:
        share = parts[0].shape[0] / max(logits.shape[0], 1)
    else:
        weight = parts[2].to(own.dtype).sum(0)
        total = weight
        for dim, placement in enumerate(rows):
            if placement.is_shard():
                total = funcol.wait_tensor(funcol.all_reduce(total, "sum", (mesh, dim)))
        share = weight / total.masked_fill(total == 0, 1)
    out = own * share
    placements = [Partial() if p.is_shard() else p for p in rows]
    return DTensor.from_local(out, mesh, placements, run_check=False)
