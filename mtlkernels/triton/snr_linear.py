"""snr_linear in Triton: for every output sub-network a product over the inputs it is connected to.

Every program reads the gates of its row or column itself: with SKIP a block whose gate is 0 is neither loaded nor
multiplied, and the host never waits to know which. Gates multiply the float32 product of a block, or dz before it is
rounded for the product, so that nothing is rounded twice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import GemmConfig, arch_of, cdiv, on_device, pick_gemm, rows_contiguous, supports
from .expert_linear import INTERPRETED, SAVES_INPUT, _activate, _load_dz, _tile


@triton.jit
def _takes_part(gate, SKIP: tl.constexpr):
    """Whether a block with this gate is to be computed; a NaN is no 0."""
    found = gate != 0
    if not SKIP:
        found = found | (gate == 0)
    return found


@triton.jit(do_not_specialize=["B"])
def forward_kernel(
    x_ptr, w_ptr, gate_ptr, bias_ptr, y_ptr, z_ptr, B, J, N, K, total, x_b, x_j,
    SKIP: tl.constexpr, BIAS: tl.constexpr, SAVE: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y[b,i,:] = act(sum_j gate[i,j] x[b,j,:] W_ij^T + bias_i); grid (tiles of B times tiles of N, I); total: I * N."""
    i = tl.program_id(1).to(tl.int64)
    tile_m, tile_n = _tile(tl.cdiv(B, BM), tl.cdiv(N, BN), GROUP)
    row0 = tile_m.to(tl.int64) * BM
    n0 = tile_n * BN
    rows = tl.arange(0, BM)[:, None]
    n = tl.arange(0, BN)[None, :]
    k = tl.arange(0, BK)
    in_rows = rows < B - row0
    in_n = n < N - n0
    x_places = rows * x_b + k[None, :]
    w_places = n * K + k[:, None]
    acc = tl.zeros([BM, BN], tl.float32)
    x_block = x_ptr + row0 * x_b
    for j in range(0, J):
        gate = tl.load(gate_ptr + i * J + j).to(tl.float32)
        if _takes_part(gate, SKIP):
            x = x_block
            w = w_ptr + ((i * J + j) * N + n0) * K
            part = tl.zeros([BM, BN], tl.float32)
            for k0 in range(0, K, BK):
                x_tile = tl.load(x + x_places, mask=in_rows & (k0 + k[None, :] < K), other=0)
                w_tile = tl.load(w + w_places, mask=in_n & (k0 + k[:, None] < K), other=0)
                w_tile = w_tile.to(x_ptr.dtype.element_ty)
                if UPCAST:
                    x_tile = x_tile.to(tl.float32)
                    w_tile = w_tile.to(tl.float32)
                part = tl.dot(x_tile, w_tile, part, input_precision=PRECISION)
                x += BK
                w += BK
            acc += gate * part
        x_block += x_j
    if BIAS:
        acc += tl.load(bias_ptr + i * N + n0 + n, mask=in_n, other=0).to(tl.float32)
    corner = row0 * total + i * N + n0
    places = rows * total + n
    inside = in_rows & in_n
    if SAVE:
        tl.store(z_ptr + corner + places, acc.to(z_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptr + corner + places, _activate(acc, ACTIVATION).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["B"])
def dx_kernel(
    grad_ptr, saved_ptr, w_ptr, gate_ptr, dx_ptr, B, outputs, J, N, K, total, dx_b,
    SKIP: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dx[b,j,:] = sum_i gate[i,j] dz[b,i,:] W_ij; grid (tiles of B times tiles of K, J); outputs: I."""
    j = tl.program_id(1).to(tl.int64)
    tile_m, tile_n = _tile(tl.cdiv(B, BM), tl.cdiv(K, BN), GROUP)
    row0 = tile_m.to(tl.int64) * BM
    k0 = tile_n * BN
    rows = tl.arange(0, BM)[:, None]
    n = tl.arange(0, BK)
    k = tl.arange(0, BN)[None, :]
    in_rows = rows < B - row0
    in_k = k < K - k0
    dz_places = rows * total + n[None, :]
    w_places = n[:, None] * K + k
    acc = tl.zeros([BM, BN], tl.float32)
    block = row0 * total  # offset into grad and saved alike: one pointer fewer to carry, or float32 would spill
    for i in range(0, outputs):
        gate = tl.load(gate_ptr + i * J + j).to(tl.float32)
        if _takes_part(gate, SKIP):
            w = w_ptr + (i * J + j) * N * K + k0
            at = block
            for n0 in range(0, N, BK):
                dz = _load_dz(grad_ptr + at, saved_ptr + at, dz_places, in_rows & (n[None, :] < N - n0), ACTIVATION)
                w_tile = tl.load(w + w_places, mask=(n[:, None] < N - n0) & in_k, other=0).to(dx_ptr.dtype.element_ty)
                dz = (gate * dz).to(dx_ptr.dtype.element_ty)
                if UPCAST:
                    w_tile = w_tile.to(tl.float32)
                    dz = dz.to(tl.float32)
                acc = tl.dot(dz, w_tile, acc, input_precision=PRECISION)
                at += BK
                w += BK * K
        block += N
    dx = dx_ptr + row0 * dx_b + j * K + k0
    tl.store(dx + rows * dx_b + k, acc.to(dx_ptr.dtype.element_ty), mask=in_rows & in_k)


@triton.jit(do_not_specialize=["B", "chunk_rows"])
def dw_kernel(
    grad_ptr, saved_ptr, x_ptr, w_ptr, gate_ptr, dw_ptr, dgate_ptr, B, J, N, K, total, x_b, x_j, chunk_rows, blocks,
    SKIP: tl.constexpr, ACTIVATION: tl.constexpr, NEED_W: tl.constexpr, NEED_G: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """S_ij = dz_i^T x_j over one chunk of rows: dw = gate S and this tile's <W, S>.

    grid (tiles of N times tiles of K, I * J, chunks); dgate [chunks, tiles, I * J, BM], a sum a row of the tile;
    blocks: I * J.
    """
    block = tl.program_id(1).to(tl.int64)
    i = block // J
    j = block % J
    tile_m, tile_n = _tile(tl.cdiv(N, BM), tl.cdiv(K, BN), GROUP)
    chunk = tl.program_id(2).to(tl.int64)
    row0 = chunk * chunk_rows
    n0 = tile_m * BM
    k0 = tile_n * BN
    rows = tl.arange(0, BK)[:, None]
    n = tl.arange(0, BM)
    k = tl.arange(0, BN)[None, :]
    in_n = n < N - n0
    in_k = k < K - k0
    acc = tl.zeros([BM, BN], tl.float32)
    product = tl.zeros([BM], tl.float32)
    places = n[:, None] * K + k
    inside = in_n[:, None] & in_k
    gate = tl.load(gate_ptr + block).to(tl.float32)
    if _takes_part(gate, SKIP):
        left = tl.minimum(chunk_rows, B - row0)
        grad = grad_ptr + row0 * total + i * N + n0
        saved = saved_ptr + row0 * total + i * N + n0
        x = x_ptr + row0 * x_b + j * x_j + k0
        dz_places = rows * total + n[None, :]
        x_places = rows * x_b + k
        for _ in range(0, tl.cdiv(chunk_rows, BK)):
            in_rows = rows < left
            dz = _load_dz(grad, saved, dz_places, in_rows & in_n[None, :], ACTIVATION)
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
        if NEED_G:
            w_tile = tl.load(w_ptr + (block * N + n0) * K + k0 + places, mask=inside, other=0).to(tl.float32)
            product = tl.sum(w_tile * acc, 1)
    if NEED_G:
        place = (chunk * tl.num_programs(0) + tl.program_id(0)) * blocks + block
        tl.store(dgate_ptr + place * BM + n, product)
    if NEED_W:
        dw = dw_ptr + ((chunk * blocks + block) * N + n0) * K + k0
        tl.store(dw + places, (gate * acc).to(dw_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["B", "chunk_rows"])
def db_kernel(
    grad_ptr, saved_ptr, db_ptr, B, total, chunk_rows,
    ACTIVATION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """db of one chunk of rows: the column sums of dz; grid (tiles of I * N, chunks)."""
    chunk = tl.program_id(1).to(tl.int64)
    row0 = chunk * chunk_rows
    left = tl.minimum(chunk_rows, B - row0)
    rows = tl.arange(0, BM)[:, None]
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    grad = grad_ptr + row0 * total
    saved = saved_ptr + row0 * total
    places = rows * total + columns[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for _ in range(0, tl.cdiv(chunk_rows, BM)):
        acc += _load_dz(grad, saved, places, (rows < left) & (columns[None, :] < total), ACTIVATION)
        left -= BM
        grad += BM * total
        saved += BM * total
    db = tl.sum(acc, 0).to(db_ptr.dtype.element_ty)
    tl.store(db_ptr + chunk * total + columns, db, mask=columns < total)


_GROUP = 8
_PROGRAMS = 264  # two for each of the 132 multiprocessors of an H100 or H200: what the gradients' tiles are split up to
_MIN_ROWS = 512  # of a split: below, the partial sums cost more than the idle multiprocessors
BIAS_TILE = (16, 128)  # rows and columns of db_kernel


def pick_forward(n: int, k: int, itemsize: int, tensor_cores: bool, arch: int) -> GemmConfig:
    """Tile of forward_kernel, which holds two accumulators: before Hopper a wide one would spill."""
    return pick_gemm(None, n if arch >= 90 else min(n, 64), k, itemsize, tensor_cores, arch)


def pick_dx(k: int, itemsize: int, tensor_cores: bool, arch: int) -> GemmConfig:
    """Tile of dx_kernel; with four warps exact float32 would spill."""
    tile = pick_gemm(None, k, None, itemsize, tensor_cores, arch, through_registers=True)
    return tile if tensor_cores else tile._replace(warps=8)


class _Call:
    """What forward and backward share: sizes, and how products are computed."""

    def __init__(self, x: Tensor, weight: Tensor, gate: Tensor, activation: str, skip_closed: bool) -> None:
        ok, reason = supports(x.device.type, x.dtype, INTERPRETED)
        if not ok:
            raise ValueError(f"x cannot be multiplied by Triton: {reason}")
        self.x, self.weight, self.gate = rows_contiguous(x), weight.contiguous(), gate.contiguous()
        self.outputs, self.inputs, self.n, self.k = weight.shape
        self.batch, self.total, self.itemsize = x.shape[0], self.outputs * self.n, x.element_size()
        # float32 is exact unless the caller has allowed TF32 for torch's own products.
        tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" and not INTERPRETED
        self.tensor_cores = tf32 or x.dtype != torch.float32
        # The interpreter computes bfloat16 products on the bit patterns.
        upcast = INTERPRETED and x.dtype == torch.bfloat16
        self.constants = dict(SKIP=skip_closed, ACTIVATION=activation, UPCAST=upcast, GROUP=_GROUP,
                              PRECISION="tf32" if tf32 else "ieee")  # fmt: skip
        self.arch = arch_of(x.device)

    def launch(self, tile: GemmConfig) -> dict:
        return dict(self.constants, BM=tile.m, BN=tile.n, BK=tile.k, num_warps=tile.warps, num_stages=tile.stages)

    def empty(self, shape, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)

    def chunks(self, programs: int, step: int) -> tuple[int, int]:
        """Into how many pieces to cut the batch, and their rows, a multiple of step, so that a GPU has enough to do."""
        chunks = max(1, min(_PROGRAMS // max(1, programs), cdiv(self.batch, _MIN_ROWS)))
        return chunks, cdiv(cdiv(self.batch, chunks), step) * step


def snr_linear(
    x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor | None, activation: str, skip_closed: bool, save: bool
) -> tuple[Tensor, Tensor]:
    """``Y[b,i,:] = act(sum_j gate[i,j] W_ij x[b,j,:] + c_i)``.

    Args:
        x: [B,J,K]; float32, bfloat16 or float16, any strides.
        weight: [I,J,N,K] in x's dtype or float32, which is rounded to x's dtype tile by tile.
        gate: [I,J]; bias: [I,N] or None.
        activation: "", relu, gelu (by erf), silu, tanh or sigmoid.
        skip_closed: blocks whose gate is 0 are not read.
        save: also return what backward needs and y does not tell.

    Returns:
        y [B,I,N] in x's dtype; the pre-activation likewise where save and activation is gelu or silu, else [0].
    """
    call = _Call(x, weight, gate, activation, skip_closed)
    save = save and activation in SAVES_INPUT
    shape = (call.batch, call.outputs, call.n)
    y, z = call.empty(shape, x.dtype), call.empty(shape if save else 0, x.dtype)
    if y.numel() == 0:
        return y, z
    tile = pick_forward(call.n, call.k, call.itemsize, call.tensor_cores, call.arch)
    grid = (cdiv(call.batch, tile.m) * cdiv(call.n, tile.n), call.outputs)
    with on_device(x):
        forward_kernel[grid](
            call.x, call.weight, call.gate, call.x if bias is None else bias.contiguous(), y, z,
            call.batch, call.inputs, call.n, call.k, call.total, *call.x.stride()[:2],
            BIAS=bias is not None, SAVE=save, **call.launch(tile),
        )  # fmt: skip
    return y, z


def snr_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    gate: Tensor,
    saved: Tensor,
    activation: str,
    skip_closed: bool,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`snr_linear`, with ``dz = grad * act'`` and ``S_ij = dz_i^T x_j``.

    Args:
        grad: [B,I,N], any strides.
        saved: the pre-activation for gelu and silu, y for the other activations.
        needs: bits 1 dx, 2 dweight, 4 dgate, 8 dbias. The rest as given to :func:`snr_linear`.

    Returns:
        dx like x, dweight ``gate S`` like weight, dgate ``<W, S>`` like gate, dbias [I,N] in weight's dtype; one that
        is not needed has shape [0].
    """
    call = _Call(x, weight, gate, activation, skip_closed)
    grad = grad.contiguous()
    saved = grad if activation == "" else saved.contiguous()
    dx = call.empty(x.shape if needs & 1 else 0, x.dtype)
    with on_device(x):
        if dx.numel():
            tile = pick_dx(call.k, call.itemsize, call.tensor_cores, call.arch)
            grid = (cdiv(call.batch, tile.m) * cdiv(call.k, tile.n), call.inputs)
            dx_kernel[grid](
                grad, saved, call.weight, call.gate, dx, call.batch, call.outputs, call.inputs, call.n, call.k,
                call.total, call.inputs * call.k, **call.launch(tile),
            )  # fmt: skip
        dweight, dgate = _block_gradients(call, grad, saved, bool(needs & 2), bool(needs & 4))
        dbias = _bias_gradient(call, grad, saved, activation) if needs & 8 else call.empty(0, weight.dtype)
    return dx, dweight, dgate, dbias


def _block_gradients(call: _Call, grad: Tensor, saved: Tensor, need_w: bool, need_g: bool) -> tuple[Tensor, Tensor]:
    dtype, blocks = call.weight.dtype, call.outputs * call.inputs
    tile = pick_gemm(call.n, call.k, None, call.itemsize, call.tensor_cores, call.arch, through_registers=True)
    tiles = cdiv(call.n, tile.m) * cdiv(call.k, tile.n)
    # Too few tiles to fill a GPU: cut the batch, sum the partial results in a fixed order.
    chunks, chunk_rows = call.chunks(tiles * blocks, tile.k)
    shape = call.weight.shape if chunks == 1 else (chunks, *call.weight.shape)
    dweight = call.empty(shape if need_w else 0, dtype if chunks == 1 else torch.float32)
    products = call.empty((chunks * tiles, *call.gate.shape, tile.m) if need_g else 0, torch.float32)
    if dweight.numel() + products.numel():
        dw_kernel[(tiles, blocks, chunks)](
            grad, saved, call.x, call.weight, call.gate, dweight, products, call.batch, call.inputs, call.n, call.k,
            call.total, *call.x.stride()[:2], chunk_rows, blocks, NEED_W=need_w, NEED_G=need_g, **call.launch(tile),
        )  # fmt: skip
    if need_w and chunks > 1:
        dweight = dweight.sum(0).to(dtype)
    return dweight, (products.sum((0, 3)) if need_g else products).to(call.gate.dtype)


def _bias_gradient(call: _Call, grad: Tensor, saved: Tensor, activation: str) -> Tensor:
    rows, columns = BIAS_TILE
    tiles = cdiv(call.total, columns)
    chunks, chunk_rows = call.chunks(tiles, rows)
    dtype = call.weight.dtype
    dbias = call.empty((chunks, call.outputs, call.n), dtype if chunks == 1 else torch.float32)
    if dbias.numel():
        db_kernel[(tiles, chunks)](
            grad, saved, dbias, call.batch, call.total, chunk_rows, ACTIVATION=activation, BM=rows, BN=columns
        )
    return dbias[0] if chunks == 1 else dbias.sum(0).to(dtype)
