"""expert_linear in Triton: a bank of linear layers as one GEMM a unit, bias and activation fused.

The experts of unit u are one contiguous slice of the weight, [experts_per_unit[u] * N, K], and one contiguous range of
columns of y seen as [B, E*N]; so forward, dx and dweight are plain products of a unit, with the slice's rows
("columns" below, they are columns of y) as one of the three sizes. The units are the second axis of the grid.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import GemmConfig, arch_of, cdiv, offsets, on_device, pick_gemm, rows_contiguous, supports

SAVES_INPUT = ("gelu", "silu")  # their gradient needs the pre-activation; the others' needs y


@triton.jit
def _tanh(z):
    """tanh to float32's accuracy; near 0, where 1 - exp cancels, by its series."""
    decay = tl.exp(-2.0 * tl.abs(z))
    far = (1.0 - decay) / (1.0 + decay)
    square = z * z
    series = 62.0 / 2835.0 * square - 17.0 / 315.0
    series = (series * square + 2.0 / 15.0) * square - 1.0 / 3.0
    near = z + z * square * series
    return tl.where(tl.abs(z) < 0.25, near, tl.where(z < 0, -far, far))


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        z = tl.where(z <= 0, 0.0, z)  # written so that NaN stays NaN
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "silu":
        z = z / (1.0 + tl.exp(-z))
    elif ACTIVATION == "tanh":
        z = _tanh(z)
    elif ACTIVATION == "sigmoid":
        z = 1.0 / (1.0 + tl.exp(-z))
    return z


@triton.jit
def _through(grad, saved, ACTIVATION: tl.constexpr):
    """grad * act'; saved is the pre-activation for gelu and silu, the output for the others."""
    if ACTIVATION == "relu":
        grad = tl.where(saved <= 0, 0.0, grad)  # a NaN output lets the gradient through, as in torch
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * saved * saved)
        grad = grad * (0.5 * (1.0 + tl.erf(saved * 0.7071067811865476)) + saved * density)
    elif ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-saved))
        grad = grad * (s * (1.0 + saved * (1.0 - s)))
    elif ACTIVATION == "tanh":
        grad = grad * (1.0 - saved * saved)
    elif ACTIVATION == "sigmoid":
        grad = grad * (saved * (1.0 - saved))
    return grad


@triton.jit
def _unit(offset_ptr, span, N, EVEN: tl.constexpr):
    """First and last column of this program's unit; span = columns of a unit where all have as many."""
    u = tl.program_id(1)
    if EVEN:
        first = u * span
        last = first + span
    else:
        first = tl.load(offset_ptr + u) * N
        last = tl.load(offset_ptr + u + 1) * N
    return first, last


