"""expert_mix in Triton: the experts' outputs of a tile live in registers between their product and the mix.

A program holds a tile [rows, columns of D] of the output for up to four tasks, and walks over the experts: their
product's tile, bias and activation, then one multiply-add a task. More tasks than that take further programs, which
compute the experts again; from _MOST_TASKS on, expert_linear and mix serve one after the other. Backward computes the
experts' outputs once more with expert_linear, and goes through mix's backward and expert_linear's.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.expert_mix import without_unused
from ..reference.mix import allowed_experts
from . import expert_linear as linear
from . import mix as mixing
from .config import ExpertMixConfig, cdiv, on_device, pick_expert_mix
from .expert_linear import _activate
from .mix import MAP_NONE, _routes, _static

# How an expert finds its rows of x; constexpr of the kernel.
INPUT_SHARED, INPUT_OWN, INPUT_MAP = 0, 1, 2


@triton.jit
def _softmax_row(
    logit_ptr, map_ptr, lse_ptr, b, in_rows, t, B, T, E, logit_b, logit_t, first,
    LOGITS: tl.constexpr, MAP: tl.constexpr,
):  # fmt: skip
    """Largest logit and one over the sum of exponentials of output row t, [rows]; stores the logsumexp if `first`."""
    top = tl.full(b.shape, float("-inf"), tl.float32)
    total = tl.zeros(b.shape, tl.float32)
    if LOGITS:
        row = logit_ptr + b * logit_b + t.to(tl.int64) * logit_t
        for e in range(0, E):
            allowed, column = _routes(map_ptr, t, e, T, E, MAP)
            logit = tl.load(row + column, mask=in_rows & allowed, other=float("-inf")).to(tl.float32)
            new_top = tl.maximum(top, logit)
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            total = total * tl.exp(top - base) + tl.exp(logit - base)
            top = new_top
        top = tl.where(top == float("-inf"), 0.0, top)
        tl.store(lse_ptr + b * T + t, top + tl.log(total), mask=in_rows & (t < T) & first)
    return top, 1.0 / total


@triton.jit
def _add_task(
    acc, h, top, inverse, logit_ptr, static_ptr, map_ptr, b, in_rows, t, e, T, E, logit_b, logit_t, static_t,
    LOGITS: tl.constexpr, STATIC: tl.constexpr, MAP: tl.constexpr,
):  # fmt: skip
    """acc + a * h, where a is output row t's weight of expert e."""
    allowed, column = _routes(map_ptr, t, e, T, E, MAP)
    a = tl.zeros(b.shape, tl.float32)
    if LOGITS:
        place = logit_ptr + b * logit_b + t.to(tl.int64) * logit_t + column
        logit = tl.load(place, mask=in_rows & allowed, other=float("-inf")).to(tl.float32)
        a = tl.where(allowed, tl.exp(logit - top) * inverse, 0.0)
    if STATIC != 0:
        a += _static(static_ptr, static_t, t, e, column, allowed, t, t, STATIC)
    if MAP != 0:
        acc += tl.where(allowed, a[:, None] * h, 0.0)  # selected, since 0 * NaN is NaN
    else:
        acc += a[:, None] * h
    return acc


