"""hard_concrete: the connection variables of sub-network routing, and the expected number of open connections."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backend as _backend
from ..reference import hard_concrete as _plain
from ._arguments import FLOATS, check_dense
from ._operator import Grads, Operator


def hard_concrete(
    log_alpha: Tensor,
    noise: Tensor | None = None,
    *,
    beta: float = 2 / 3,
    gamma: float = -0.1,
    zeta: float = 1.1,
) -> Tensor:
    """Connection variables in [0, 1] that are exactly 0 or 1 with a probability that can be learned.

    With noise, a sample to train with: ``s = sigmoid((log(noise) - log(1 - noise) + log_alpha) / beta)``. Without, the
    estimator for serving: ``s = sigmoid(log_alpha)``, without beta. Both are stretched and cut off:
    ``z = min(1, max(0, s (zeta - gamma) + gamma))``. The derivative is 0 where z is 0 or 1.

    Args:
        log_alpha: any shape; float64, float32, bfloat16 or float16.
        noise: uniform in (0, 1), of log_alpha's shape, any of these dtypes; clamped to [1e-6, 1 - 1e-6]. Draw it anew
            for every step, in float32 at least, and alike on data-parallel replicas. It gets no gradient.
        beta: temperature, above 0.
        gamma, zeta: what (0, 1) is stretched to; gamma below 0, zeta above 1.

    Returns:
        z, like log_alpha; computed in float32 (float64) and rounded once.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype, device or range does not fit; the message names it.

    Louizos et al., ICLR 2018, eq. 10 to 13; for connections between sub-networks Ma et al., AAAI 2019 (SNR).
    """
    constants = _check(log_alpha, beta, gamma, zeta)
    if noise is not None:
        if not isinstance(noise, Tensor):
            raise TypeError(f"noise must be a tensor; got {type(noise).__name__}")
        check_dense(noise=noise)
        if noise.dtype not in FLOATS:
            raise TypeError(f"noise must be float64, float32, bfloat16 or float16; got {noise.dtype}")
        if noise.shape != log_alpha.shape:
            raise ValueError(
                f"noise must have log_alpha's shape {tuple(log_alpha.shape)}; got shape {tuple(noise.shape)}"
            )
        if noise.device != log_alpha.device:
            raise ValueError(f"noise is on {noise.device}, log_alpha on {log_alpha.device}: they must be on one device")
    which = _backend.choose("hard_concrete", None, log_alpha)
    return OPERATOR(which, log_alpha.requires_grad, log_alpha, noise, *constants)


def hard_concrete_l0(log_alpha: Tensor, *, beta: float = 2 / 3, gamma: float = -0.1, zeta: float = 1.1) -> Tensor:
    """The expected number of connections that :func:`hard_concrete` leaves open, to be penalised.

    ``sum Pr(z != 0) = sum sigmoid(log_alpha - beta log(-gamma / zeta))``; arguments and errors as there.

    Returns:
        A scalar, float32 (float64 for float64); 0 of no connections.

    Louizos et al., ICLR 2018, eq. 12.
    """
    constants = _check(log_alpha, beta, gamma, zeta)
    which = _backend.choose("hard_concrete_l0", None, log_alpha)
    return L0_OPERATOR(which, log_alpha.requires_grad, log_alpha, *constants)


def _check(log_alpha: Tensor, beta: float, gamma: float, zeta: float) -> tuple[float, float, float]:
    """Raises what does not fit; returns the constants as floats."""
    if not isinstance(log_alpha, Tensor):
        raise TypeError(f"log_alpha must be a tensor; got {type(log_alpha).__name__}")
    check_dense(log_alpha=log_alpha)
    if log_alpha.dtype not in FLOATS:
        raise TypeError(f"log_alpha must be float64, float32, bfloat16 or float16; got {log_alpha.dtype}")
    for name, value in (("beta", beta), ("gamma", gamma), ("zeta", zeta)):
        if isinstance(value, (bool, Tensor)) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a float; got {value!r}")
    if not (0 < beta < math.inf):
        raise ValueError(f"beta must be above 0 and finite; got {beta}")
    if not (-math.inf < gamma < 0):
        raise ValueError(f"gamma must be below 0 and finite; got {gamma}")
    if not (1 < zeta < math.inf):
        raise ValueError(f"zeta must be above 1 and finite; got {zeta}")
    return float(beta), float(gamma), float(zeta)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _forward_fake(log_alpha, noise, beta, gamma, zeta) -> tuple[Tensor, Tensor]:
    return log_alpha.new_empty(log_alpha.shape), log_alpha.new_empty(log_alpha.shape, dtype=_wide(log_alpha))


def _backward_fake(grad, s, beta, gamma, zeta, sampled) -> Tensor:
    return grad.new_empty(s.shape)


def _gradients(backward, args: tuple, kept: tuple[Tensor], needs: Sequence[bool], grads: Grads) -> Grads:
    _, noise, beta, gamma, zeta = args
    if grads[0] is None or not needs[0]:
        return None, None
    return backward(grads[0], *kept, beta, gamma, zeta, noise is not None), None


def _l0_fake(log_alpha, beta, gamma, zeta) -> tuple[Tensor, Tensor]:
    wide = _wide(log_alpha)
    return log_alpha.new_empty((), dtype=wide), log_alpha.new_empty(log_alpha.shape, dtype=wide)


def _l0_backward_fake(grad, slope) -> Tensor:
    return slope.new_empty(slope.shape)


def _l0_gradients(backward, args: tuple, kept: tuple[Tensor], needs: Sequence[bool], grads: Grads) -> Grads:
    return (None if grads[0] is None else backward(grads[0], *kept).to(args[0].dtype),)


def _predicates(op: str) -> dict[str, _backend.Predicate]:
    return {
        "native": _backend.native_support(op, on_gpu=True),
        "triton": _backend.triton_support,
        "reference": _backend.reference_support,
    }


OPERATOR = Operator(
    "hard_concrete",
    num_tensors=2,
    schemas=(
        "(Tensor log_alpha, Tensor? noise, float beta, float gamma, float zeta) -> (Tensor, Tensor)",
        "(Tensor grad, Tensor s, float beta, float gamma, float zeta, bool sampled) -> Tensor",
    ),
    fakes=(_forward_fake, _backward_fake),
    keep=lambda args, outputs: (outputs[1],),
    gradients=_gradients,
    reference=_plain.hard_concrete,
    predicates=_predicates("hard_concrete"),
)

L0_OPERATOR = Operator(
    "hard_concrete_l0",
    num_tensors=1,
    schemas=(
        "(Tensor log_alpha, float beta, float gamma, float zeta) -> (Tensor, Tensor)",
        "(Tensor grad, Tensor slope) -> Tensor",
    ),
    fakes=(_l0_fake, _l0_backward_fake),
    keep=lambda args, outputs: (outputs[1],),
    gradients=_l0_gradients,
    reference=_plain.hard_concrete_l0,
    predicates=_predicates("hard_concrete_l0"),
)
