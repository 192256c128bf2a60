"""star_linear in Triton: a grouped product over tiles of rows, each tile of one domain.

The rows are sorted by domain on the device, and every domain's rows cut into tiles; the grid holds as many tiles as
there can be at most, so that nothing waits for the ids. W * W_p is formed in float32 as its tiles are loaded. Rows
whose id is out of range are sorted behind all others: y is NaN there, dx is 0, and no other gradient sees them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import cdiv, on_device
from .expert_linear import _MIN_ROWS, _PROGRAMS, SAVES_INPUT, _activate, _Call, _load_dz, _tile


@triton.jit
def _load_weight(w_ptr, own_ptr, places, mask, dtype: tl.constexpr):
    """A tile of W * W_p, formed in float32."""
    w = tl.load(w_ptr + places, mask=mask, other=0).to(tl.float32)
    return (w * tl.load(own_ptr + places, mask=mask, other=0).to(tl.float32)).to(dtype)


@triton.jit(do_not_specialize=["P", "tiles"])
def forward_kernel(
    x_ptr, w_ptr, own_ptr, bias_ptr, own_bias_ptr, order_ptr, tile_ptr, y_ptr, z_ptr, P, N, K, tiles, x_b,
    BIAS: tl.constexpr, OWN_BIAS: tl.constexpr, SAVE: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y of one tile of rows and BN columns; grid tiles * cdiv(N, BN). tile_ptr [3, tiles]: domain, first row, last."""
    tile_m, tile_n = _tile(tiles, tl.cdiv(N, BN), GROUP)
    domain = tl.load(tile_ptr + tile_m)
    first = tl.load(tile_ptr + tiles + tile_m)
    last = tl.load(tile_ptr + 2 * tiles + tile_m)
    if first >= last:
        return
    p = tl.minimum(domain, P - 1).to(tl.int64)  # rows of no domain: whatever is read, they come out as NaN
    in_rows = first + tl.arange(0, BM) < last
    rows = tl.load(order_ptr + first + tl.arange(0, BM), mask=in_rows, other=0)[:, None]
    in_rows = in_rows[:, None]
    column0 = tile_n * BN
    columns = tl.arange(0, BN)[None, :]
    in_columns = columns < N - column0
    k = tl.arange(0, BK)
    w = w_ptr + column0.to(tl.int64) * K
    own = own_ptr + (p * N + column0) * K
    w_places = columns * K + k[:, None]
    x = x_ptr + rows * x_b + k[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for k0 in range(0, K, BK):
        x_tile = tl.load(x + k0, mask=in_rows & (k[None, :] < K - k0), other=0)
        w_tile = _load_weight(w + k0, own + k0, w_places, in_columns & (k[:, None] < K - k0), x_ptr.dtype.element_ty)
        if UPCAST:
            x_tile = x_tile.to(tl.float32)
            w_tile = w_tile.to(tl.float32)
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
    if BIAS:
        acc += tl.load(bias_ptr + column0 + columns, mask=in_columns, other=0).to(tl.float32)
    if OWN_BIAS:
        acc += tl.load(own_bias_ptr + p * N + column0 + columns, mask=in_columns, other=0).to(tl.float32)
    acc = tl.where(domain < P, acc, float("nan"))
    places = rows * N + column0 + columns
    inside = in_rows & in_columns
    if SAVE:
        tl.store(z_ptr + places, acc.to(z_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptr + places, _activate(acc, ACTIVATION).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["P", "tiles"])
def dx_kernel(
    grad_ptr, saved_ptr, w_ptr, own_ptr, order_ptr, tile_ptr, dx_ptr, P, N, K, tiles,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dx = dz (W * W_p) of one tile of rows and BN of the K features; grid tiles * cdiv(K, BN)."""
    tile_m, tile_n = _tile(tiles, tl.cdiv(K, BN), GROUP)
    domain = tl.load(tile_ptr + tile_m)
    first = tl.load(tile_ptr + tiles + tile_m)
    last = tl.load(tile_ptr + 2 * tiles + tile_m)
    if first >= last:
        return
    p = tl.minimum(domain, P - 1).to(tl.int64)
    in_rows = first + tl.arange(0, BM) < last
    rows = tl.load(order_ptr + first + tl.arange(0, BM), mask=in_rows, other=0)[:, None]
    in_rows = in_rows[:, None]
    k0 = tile_n * BN
    k = tl.arange(0, BN)[None, :]
    in_k = k < K - k0
    j = tl.arange(0, BK)
    own = own_ptr + p * N * K
    dz_places = rows * N + j[None, :]
    w_places = j[:, None].to(tl.int64) * K + k0 + k
    acc = tl.zeros([BM, BN], tl.float32)
    for j0 in range(0, N, BK):
        dz = _load_dz(grad_ptr, saved_ptr, dz_places + j0, in_rows & (j[None, :] < N - j0), ACTIVATION)
        w_tile = _load_weight(w_ptr, own, w_places, (j[:, None] < N - j0) & in_k, dx_ptr.dtype.element_ty)
        dz = dz.to(dx_ptr.dtype.element_ty)
        if UPCAST:
            dz = dz.to(tl.float32)
            w_tile = w_tile.to(tl.float32)
        acc = tl.dot(dz, w_tile, acc, input_precision=PRECISION)
        w_places += BK * K
    acc = tl.where(domain < P, acc, 0.0)
    tl.store(dx_ptr + rows * K + k0 + k, acc.to(dx_ptr.dtype.element_ty), mask=in_rows & in_k)


@triton.jit(do_not_specialize=["tiles"])
def sums_kernel(
    grad_ptr, saved_ptr, x_ptr, order_ptr, tile_ptr, partial_ptr, partial_bias_ptr, N, K, tiles, x_b,
    ACTIVATION: tl.constexpr, NEED_W: tl.constexpr, NEED_B: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dz^T x and the sum of dz over one chunk of a domain's rows; grid (tiles of N and K, chunks)."""
    chunk = tl.program_id(1)
    first = tl.load(tile_ptr + tiles + chunk)
    last = tl.load(tile_ptr + 2 * tiles + chunk)
    if first >= last:
        return
    tile_m, tile_n = _tile(tl.cdiv(N, BM), tl.maximum(tl.cdiv(K, BN), 1), GROUP)
    column0 = tile_m * BM
    k0 = tile_n * BN
    columns = tl.arange(0, BM)
    k = tl.arange(0, BN)[None, :]
    in_columns = columns < N - column0
    in_k = k < K - k0
    acc = tl.zeros([BM, BN], tl.float32)
    column_sum = tl.zeros([BK, BM], tl.float32)
    for row in range(first, last, BK):
        in_rows = row + tl.arange(0, BK) < last
        rows = tl.load(order_ptr + row + tl.arange(0, BK), mask=in_rows, other=0)[:, None]
        in_rows = in_rows[:, None]
        places = rows * N + column0 + columns[None, :]
        dz = _load_dz(grad_ptr, saved_ptr, places, in_rows & in_columns[None, :], ACTIVATION)
        if NEED_B:
            column_sum += dz
        if NEED_W:
            x_tile = tl.load(x_ptr + rows * x_b + k0 + k, mask=in_rows & in_k, other=0)
            dz = dz.to(x_ptr.dtype.element_ty)
            if UPCAST:
                x_tile = x_tile.to(tl.float32)
                dz = dz.to(tl.float32)
            acc = tl.dot(tl.trans(dz), x_tile, acc, input_precision=PRECISION)
    at = chunk.to(tl.int64) * N + column0 + columns
    if NEED_W:
        tl.store(partial_ptr + at[:, None] * K + k0 + k, acc, mask=in_columns[:, None] & in_k)
    if NEED_B:
        tl.store(partial_bias_ptr + at, tl.sum(column_sum, 0), mask=in_columns & (tile_n == 0))


@triton.jit(do_not_specialize=["P"])
def combine_kernel(
    partial_ptr, chunk_ptr, w_ptr, own_ptr, dw_ptr, down_ptr, P, numel,
    SCALE: tl.constexpr, NEED_SHARED: tl.constexpr, NEED_OWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the chunks' sums S of every domain, in order: dW_p = S_p * W and dW = sum_p S_p * W_p.

    chunk_ptr [P+1]: each domain's first chunk. Without SCALE (biases) W and W_p are 1.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    place = i
    partial = partial_ptr + i
    shared = tl.zeros([BLOCK], tl.float32)
    if SCALE and NEED_OWN:
        w = tl.load(w_ptr + i, mask=inside, other=0).to(tl.float32)
    for p in range(0, P):
        first = tl.load(chunk_ptr + p)
        last = tl.load(chunk_ptr + p + 1)
        total = tl.zeros([BLOCK], tl.float32)
        for _ in range(first, last):
            total += tl.load(partial, mask=inside, other=0)
            partial += numel
        if NEED_OWN:
            own = total
            if SCALE:
                own = tl.where(first < last, total * w, 0.0)
            tl.store(down_ptr + place, own.to(down_ptr.dtype.element_ty), mask=inside)
        if NEED_SHARED:
            if SCALE:
                # A domain without rows is not read.
                total *= tl.load(own_ptr + place, mask=inside & (first < last), other=0).to(tl.float32)
            shared += total
        place += numel
    if NEED_SHARED:
        tl.store(dw_ptr + i, shared.to(dw_ptr.dtype.element_ty), mask=inside)


class _Sorted:
    """The rows sorted by domain, on the device; nothing here depends on the ids but numbers in tensors."""

    def __init__(self, domain: Tensor, num_domains: int) -> None:
        ids = domain.long()
        ids = torch.where((ids >= 0) & (ids < num_domains), ids, num_domains)
        ids, self.order = torch.sort(ids, stable=True)
        self.batch, self.num_domains = domain.shape[0], num_domains
        self.first = torch.searchsorted(ids, torch.arange(num_domains + 2, device=domain.device))  # [P + 2]

    def tiles(self, rows: int, groups: int) -> tuple[Tensor, Tensor]:
        """Each of the first `groups` domains' rows cut into tiles of at most `rows`.

        Returns int32 [3, tiles] of domain, first row and last of every tile that there can be at most (the unused
        ones are empty), and int32 [groups + 1], each domain's first tile.
        """
        tiles = (self.first[: groups + 1].diff() + rows - 1) // rows
        begins = torch.nn.functional.pad(tiles.cumsum(0), (1, 0))
        index = torch.arange(self.batch // rows + min(groups, self.batch), device=tiles.device)
        group = torch.searchsorted(begins[1:], index, right=True)
        inside = group.clamp(max=groups - 1)
        last = torch.where(group < groups, self.first[inside + 1], 0)
        start = self.first[inside] + (index - begins[inside]) * rows
        return torch.stack([group, start, torch.minimum(last, start + rows)]).int(), begins.int()


class _Star(_Call):
    """expert_linear's sizes and ways to compute products, for one expert; and the sorted rows."""

    def __init__(self, x: Tensor, domain: Tensor, weight: Tensor, domain_weight: Tensor) -> None:
        super().__init__(x, weight[None], None)
        self.own, self.num_domains = domain_weight.contiguous(), domain_weight.shape[0]
        self.sorted = _Sorted(domain, self.num_domains)

    def constants(self, tile, activation: str) -> dict:
        constants = super().constants(tile, activation)
        del constants["EVEN"]
        return constants


def star_linear(
    x: Tensor,
    domain: Tensor,
    weight: Tensor,
    domain_weight: Tensor,
    bias: Tensor | None,
    domain_bias: Tensor | None,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """``out_b = act((W * W_p) x_b + c + c_p)``, p = domain_b; NaN where the id is not in 0 .. P-1.

    Args:
        x: [B,K]; float32, bfloat16 or float16, any strides. domain: [B], any integer type.
        weight: [N,K] and domain_weight: [P,N,K], in x's dtype or float32; their product is rounded to x's dtype.
        bias: [N] or None. domain_bias: [P,N] or None.
        activation: "", relu, gelu (by erf), silu, tanh or sigmoid.
        save: also return what backward needs and y does not tell.

    Returns:
        y [B,N] in x's dtype; the pre-activation likewise where save and activation is gelu or silu, else [0].
    """
    with on_device(x):
        call = _Star(x, domain, weight, domain_weight)
        save = save and activation in SAVES_INPUT
        y = torch.empty((call.batch, call.n), dtype=x.dtype, device=x.device)
        z = torch.empty((call.batch, call.n) if save else 0, dtype=x.dtype, device=x.device)
        if y.numel() == 0:
            return y, z
        tile = call.pick(None, call.n, call.k, gradient=True)
        tiles, _ = call.sorted.tiles(tile.m, call.num_domains + 1)
        forward_kernel[(tiles.shape[1] * cdiv(call.n, tile.n),)](
            call.x, call.weight, call.own,
            call.x if bias is None else bias.contiguous(), call.x if domain_bias is None else domain_bias.contiguous(),
            call.sorted.order, tiles, y, z, call.num_domains, call.n, call.k, tiles.shape[1], call.x_strides[0],
            BIAS=bias is not None, OWN_BIAS=domain_bias is not None, SAVE=save, **call.constants(tile, activation),
        )  # fmt: skip
    return y, z


def star_linear_backward(
    grad: Tensor,
    x: Tensor,
    domain: Tensor,
    weight: Tensor,
    domain_weight: Tensor,
    saved: Tensor,
    activation: str,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`star_linear`, with ``dz = grad * act'``.

    Args:
        grad: [B,N], any strides.
        saved: the pre-activation for gelu and silu, y for the other activations.
        needs: bits 1 dx, 2 dweight, 4 ddomain_weight, 8 dbias, 16 ddomain_bias. The rest as in forward.

    Returns:
        dx, dweight, ddomain_weight, dbias [N], ddomain_bias [P,N]; one that is not needed has shape [0].
    """
    with on_device(x):
        call = _Star(x, domain, weight, domain_weight)
        grad = grad.contiguous()
        saved = grad if activation == "" else saved.contiguous()
        dx = torch.empty(x.shape if needs & 1 else 0, dtype=x.dtype, device=x.device)
        if dx.numel():
            tile = call.pick(None, call.k, None, gradient=True)
            tiles, _ = call.sorted.tiles(tile.m, call.num_domains + 1)
            dx_kernel[(tiles.shape[1] * cdiv(call.k, tile.n),)](
                grad, saved, call.weight, call.own, call.sorted.order, tiles, dx,
                call.num_domains, call.n, call.k, tiles.shape[1], **call.constants(tile, activation),
            )  # fmt: skip
        return dx, *_parameter_gradients(call, grad, saved, activation, needs)


def _parameter_gradients(
    call: _Star, grad: Tensor, saved: Tensor, activation: str, needs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, k, num_domains = call.n, call.k, call.num_domains
    shapes = (n, k), (num_domains, n, k), (n,), (num_domains, n)
    found = [
        torch.empty(shape if needs & 2 << i else 0, dtype=call.weight.dtype, device=call.x.device)
        for i, shape in enumerate(shapes)
    ]
    need_w, need_b = bool(needs & 6) and n * k > 0, bool(needs & 24) and n > 0
    if not (need_w or need_b):
        return tuple(found)
    tile = call.pick(n, k, None, gradient=True)
    grid = cdiv(n, tile.m) * (cdiv(k, tile.n) if need_w else 1)
    chunks = max(1, min(_PROGRAMS // grid, cdiv(call.batch, _MIN_ROWS)))
    chunk_rows = max(1, cdiv(cdiv(call.batch, chunks), tile.k)) * tile.k
    tiles, begins = call.sorted.tiles(chunk_rows, num_domains)
    chunks = tiles.shape[1]
    partial = torch.empty((chunks, n, k) if need_w else 0, dtype=torch.float32, device=call.x.device)
    partial_bias = torch.empty((chunks, n) if need_b else 0, dtype=torch.float32, device=call.x.device)
    if chunks:
        sums_kernel[(grid, chunks)](
            grad, saved, call.x, call.sorted.order, tiles, partial, partial_bias,
            n, k if need_w else 0, chunks, call.x_strides[0],
            NEED_W=need_w, NEED_B=need_b, **call.constants(tile, activation),
        )  # fmt: skip
    block = 512
    for need, sums, shared, own, numel in (
        (need_w, partial, found[0], found[1], n * k),
        (need_b, partial_bias, found[2], found[3], n),
    ):
        if need:
            combine_kernel[(cdiv(numel, block),)](
                sums, begins, call.weight, call.own, shared, own, num_domains, numel,
                SCALE=sums is partial, NEED_SHARED=shared.numel() > 0, NEED_OWN=own.numel() > 0, BLOCK=block,
            )  # fmt: skip
    return tuple(found)
