"""mix in plain torch."""

import torch
from torch import Tensor

from .expert_linear import accumulate_dtype, without_autocast


def allowed_experts(mask: Tensor | None, columns: Tensor | None) -> Tensor | None:
    """[T,E] bool, True where row t may use expert e; None when every row may use every expert."""
    if columns is not None:
        return columns >= 0
    return mask


def native_rows(num_rows: int, native: list[int], device: torch.device) -> Tensor:
    """[T,E] bool, True where expert e belongs to unit t."""
    unit = torch.tensor([u for u, n in enumerate(native) for _ in range(n)], dtype=torch.long, device=device)
    return unit == torch.arange(num_rows, device=device)[:, None]


def mix(
    experts: Tensor,
    logits: Tensor | None,
    static: Tensor | None,
    mask: Tensor | None,
    columns: Tensor | None,
    native: list[int] | None,
) -> tuple[Tensor, Tensor]:
    """``O[b,t,:] = sum_e (softmax(logits) + static)[b,t,e] H[b,e,:]`` and the logsumexp of the logits.

    experts [B,E,D]; logits [B,T,E], or packed [B,R] with columns; static [T,E], packed [R], [T,E,D], or the native
    weights [sum(native[:T])]. Returns out [B,T,D] in experts' dtype and lse [B,T] (empty without logits).
    """
    # Autocast would round the weights to 16 bit for the product.
    with without_autocast(experts.device.type):
        return _mix(experts, logits, static, mask, columns, native)


def _mix(experts, logits, static, mask, columns, native) -> tuple[Tensor, Tensor]:
    acc = accumulate_dtype(experts.dtype)
    h = experts.to(acc)
    num_experts = experts.shape[1]
    if static is not None and static.dim() == 3:
        out = torch.einsum("tjd,bjd->btd", static.to(acc), h)
        return out.to(experts.dtype), h.new_empty(0)

    allowed = allowed_experts(mask, columns)
    if logits is not None:
        wide = logits.to(acc)
        if columns is not None:
            wide = _unpack(wide, columns)
        weights, lse = _softmax(wide, allowed)
        num_rows = wide.shape[1]
    else:
        num_rows = next(t.shape[0] for t in (columns, mask, static) if t is not None)
        weights, lse = h.new_zeros(1, num_rows, num_experts), h.new_empty(0)

    if native is not None:
        own = native_rows(num_rows, native, experts.device)
        v = h.new_ones(sum(native[:num_rows])) if static is None else static.to(acc)
        # Expert e of the first T units is entry e of v: both are ordered unit by unit.
        wide_v = torch.nn.functional.pad(v, (0, num_experts - v.shape[0]))
        weights = weights + torch.where(own, wide_v, 0)
    elif static is not None:
        if columns is not None:
            static = _unpack(static, columns)
        weights = weights + static.to(acc)

    if allowed is None:
        out = torch.matmul(weights.expand(h.shape[0], -1, -1), h)
    else:
        # Selected, not multiplied by zero: a masked expert may hold NaN; neither its value nor its gradient is read.
        weights = torch.where(allowed, weights, 0).expand(h.shape[0], -1, -1)
        seen = torch.where(allowed[..., None], h[:, None], 0)
        out = torch.einsum("bte,bted->btd", weights, seen)
    return out.to(experts.dtype), lse


def _unpack(packed: Tensor, columns: Tensor) -> Tensor:
    """[..., R] -> [..., T, E]; anything where a row may not use an expert."""
    if packed.shape[-1] == 0:  # nothing to point at, but the result still depends on it, so that it gets a gradient
        packed = torch.nn.functional.pad(packed, (0, 1))
    return packed[..., columns.clamp(min=0).long()]


def _softmax(logits: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax and logsumexp over the allowed entries; a row with none is all zero, its logsumexp -inf."""
    if logits.shape[-1] == 0:
        return logits, logits.new_full(logits.shape[:-1], -torch.inf)
    if allowed is None:
        return torch.softmax(logits, -1), torch.logsumexp(logits, -1)
    some = allowed.any(-1, keepdim=True)
    # Rows with nothing allowed go through as zeros and are cut off afterwards, so that no NaN enters the gradient.
    safe = torch.where(some, logits.masked_fill(~allowed, -torch.inf), 0)
    weights = torch.where(allowed, torch.softmax(safe, -1), 0)
    lse = torch.where(some[..., 0], torch.logsumexp(safe, -1), -torch.inf)
    return weights, lse
