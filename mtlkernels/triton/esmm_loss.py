"""esmm_loss in Triton: loss and both gradients of every row in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import cdiv, on_device
from .losses import checked, logistic, pick_loss, positive, readable, scale


@triton.jit(do_not_specialize=["B"])
def esmm_kernel(a_ptr, c_ptr, y_ptr, z_ptr, da_ptr, dc_ptr, partial_ptr, weight, B, BB: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    here = row < B
    a = tl.load(a_ptr + row, mask=here, other=0).to(tl.float32)
    c = tl.load(c_ptr + row, mask=here, other=0).to(tl.float32)
    y = checked(tl.load(y_ptr + row, mask=here, other=0).to(tl.float32))
    z = checked(tl.load(z_ptr + row, mask=here, other=0).to(tl.float32))
    y = tl.where((z > 0) & (y == 0), float("nan"), y)
    w = y * z
    a_plus, a_minus, a_tail = logistic(a)
    c_plus, c_minus, c_tail = logistic(c)
    softplus_a = positive(a) + a_tail
    softplus_c = positive(c) + c_tail
    minus_log_a = positive(-a) + a_tail
    minus_log_c = positive(-c) + c_tail
    # 1 - pCTCVR: no click, or a click without conversion. share: of the first; q: the logarithm of their sum.
    share, other, tail = logistic(positive(c) - a + c_tail)
    q = -positive(-(tl.maximum(-softplus_a, -(minus_log_a + softplus_c)) + tail))
    ctcvr = w * (minus_log_a + minus_log_c) - (1 - w) * q
    loss = positive(a) - a * y + a_tail + weight * ctcvr
    da = (1 - y) * a_plus - y * a_minus + weight * ((1 - w) * (a_plus * c_plus * share) - w * a_minus)
    dc = weight * ((1 - w) * (c_plus * other) - w * c_minus)
    tl.store(da_ptr + row, da / B, mask=here)
    tl.store(dc_ptr + row, dc / B, mask=here)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.where(here, loss, 0.0), 0) / B)


def esmm_loss(
    ctr_logit: Tensor, cvr_logit: Tensor, click: Tensor, conversion: Tensor, ctcvr_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over rows of the click's cross entropy and, times ``ctcvr_weight``, that of click and conversion.

    All [B]; logits float32, bfloat16 or float16, labels of any dtype the public function lets through. A row whose
    labels do not fit becomes NaN. Returns the loss and its derivatives by both logits, float32.
    """
    batch = ctr_logit.shape[0]
    dctr = torch.empty(batch, dtype=torch.float32, device=ctr_logit.device)
    dcvr = torch.empty_like(dctr)
    tile = pick_loss(1)
    partial = torch.empty(cdiv(batch, tile.rows), dtype=torch.float32, device=ctr_logit.device)
    if batch:
        with on_device(ctr_logit):
            esmm_kernel[(partial.shape[0],)](
                ctr_logit.contiguous(), cvr_logit.contiguous(), readable(click), readable(conversion),
                dctr, dcvr, partial, float(ctcvr_weight), batch, BB=tile.rows, num_warps=tile.warps,
            )  # fmt: skip
    return partial.sum(dtype=torch.float64).to(torch.float32), dctr, dcvr


def esmm_loss_backward(grad: Tensor, dctr: Tensor, dcvr: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the logits: grad (a scalar) times what :func:`esmm_loss` saved."""
    return scale(grad, dctr), scale(grad, dcvr)
