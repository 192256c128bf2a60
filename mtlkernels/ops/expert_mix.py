"""expert_mix: a bank of experts and the mix of their outputs in one pass; the outputs [B,E,D] never reach memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backend as _backend
from ..reference import expert_mix as _plain
from ._arguments import autocast, check_dense
from ._operator import Grads, Operator
from .expert_linear import _check as _check_linear
from .mix import _check as _check_mix
from .mix import _num_rows
from .routes import Routes


def expert_mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    logits: Tensor | None = None,
    static: Tensor | None = None,
    *,
    experts_per_unit: Sequence[int] | None = None,
    mask: Tensor | None = None,
    routes: Routes | None = None,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """``O[b,t,:] = sum_e (softmax(logits) + static)[b,t,e] act(W_e x[b,unit(e),:] + c_e)``.

    What :func:`expert_linear` and :func:`mix` give one after the other, without the experts' outputs in between; these
    are not rounded, and an expert that no row may use is left out altogether. Where a gradient is wanted, a CPU keeps
    them once, in x's dtype, for to compute them again costs more there than to read them; a GPU's kernels compute them
    again. For more than eight rows T these round them: the CUDA C++ ones then go through slabs of the batch, the Triton
    ones take the two operators one after the other.

    Args:
        x: [B,K], read by every expert, or [B,U,K]; as in :func:`expert_linear`.
        weight: [E,D,K], as in :func:`expert_linear`, also under autocast.
        bias: [E,D] in weight's dtype.
        logits: [B,T,E], or packed [B,R] with routes; as in :func:`mix`.
        static: [T,E], or packed [R] with routes. A weight a channel, [T,E,D], is refused: use mix for it.
        experts_per_unit: as in :func:`expert_linear`.
        mask, routes: as in :func:`mix`.
        activation: None, "relu", "gelu" (exact), "silu", "tanh" or "sigmoid".
        backend: "native", "triton", "reference"; None follows :func:`mtlkernels.use_backend`.

    Returns:
        [B,T,D] in x's dtype; everything in float32 (float64 for float64), rounded once.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype or device does not fit; the message names it.
    """
    x = autocast(x)
    counts = _check_linear(x, weight, bias, experts_per_unit, activation)
    columns = None
    if routes is not None:
        if mask is not None:
            raise ValueError("give mask or routes, not both")
        if not isinstance(routes, Routes):
            raise TypeError(f"routes must be a mtlkernels.Routes; got {type(routes).__name__}")
        columns = routes.columns
        if columns.device != x.device:
            raise ValueError(f"routes is on {columns.device}, x on {x.device}: use routes.to(device)")
    check_dense(logits=logits, static=static, mask=mask)
    if isinstance(static, Tensor) and static.dim() == 3:
        raise ValueError("static must be [T,E], or packed [R] with routes; a weight a channel, [T,E,D], is not fused: "
                         f"call mix on expert_linear's output; got shape {tuple(static.shape)}")  # fmt: skip
    # The experts' outputs, were they there: their shape, dtype and device are what the other arguments must fit.
    outputs = x.new_empty(()).expand(x.shape[0], *weight.shape[:2])
    _check_mix(outputs, logits, static, mask, routes)
    grad = any(t is not None and t.requires_grad for t in (x, weight, bias, logits, static))
    which = _backend.choose("expert_mix", backend, x)
    operator = SAVING if which == "native" and x.is_cpu and grad and torch.is_grad_enabled() else OPERATOR
    return operator(which, grad, x, weight, bias, logits, static, mask, columns, counts, activation or "")


def _forward_fake(
    x, weight, bias, logits, static, mask, columns, experts_per_unit, activation
) -> tuple[Tensor, Tensor]:
    rows = _num_rows(logits, static, mask, columns)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = x.new_empty(x.shape[0], rows, weight.shape[1])
    return out, x.new_empty((0,) if logits is None else (x.shape[0], rows), dtype=acc)


def _backward_fake(
    grad, grad_lse, x, weight, bias, logits, static, mask, columns, experts_per_unit, activation, lse, needs
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(tensor: Tensor | None, bit: int, otherwise: Tensor) -> Tensor:
        return tensor.new_empty(tensor.shape) if tensor is not None and needs & bit else otherwise.new_empty(0)

    return (
        like(x, 1, x),
        like(weight, 2, weight),
        like(bias, 4, weight),
        like(logits, 8, x),
        like(static, 16, x),
    )


def _saving_fake(
    x, weight, bias, logits, static, mask, columns, experts_per_unit, activation
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _forward_fake(x, weight, bias, logits, static, mask, columns, experts_per_unit, activation)
    return *outputs, x.new_empty(x.shape[0], *weight.shape[:2])


def _gradients(backward, args: tuple, kept: tuple[Tensor], needs: Sequence[bool], grads: Grads) -> Grads:
    x, weight, _, logits, static, mask, columns, _, _ = args
    grad, grad_lse = grads[:2]
    if grad is None and grad_lse is None:
        return (None,) * 7
    if grad is None:
        grad = x.new_zeros(x.shape[0], _num_rows(logits, static, mask, columns), weight.shape[1])
    wanted = sum(bit for bit, need in zip((1, 2, 4, 8, 16), needs, strict=False) if need)
    found = backward(grad, grad_lse, *args, *kept, wanted)
    return (*(g if need else None for g, need in zip(found, needs, strict=False)), None, None)


_ARGUMENTS = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? logits, Tensor? static, Tensor? mask, Tensor? columns,"
    " int[]? experts_per_unit, str activation)"
)
_BACKWARD_ARGUMENTS = "(Tensor grad, Tensor? grad_lse, " + _ARGUMENTS[1:-1] + ", Tensor {}, int needs)"
_GRADIENTS = " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
_PREDICATES = {
    # First on a GPU, until one has measured the two; auto never takes it on a CPU.
    "triton": _backend.triton_support,
    "native": _backend.native_support("expert_mix", on_gpu=True),
    "reference": _backend.reference_support,
}

OPERATOR = Operator(
    "expert_mix",
    num_tensors=7,
    schemas=(_ARGUMENTS + " -> (Tensor, Tensor)", _BACKWARD_ARGUMENTS.format("lse") + _GRADIENTS),
    fakes=(_forward_fake, _backward_fake),
    keep=lambda args, outputs: (outputs[1],),
    gradients=_gradients,
    reference=_plain.expert_mix,
    predicates=_PREDICATES,
    autocast=True,
)

# The same for the CPU's training step: one output more, the experts' outputs, for backward to read.
SAVING = Operator(
    "expert_mix_saving",
    num_tensors=7,
    schemas=(_ARGUMENTS + " -> (Tensor, Tensor, Tensor)", _BACKWARD_ARGUMENTS.format("saved") + _GRADIENTS),
    fakes=(_saving_fake, _backward_fake),
    keep=lambda args, outputs: (outputs[2],),
    gradients=_gradients,
    reference=lambda x, *args: (*_plain.expert_mix(x, *args), x.new_empty(0)),
    predicates={
        "triton": lambda case: _backend.Support(False, "Triton computes the experts again"),
        "native": _backend.native_support("expert_mix_saving", on_gpu=False),
        "reference": _backend.reference_support,
    },
    public=(),
)
