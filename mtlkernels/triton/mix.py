"""mix in Triton: one pass over the experts for all tasks, forward and backward.

A program holds all T rows of a tile of the output in registers, [rows, T, width], and walks over the experts: each
tile of H is read once for all tasks. Tiles are three-dimensional throughout, with T (padded to a power of two) inside
a thread, so that the loop over experts moves nothing between threads.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import mix_channels
from .config import cdiv, offsets, on_device, pick_mix, power_of_two, rows_contiguous, supports

# How A is put together; constexpr of the kernels.
MAP_NONE, MAP_MASK, MAP_COLUMNS = 0, 1, 2
STATIC_NONE, STATIC_TABLE, STATIC_NATIVE, STATIC_ONES = 0, 1, 2, 3


@triton.jit
def _routes(map_ptr, t, e, T, E, MAP: tl.constexpr):
    """Which row t may use which expert e, and the column in which logits and static hold that pair."""
    allowed = (t < T) & (e < E)
    column = e + 0 * t
    if MAP == 1:
        allowed = tl.load(map_ptr + t * E + e, mask=allowed, other=0) != 0
    if MAP == 2:
        column = tl.load(map_ptr + t * E + e, mask=allowed, other=-1)
        allowed = column >= 0
    return allowed, column


@triton.jit
def _static(static_ptr, static_t, t, e, column, allowed, begin, end, STATIC: tl.constexpr):
    """The static part of A in float32, 0 where not allowed."""
    if STATIC == 1:
        value = tl.load(static_ptr + t * static_t + column, mask=allowed, other=0).to(tl.float32)
    else:
        native = allowed & (e >= begin) & (e < end)
        if STATIC == 2:
            value = tl.load(static_ptr + e + 0 * t, mask=native, other=0).to(tl.float32)
        else:
            value = tl.where(native, 1.0, 0.0)
    return value


@triton.jit
def _native_range(offset_ptr, t, T, STATIC: tl.constexpr):
    if STATIC >= 2:
        begin = tl.load(offset_ptr + t, mask=t < T, other=0)
        end = tl.load(offset_ptr + t + 1, mask=t < T, other=0)
    else:
        begin = t
        end = t
    return begin, end


@triton.jit(do_not_specialize=["B"])
def forward_kernel(
    h_ptr, logit_ptr, static_ptr, map_ptr, offset_ptr, out_ptr, lse_ptr,
    B, T, E, D, h_b, h_e, logit_b, logit_t, static_t,
    LOGITS: tl.constexpr, STATIC: tl.constexpr, MAP: tl.constexpr,
    BB: tl.constexpr, TP: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """out [BB,T,BD] and lse [BB,T]; grid (tiles of B, tiles of D)."""
    b = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)[:, None, None]
    t = tl.arange(0, TP)[None, :, None]
    d = tl.program_id(1) * BD + tl.arange(0, BD)[None, None, :]
    row = b < B
    begin, end = _native_range(offset_ptr, t, T, STATIC)
    logit_row = logit_ptr + b * logit_b + t.to(tl.int64) * logit_t
    top = tl.full([BB, TP, 1], float("-inf"), tl.float32)
    total = tl.zeros([BB, TP, 1], tl.float32)
    if LOGITS:
        for e0 in range(0, E, BE):
            e = e0 + tl.arange(0, BE)[None, None, :]
            allowed, column = _routes(map_ptr, t, e, T, E, MAP)
            logit = tl.load(logit_row + column, mask=allowed & row, other=float("-inf")).to(tl.float32)
            new_top = tl.maximum(top, tl.max(logit, 2, keep_dims=True))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            total = total * tl.exp(top - base) + tl.sum(tl.exp(logit - base), 2, keep_dims=True)
            top = new_top
        top = tl.where(top == float("-inf"), 0.0, top)
        tl.store(lse_ptr + b * T + t, top + tl.log(total), mask=row & (t < T) & (tl.program_id(1) == 0))

    acc = tl.zeros([BB, TP, BD], tl.float32)
    inverse = 1.0 / total
    h_row = h_ptr + b * h_b + d
    for e in tl.range(0, E, loop_unroll_factor=UNROLL):
        allowed, column = _routes(map_ptr, t, e, T, E, MAP)
        a = tl.zeros([BB, TP, 1], tl.float32)
        if LOGITS:
            logit = tl.load(logit_row + column, mask=allowed & row, other=float("-inf")).to(tl.float32)
            a = tl.where(allowed, tl.exp(logit - top) * inverse, 0.0)
        if STATIC != 0:
            a += _static(static_ptr, static_t, t, e, column, allowed, begin, end, STATIC)
        wanted = row & (d < D)
        if MAP != 0:
            # An expert that no row may use is not read; one that some may use is selected, since 0 * NaN is NaN.
            wanted = wanted & (tl.max(allowed.to(tl.int32), 1, keep_dims=True) != 0)
        h = tl.load(h_row, mask=wanted, other=0).to(tl.float32)
        if MAP != 0:
            acc += tl.where(allowed, a * h, 0.0)
        else:
            acc += a * h
        h_row += h_e
    tl.store(out_ptr + (b * T + t) * D + d, acc.to(out_ptr.dtype.element_ty), mask=row & (t < T) & (d < D))


@triton.jit(do_not_specialize=["B"])
def backward_kernel(
    g_ptr, g_lse_ptr, h_ptr, logit_ptr, static_ptr, map_ptr, offset_ptr, lse_ptr,
    dh_ptr, da_ptr, dlogit_ptr, partial_ptr,
    B, T, E, D, g_b, g_t, h_b, h_e, logit_b, logit_t, dlogit_b, dlogit_t, static_t, partial_b,
    LOGITS: tl.constexpr, STATIC: tl.constexpr, MAP: tl.constexpr, G_LSE: tl.constexpr,
    NEED_H: tl.constexpr, NEED_L: tl.constexpr, NEED_S: tl.constexpr, ONE: tl.constexpr,
    BB: tl.constexpr, TP: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dexperts, dlogits and this program's share of dstatic; grid (tiles of B).

    da holds dA in float32 in the layout of dlogits (it is dlogits where that is float32): written expert by expert in
    the pass over H, read back once ``sum_e P dA`` is known. ONE says that BD covers D, so that the gradient's tile
    stays in registers for all experts.
    """
    b = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)[:, None, None]
    t = tl.arange(0, TP)[None, :, None]
    d = tl.arange(0, BD)[None, None, :]
    row = b < B
    cell = row & (t < T)
    begin, end = _native_range(offset_ptr, t, T, STATIC)
    logit_row = logit_ptr + b * logit_b + t.to(tl.int64) * logit_t
    da_row = da_ptr + b * dlogit_b + t * dlogit_t
    lse = tl.zeros([BB, TP, 1], tl.float32)
    inverse = tl.zeros([BB, TP, 1], tl.float32)
    if LOGITS and (NEED_H or NEED_L):
        # exp(logit - lse) sums to 1 up to the rounding of lse, which for logits of 1e4 is 5e-4; so divide by the sum.
        lse = tl.load(lse_ptr + b * T + t, mask=cell, other=0)
        for e0 in range(0, E, BE):
            e = e0 + tl.arange(0, BE)[None, None, :]
            allowed, column = _routes(map_ptr, t, e, T, E, MAP)
            logit = tl.load(logit_row + column, mask=allowed & row, other=float("-inf")).to(tl.float32)
            inverse += tl.sum(tl.where(allowed, tl.exp(logit - lse), 0.0), 2, keep_dims=True)
        inverse = 1.0 / inverse

    g_row = g_ptr + b * g_b + t.to(tl.int64) * g_t + d
    h_row = h_ptr + b * h_b + d
    dh_row = dh_ptr + b * E * D + d
    if ONE:
        g = tl.load(g_row, mask=cell & (d < D), other=0).to(tl.float32)
    for e in range(0, E):
        allowed, column = _routes(map_ptr, t, e, T, E, MAP)
        p = tl.zeros([BB, TP, 1], tl.float32)
        if LOGITS and NEED_H:
            logit = tl.load(logit_row + column, mask=allowed & row, other=float("-inf")).to(tl.float32)
            p = tl.where(allowed, tl.exp(logit - lse) * inverse, 0.0)
        a = p
        if NEED_H and STATIC != 0:
            a += _static(static_ptr, static_t, t, e, column, allowed, begin, end, STATIC)
        used = row
        if MAP != 0:
            used = row & (tl.max(allowed.to(tl.int32), 1, keep_dims=True) != 0)
        da = tl.zeros([BB, TP, 1], tl.float32)
        for d0 in range(0, BD if ONE else D, BD):
            inside = d0 + d < D
            if not ONE:
                g = tl.load(g_row + d0, mask=cell & inside, other=0).to(tl.float32)
            if NEED_L or NEED_S:
                h = tl.load(h_row + d0, mask=used & inside, other=0).to(tl.float32)
                da += tl.sum(g * h, 2, keep_dims=True)
            if NEED_H:
                share = a * g
                if MAP != 0:
                    share = tl.where(allowed, share, 0.0)
                dh = tl.sum(share, 1, keep_dims=True)
                tl.store(dh_row + d0, dh.to(dh_ptr.dtype.element_ty), mask=row & inside)
        if NEED_L:
            tl.store(da_row + column, da, mask=cell & allowed)
        if NEED_S:
            share = tl.sum(tl.where(allowed & row, da, 0.0), 0, keep_dims=True)
            partial = partial_ptr + tl.program_id(0).to(tl.int64) * partial_b
            if STATIC == 1:
                place = (t < T) & (column >= 0)
                tl.store(partial + t * static_t + column, share, mask=place)
            else:
                tl.store(partial + e + 0 * t, share, mask=(e >= begin) & (e < end))
        h_row += h_e
        dh_row += D

    if NEED_L:
        tl.debug_barrier()  # dA of one cell is stored by one thread and read back by another
        delta = tl.zeros([BB, TP, 1], tl.float32)
        for e0 in range(0, E, BE):
            es = e0 + tl.arange(0, BE)[None, None, :]
            allowed, column = _routes(map_ptr, t, es, T, E, MAP)
            logit = tl.load(logit_row + column, mask=allowed & row, other=float("-inf")).to(tl.float32)
            da = tl.load(da_row + column, mask=allowed & row, other=0)
            delta += tl.sum(tl.where(allowed, tl.exp(logit - lse) * inverse * da, 0.0), 2, keep_dims=True)
        tl.debug_barrier()  # da may be dlogits: no thread writes there before all have read
        if G_LSE:
            delta -= tl.load(g_lse_ptr + b * T + t, mask=cell, other=0).to(tl.float32)
        dlogit_row = dlogit_ptr + b * dlogit_b + t * dlogit_t
        for e0 in range(0, E, BE):
            es = e0 + tl.arange(0, BE)[None, None, :]
            allowed, column = _routes(map_ptr, t, es, T, E, MAP)
            logit = tl.load(logit_row + column, mask=allowed & row, other=float("-inf")).to(tl.float32)
            da = tl.load(da_row + column, mask=allowed & row, other=0)
            dlogit = tl.where(allowed, tl.exp(logit - lse) * inverse * (da - delta), 0.0)
            place = cell & (es < E) & (column >= 0)
            tl.store(dlogit_row + column, dlogit.to(dlogit_ptr.dtype.element_ty), mask=place)


INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)


class _Call:
    """The arguments of a call as the kernels take them."""

    def __init__(
        self,
        experts: Tensor,
        logits: Tensor | None,
        static: Tensor | None,
        mask: Tensor | None,
        columns: Tensor | None,
        native: Sequence[int] | None,
    ) -> None:
        ok, reason = supports(experts.device.type, experts.dtype, INTERPRETED)
        if not ok:
            raise ValueError(f"experts cannot be mixed by Triton: {reason}")
        self.experts = rows_contiguous(experts)
        self.batch, self.num_experts, self.width = experts.shape
        self.logits = None if logits is None else rows_contiguous(logits)
        self.static = None if static is None else static.contiguous()
        self.channels = static is not None and static.dim() == 3
        source = next(x for x in (columns, mask, static) if x is not None) if logits is None else logits
        self.num_rows = columns.shape[0] if columns is not None else source.shape[0 if logits is None else 1]
        # A kernel takes a pointer for every argument; where there is nothing to point at, it gets this one, unread.
        none = self.experts
        self.map_kind, self.map = MAP_NONE, none
        if columns is not None:
            self.map_kind, self.map = MAP_COLUMNS, columns.contiguous()
        elif mask is not None:
            self.map_kind, self.map = MAP_MASK, mask.contiguous().view(torch.uint8)
        self.static_kind, self.offsets = STATIC_NONE, none
        if native is not None:
            self.static_kind = STATIC_ONES if static is None else STATIC_NATIVE
            self.offsets = offsets(native, experts.device)
        elif static is not None:
            self.static_kind = STATIC_TABLE
        packed = columns is not None
        self.static_row = 0 if packed else self.num_experts
        self.logit_strides = (0, 0)
        if logits is not None:
            self.logit_strides = (self.logits.stride(0), 0 if packed else self.logits.stride(1))
        self.tile = pick_mix(self.num_rows, self.num_experts, self.width, experts.element_size())
        self.tasks = power_of_two(self.num_rows)

    def pointers(self) -> tuple[Tensor, ...]:
        def given(tensor: Tensor | None) -> Tensor:
            return self.experts if tensor is None else tensor

        return self.experts, given(self.logits), given(self.static), self.map, self.offsets

    def sizes(self) -> tuple[int, int, int, int]:
        return self.batch, self.num_rows, self.num_experts, self.width


