"""masked_bce: every task's mean cross entropy over its valid rows, value and gradient in one pass."""

from collections.abc import Sequence

from torch import Tensor

from .. import backend as _backend
from ..reference import masked_bce as _plain
from ..reference.expert_linear import accumulate_dtype
from ._operator import Grads, Operator
from ._targets import as_target, check_logits


def masked_bce(logits: Tensor, labels: Tensor, mask: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """``loss_t = sum_b mask[b,t] bce(logits[b,t], labels[b,t]) / sum_b mask[b,t]``: binary cross entropy with logits.

    Args:
        logits: [B,T], float64, float32, bfloat16 or float16; any strides.
        labels: [B,T] in [0, 1], soft ones too; bool, integer or floating point. They get no gradient.
        mask: [B,T], True where the row is valid for the task; or finite weights of at least 0, integer or floating
            point. None: every row is. Where it is 0 neither logits nor labels are read: they may be NaN.
        backend: "native", "triton", "reference"; None follows :func:`mtlkernels.use_backend`.

    Returns:
        [T] in float32 (float64 for float64). A task without a valid row has loss 0 and zero gradient.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype or device does not fit; the message names it.
        RuntimeError: from the native kernel on a CPU, a label outside [0, 1] that is not masked, a weight that is
            negative or not finite, or a task's sum of them that is not; the message says which. On a GPU and on the
            other backends such a label's place is NaN instead, and so is the task's loss; of such a weight or sum the
            whole task.

    Tang et al., RecSys 2020, section 4.3: each task's loss over its own sample space.
    """
    check_logits("logits", logits)
    if logits.dim() != 2:
        raise ValueError(f"logits must be [B,T]; got shape {tuple(logits.shape)}")
    labels = as_target("labels", labels, logits, "logits")
    if mask is not None:
        mask = as_target("mask", mask, logits, "logits")
    which = _backend.choose("masked_bce", backend, logits)
    return OPERATOR(which, logits.requires_grad, logits, labels, mask)


def _forward_fake(logits, labels, mask) -> tuple[Tensor, Tensor]:
    acc = accumulate_dtype(logits.dtype)
    return logits.new_empty(logits.shape[1], dtype=acc), logits.new_empty(logits.shape, dtype=acc)


def _backward_fake(grad, dlogits) -> Tensor:
    return dlogits.new_empty(dlogits.shape)


def _gradients(backward, args: tuple, kept: tuple[Tensor], needs: Sequence[bool], grads: Grads) -> Grads:
    if grads[0] is None or not needs[0]:
        return None, None, None
    # Rounded to the logits' dtype here, once, after the gradient from above, which may be a loss scale.
    return backward(grads[0], *kept).to(args[0].dtype), None, None


OPERATOR = Operator(
    "masked_bce",
    num_tensors=3,
    schemas=(
        "(Tensor logits, Tensor labels, Tensor? mask) -> (Tensor, Tensor)",
        "(Tensor grad, Tensor dlogits) -> Tensor",
    ),
    fakes=(_forward_fake, _backward_fake),
    keep=lambda args, outputs: outputs[1:],
    gradients=_gradients,
    reference=_plain.masked_bce,
    predicates={
        "native": _backend.native_support("masked_bce", on_gpu=True),
        "triton": _backend.triton_support,
        "reference": _backend.reference_support,
    },
)
