"""hard_concrete and its L0 penalty in Triton. One number a connection: what counts is that each is a single launch.

The constants are compile-time ones: they are hyperparameters, and float arguments of a kernel may arrive as float64.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.hard_concrete import NOISE_MAX, NOISE_MIN
from .config import cdiv, on_device

BLOCK = 256


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def sample_kernel(
    phi_ptr, noise_ptr, z_ptr, s_ptr, n,
    SAMPLED: tl.constexpr, BETA: tl.constexpr, GAMMA: tl.constexpr, ZETA: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    phi = tl.load(phi_ptr + at, mask=at < n, other=0).to(tl.float32)
    if SAMPLED:
        noise = tl.load(noise_ptr + at, mask=at < n, other=0.5).to(tl.float32)
        noise = tl.where(noise < LOW, LOW, tl.where(noise > HIGH, HIGH, noise))  # a NaN stays one
        phi = (tl.log(noise) - tl.log(1.0 - noise) + phi) / BETA
    s = _sigmoid(phi)
    stretched = s * (ZETA - GAMMA) + GAMMA
    z = tl.where(stretched < 0, 0.0, tl.where(stretched > 1, 1.0, stretched))
    tl.store(s_ptr + at, s, mask=at < n)
    tl.store(z_ptr + at, z.to(z_ptr.dtype.element_ty), mask=at < n)


@triton.jit
def backward_kernel(
    grad_ptr, s_ptr, out_ptr, n, SCALE: tl.constexpr, GAMMA: tl.constexpr, ZETA: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    s = tl.load(s_ptr + at, mask=at < n, other=0)
    grad = tl.load(grad_ptr + at, mask=at < n, other=0).to(tl.float32)
    stretched = s * (ZETA - GAMMA) + GAMMA
    dphi = tl.where((stretched <= 0) | (stretched >= 1), 0.0, grad * SCALE * s * (1.0 - s))
    tl.store(out_ptr + at, dphi.to(out_ptr.dtype.element_ty), mask=at < n)


@triton.jit
def l0_kernel(phi_ptr, total_ptr, slope_ptr, n, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """One program, so that the sum has one order."""
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(phi_ptr + at, mask=at < n, other=0).to(tl.float32) - SHIFT
        is_open = _sigmoid(x)
        sums += tl.where(at < n, is_open, 0.0)
        tl.store(slope_ptr + at, is_open * _sigmoid(-x), mask=at < n)
    tl.store(total_ptr, tl.sum(sums, 0))


def hard_concrete(
    log_alpha: Tensor, noise: Tensor | None, beta: float, gamma: float, zeta: float
) -> tuple[Tensor, Tensor]:
    """z in log_alpha's dtype and s in float32, both contiguous; float32, bfloat16 or float16, any noise dtype."""
    phi = log_alpha.contiguous()
    noise_at = phi if noise is None else noise.to(torch.float32).contiguous()
    z = torch.empty(phi.shape, dtype=phi.dtype, device=phi.device)
    s = torch.empty(phi.shape, dtype=torch.float32, device=phi.device)
    n = phi.numel()
    if n:
        with on_device(phi):
            sample_kernel[(cdiv(n, BLOCK),)](
                phi, noise_at, z, s, n, SAMPLED=noise is not None, BETA=beta, GAMMA=gamma, ZETA=zeta,
                LOW=NOISE_MIN, HIGH=NOISE_MAX, BLOCK=BLOCK,
            )  # fmt: skip
    return z, s


def hard_concrete_backward(grad: Tensor, s: Tensor, beta: float, gamma: float, zeta: float, sampled: bool) -> Tensor:
    """The gradient of log_alpha, in grad's dtype; 0 where z is 0 or 1."""
    grad, s = grad.contiguous(), s.contiguous()
    out = torch.empty(s.shape, dtype=grad.dtype, device=grad.device)
    n = s.numel()
    if n:
        scale = (zeta - gamma) / beta if sampled else zeta - gamma
        with on_device(s):
            backward_kernel[(cdiv(n, BLOCK),)](grad, s, out, n, SCALE=scale, GAMMA=gamma, ZETA=zeta, BLOCK=BLOCK)
    return out


def hard_concrete_l0(log_alpha: Tensor, beta: float, gamma: float, zeta: float) -> tuple[Tensor, Tensor]:
    """The expected number of open connections, a scalar, and its gradient for each; both float32."""
    phi = log_alpha.contiguous()
    total = torch.empty((), dtype=torch.float32, device=phi.device)
    slope = torch.empty(phi.shape, dtype=torch.float32, device=phi.device)
    with on_device(phi):
        l0_kernel[(1,)](phi, total, slope, phi.numel(), SHIFT=beta * math.log(-gamma / zeta), BLOCK=BLOCK)
    return total, slope


def hard_concrete_l0_backward(grad: Tensor, slope: Tensor) -> Tensor:
    """One multiplication, which torch's own kernel does as well."""
    return slope * grad