def mix(
    experts: Tensor,
    logits: Tensor | None,
    static: Tensor | None,
    mask: Tensor | None,
    columns: Tensor | None,
    native: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    """``O[b,t,:] = sum_e (softmax(logits) + static)[b,t,e] H[b,e,:]``.

    Args:
        experts: H [B,E,D], float32, bfloat16 or float16, any strides.
        logits: [B,T,E], or packed [B,R] with columns, or None.
        static: [T,E]; packed [R] with columns; [T,E,D] without logits; native weights with native; or None.
        mask: [T,E] bool, True = may use.
        columns: [T,E] int32, the column of packed logits and static, -1 = may not use.
        native: experts of each unit; row t is unit t and has static weights for its own experts, 1 without static.

    Returns:
        out [B,T,D] in experts' dtype, lse [B,T] float32 (empty without logits).
    """
    call = _Call(experts, logits, static, mask, columns, native)
    if call.channels:
        return mix_channels.mix(call.experts, call.static), call.experts.new_empty(0, dtype=torch.float32)
    batch, num_rows, num_experts, width = call.sizes()
    tile = call.tile
    out = torch.empty((batch, num_rows, width), dtype=experts.dtype, device=experts.device)
    lse_shape = (0,) if logits is None else (batch, num_rows)
    lse = torch.empty(lse_shape, dtype=torch.float32, device=experts.device)
    if out.numel() + lse.numel() == 0:
        return out, lse
    grid = (cdiv(batch, tile.rows), max(1, cdiv(width, tile.width)))
    with on_device(experts):
        forward_kernel[grid](
            *call.pointers(), out, lse, *call.sizes(), *call.experts.stride()[:2], *call.logit_strides,
            call.static_row, LOGITS=logits is not None, STATIC=call.static_kind, MAP=call.map_kind,
            BB=tile.rows, TP=call.tasks, BE=tile.experts, BD=tile.width, UNROLL=tile.unroll, num_warps=tile.warps,
        )  # fmt: skip
    return out, lse


def mix_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    experts: Tensor,
    logits: Tensor | None,
    static: Tensor | None,
    mask: Tensor | None,
    columns: Tensor | None,
    native: Sequence[int] | None,
    lse: Tensor,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`mix`. ``dA = <grad, H>``, ``dlogits = P (dA - sum_e P dA + grad_lse)``, dstatic sums dA.

    Args:
        grad: [B,T,D], any strides; grad_lse: [B,T] or None. The rest as given to and returned by :func:`mix`.
        needs: bits 1 dexperts, 2 dlogits, 4 dstatic.

    Returns:
        dexperts, dlogits, dstatic, each like its argument; one that is not needed has shape [0].
    """
    call = _Call(experts, logits, static, mask, columns, native)
    batch, num_rows, num_experts, width = call.sizes()
    device, tile = experts.device, call.tile
    need_h = bool(needs & 1)
    need_l = bool(needs & 2) and logits is not None
    need_s = bool(needs & 4) and static is not None
    nothing = torch.empty(0, dtype=experts.dtype, device=device)
    dexperts = torch.empty(experts.shape, dtype=experts.dtype, device=device) if need_h else nothing
    if call.channels:
        dstatic = mix_channels.mix_backward(grad, call.experts, call.static, dexperts, need_h, need_s)
        return dexperts, nothing, dstatic

    packed = columns is not None
    # Packed columns that no pair (t,e) uses are not reached by the kernel.
    new = torch.zeros if packed else torch.empty
    dlogits = new(logits.shape, dtype=logits.dtype, device=device) if need_l else nothing
    da = dlogits
    if need_l and logits.dtype != torch.float32:
        da = torch.empty(logits.shape, dtype=torch.float32, device=device)
    programs = cdiv(batch, tile.rows)
    partial = new((programs, static.numel()), dtype=torch.float32, device=device) if need_s else nothing
    if num_rows == 0 and need_h:
        dexperts.zero_()
    if batch and num_experts and num_rows and needs:
        grad = rows_contiguous(grad)
        # da and dlogits are contiguous: [B,T,E], or [B,R] without a stride over t.
        dlogit_strides = (dlogits.shape[1], 0) if packed and need_l else (num_rows * num_experts, num_experts)
        with on_device(experts):
            backward_kernel[(programs,)](
                grad, nothing if grad_lse is None else grad_lse.contiguous(), *call.pointers(), lse.contiguous(),
                dexperts, da, dlogits, partial, *call.sizes(),
                *grad.stride()[:2], *call.experts.stride()[:2], *call.logit_strides, *dlogit_strides, call.static_row,
                partial.shape[-1],
                LOGITS=logits is not None, STATIC=call.static_kind, MAP=call.map_kind, G_LSE=grad_lse is not None,
                NEED_H=need_h, NEED_L=need_l, NEED_S=need_s, ONE=width <= tile.width,
                BB=tile.rows, TP=call.tasks, BE=tile.experts, BD=tile.width, num_warps=tile.warps,
            )  # fmt: skip
    dstatic = partial.sum(0).to(static.dtype).reshape(static.shape) if need_s else nothing
    return dexperts, dlogits, dstatic
