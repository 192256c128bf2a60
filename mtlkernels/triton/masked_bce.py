"""masked_bce in Triton: the masks' sums, then loss and gradient of every number in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import cdiv, on_device
from .losses import checked, logistic, pick_loss, positive, readable, scale


@triton.jit(do_not_specialize=["B"])
def mask_sum_kernel(mask_ptr, partial_ptr, B, T, BB: tl.constexpr, BT: tl.constexpr):
    """partial [tiles of B, T]. A weight that is negative or NaN makes its task's sum, and all that follows, NaN."""
    row = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)[:, None]
    task = tl.program_id(1) * BT + tl.arange(0, BT)[None, :]
    w = tl.load(mask_ptr + row * T + task, mask=(row < B) & (task < T), other=0).to(tl.float32)
    total = tl.sum(tl.where(w >= 0, w, float("nan")), 0, keep_dims=True)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * T + task, total, mask=task < T)


@triton.jit(do_not_specialize=["B"])
def bce_kernel(
    x_ptr, y_ptr, mask_ptr, total_ptr, dx_ptr, partial_ptr, B, T,
    MASK: tl.constexpr, BB: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)[:, None]
    task = tl.program_id(1) * BT + tl.arange(0, BT)[None, :]
    here = (row < B) & (task < T)
    at = row * T + task
    if MASK:
        w = tl.load(mask_ptr + at, mask=here, other=0).to(tl.float32)
        used = w != 0
        total = tl.load(total_ptr + task, mask=task < T, other=1)
        # A sum beyond the number range is NaN: a share of infinity would be a wrong 0.
        share = tl.where(used, w / tl.where(total == float("inf"), float("nan"), total), 0.0)
    else:
        used = here
        share = tl.where(here, 1.0 / B, 0.0)
    x = tl.load(x_ptr + at, mask=used, other=0).to(tl.float32)
    y = checked(tl.load(y_ptr + at, mask=used, other=0).to(tl.float32))
    plus, minus, tail = logistic(x)
    loss = share * (positive(x) - x * y + tail)
    tl.store(dx_ptr + at, share * ((1 - y) * plus - y * minus), mask=here)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * T + task, tl.sum(loss, 0, keep_dims=True), mask=task < T)


def masked_bce(logits: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """``loss_t = sum_b mask[b,t] bce(logits[b,t], labels[b,t]) / sum_b mask[b,t]``, 0 for a task whose mask is all 0.

    All [B,T]; logits float32, bfloat16 or float16, labels and mask of any dtype the public function lets through. A
    label that does not fit becomes NaN. Returns the loss [T] and its derivative by the logits, float32.
    """
    batch, num_tasks = logits.shape
    device = logits.device
    dlogits = torch.empty((batch, num_tasks), dtype=torch.float32, device=device)
    tile = pick_loss(num_tasks)
    grid = (cdiv(batch, tile.rows), cdiv(num_tasks, tile.tasks))
    partial = torch.empty((grid[0], num_tasks), dtype=torch.float32, device=device)
    size = dict(BB=tile.rows, BT=tile.tasks, num_warps=tile.warps)
    if dlogits.numel():
        mask = None if mask is None else readable(mask)
        with on_device(logits):
            total = partial
            if mask is not None:
                mask_sum_kernel[grid](mask, partial, batch, num_tasks, **size)
                total = partial.sum(0, dtype=torch.float64).to(torch.float32)
            bce_kernel[grid](
                logits.contiguous(), readable(labels), logits if mask is None else mask, total, dlogits, partial,
                batch, num_tasks, MASK=mask is not None, **size,
            )  # fmt: skip
    return partial.sum(0, dtype=torch.float64).to(torch.float32), dlogits


def masked_bce_backward(grad: Tensor, dlogits: Tensor) -> Tensor:
    """Gradient of the logits: grad [T] times what :func:`masked_bce` saved."""
    return scale(grad, dlogits)