@triton.jit(do_not_specialize=["B"])
def forward_kernel(
    x_ptr, w_ptr, bias_ptr, unit_ptr, logit_ptr, static_ptr, map_ptr, out_ptr, lse_ptr,
    B, T, E, D, K, x_b, x_u, logit_b, logit_t, static_t,
    INPUT: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    LOGITS: tl.constexpr, STATIC: tl.constexpr, MAP: tl.constexpr, TASKS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, EVEN_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [BM, TASKS tasks, BN] of all experts, and lse; grid (tiles of B, tiles of D, chunks of TASKS)."""
    row0 = tl.program_id(0).to(tl.int64) * BM
    column0 = tl.program_id(1) * BN
    t0 = tl.program_id(2) * TASKS
    b = row0 + tl.arange(0, BM)
    d = column0 + tl.arange(0, BN)
    k = tl.arange(0, BK)
    in_rows = b < B
    in_columns = d < D
    first = tl.program_id(1) == 0
    top0, inverse0 = _softmax_row(logit_ptr, map_ptr, lse_ptr, b, in_rows, t0, B, T, E, logit_b, logit_t, first,
                                  LOGITS, MAP)  # fmt: skip
    acc0 = tl.zeros([BM, BN], tl.float32)
    if TASKS > 1:
        top1, inverse1 = _softmax_row(logit_ptr, map_ptr, lse_ptr, b, in_rows, t0 + 1, B, T, E, logit_b, logit_t, first,
                                      LOGITS, MAP)  # fmt: skip
        acc1 = tl.zeros([BM, BN], tl.float32)
    if TASKS > 2:
        top2, inverse2 = _softmax_row(logit_ptr, map_ptr, lse_ptr, b, in_rows, t0 + 2, B, T, E, logit_b, logit_t, first,
                                      LOGITS, MAP)  # fmt: skip
        acc2 = tl.zeros([BM, BN], tl.float32)
        top3, inverse3 = _softmax_row(logit_ptr, map_ptr, lse_ptr, b, in_rows, t0 + 3, B, T, E, logit_b, logit_t, first,
                                      LOGITS, MAP)  # fmt: skip
        acc3 = tl.zeros([BM, BN], tl.float32)
    x_expert = x_ptr + b[:, None] * x_b + k[None, :]
    w_expert = w_ptr + d[None, :].to(tl.int64) * K + k[:, None]
    bias = bias_ptr + d
    for e in range(0, E):
        x = x_expert
        if INPUT == 2:
            x += tl.load(unit_ptr + e).to(tl.int64) * x_u
        w = w_expert
        z = tl.zeros([BM, BN], tl.float32)
        for k0 in range(0, K, BK):
            if EVEN_K:
                x_tile = tl.load(x, mask=in_rows[:, None], other=0)
                w_tile = tl.load(w, mask=in_columns[None, :], other=0)
            else:
                x_tile = tl.load(x, mask=in_rows[:, None] & (k0 + k[None, :] < K), other=0)
                w_tile = tl.load(w, mask=in_columns[None, :] & (k0 + k[:, None] < K), other=0)
            w_tile = w_tile.to(x_ptr.dtype.element_ty)
            if UPCAST:
                x_tile = x_tile.to(tl.float32)
                w_tile = w_tile.to(tl.float32)
            z = tl.dot(x_tile, w_tile, z, input_precision=PRECISION)
            x += BK
            w += BK
        if BIAS:
            z += tl.load(bias, mask=in_columns, other=0).to(tl.float32)[None, :]
        h = _activate(z, ACTIVATION)
        acc0 = _add_task(acc0, h, top0, inverse0, logit_ptr, static_ptr, map_ptr, b, in_rows, t0, e, T, E,
                         logit_b, logit_t, static_t, LOGITS, STATIC, MAP)  # fmt: skip
        if TASKS > 1:
            acc1 = _add_task(acc1, h, top1, inverse1, logit_ptr, static_ptr, map_ptr, b, in_rows, t0 + 1, e, T, E,
                             logit_b, logit_t, static_t, LOGITS, STATIC, MAP)  # fmt: skip
        if TASKS > 2:
            acc2 = _add_task(acc2, h, top2, inverse2, logit_ptr, static_ptr, map_ptr, b, in_rows, t0 + 2, e, T, E,
                             logit_b, logit_t, static_t, LOGITS, STATIC, MAP)  # fmt: skip
            acc3 = _add_task(acc3, h, top3, inverse3, logit_ptr, static_ptr, map_ptr, b, in_rows, t0 + 3, e, T, E,
                             logit_b, logit_t, static_t, LOGITS, STATIC, MAP)  # fmt: skip
        w_expert += D * K
        bias += D
        if INPUT == 1:
            x_expert += x_u
    inside = in_rows[:, None] & in_columns[None, :]
    out = out_ptr + (b[:, None] * T + t0) * D + d[None, :]
    dtype = out_ptr.dtype.element_ty
    tl.store(out, acc0.to(dtype), mask=inside)
    if TASKS > 1:
        tl.store(out + D, acc1.to(dtype), mask=inside & (t0 + 1 < T))
    if TASKS > 2:
        tl.store(out + 2 * D, acc2.to(dtype), mask=inside & (t0 + 2 < T))
        tl.store(out + 3 * D, acc3.to(dtype), mask=inside & (t0 + 3 < T))


INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)
_MOST_TASKS = 8  # two chunks of four: the product is computed twice


@lru_cache(maxsize=256)
def _units(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [E]: the unit of x that each expert reads."""
    return torch.tensor([u for u, n in enumerate(counts) for _ in range(n)], dtype=torch.int32, device=device)


def expert_mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    static: Tensor | None,
    mask: Tensor | None,
    columns: Tensor | None,
    experts_per_unit: Sequence[int] | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """``O[b,t,:] = sum_e (softmax(logits) + static)[b,t,e] act(W_e x[b,unit(e),:] + c_e)``.

    Args:
        x, weight, bias, experts_per_unit, activation: as in :func:`.expert_linear.expert_linear`.
        logits, static, mask, columns: as in :func:`.mix.mix`; no static [T,E,D].

    Returns:
        out [B,T,D] in x's dtype, lse [B,T] float32 (empty without logits).
    """
    call = linear._Call(x, weight, experts_per_unit)
    # mix's view of the call, its strides and maps; the experts' outputs do not exist.
    gates = mixing._Call(x.new_empty(call.batch, call.experts, 0), logits, static, mask, columns, None)
    tasks = gates.num_rows
    if tasks > _MOST_TASKS:
        h, _ = linear.expert_linear(x, weight, bias, experts_per_unit, activation, False)
        return mixing.mix(h, logits, static, mask, columns, None)
    out = torch.empty((call.batch, tasks, call.n), dtype=x.dtype, device=x.device)
    lse = torch.empty((0,) if logits is None else (call.batch, tasks), dtype=torch.float32, device=x.device)
    if out.numel() + lse.numel() == 0:
        return out, lse
    tile = pick_expert_mix(tasks, call.n, x.element_size(), call.tensor_cores, call.arch)
    shape, units = INPUT_SHARED, call.x
    if x.dim() == 3:
        shape = INPUT_OWN
        if experts_per_unit is not None and any(n != 1 for n in experts_per_unit):
            shape, units = INPUT_MAP, _units(tuple(experts_per_unit), x.device)
    grid = (
        cdiv(call.batch, tile.m),
        max(1, cdiv(call.n, tile.n)),
        cdiv(tasks, tile.tasks),
    )
    given = call.x  # where there is nothing to point at, unread
    with on_device(x):
        forward_kernel[grid](
            call.x, call.weight, given if bias is None else bias.contiguous(), units,
            given if logits is None else gates.logits, given if static is None else gates.static,
            given if gates.map_kind == MAP_NONE else gates.map, out, lse,
            call.batch, tasks, call.experts, call.n, call.k, *call.x_strides, *gates.logit_strides, gates.static_row,
            INPUT=shape, BIAS=bias is not None, ACTIVATION=activation, LOGITS=logits is not None,
            STATIC=gates.static_kind, MAP=gates.map_kind, **_constants(tile, call),
        )  # fmt: skip
    return out, lse


def _constants(tile: ExpertMixConfig, call: linear._Call) -> dict:
    return dict(
        TASKS=tile.tasks, PRECISION=call.precision, UPCAST=call.upcast, EVEN_K=call.k % tile.k == 0,
        BM=tile.m, BN=tile.n, BK=tile.k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def expert_mix_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    static: Tensor | None,
    mask: Tensor | None,
    columns: Tensor | None,
    experts_per_unit: Sequence[int] | None,
    activation: str,
    lse: Tensor,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`expert_mix`; the experts' outputs, and their gradient, exist while it runs.

    Args:
        grad: [B,T,D], any strides.
        grad_lse: gradient of lse, or None.
        lse: as returned by :func:`expert_mix`.
        needs: bits 1 dx, 2 dweight, 4 dbias, 8 dlogits, 16 dstatic.

    Returns:
        Gradients in the dtype and shape of x, weight, bias, logits and static; one that is not needed has shape [0].
    """
    weight, bias = without_unused(weight, bias, allowed_experts(mask, columns))
    saves = activation in linear.SAVES_INPUT
    h, z = linear.expert_linear(x, weight, bias, experts_per_unit, activation, True)
    products = needs & 7
    if bias is None:
        products &= 3
    wanted = bool(products) + 2 * bool(needs & 8 and logits is not None) + 4 * bool(needs & 16 and static is not None)
    dh, dlogits, dstatic = mixing.mix_backward(grad, grad_lse, h, logits, static, mask, columns, None, lse, wanted)
    empty = x.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    found = empty
    if products:
        saved = z if saves else h
        found = linear.expert_linear_backward(dh, x, weight, saved, experts_per_unit, activation, products)
    return *found, dlogits, dstatic
