"""partitioned_norm: batch normalisation with statistics and affine parameters for each domain of a mixed batch."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend as _backend
from ..reference import partitioned_norm as _plain
from ..reference.expert_linear import accumulate_dtype
from ._arguments import FLOATS, check_dense
from ._operator import Grads, Operator, _plain_gradients

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_LIBRARY = {"native": "mtlkernels", "triton": "mtlkernels_triton"}


def partitioned_norm(
    x: Tensor,
    domain: Tensor,
    weight: Tensor,
    bias: Tensor,
    domain_weight: Tensor,
    domain_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """``y = (w * w_p) * (x - mean_p) / sqrt(var_p + eps) + (b + b_p)``, p the domain of the row.

    In training mean_p and var_p (biased) are those of the domain's rows in this batch, and the running statistics of
    each domain with two rows or more move towards them in place, ``(1 - momentum) * running + momentum * batch``, with
    the unbiased variance, as in :func:`torch.nn.functional.batch_norm`. A domain with a single row uses its running
    statistics, as constants, and leaves them alone. Outside training the running statistics serve every row.

    Args:
        x: [B,D], float64, float32, bfloat16 or float16; any strides.
        domain: [B], any integer dtype, ids in [0, P), rows of the domains in any order.
        weight, bias: [D], shared. domain_weight, domain_bias: [P,D]. One float dtype for these four.
        running_mean, running_var: [P,D], one float dtype for both.
        training: whether statistics come from the batch.
        momentum: the weight of the batch in the running statistics, in [0, 1].
        eps: added to the variance, at least 0.
        backend: "native", "triton", "reference"; None follows :func:`mtlkernels.use_backend`.

    Returns:
        [B,D] in x's dtype. Statistics and sums are in float32 (float64 for float64) whatever the dtype of x.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype or device does not fit; the message names it.
        ValueError: on a CPU, an id outside [0, P). On a GPU, and where torch.compile traces through the reference,
            such a row becomes NaN, without gradient.

    Partitioned normalisation of STAR (Sheng et al., CIKM 2021, section 3.3), with statistics a domain, so that a batch
    may hold several. On a batch of one domain it is batch_norm with ``w * w_p`` and ``b + b_p``.
    """
    _check(x, domain, weight, bias, domain_weight, domain_bias, running_mean, running_var, training, momentum, eps)
    if domain.dtype not in (torch.int64, torch.int32):
        domain = domain.long()
    parameters = weight, bias, domain_weight, domain_bias
    wants_grad = x.requires_grad or any(p.requires_grad for p in parameters)
    which = _backend.choose("partitioned_norm", backend, x)
    eps = float(eps)
    y, *statistics = OPERATOR(which, wants_grad, x, domain, *parameters, running_mean, running_var, training, eps)
    if training:
        _move(running_mean, running_var, *statistics, momentum)
    return y


def _move(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: Tensor, momentum: float) -> None:
    """Running statistics towards the batch's, in place; those of domains with fewer than two rows stay as they are."""
    with torch.no_grad():
        n = count.to(var.dtype)[:, None]
        step = (n >= 2).to(var.dtype) * momentum
        unbiased = var * torch.where(n >= 2, n / (n - 1), 1)
        for running, batch in ((running_mean, mean), (running_var, unbiased)):
            if running.dtype == batch.dtype:
                running.lerp_(batch, step)
            else:
                running.copy_(torch.lerp(running.to(batch.dtype), batch, step))


