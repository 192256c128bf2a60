"""mix by a static weight a channel, ``O[b,t,d] = sum_e S[t,e,d] H[b,e,d]``: the channel-wise cross-stitch unit."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import cdiv, on_device, pick_mix, power_of_two, rows_contiguous

_CHUNKS = 32  # partial sums of dstatic: with the tiles of D and the experts enough to fill a GPU


@triton.jit(do_not_specialize=["B"])
def channel_forward_kernel(
    h_ptr, static_ptr, out_ptr, B, T, E, D, h_b, h_e,
    BB: tl.constexpr, TP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out[b,t,d] = sum_e static[t,e,d] h[b,e,d]; grid (tiles of B, tiles of D)."""
    b = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)[:, None, None]
    t = tl.arange(0, TP)[None, :, None].to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)[None, None, :]
    acc = tl.zeros([BB, TP, BD], tl.float32)
    h_row = h_ptr + b * h_b + d
    static_row = static_ptr + t * E * D + d
    for _ in range(0, E):
        h = tl.load(h_row, mask=(b < B) & (d < D), other=0).to(tl.float32)
        acc += tl.load(static_row, mask=(t < T) & (d < D), other=0).to(tl.float32) * h
        h_row += h_e
        static_row += D
    tl.store(out_ptr + (b * T + t) * D + d, acc.to(out_ptr.dtype.element_ty), mask=(b < B) & (t < T) & (d < D))


@triton.jit(do_not_specialize=["B", "steps"])
def channel_backward_kernel(
    g_ptr, h_ptr, static_ptr, dh_ptr, partial_ptr, B, T, E, D, g_b, g_t, h_b, h_e, steps,
    NEED_H: tl.constexpr, NEED_S: tl.constexpr, BB: tl.constexpr, TP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dh of one expert and `steps` tiles of rows, and their share of dstatic; grid (chunks of B, tiles of D, E)."""
    chunk = tl.program_id(0).to(tl.int64)
    e = tl.program_id(2).to(tl.int64)
    t = tl.arange(0, TP)[None, :, None].to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)[None, None, :]
    weights = (t * E + e) * D + d
    inside = (t < T) & (d < D)
    static = tl.load(static_ptr + weights, mask=inside, other=0).to(tl.float32)
    acc = tl.zeros([1, TP, BD], tl.float32)
    for step in range(0, steps):
        b = (chunk * steps + step) * BB + tl.arange(0, BB)[:, None, None]
        here = (b < B) & (d < D)
        g = tl.load(g_ptr + b * g_b + t * g_t + d, mask=(b < B) & inside, other=0).to(tl.float32)
        if NEED_H:
            dh = tl.sum(static * g, 1, keep_dims=True)
            tl.store(dh_ptr + (b * E + e) * D + d, dh.to(dh_ptr.dtype.element_ty), mask=here)
        if NEED_S:
            h = tl.load(h_ptr + b * h_b + e * h_e + d, mask=here, other=0).to(tl.float32)
            acc += tl.sum(g * h, 0, keep_dims=True)
    if NEED_S:
        tl.store(partial_ptr + chunk * T * E * D + weights, acc, mask=inside)


def mix(experts: Tensor, static: Tensor) -> Tensor:
    """experts [B,E,D], contiguous in D; static [T,E,D], contiguous -> [B,T,D]."""
    batch, num_experts, width = experts.shape
    num_rows = static.shape[0]
    tile = pick_mix(num_rows, num_experts, width, experts.element_size())
    out = torch.empty((batch, num_rows, width), dtype=experts.dtype, device=experts.device)
    if out.numel():
        with on_device(experts):
            channel_forward_kernel[cdiv(batch, tile.rows), cdiv(width, tile.width)](
                experts, static, out, batch, num_rows, num_experts, width, *experts.stride()[:2],
                BB=tile.rows, TP=power_of_two(num_rows), BD=tile.width, num_warps=tile.warps,
            )  # fmt: skip
    return out


def mix_backward(grad: Tensor, experts: Tensor, static: Tensor, dexperts: Tensor, need_h: bool, need_s: bool) -> Tensor:
    """Fills dexperts [B,E,D] if needed and returns dstatic [T,E,D], or an empty tensor; grad [B,T,D]."""
    batch, num_experts, width = experts.shape
    num_rows = static.shape[0]
    tile = pick_mix(num_rows, num_experts, width, experts.element_size())
    if num_rows == 0 and need_h:
        dexperts.zero_()
    tiles = cdiv(batch, tile.rows)
    steps = max(1, cdiv(tiles, _CHUNKS))
    chunks = cdiv(tiles, steps)
    partial = torch.empty((chunks, *static.shape) if need_s else 0, dtype=torch.float32, device=grad.device)
    grad = rows_contiguous(grad)
    if batch and static.numel() and (need_h or need_s):
        with on_device(grad):
            channel_backward_kernel[chunks, cdiv(width, tile.width), num_experts](
                grad, experts, static, dexperts, partial, batch, num_rows, num_experts, width,
                *grad.stride()[:2], *experts.stride()[:2], steps,
                NEED_H=need_h, NEED_S=need_s, BB=tile.rows, TP=power_of_two(num_rows), BD=tile.width,
                num_warps=tile.warps,
            )  # fmt: skip
    return partial.sum(0).to(static.dtype) if need_s else partial.to(static.dtype)
