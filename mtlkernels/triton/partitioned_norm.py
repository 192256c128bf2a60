"""partitioned_norm in Triton: rows grouped by domain, so that a program works on rows of one domain.

A stable sort of the ids groups the rows; nothing goes back to the host. Bucket 0 holds rows with a negative id, bucket
p + 1 those of domain p, and the last one those with an id of P or more. A bucket's rows are cut into chunks of R, and
chunk k of bucket q gets slot ``begin[q] // R + q + k``: no two chunks share one, there are at most B // R + P + 2, and
so the grid needs no counts. Partial results take memory a slot, not a block and domain.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import cdiv, on_device, power_of_two, rows_contiguous, supports

_SLOTS = 256  # chunks that a large batch is cut into: enough to fill a GPU, few enough to merge in one program
_MERGED = 32  # chunks that the merge takes at a time


class NormConfig(NamedTuple):
    """Tile of the kernels: rows of one domain, or rows that each bring their own coefficients; columns, warps."""

    rows: int
    loose_rows: int
    width: int
    warps: int


def pick_norm(width: int, itemsize: int) -> NormConfig:
    """Tile for rows of `width` elements of `itemsize` bytes: 4096 numbers, of a row 512 bytes."""
    columns = min(power_of_two(width), 512 // itemsize)
    rows = min(4096 // columns, 128)
    return NormConfig(rows, rows // 4, columns, 4)


@triton.jit(do_not_specialize=["B", "P", "steps"])
def bounds_kernel(id_ptr, bound_ptr, B, P, steps, BLOCK: tl.constexpr):
    """bound[q], where bucket q begins among the sorted ids; bound[P + 2] = B."""
    q = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros([BLOCK], tl.int64)
    high = tl.zeros([BLOCK], tl.int64) + B
    for _ in range(0, steps):
        middle = (low + high) // 2
        open_ = low < high
        less = tl.load(id_ptr + middle, mask=open_, other=0) < q - 1
        low = tl.where(open_ & less, middle + 1, low)
        high = tl.where(open_ & (less == 0), middle, high)
    low = tl.where(q == 0, 0, tl.where(q == P + 2, B, low))
    tl.store(bound_ptr + q, low, mask=q < P + 3)


@triton.jit
def _chunk(bound_ptr, P, R, steps):
    """The bucket of this program's slot, the chunk's rows [start, stop), and all of the bucket's [begin, end)."""
    slot = tl.program_id(0).to(tl.int64)
    low = slot * 0
    high = low + P + 1
    for _ in range(0, steps):  # the last bucket whose first slot is not beyond this one
        middle = (low + high + 1) // 2
        here = tl.load(bound_ptr + middle) // R + middle <= slot
        low = tl.where(here, middle, low)
        high = tl.where(here, high, middle - 1)
    begin = tl.load(bound_ptr + low)
    end = tl.load(bound_ptr + low + 1)
    start = begin + (slot - begin // R - low) * R
    stop = tl.minimum(start + R, end)
    return slot, low, start, stop, begin, end


@triton.jit
def _table(ptr, p, d, D, live):
    """Numbers of a [P,D] tensor for the domain or domains p, in float32."""
    return tl.load(ptr + p * D + d, mask=live, other=0).to(tl.float32)


@triton.jit(do_not_specialize=["P", "R", "search", "steps"])
def statistics_kernel(
    x_ptr, order_ptr, bound_ptr, partial_ptr, P, D, x_b, R, search, steps, BR: tl.constexpr, BD: tl.constexpr
):
    """Of each chunk: the mean of x minus the domain's first row, and the sum of squares about that mean."""
    slot, bucket, start, stop, begin, end = _chunk(bound_ptr, P, R, search)
    if (start < stop) & (bucket > 0) & (bucket <= P) & (end - begin >= 2):
        d = tl.program_id(1) * BD + tl.arange(0, BD)[None, :]
        # Beside a large common offset, differences keep the digits that sums of the numbers themselves would lose.
        shift = tl.load(x_ptr + tl.load(order_ptr + begin) * x_b + d, mask=d < D, other=0).to(tl.float32)
        mean = tl.zeros([1, BD], tl.float32)
        squares = tl.zeros([1, BD], tl.float32)
        for step in range(0, steps):
            i = start + step * BR + tl.arange(0, BR)[:, None]
            row = tl.load(order_ptr + i, mask=i < stop, other=0)
            live = (i < stop) & (d < D)
            x = tl.load(x_ptr + row * x_b + d, mask=live, other=0).to(tl.float32)
            x = tl.where(live, x - shift, 0.0)
            before = tl.minimum(stop - start, step * BR).to(tl.float32)
            count = tl.maximum(tl.minimum(stop - start - step * BR, BR), 0).to(tl.float32)
            tile_mean = tl.sum(x, 0, keep_dims=True) / tl.maximum(count, 1.0)
            x = tl.where(live, x - tile_mean, 0.0)
            # The merge of Chan, Golub and LeVeque (1979).
            share = count / tl.maximum(before + count, 1.0)
            delta = tile_mean - mean
            mean += delta * share
            squares += tl.sum(x * x, 0, keep_dims=True) + delta * delta * (before * share)
        partial = partial_ptr + slot * 2 * D + d
        tl.store(partial, mean, mask=d < D)
        tl.store(partial + D, squares, mask=d < D)


@triton.jit(do_not_specialize=["R"])
def merge_kernel(
    x_ptr, order_ptr, bound_ptr, partial_ptr, running_mean_ptr, running_var_ptr, mean_ptr, var_ptr, count_ptr,
    D, x_b, R, TRAINING: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The statistics that serve each domain: of its chunks, or the running ones."""
    p = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)[None, :]
    count = p * 0
    begin = p * 0
    if TRAINING:
        begin = tl.load(bound_ptr + p + 1)
        count = tl.load(bound_ptr + p + 2) - begin
    if count >= 2:
        n = count.to(tl.float32)
        partial = partial_ptr + (begin // R + p + 1) * 2 * D + d
        chunks = (count + R - 1) // R
        mean = tl.zeros([1, BD], tl.float32)
        for c0 in range(0, chunks, BC):
            c = c0 + tl.arange(0, BC)[:, None]
            rows = tl.minimum(count - c * R, R).to(tl.float32)
            m = tl.load(partial + c * 2 * D, mask=(c < chunks) & (d < D), other=0)
            mean += tl.sum(m * (rows / n), 0, keep_dims=True)
        squares = tl.zeros([1, BD], tl.float32)
        for c0 in range(0, chunks, BC):
            c = c0 + tl.arange(0, BC)[:, None]
            live = (c < chunks) & (d < D)
            rows = tl.minimum(count - c * R, R).to(tl.float32)
            m = tl.load(partial + c * 2 * D, mask=live, other=0) - mean
            s = tl.load(partial + c * 2 * D + D, mask=live, other=0)
            squares += tl.sum(tl.where(live, s + m * m * rows, 0.0), 0, keep_dims=True)
        shift = tl.load(x_ptr + tl.load(order_ptr + begin) * x_b + d, mask=d < D, other=0).to(tl.float32)
        mean += shift
        var = squares / n
    else:
        mean = _table(running_mean_ptr, p, d, D, d < D)
        var = _table(running_var_ptr, p, d, D, d < D)
    tl.store(mean_ptr + p * D + d, mean, mask=d < D)
    tl.store(var_ptr + p * D + d, var, mask=d < D)
    if tl.program_id(1) == 0:
        tl.store(count_ptr + p, count)


@triton.jit(do_not_specialize=["B", "P", "R", "search", "steps"])
def forward_kernel(
    x_ptr, domain_ptr, order_ptr, bound_ptr, weight_ptr, bias_ptr, own_weight_ptr, own_bias_ptr, mean_ptr, var_ptr,
    out_ptr, B, P, D, x_b, R, search, steps, EPS: tl.constexpr, GROUPED: tl.constexpr, BR: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """y; a chunk of one domain a program, or, not GROUPED, rows as they come, each with its own domain."""
    d = tl.program_id(1) * BD + tl.arange(0, BD)[None, :]
    if GROUPED:
        _, bucket, start, stop, _, _ = _chunk(bound_ptr, P, R, search)
        p = bucket - 1 + tl.zeros([1, 1], tl.int64)
    else:
        start = tl.program_id(0).to(tl.int64) * BR
        stop = tl.minimum(start + BR, B)
        i = start + tl.arange(0, BR)[:, None]
        p = tl.load(domain_ptr + i, mask=i < stop, other=-1).to(tl.int64)
    known = (p >= 0) & (p < P)
    inside = known & (d < D)
    mean = _table(mean_ptr, p, d, D, inside)
    scale = 1.0 / tl.sqrt(_table(var_ptr, p, d, D, inside) + EPS)
    scale *= _table(weight_ptr, 0, d, D, d < D) * _table(own_weight_ptr, p, d, D, inside)
    move = _table(bias_ptr, 0, d, D, d < D) + _table(own_bias_ptr, p, d, D, inside)
    for step in range(0, steps):
        i = start + step * BR + tl.arange(0, BR)[:, None]
        row = i
        if GROUPED:
            row = tl.load(order_ptr + i, mask=i < stop, other=0)
        live = (i < stop) & (d < D)
        x = tl.load(x_ptr + row * x_b + d, mask=live, other=0).to(tl.float32)
        y = tl.where(known, (x - mean) * scale + move, float("nan"))
        tl.store(out_ptr + row * D + d, y.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["P", "R", "search", "steps"])
def sums_kernel(
    g_ptr, x_ptr, order_ptr, bound_ptr, mean_ptr, partial_ptr, P, D, g_b, x_b, R, search, steps,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Of each chunk: the sums of grad and of grad * (x - mean)."""
    slot, bucket, start, stop, _, _ = _chunk(bound_ptr, P, R, search)
    if (start < stop) & (bucket > 0) & (bucket <= P):
        d = tl.program_id(1) * BD + tl.arange(0, BD)[None, :]
        mean = _table(mean_ptr, bucket - 1, d, D, d < D)
        total = tl.zeros([1, BD], tl.float32)
        product = tl.zeros([1, BD], tl.float32)
        for step in range(0, steps):
            i = start + step * BR + tl.arange(0, BR)[:, None]
            row = tl.load(order_ptr + i, mask=i < stop, other=0)
            live = (i < stop) & (d < D)
            g = tl.load(g_ptr + row * g_b + d, mask=live, other=0).to(tl.float32)
            x = tl.load(x_ptr + row * x_b + d, mask=live, other=0).to(tl.float32)
            total += tl.sum(g, 0, keep_dims=True)
            product += tl.sum(tl.where(live, g * (x - mean), 0.0), 0, keep_dims=True)
        partial = partial_ptr + slot * 2 * D + d
        tl.store(partial, total, mask=d < D)
        tl.store(partial + D, product, mask=d < D)


@triton.jit(do_not_specialize=["R"])
def merge_sums_kernel(
    bound_ptr, partial_ptr, var_ptr, total_ptr, product_ptr, D, R,
    EPS: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Of each domain: the sums of grad and of grad * xhat."""
    p = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)[None, :]
    begin = tl.load(bound_ptr + p + 1)
    chunks = (tl.load(bound_ptr + p + 2) - begin + R - 1) // R
    partial = partial_ptr + (begin // R + p + 1) * 2 * D + d
    total = tl.zeros([1, BD], tl.float32)
    product = tl.zeros([1, BD], tl.float32)
    for c0 in range(0, chunks, BC):
        c = c0 + tl.arange(0, BC)[:, None]
        live = (c < chunks) & (d < D)
        total += tl.sum(tl.load(partial + c * 2 * D, mask=live, other=0), 0, keep_dims=True)
        product += tl.sum(tl.load(partial + c * 2 * D + D, mask=live, other=0), 0, keep_dims=True)
    rstd = 1.0 / tl.sqrt(_table(var_ptr, p, d, D, d < D) + EPS)
    tl.store(total_ptr + p * D + d, total, mask=d < D)
    # No rows, no product: an empty domain's statistics are not read into it.
    tl.store(product_ptr + p * D + d, tl.where(chunks > 0, product * rstd, 0.0), mask=d < D)


@triton.jit(do_not_specialize=["P", "R", "search", "steps"])
def backward_kernel(
    g_ptr, x_ptr, order_ptr, bound_ptr, weight_ptr, own_weight_ptr, mean_ptr, var_ptr, count_ptr, total_ptr,
    product_ptr, dx_ptr, P, D, g_b, x_b, R, search, steps,
    EPS: tl.constexpr, TRAINING: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dx = scale (grad - mean(grad) - xhat mean(grad xhat)); with constant statistics scale grad alone."""
    _, bucket, start, stop, _, _ = _chunk(bound_ptr, P, R, search)
    d = tl.program_id(1) * BD + tl.arange(0, BD)[None, :]
    p = bucket - 1
    inside = (p >= 0) & (p < P) & (d < D)
    mean = _table(mean_ptr, p, d, D, inside)
    slope = 1.0 / tl.sqrt(_table(var_ptr, p, d, D, inside) + EPS)
    # Rows of no domain: weight 0, and so gradient 0.
    scale = slope * _table(weight_ptr, 0, d, D, d < D) * _table(own_weight_ptr, p, d, D, inside)
    batch = False
    middle = tl.zeros([1, BD], tl.float32)
    if TRAINING:
        count = tl.load(count_ptr + p, mask=(p >= 0) & (p < P), other=0)
        batch = count >= 2
        n = tl.maximum(count, 1).to(tl.float32)
        slope *= _table(product_ptr, p, d, D, inside) / n
        middle = _table(total_ptr, p, d, D, inside) / n
    for step in range(0, steps):
        i = start + step * BR + tl.arange(0, BR)[:, None]
        row = tl.load(order_ptr + i, mask=i < stop, other=0)
        live = (i < stop) & (d < D)
        g = tl.load(g_ptr + row * g_b + d, mask=live, other=0).to(tl.float32)
        if TRAINING:
            x = tl.load(x_ptr + row * x_b + d, mask=live, other=0).to(tl.float32)
            g = tl.where(batch, g - middle - (x - mean) * slope, g)
        dx = tl.where(inside, scale * g, 0.0)
        tl.store(dx_ptr + row * D + d, dx.to(dx_ptr.dtype.element_ty), mask=live)


INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)


class _Call:
    """What a call's launches share: tiles, the grouping of rows, the grid."""

    def __init__(self, x: Tensor, domain: Tensor, num_domains: int, grouped: bool) -> None:
        ok, reason = supports(x.device.type, x.dtype, INTERPRETED)
        if not ok:
            raise ValueError(f"x cannot be normalised by Triton: {reason}")
        self.x = rows_contiguous(x)
        self.batch, self.width = x.shape
        self.num_domains = num_domains
        self.tile = pick_norm(self.width, x.element_size())
        self.columns = cdiv(self.width, self.tile.width)
        self.steps = max(1, cdiv(self.batch, self.tile.rows * _SLOTS)) if grouped else 1
        self.rows = self.tile.rows * self.steps
        self.slots = self.batch // self.rows + num_domains + 2
        self.search = (num_domains + 1).bit_length()
        self.order = self.bounds = domain
        if grouped and self.batch and self.width:
            ids, self.order = torch.sort(domain, stable=True)
            self.bounds = torch.empty(num_domains + 3, dtype=torch.int64, device=x.device)
            with on_device(x):
                bounds_kernel[(cdiv(num_domains + 3, 128),)](
                    ids, self.bounds, self.batch, num_domains, self.batch.bit_length(), BLOCK=128
                )

    def partials(self) -> Tensor:
        return torch.empty((self.slots, 2, self.width), dtype=torch.float32, device=self.x.device)

    def shape(self) -> dict[str, int]:
        return {"BR": self.tile.rows, "BD": self.tile.width, "num_warps": self.tile.warps}


def partitioned_norm(
    x: Tensor, domain: Tensor, weight: Tensor, bias: Tensor, domain_weight: Tensor, domain_bias: Tensor,
    running_mean: Tensor, running_var: Tensor, training: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``y = (w * w_p) * (x - mean_p) / sqrt(var_p + eps) + (b + b_p)``, p the row's domain.

    Args:
        x: [B,D], float32, bfloat16 or float16, any strides; domain: [B] int64 or int32.
        weight, bias: [D]; domain_weight, domain_bias, running_mean, running_var: [P,D]; any float dtype.

    Returns:
        y [B,D] in x's dtype; mean, var [P,D] float32, the statistics that served; count [P] int64, the rows they come
        from. A row whose id is outside [0, P) is NaN.
    """
    num_domains = domain_weight.shape[0]
    call = _Call(x, domain, num_domains, training)
    device, columns, width = x.device, call.columns, call.width
    out = torch.empty(x.shape, dtype=x.dtype, device=device)
    mean, var = (torch.empty((num_domains, width), dtype=torch.float32, device=device) for _ in range(2))
    count = torch.empty(num_domains, dtype=torch.int64, device=device)
    if out.numel() == 0:
        # Without columns the rows of a domain still count.
        ids = torch.arange(num_domains, device=device)[:, None]
        count.copy_((domain == ids).sum(1) if training else torch.zeros_like(count))
        return out, mean.copy_(running_mean), var.copy_(running_var), count
    shared = [t.contiguous() for t in (weight, bias, domain_weight, domain_bias)]
    partial = call.partials() if training else mean
    with on_device(x):
        if training:
            statistics_kernel[call.slots, columns](
                call.x, call.order, call.bounds, partial, num_domains, width, call.x.stride(0), call.rows, call.search,
                call.steps, **call.shape(),
            )  # fmt: skip
        merge_kernel[num_domains, columns](
            call.x, call.order, call.bounds, partial, running_mean.contiguous(), running_var.contiguous(), mean, var,
            count, width, call.x.stride(0), call.rows, TRAINING=training, BC=_MERGED, BD=call.tile.width,
            num_warps=call.tile.warps,
        )  # fmt: skip
        shape = call.shape() if training else {**call.shape(), "BR": call.tile.loose_rows}
        slots = call.slots if training else cdiv(call.batch, call.tile.loose_rows)
        forward_kernel[slots, columns](
            call.x, domain.contiguous(), call.order, call.bounds, *shared, mean, var, out, call.batch, num_domains,
            width, call.x.stride(0), call.rows, call.search, call.steps, EPS=eps, GROUPED=training, **shape,
        )  # fmt: skip
    return out, mean, var, count


def partitioned_norm_backward(
    grad: Tensor, x: Tensor, domain: Tensor, weight: Tensor, domain_weight: Tensor, mean: Tensor, var: Tensor,
    count: Tensor, training: bool, eps: float, needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of :func:`partitioned_norm`, from what it returned; where count < 2 the statistics are constants.

    Args:
        grad: [B,D], any strides.
        needs: bits 1 dx, 2 dweight, 4 dbias, 8 ddomain_weight, 16 ddomain_bias.

    Returns:
        These five, each like its argument; one that is not needed has shape [0].
    """
    num_domains = domain_weight.shape[0]
    call = _Call(x, domain, num_domains, True)
    device, columns, width = x.device, call.columns, call.width
    need_x, need_sums = bool(needs & 1), bool(needs & 30) or training
    dx = torch.empty(x.shape if need_x else 0, dtype=x.dtype, device=device)
    total, product = (torch.zeros((num_domains, width), dtype=torch.float32, device=device) for _ in range(2))
    if x.numel() and needs:
        grad, mean, var, count = rows_contiguous(grad), mean.contiguous(), var.contiguous(), count.contiguous()
        grid = call.slots, columns
        sizes = call.width, grad.stride(0), call.x.stride(0), call.rows, call.search, call.steps
        with on_device(x):
            if need_sums:
                partial = call.partials()
                sums_kernel[grid](
                    grad, call.x, call.order, call.bounds, mean, partial, num_domains, *sizes, **call.shape()
                )
                merge_sums_kernel[num_domains, columns](
                    call.bounds, partial, var, total, product, width, call.rows, EPS=eps, BC=_MERGED,
                    BD=call.tile.width, num_warps=call.tile.warps,
                )  # fmt: skip
            if need_x:
                backward_kernel[grid](
                    grad, call.x, call.order, call.bounds, weight.contiguous(), domain_weight.contiguous(), mean, var,
                    count, total, product, dx, num_domains, *sizes, EPS=eps, TRAINING=training, **call.shape(),
                )  # fmt: skip
    found = (
        lambda: (domain_weight.float() * product).sum(0).to(weight.dtype),
        lambda: total.sum(0).to(weight.dtype),
        lambda: (weight.float() * product).to(domain_weight.dtype),
        lambda: total.to(domain_weight.dtype),
    )
    empty = torch.empty(0, dtype=weight.dtype, device=device), torch.empty(0, dtype=domain_weight.dtype, device=device)
    rest = (make() if needs >> (i + 1) & 1 else empty[i // 2] for i, make in enumerate(found))
    return dx, *rest
