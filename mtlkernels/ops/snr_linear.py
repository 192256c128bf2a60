"""snr_linear: every pair of sub-networks its own linear layer, weighted by a connection variable and summed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backend as _backend
from ..reference import snr_linear as _plain
from ..reference.expert_linear import NEED_INPUT
from ._arguments import autocast, check_activation, check_dense, check_weight_dtype
from ._operator import Grads, Operator


def snr_linear(
    x: Tensor,
    weight: Tensor,
    gate: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    skip_closed: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``Y[b,i,:] = act(sum_j gate[i,j] W_ij x[b,j,:] + c_i)``: J sub-networks feed I, each pair through its own weight.

    Args:
        x: [B,J,K], float64, float32, bfloat16 or float16; any strides.
        weight: [I,J,N,K], each slice as ``torch.nn.Linear`` stores it. x's dtype; under autocast, which takes x to 16
            bit, float32 weights enter as they are and their gradients stay float32.
        gate: [I,J], the connection variables, such as :func:`hard_concrete` gives; float32 or x's dtype, under autocast
            or not.
        bias: [I,N] in weight's dtype.
        activation: None, "relu", "gelu" (exact), "silu", "tanh" or "sigmoid".
        skip_closed: a connection whose gate is exactly 0 is not read, costs nothing, and gets zero gradients, gate
            included. True of gates from hard_concrete, whose derivative is 0 there. Without, a gate of 0 gets its true
            derivative.
        backend: "native", "triton", "reference"; None follows :func:`mtlkernels.use_backend`.

    Returns:
        [B,I,N] in x's dtype, summed in float32 (float64) and rounded once; act(bias) where all gates are 0.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype or device does not fit; the message names it.

    SNR-Trans of Ma et al., AAAI 2019.
    """
    x = autocast(x)
    _check(x, weight, gate, bias, activation, skip_closed)
    name = activation or ""
    grad = x.requires_grad or weight.requires_grad or gate.requires_grad or (bias is not None and bias.requires_grad)
    which = _backend.choose("snr_linear", backend, x)
    save = grad and name in NEED_INPUT and torch.is_grad_enabled()
    return OPERATOR(which, grad, x, weight, gate, bias, name, skip_closed, save)


def _check(
    x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor | None, activation: str | None, skip_closed: bool
) -> None:
    for name, tensor in (("x", x), ("weight", weight), ("gate", gate), ("bias", bias)):
        if not isinstance(tensor, Tensor) and (name != "bias" or tensor is not None):
            raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
    check_dense(x=x, weight=weight, gate=gate, bias=bias)
    ws = weight.shape
    if len(ws) != 4:
        raise ValueError(f"weight must be [I,J,N,K], four dimensions; got shape {tuple(ws)}")
    if x.dim() != 3 or x.shape[1:] != (ws[1], ws[3]):
        raise ValueError(f"x must be [B,J,K] = [B, {ws[1]}, {ws[3]}], as weight [I,J,N,K]; got shape {tuple(x.shape)}")
    if gate.shape != ws[:2]:
        raise ValueError(f"gate must be [I,J] = {tuple(ws[:2])}; got shape {tuple(gate.shape)}")
    check_weight_dtype(x, weight)
    if gate.dtype not in (torch.float32, x.dtype):
        raise TypeError(f"gate must be float32 or x's dtype {x.dtype}; got {gate.dtype}")
    for name, tensor in (("weight", weight), ("gate", gate)):
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: they must be on one device")
    if bias is not None:
        if bias.shape != (ws[0], ws[2]):
            raise ValueError(f"bias must be [I,N] = {(ws[0], ws[2])}; got shape {tuple(bias.shape)}")
        if bias.dtype != weight.dtype or bias.device != x.device:
            raise TypeError(f"bias is {bias.dtype} on {bias.device}, weight {weight.dtype} on {weight.device}")
    check_activation(activation)
    if not isinstance(skip_closed, bool):
        raise TypeError(f"skip_closed must be a bool; got {skip_closed!r}")


def _forward_fake(
    x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor | None, activation: str, skip_closed: bool, save: bool
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape[0], weight.shape[0], weight.shape[2])
    return y, torch.empty_like(y) if save and activation in NEED_INPUT else x.new_empty(0)


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    gate: Tensor,
    saved: Tensor,
    activation: str,
    skip_closed: bool,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if needs & 1 else (0,)),
        weight.new_empty(weight.shape if needs & 2 else (0,)),
        gate.new_empty(gate.shape if needs & 4 else (0,)),
        weight.new_empty((weight.shape[0], weight.shape[2]) if needs & 8 else (0,)),
    )


def _keep(args: tuple, outputs: tuple) -> tuple[Tensor]:
    return (outputs[1] if args[6] and args[4] in NEED_INPUT else outputs[0],)


def _gradients(backward, args: tuple, kept: tuple[Tensor], needs: Sequence[bool], grads: Grads) -> Grads:
    x, weight, gate, _, activation, skip_closed, _ = args
    if grads[0] is None:
        return None, None, None, None
    wanted = sum(bit for bit, need in zip((1, 2, 4, 8), needs, strict=True) if need)
    found = backward(grads[0], x, weight, gate, *kept, activation, skip_closed, wanted)
    return tuple(g if need else None for g, need in zip(found, needs, strict=True))


def _reference(x, weight, gate, bias, activation, skip_closed, save) -> tuple[Tensor, Tensor]:
    return _plain.snr_linear(x, weight, gate, bias, activation, skip_closed), x.new_empty(0)


OPERATOR = Operator(
    "snr_linear",
    num_tensors=4,
    schemas=(
        "(Tensor x, Tensor weight, Tensor gate, Tensor? bias, str activation, bool skip_closed, bool save)"
        " -> (Tensor, Tensor)",
        "(Tensor grad, Tensor x, Tensor weight, Tensor gate, Tensor saved, str activation, bool skip_closed, int needs)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
    ),
    fakes=(_forward_fake, _backward_fake),
    keep=_keep,
    gradients=_gradients,
    reference=_reference,
    predicates={
        # First on a GPU, until one has measured the two; auto never takes it on a CPU.
        "triton": _backend.triton_support,
        "native": _backend.native_support("snr_linear", on_gpu=True),
        "reference": _backend.reference_support,
    },
    autocast=True,
)