@triton.jit
def _tile(tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column tile of this program; GROUP row tiles share the column tiles they read while these are in L2."""
    pid = tl.program_id(0)
    width = GROUP * tiles_n
    first = (pid // width) * GROUP
    group = tl.minimum(tiles_m - first, GROUP)
    return first + (pid % width) % group, (pid % width) // group


@triton.jit
def _load_dz(grad_ptr, saved_ptr, places, mask, ACTIVATION: tl.constexpr):
    dz = tl.load(grad_ptr + places, mask=mask, other=0).to(tl.float32)
    if ACTIVATION != "":
        dz = _through(dz, tl.load(saved_ptr + places, mask=mask, other=0).to(tl.float32), ACTIVATION)
        dz = tl.where(mask, dz, 0.0)
    return dz


@triton.jit(do_not_specialize=["B"])
def forward_kernel(
    x_ptr, w_ptr, bias_ptr, offset_ptr, y_ptr, z_ptr, B, N, K, span, total, x_b, x_u,
    EVEN: tl.constexpr, BIAS: tl.constexpr, SAVE: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, EVEN_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y[b, columns of unit u] = act(x[b,u,:] W_u^T + bias); grid (tiles of B times tiles of span, U).

    span: the widest unit's columns; total: E * N, all units' columns.
    """
    first, last = _unit(offset_ptr, span, N, EVEN)
    tile_m, tile_n = _tile(tl.cdiv(B, BM), tl.cdiv(span, BN), GROUP)
    if first + tile_n * BN >= last:
        return
    row0 = tile_m.to(tl.int64) * BM
    column0 = (first + tile_n * BN).to(tl.int64)
    rows = tl.arange(0, BM)[:, None]
    columns = tl.arange(0, BN)[None, :]
    in_rows = rows < B - row0
    in_columns = columns < last - column0
    k = tl.arange(0, BK)
    x = x_ptr + tl.program_id(1).to(tl.int64) * x_u + row0 * x_b
    w = w_ptr + column0 * K
    x_places = rows * x_b + k[None, :]
    w_places = columns * K + k[:, None]
    acc = tl.zeros([BM, BN], tl.float32)
    for k0 in range(0, K, BK):
        if EVEN_K:
            x_tile = tl.load(x + x_places, mask=in_rows, other=0)
            w_tile = tl.load(w + w_places, mask=in_columns, other=0)
        else:
            x_tile = tl.load(x + x_places, mask=in_rows & (k0 + k[None, :] < K), other=0)
            w_tile = tl.load(w + w_places, mask=in_columns & (k0 + k[:, None] < K), other=0)
        w_tile = w_tile.to(x_ptr.dtype.element_ty)
        if UPCAST:
            x_tile = x_tile.to(tl.float32)
            w_tile = w_tile.to(tl.float32)
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
        x += BK
        w += BK
    if BIAS:
        acc += tl.load(bias_ptr + column0 + columns, mask=in_columns, other=0).to(tl.float32)
    corner = row0 * total + column0
    places = rows * total + columns
    inside = in_rows & in_columns
    if SAVE:
        tl.store(z_ptr + corner + places, acc.to(z_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptr + corner + places, _activate(acc, ACTIVATION).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["B"])
def dx_kernel(
    grad_ptr, saved_ptr, w_ptr, offset_ptr, dx_ptr, B, N, K, span, total, dx_b,
    EVEN: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dx[b,u,:] = dz[b, columns of unit u] W_u, summed over its experts; grid (tiles of B times tiles of K, U)."""
    first, last = _unit(offset_ptr, span, N, EVEN)
    tile_m, tile_n = _tile(tl.cdiv(B, BM), tl.cdiv(K, BN), GROUP)
    row0 = tile_m.to(tl.int64) * BM
    k0 = tile_n * BN
    rows = tl.arange(0, BM)[:, None]
    j = tl.arange(0, BK)
    k = tl.arange(0, BN)[None, :]
    in_rows = rows < B - row0
    in_k = k < K - k0
    grad = grad_ptr + row0 * total + first
    saved = saved_ptr + row0 * total + first
    w = w_ptr + first.to(tl.int64) * K + k0
    dz_places = rows * total + j[None, :]
    w_places = j[:, None] * K + k
    acc = tl.zeros([BM, BN], tl.float32)
    for j0 in range(0, last - first, BK):
        left = last - first - j0
        dz = _load_dz(grad, saved, dz_places, in_rows & (j[None, :] < left), ACTIVATION)
        w_tile = tl.load(w + w_places, mask=(j[:, None] < left) & in_k, other=0).to(dx_ptr.dtype.element_ty)
        dz = dz.to(dx_ptr.dtype.element_ty)
        if UPCAST:
            w_tile = w_tile.to(tl.float32)
            dz = dz.to(tl.float32)
        acc = tl.dot(dz, w_tile, acc, input_precision=PRECISION)
        grad += BK
        saved += BK
        w += BK * K
    dx = dx_ptr + row0 * dx_b + tl.program_id(1).to(tl.int64) * K + k0
    tl.store(dx + rows * dx_b + k, acc.to(dx_ptr.dtype.element_ty), mask=in_rows & in_k)


@triton.jit(do_not_specialize=["B", "chunk_rows"])
def dw_kernel(
    grad_ptr, saved_ptr, x_ptr, offset_ptr, dw_ptr, db_ptr, B, N, K, span, total, x_b, x_u, chunk_rows,
    EVEN: tl.constexpr, ACTIVATION: tl.constexpr, NEED_W: tl.constexpr, NEED_B: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dW_u = dz[:, columns of unit u]^T x[:,u,:] and db of one chunk of rows; grid (tiles of span and K, U, chunks)."""
    first, last = _unit(offset_ptr, span, N, EVEN)
    tile_m, tile_n = _tile(tl.cdiv(span, BM), tl.maximum(tl.cdiv(K, BN), 1), GROUP)
    if first + tile_m * BM >= last:
        return
    chunk = tl.program_id(2).to(tl.int64)
    row0 = chunk * chunk_rows
    column0 = first + tile_m * BM
    k0 = tile_n * BN
    left = tl.minimum(chunk_rows, B - row0)
    rows = tl.arange(0, BK)[:, None]
    columns = tl.arange(0, BM)
    k = tl.arange(0, BN)[None, :]
    in_columns = columns < last - column0
    in_k = k < K - k0
    grad = grad_ptr + row0 * total + column0
    saved = saved_ptr + row0 * total + column0
    x = x_ptr + tl.program_id(1).to(tl.int64) * x_u + row0 * x_b + k0
    dz_places = rows * total + columns[None, :]
    x_places = rows * x_b + k
    acc = tl.zeros([BM, BN], tl.float32)
    column_sum = tl.zeros([BK, BM], tl.float32)
    for _ in range(0, tl.cdiv(chunk_rows, BK)):
        in_rows = rows < left
        dz = _load_dz(grad, saved, dz_places, in_rows & in_columns[None, :], ACTIVATION)
        if NEED_B:
            column_sum += dz
        if NEED_W:
            x_tile = tl.load(x + x_places, mask=in_rows & in_k, other=0)
            dz = dz.to(x_ptr.dtype.element_ty)
            if UPCAST:
                x_tile = x_tile.to(tl.float32)
                dz = dz.to(tl.float32)
            acc = tl.dot(tl.trans(dz), x_tile, acc, input_precision=PRECISION)
        left -= BK
        grad += BK * total
        saved += BK * total
        x += BK * x_b
    if NEED_W:
        dw = dw_ptr + (chunk * total + column0) * K + k0
        tl.store(dw + columns[:, None] * K + k, acc.to(dw_ptr.dtype.element_ty), mask=in_columns[:, None] & in_k)
    if NEED_B:
        db = tl.sum(column_sum, 0).to(db_ptr.dtype.element_ty)
        tl.store(db_ptr + chunk * total + column0 + columns, db, mask=in_columns & (tile_n == 0))


INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)
_GROUP = 8
_PROGRAMS = 264  # two for each of the 132 multiprocessors of an H100 or H200: what dweight's tiles are split up to
_MIN_ROWS = 512  # of a split: below, the partial sums cost more than the idle multiprocessors


class _Call:
    """What forward and backward share: sizes, the layout of the units, and how products are computed."""

    def __init__(self, x: Tensor, weight: Tensor, experts_per_unit: Sequence[int] | None) -> None:
        ok, reason = supports(x.device.type, x.dtype, INTERPRETED)
        if not ok:
            raise ValueError(f"x cannot be multiplied by Triton: {reason}")
        self.x, self.weight = rows_contiguous(x), weight.contiguous()
        self.experts, self.n, self.k = weight.shape
        self.batch = x.shape[0]
        if x.dim() == 2:
            self.units, counts, self.x_strides = 1, [self.experts], (self.x.stride(0), 0)
        else:
            self.units, self.x_strides = x.shape[1], self.x.stride()[:2]
            counts = [1] * self.experts if experts_per_unit is None else list(experts_per_unit)
        self.total = self.experts * self.n
        self.span = max(counts, default=0) * self.n
        self.even = len(set(counts)) <= 1
        self.offsets = self.x if self.even else offsets(counts, x.device)
        # float32 is exact unless the caller has allowed TF32 for torch's own products.
        tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" and not INTERPRETED
        self.precision = "tf32" if tf32 else "ieee"
        self.tensor_cores = tf32 or x.dtype != torch.float32
        # The interpreter computes bfloat16 products on the bit patterns.
        self.upcast = INTERPRETED and x.dtype == torch.bfloat16
        self.arch = arch_of(x.device)

    def pick(self, m: int | None, n: int, k: int | None, gradient: bool) -> GemmConfig:
        return pick_gemm(m, n, k, self.x.element_size(), self.tensor_cores, self.arch, through_registers=gradient)

    def constants(self, tile: GemmConfig, activation: str) -> dict:
        return dict(
            EVEN=self.even, ACTIVATION=activation, PRECISION=self.precision, UPCAST=self.upcast,
            BM=tile.m, BN=tile.n, BK=tile.k, GROUP=_GROUP, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def expert_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    experts_per_unit: Sequence[int] | None,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """``Y[b,e,:] = act(W_e x[b,unit(e),:] + c_e)``.

    Args:
        x: [B,K], read by every expert, or [B,U,K]; float32, bfloat16 or float16, any strides.
        weight: [E,N,K] in x's dtype or float32, which is rounded to x's dtype tile by tile.
        bias: [E,N] or None.
        experts_per_unit: experts of each of the U units; None is one each.
        activation: "", relu, gelu (by erf), silu, tanh or sigmoid.
        save: also return what backward needs and y does not tell.

    Returns:
        y [B,E,N] in x's dtype; the pre-activation likewise where save and activation is gelu or silu, else [0].
    """
    call = _Call(x, weight, experts_per_unit)
    save = save and activation in SAVES_INPUT
    shape = (call.batch, call.experts, call.n)
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    z = torch.empty(shape if save else 0, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y, z
    tile = call.pick(None, call.span, call.k, gradient=False)
    grid = (cdiv(call.batch, tile.m) * cdiv(call.span, tile.n), call.units)
    with on_device(x):
        forward_kernel[grid](
            call.x, call.weight, call.x if bias is None else bias.contiguous(), call.offsets, y, z,
            call.batch, call.n, call.k, call.span, call.total, *call.x_strides,
            BIAS=bias is not None, SAVE=save, EVEN_K=call.k % tile.k == 0, **call.constants(tile, activation),
        )  # fmt: skip
    return y, z


def expert_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    saved: Tensor,
    experts_per_unit: Sequence[int] | None,
    activation: str,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`expert_linear`, with ``dz = grad * act'``.

    Args:
        grad: [B,E,N], any strides.
        saved: the pre-activation for gelu and silu, y for the other activations.
        needs: bits 1 dx, 2 dweight, 4 dbias. The rest as given to :func:`expert_linear`.

    Returns:
        dx like x, dweight like weight, dbias [E,N] in weight's dtype; one that is not needed has shape [0].
    """
    call = _Call(x, weight, experts_per_unit)
    grad = grad.contiguous()
    saved = grad if activation == "" else saved.contiguous()
    need_x, need_w, need_b = bool(needs & 1), bool(needs & 2), bool(needs & 4)
    dx = torch.empty(x.shape if need_x else 0, dtype=x.dtype, device=x.device)
    with on_device(x):
        if dx.numel():
            tile = call.pick(None, call.k, None, gradient=True)
            grid = (cdiv(call.batch, tile.m) * cdiv(call.k, tile.n), call.units)
            dx_kernel[grid](
                grad, saved, call.weight, call.offsets, dx, call.batch, call.n, call.k, call.span, call.total,
                call.units * call.k, **call.constants(tile, activation),
            )  # fmt: skip
        dweight, dbias = _parameter_gradients(call, grad, saved, activation, need_w, need_b)
    return dx, dweight, dbias


def _parameter_gradients(
    call: _Call, grad: Tensor, saved: Tensor, activation: str, need_w: bool, need_b: bool
) -> tuple[Tensor, Tensor]:
    dtype, device = call.weight.dtype, call.x.device
    tile = call.pick(call.span, call.k, None, gradient=True)
    tiles = cdiv(call.span, tile.m) * max(1, cdiv(call.k, tile.n) if need_w else 1)
    # Too few tiles to fill a GPU: cut the batch, sum the partial results in a fixed order.
    chunks = max(1, min(_PROGRAMS // max(1, tiles * call.units), cdiv(call.batch, _MIN_ROWS)))
    chunk_rows = cdiv(cdiv(call.batch, chunks), tile.k) * tile.k
    part = dtype if chunks == 1 else torch.float32
    leading = () if chunks == 1 else (chunks,)
    dweight = torch.empty((*leading, *call.weight.shape) if need_w else 0, dtype=part, device=device)
    dbias = torch.empty((*leading, call.experts, call.n) if need_b else 0, dtype=part, device=device)
    if dweight.numel() + dbias.numel():
        dw_kernel[(tiles, call.units, chunks)](
            grad, saved, call.x, call.offsets, dweight, dbias,
            call.batch, call.n, call.k if need_w else 0, call.span, call.total, *call.x_strides, chunk_rows,
            NEED_W=need_w, NEED_B=need_b, **call.constants(tile, activation),
        )  # fmt: skip
    if chunks > 1:
        dweight = dweight.sum(0).to(dtype) if need_w else dweight
        dbias = dbias.sum(0).to(dtype) if need_b else dbias
    return dweight, dbias
