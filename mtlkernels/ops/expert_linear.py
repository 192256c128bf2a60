"""expert_linear: a bank of linear layers as one batched GEMM, bias and activation in its epilogue."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import backend as _backend
from ..reference import expert_linear as _plain
from ._arguments import ACTIVATIONS, autocast, check_activation, check_dense, check_weight_dtype
from ._operator import Grads, Operator

_NAMES = {None: "", **{name: name for name in ACTIVATIONS}}


def expert_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    experts_per_unit: Sequence[int] | None = None,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """``Y[b,e,:] = act(W_e X[b,unit(e),:] + c_e)``: every expert's linear layer in one call.

    Args:
        x: [B,K], read by every expert, or [B,U,K], where unit u feeds the next ``experts_per_unit[u]`` experts.
            float64, float32, bfloat16 or float16; any strides.
        weight: [E,N,K], each slice as ``torch.nn.Linear`` stores it. x's dtype; under autocast, which takes x to 16
            bit, float32 weights enter as they are and their gradients stay float32.
        bias: [E,N] in weight's dtype.
        experts_per_unit: U counts that sum to E, for x [B,U,K] only; None is one expert a unit.
        activation: None, "relu", "gelu" (exact), "silu", "tanh" or "sigmoid".
        backend: "native", "triton", "reference"; None follows :func:`mtlkernels.use_backend`.

    Returns:
        [B,E,N] in x's dtype, summed in float32 (float64) and rounded once.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype or device does not fit; the message names it.
    """
    if not torch.compiler.is_compiling() and OPERATOR.goes_straight(x, backend):
        refused = None
        try:
            if weight.is_cpu and weight.dtype == x.dtype and (bias is None or bias.is_cpu):
                counts, name = None if experts_per_unit is None else list(experts_per_unit), _NAMES[activation]
                grad = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
                if grad and torch.is_grad_enabled():
                    return OPERATOR.differentiable(x, weight, bias, counts, name, name in _plain.NEED_INPUT)
                return OPERATOR.kernel(x, weight, bias, counts, name, False)
        except Exception as error:
            refused = error
        if refused is not None:
            try:
                _check(x, weight, bias, experts_per_unit, activation)
                raise refused
            finally:
                del refused  # its traceback holds this frame
    x = autocast(x)
    counts = _check(x, weight, bias, experts_per_unit, activation)
    name = activation or ""
    grad = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    which = _backend.choose("expert_linear", backend, x)
    save = grad and name in _plain.NEED_INPUT and torch.is_grad_enabled()
    return OPERATOR(which, grad, x, weight, bias, counts, name, save)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, experts_per_unit: Sequence[int] | None, activation: str | None
) -> list[int] | None:
    """Raises what does not fit; returns experts_per_unit as a list, or None where every unit has one expert."""
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))):
        raise TypeError("x, weight and bias must be tensors (bias may be None)")
    check_dense(x=x, weight=weight, bias=bias)
    xs, ws = x.shape, weight.shape
    if len(ws) != 3:
        raise ValueError(f"weight must be [E,N,K], three dimensions; got shape {tuple(ws)}")
    if len(xs) not in (2, 3):
        raise ValueError(f"x must be [B,K] or [B,U,K]; got shape {tuple(xs)}")
    if xs[-1] != ws[2]:
        raise ValueError(f"x has {xs[-1]} features in its last dimension, weight [E,N,K] expects K={ws[2]}")
    check_weight_dtype(x, weight)
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}, x on {x.device}: they must be on one device")
    if bias is not None:
        if bias.shape != ws[:2]:
            raise ValueError(f"bias must be [E,N] = {tuple(ws[:2])}; got shape {tuple(bias.shape)}")
        if bias.dtype != weight.dtype or bias.device != x.device:
            raise TypeError(f"bias is {bias.dtype} on {bias.device}, weight {weight.dtype} on {weight.device}")
    check_activation(activation)
    if experts_per_unit is None:
        if len(xs) == 3 and xs[1] != ws[0]:
            raise ValueError(
                f"x [B,U,K] has {xs[1]} units and weight {ws[0]} experts: give experts_per_unit, one count a unit"
            )
        return None
    counts, total = read_counts(experts_per_unit)
    if len(xs) != 3:
        raise ValueError("experts_per_unit goes with x [B,U,K]; x [B,K] is read by every expert")
    if len(counts) != xs[1]:
        raise ValueError(f"experts_per_unit has {len(counts)} counts, x [B,U,K] has {xs[1]} units")
    if total != ws[0] or (counts and min(counts) < 0):
        raise ValueError(f"experts_per_unit must be counts that sum to weight's {ws[0]} experts; got {counts}")
    return counts


def read_counts(experts_per_unit: Sequence[int]) -> tuple[list[int], int]:
    """experts_per_unit as a list, and its sum. Raises TypeError for anything but a sequence of ints."""
    try:
        counts = list(experts_per_unit)
        total = sum(counts)
    except TypeError:
        total = None
    if not isinstance(total, int):
        raise TypeError(f"experts_per_unit must be a sequence of ints; got {experts_per_unit!r}")
    return counts, total


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, experts_per_unit: list[int] | None, activation: str, save: bool
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape[0], weight.shape[0], weight.shape[1])
    return y, torch.empty_like(y) if save and activation in _plain.NEED_INPUT else x.new_empty(0)


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    saved: Tensor,
    experts_per_unit: list[int] | None,
    activation: str,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if needs & 1 else (0,)),
        weight.new_empty(weight.shape if needs & 2 else (0,)),
        weight.new_empty(weight.shape[:2] if needs & 4 else (0,)),
    )


def _remember(kernel: Callable) -> Callable[..., Tensor]:
    def forward(ctx, x, weight, bias, counts, activation, save) -> Tensor:
        y, z = kernel(x, weight, bias, counts, activation, save)
        ctx.save_for_backward(x, weight, bias, z if save else y)
        ctx.values = counts, activation, save
        return y

    return forward


def _keep(args: tuple, outputs: tuple) -> tuple[Tensor]:
    return (outputs[1] if args[5] else outputs[0],)


def _gradients(backward, args: tuple, kept: tuple[Tensor], needs: Sequence[bool], grads: Grads) -> Grads:
    x, weight, _, counts, activation, _ = args
    if grads[0] is None:
        return None, None, None
    wanted = needs[0] + 2 * needs[1] + 4 * needs[2]
    found = backward(grads[0], x, weight, *kept, counts, activation, wanted)
    return tuple(g if need else None for g, need in zip(found, needs, strict=True))


def _reference(x, weight, bias, experts_per_unit, activation, save) -> tuple[Tensor, Tensor]:
    return _plain.expert_linear(x, weight, bias, experts_per_unit, activation), x.new_empty(0)


OPERATOR = Operator(
    "expert_linear",
    num_tensors=3,
    schemas=(
        "(Tensor x, Tensor weight, Tensor? bias, int[]? experts_per_unit, str activation, bool save)"
        " -> (Tensor, Tensor)",
        "(Tensor grad, Tensor x, Tensor weight, Tensor saved, int[]? experts_per_unit, str activation, int needs)"
        " -> (Tensor, Tensor, Tensor)",
    ),
    fakes=(_forward_fake, _backward_fake),
    keep=_keep,
    gradients=_gradients,
    reference=_reference,
    predicates={
        # First on a GPU, until one has measured the two; auto never takes it on a CPU.
        "triton": _backend.triton_support,
        "native": _backend.native_support("expert_linear", on_gpu=True),
        "reference": _backend.reference_support,
    },
    remember=_remember,
    autocast=True,
)
