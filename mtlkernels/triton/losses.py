"""What the losses share in Triton: one row's mathematics, tiles of [B,T], and the gradient scaled from above."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import cdiv, on_device, power_of_two


class LossTile(NamedTuple):
    """Rows and tasks of a tile, and warps."""

    rows: int
    tasks: int
    warps: int


def pick_loss(num_tasks: int) -> LossTile:
    """Tiles of 1024 numbers, 8 a thread: enough in flight to hide memory's latency, few enough for the registers."""
    tasks = min(power_of_two(num_tasks), 64)
    return LossTile(1024 // tasks, tasks, 4)


@triton.jit
def logistic(x):
    """sigmoid(x), sigmoid(-x) and log(1 + exp(-|x|)), all to full relative precision; no exponent is positive."""
    e = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + e)
    small = e * large
    # log(1 + e) as 2 atanh(e / (2 + e)), e in [0,1]: log itself would lose a small e.
    s = e / (2.0 + e)
    z = s * s
    p = 0.134257490114
    p = p * z + 0.141183099027
    p = p * z + 0.200037803225
    p = p * z + 0.333333201683
    tail = 2.0 * s * (z * p) + 2.0 * s
    return tl.where(x < 0, small, large), tl.where(x < 0, large, small), tail


@triton.jit
def positive(x):
    return tl.where(x > 0, x, 0.0)


@triton.jit
def checked(label):
    """The label, or NaN where it lies outside [0,1]."""
    return tl.where((label >= 0) & (label <= 1), label, float("nan"))


@triton.jit(do_not_specialize=["B"])
def scale_kernel(grad_ptr, from_ptr, to_ptr, B, T, BB: tl.constexpr, BT: tl.constexpr):
    """to = grad * from, grad [T]. Where from is 0 so is to: what comes from above a masked number may be infinite."""
    row = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)[:, None]
    task = tl.program_id(1) * BT + tl.arange(0, BT)[None, :]
    here = (row < B) & (task < T)
    value = tl.load(from_ptr + row * T + task, mask=here, other=0)
    grad = tl.load(grad_ptr + task, mask=task < T, other=0)
    tl.store(to_ptr + row * T + task, tl.where(value == 0, 0.0, grad * value), mask=here)


def scale(grad: Tensor, saved: Tensor) -> Tensor:
    """``grad * saved``, grad [T] or a scalar, saved [B,T] or [B], float32."""
    saved = saved.contiguous()
    out = torch.empty_like(saved)
    num_tasks = saved.shape[1] if saved.dim() == 2 else 1
    if out.numel():
        tile = pick_loss(num_tasks)
        batch = saved.shape[0]
        grid = (cdiv(batch, tile.rows), cdiv(num_tasks, tile.tasks))
        with on_device(saved):
            scale_kernel[grid](
                grad.contiguous(), saved, out, batch, num_tasks, BB=tile.rows, BT=tile.tasks, num_warps=tile.warps
            )
    return out


def readable(target: Tensor) -> Tensor:
    """The labels or mask densely; bool as bytes, which every kernel can load."""
    target = target.contiguous()
    return target.view(torch.uint8) if target.dtype == torch.bool else target
