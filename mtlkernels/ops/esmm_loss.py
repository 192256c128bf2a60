"""esmm_loss: the loss of the entire-space multi-task model, its value and both gradients in one pass."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backend as _backend
from ..reference import esmm_loss as _plain
from ..reference.expert_linear import accumulate_dtype
from ._operator import Grads, Operator
from ._targets import as_target, check_logits


def esmm_loss(
    ctr_logit: Tensor,
    cvr_logit: Tensor,
    click: Tensor,
    conversion: Tensor,
    *,
    ctcvr_weight: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Cross entropy of the click, plus that of click and conversion, mean over all impressions.

    With pCTR = sigmoid(ctr_logit), pCVR = sigmoid(cvr_logit) and w = click * conversion, a row's loss is
    ``bce(pCTR, click) + ctcvr_weight * bce(pCTR * pCVR, w)``, computed from logarithms: finite, and right to a few
    units in the last place of 1 + loss, for any finite logits.

    Args:
        ctr_logit, cvr_logit: logits of one shape, any, and one dtype: float64, float32, bfloat16 or float16.
        click, conversion: labels of the same shape in [0, 1], soft ones too; bool, integer or floating point. A row
            without a click has no conversion. They get no gradient.
        ctcvr_weight: weight of the second term, at least 0.
        backend: "native", "triton", "reference"; None follows :func:`mtlkernels.use_backend`.

    Returns:
        The loss, a scalar in float32 (float64 for float64): 0 with zero gradient for no rows at all.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype or device does not fit; the message names it.
        RuntimeError: from the native kernel on a CPU, a label outside [0, 1] or a conversion without a click; the
            message names the row. On a GPU and on the other backends that row is NaN instead, and so is the loss.

    Ma et al., SIGIR 2018, eq. 1 to 3.
    """
    check_logits("ctr_logit", ctr_logit)
    check_logits("cvr_logit", cvr_logit)
    if cvr_logit.shape != ctr_logit.shape or cvr_logit.device != ctr_logit.device:
        raise ValueError(f"cvr_logit must be like ctr_logit, {tuple(ctr_logit.shape)} on {ctr_logit.device}; "
                         f"got {tuple(cvr_logit.shape)} on {cvr_logit.device}")  # fmt: skip
    if cvr_logit.dtype != ctr_logit.dtype:
        raise TypeError(f"cvr_logit must have ctr_logit's dtype {ctr_logit.dtype}; got {cvr_logit.dtype}")
    click = as_target("click", click, ctr_logit, "ctr_logit")
    conversion = as_target("conversion", conversion, ctr_logit, "ctr_logit")
    if isinstance(ctcvr_weight, bool) or not isinstance(ctcvr_weight, (int, float)):
        raise TypeError(f"ctcvr_weight must be a number; got {type(ctcvr_weight).__name__}")
    if not 0 <= ctcvr_weight < math.inf:
        raise ValueError(f"ctcvr_weight must be finite and at least 0; got {ctcvr_weight}")
    grad = ctr_logit.requires_grad or cvr_logit.requires_grad
    rows = ctr_logit, cvr_logit, click, conversion
    if ctr_logit.dim() != 1:
        rows = tuple(t.flatten() for t in rows)
    return OPERATOR(_backend.choose("esmm_loss", backend, ctr_logit), grad, *rows, float(ctcvr_weight))


def _forward_fake(ctr_logit, cvr_logit, click, conversion, ctcvr_weight) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulate_dtype(ctr_logit.dtype)
    loss, dctr = ctr_logit.new_empty((), dtype=acc), ctr_logit.new_empty(ctr_logit.shape, dtype=acc)
    return loss, dctr, torch.empty_like(dctr)


def _backward_fake(grad, dctr, dcvr) -> tuple[Tensor, Tensor]:
    return dctr.new_empty(dctr.shape), dcvr.new_empty(dcvr.shape)


def _gradients(backward, args: tuple, kept: tuple[Tensor, Tensor], needs: Sequence[bool], grads: Grads) -> Grads:
    if grads[0] is None:
        return None, None, None, None
    found = backward(grads[0], *kept)
    # Rounded to the logits' dtype here, once, after the gradient from above, which may be a loss scale.
    return (*(g.to(args[0].dtype) if need else None for g, need in zip(found, needs[:2], strict=True)), None, None)


OPERATOR = Operator(
    "esmm_loss",
    num_tensors=4,
    schemas=(
        "(Tensor ctr_logit, Tensor cvr_logit, Tensor click, Tensor conversion, float ctcvr_weight)"
        " -> (Tensor, Tensor, Tensor)",
        "(Tensor grad, Tensor dctr, Tensor dcvr) -> (Tensor, Tensor)",
    ),
    fakes=(_forward_fake, _backward_fake),
    keep=lambda args, outputs: outputs[1:],
    gradients=_gradients,
    reference=_plain.esmm_loss,
    predicates={
        "native": _backend.native_support("esmm_loss", on_gpu=True),
        "triton": _backend.triton_support,
        "reference": _backend.reference_support,
    },
)