def _check(
    x, domain, weight, bias, domain_weight, domain_bias, running_mean, running_var, training, momentum, eps
) -> None:
    """Raises what does not fit."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor; got {type(x).__name__}")
    check_dense(x=x, domain=domain, weight=weight, bias=bias, domain_weight=domain_weight, domain_bias=domain_bias,
                running_mean=running_mean, running_var=running_var)  # fmt: skip
    if x.dim() != 2:
        raise ValueError(f"x must be [B,D]; got shape {tuple(x.shape)}")
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be float64, float32, bfloat16 or float16; got {x.dtype}")
    if not isinstance(domain, Tensor) or domain.dtype not in _INTEGERS:
        raise TypeError(f"domain must be an integer tensor; got {getattr(domain, 'dtype', type(domain).__name__)}")
    batch, width = x.shape
    if domain.shape != (batch,) or domain.device != x.device:
        raise ValueError(f"domain must be [B] = [{batch}] on {x.device}, as x is; "
                         f"got {tuple(domain.shape)} on {domain.device}")  # fmt: skip
    num_domains = None
    for name, tensor, like, shared in (
        ("weight", weight, weight, True),
        ("bias", bias, weight, True),
        ("domain_weight", domain_weight, weight, False),
        ("domain_bias", domain_bias, weight, False),
        ("running_mean", running_mean, running_mean, False),
        ("running_var", running_var, running_mean, False),
    ):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16; got {tensor.dtype}")
        if tensor.dtype != like.dtype:
            first = "weight" if like is weight else "running_mean"
            raise TypeError(f"{name} must have {first}'s dtype {like.dtype}; got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: they must be on one device")
        if shared:
            if tensor.shape != (width,):
                raise ValueError(f"{name} must be [D] = [{width}]; got {tuple(tensor.shape)}")
            continue
        if tensor.dim() != 2 or tensor.shape[1] != width or tensor.shape[0] != (num_domains or tensor.shape[0]):
            expected = f"[{num_domains or 'P'}, {width}]"
            raise ValueError(f"{name} must be [P,D] = {expected}; got {tuple(tensor.shape)}")
        num_domains = tensor.shape[0]
        if num_domains == 0:
            raise ValueError(f"{name} must have at least one domain; got {tuple(tensor.shape)}")
    if not isinstance(training, bool):
        raise TypeError(f"training must be a bool; got {training!r}")
    for name, tensor in (("running_mean", running_mean), ("running_var", running_var)):
        if tensor.requires_grad:
            raise ValueError(f"{name} must not require a gradient: it is a constant here, and changed in place")
        if training and any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)):
            raise ValueError(f"{name} must not be expanded, with strides {tensor.stride()}: it is changed in place")
    for name, value in (("momentum", momentum), ("eps", eps)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number; got {value!r}")
    # Any other would stay in the running statistics.
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must lie in [0, 1]; got {momentum}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and at least 0; got {eps}")


def _forward_fake(
    x, domain, weight, bias, domain_weight, domain_bias, running_mean, running_var, training, eps
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    statistics = [x.new_empty(domain_weight.shape, dtype=accumulate_dtype(x.dtype)) for _ in range(2)]
    return x.new_empty(x.shape), *statistics, x.new_empty(domain_weight.shape[0], dtype=torch.int64)


def _backward_fake(
    grad, x, domain, weight, domain_weight, mean, var, count, training, eps, needs
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    like = x, weight, weight, domain_weight, domain_weight
    return tuple(t.new_empty(t.shape if needs >> i & 1 else 0) for i, t in enumerate(like))


def _gradients(backward, args: tuple, kept: tuple[Tensor, ...], needs: Sequence[bool], grads: Grads) -> Grads:
    x, domain, weight, bias, domain_weight, domain_bias, _, _, training, eps = args
    grad = grads[0]  # the statistics are outputs without a gradient, as those of torch.native_batch_norm
    if grad is None:
        return (None,) * 6
    wanted = [needs[0], *needs[2:6]]
    bits = sum(1 << i for i, need in enumerate(wanted) if need)
    found = backward(grad, x, domain, weight, domain_weight, *kept, training, eps, bits)
    dx, *rest = (g if need else None for g, need in zip(found, wanted, strict=True))
    return (dx, None, *rest)


class _AllOutputs(torch.autograd.Function):
    """The eager call with a gradient. The public function needs the statistics too, to move the running ones by.

    Running statistics are changed in place before backward comes; what served of them is in the outputs, so that
    neither they nor their old values are saved.
    """

    @staticmethod
    def forward(ctx: Any, which: str, *args: Any) -> tuple[Tensor, ...]:
        y, *statistics = OPERATOR._eager[which](*args)
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[:6], *statistics)
        ctx.which, ctx.values = which, args[8:]
        return y, *statistics

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> Grads:
        saved = ctx.saved_tensors  # once: a checkpoint computes them for one reading
        tensors, statistics = saved[:6], saved[6:]
        needs = ctx.needs_input_grad[1:7]
        mean, var, _ = statistics
        if grad is None:
            found = (None,) * 6
        elif torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            values, grads = (mean, var, *ctx.values), (grad, None, None, None)
            found = _plain_gradients(OPERATOR.reference, tensors, values, needs, grads)
        else:
            backward = getattr(torch.ops, _LIBRARY[ctx.which]).partitioned_norm_backward.default
            found = _gradients(
                backward, (*tensors, mean, var, *ctx.values), statistics, needs, (grad, None, None, None)
            )
        return (None, *found, None, None, None, None)


class _Norm(Operator):
    def __call__(self, which: str, wants_grad: bool, *args: Any) -> tuple[Tensor, ...]:
        """All outputs of backend `which`'s forward op."""
        if torch.compiler.is_compiling():
            return self.reference(*args) if which == "reference" else self._forward[which](*args)
        # Neither tangents nor a batch of running statistics are known to the kernels.
        if (
            which == "reference"
            or torch._C._are_functorch_transforms_active()
            or torch.autograd.forward_ad._current_level >= 0
        ):
            return self.reference(*args)
        if wants_grad and torch.is_grad_enabled():
            return _AllOutputs.apply(which, *args)
        return self._eager[which](*args)


OPERATOR = _Norm(
    "partitioned_norm",
    num_tensors=6,  # the running statistics go as plain values: no gradient, and changed in place before backward
    schemas=(
        "(Tensor x, Tensor domain, Tensor weight, Tensor bias, Tensor domain_weight, Tensor domain_bias,"
        " Tensor running_mean, Tensor running_var, bool training, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
        "(Tensor grad, Tensor x, Tensor domain, Tensor weight, Tensor domain_weight, Tensor mean, Tensor var,"
        " Tensor count, bool training, float eps, int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    ),
    fakes=(_forward_fake, _backward_fake),
    keep=lambda args, outputs: outputs[1:],
    gradients=_gradients,
    reference=_plain.partitioned_norm,
    predicates={
        "native": _backend.native_support("partitioned_norm", on_gpu=True),
        "triton": _backend.triton_support,
        "reference": _backend.reference_support,
    },
)
