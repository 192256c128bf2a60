"""star_linear: the layer of STAR, whose weight is a shared one times that of the row's domain."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backend as _backend
from ..reference import star_linear as _plain
from ..reference.expert_linear import NEED_INPUT
from ._arguments import autocast, check_activation, check_dense, check_weight_dtype
from ._operator import Grads, Operator

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def star_linear(
    x: Tensor,
    domain: Tensor,
    weight: Tensor,
    domain_weight: Tensor,
    bias: Tensor | None = None,
    domain_bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """``out_b = act((W * W_p) x_b + c + c_p)``, p = domain_b: one linear layer for all domains of a batch.

    The star topology of STAR (Sheng et al., One Model to Serve All, CIKM 2021): domain p's weight is the product,
    element by element, of a weight that all domains share and one of its own; its bias is the sum of two.

    Args:
        x: [B,K]; float64, float32, bfloat16 or float16; any strides.
        domain: [B], ids from 0 to P-1 in any order, of an integer type.
        weight: [N,K], as ``torch.nn.Linear`` stores it. x's dtype; under autocast, which takes x to 16 bit, float32
            weights enter as they are and their gradients stay float32.
        domain_weight: [P,N,K] in weight's dtype. A domain without rows is not read; its gradient is exactly 0.
        bias: [N] in weight's dtype. domain_bias: [P,N] likewise; either may be None.
        activation: None, "relu", "gelu" (exact), "silu", "tanh" or "sigmoid".
        backend: "native", "triton", "reference"; None follows :func:`mtlkernels.use_backend`.

    Returns:
        [B,N] in x's dtype, summed in float32 (float64) and rounded once.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype or device does not fit; the message names it. An id out
            of range raises ValueError on a CPU (RuntimeError from compiled and exported calls). On a GPU such a row is
            NaN and takes no part in any gradient: a check there would have to wait for the device.
    """
    x = autocast(x)
    _check(x, domain, weight, domain_weight, bias, domain_bias, activation)
    name = activation or ""
    biases = [b for b in (bias, domain_bias) if b is not None]
    grad = any(t.requires_grad for t in (x, weight, domain_weight, *biases))
    which = _backend.choose("star_linear", backend, x)
    save = grad and name in NEED_INPUT and torch.is_grad_enabled()
    args = which, grad, x, domain, weight, domain_weight, bias, domain_bias, name, save
    if torch.compiler.is_compiling():
        return OPERATOR(*args)
    if which == "reference" and type(domain) is Tensor and domain.is_cpu:
        _check_range(domain, domain_weight.shape[0])
    try:
        return OPERATOR(*args)
    except RuntimeError as error:
        # The kernels check the ids, while they sort the rows by them; a C++ library can raise nothing but this.
        said = str(error)
        if _RANGE in said:
            raise ValueError(said[said.index(_RANGE) :].splitlines()[0]) from None
        raise


_RANGE = "domain must hold ids from 0 to P-1"  # as the kernels say it


def _check_range(domain: Tensor, num_domains: int) -> None:
    if torch._C._are_functorch_transforms_active() or domain.numel() == 0:
        return
    lowest, highest = (int(v) for v in torch.aminmax(domain))
    if lowest < 0 or highest >= num_domains:
        raise ValueError(f"{_RANGE} = {num_domains - 1}; got {lowest if lowest < 0 else highest}")


def _check(
    x: Tensor,
    domain: Tensor,
    weight: Tensor,
    domain_weight: Tensor,
    bias: Tensor | None,
    domain_bias: Tensor | None,
    activation: str | None,
) -> None:
    """Raises what does not fit."""
    tensors = {"x": x, "domain": domain, "weight": weight, "domain_weight": domain_weight}
    tensors |= {n: b for n, b in (("bias", bias), ("domain_bias", domain_bias)) if b is not None}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
    check_dense(**tensors)
    if x.dim() != 2:
        raise ValueError(f"x must be [B,K]; got shape {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight must be [N,K] with x's K={x.shape[1]}; got shape {tuple(weight.shape)}")
    n, k = weight.shape
    ws = domain_weight.shape
    if len(ws) != 3 or ws[1:] != weight.shape:
        raise ValueError(f"domain_weight must be [P,N,K] with N={n}, K={k} of weight; got shape {tuple(ws)}")
    if ws[0] == 0:
        raise ValueError("domain_weight [P,N,K] must hold one domain at least; got P=0")
    if domain.shape != x.shape[:1]:
        raise ValueError(f"domain must be [B], one id for each of x's {x.shape[0]} rows; got {tuple(domain.shape)}")
    if domain.dtype not in _INTEGERS:
        raise TypeError(f"domain must be of an integer type; got {domain.dtype}")
    check_weight_dtype(x, weight)
    for name, tensor in tensors.items():
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: they must be on one device")
        if name not in ("x", "domain") and tensor.dtype != weight.dtype:
            raise TypeError(f"{name} is {tensor.dtype}, weight {weight.dtype}: they must agree")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [N] = ({n},); got shape {tuple(bias.shape)}")
    if domain_bias is not None and domain_bias.shape != ws[:2]:
        raise ValueError(f"domain_bias must be [P,N] = {tuple(ws[:2])}; got shape {tuple(domain_bias.shape)}")
    check_activation(activation)


def _forward_fake(
    x: Tensor,
    domain: Tensor,
    weight: Tensor,
    domain_weight: Tensor,
    bias: Tensor | None,
    domain_bias: Tensor | None,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, torch.empty_like(y) if save and activation in NEED_INPUT else x.new_empty(0)


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    domain: Tensor,
    weight: Tensor,
    domain_weight: Tensor,
    saved: Tensor,
    activation: str,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if needs & 1 else (0,)),
        weight.new_empty(weight.shape if needs & 2 else (0,)),
        weight.new_empty(domain_weight.shape if needs & 4 else (0,)),
        weight.new_empty(weight.shape[:1] if needs & 8 else (0,)),
        weight.new_empty(domain_weight.shape[:2] if needs & 16 else (0,)),
    )


def _keep(args: tuple, outputs: tuple) -> tuple[Tensor]:
    return (outputs[1] if args[7] else outputs[0],)


def _gradients(backward, args: tuple, kept: tuple[Tensor], needs: Sequence[bool], grads: Grads) -> Grads:
    x, domain, weight, domain_weight, _, _, activation, _ = args
    if grads[0] is None:
        return (None,) * 6
    needs = [needs[0], *needs[2:]]  # domain has no gradient
    wanted = sum(need << bit for bit, need in enumerate(needs))
    found = backward(grads[0], x, domain, weight, domain_weight, *kept, activation, wanted)
    dx, *rest = (g if need else None for g, need in zip(found, needs, strict=True))
    return dx, None, *rest


def _reference(
    x, domain, weight, domain_weight, bias, domain_bias, activation: str, save: bool
) -> tuple[Tensor, Tensor]:
    out = _plain.star_linear(x, domain, weight, domain_weight, bias, domain_bias, activation)
    return out, x.new_empty(0)


OPERATOR = Operator(
    "star_linear",
    num_tensors=6,
    schemas=(
        "(Tensor x, Tensor domain, Tensor weight, Tensor domain_weight, Tensor? bias, Tensor? domain_bias,"
        " str activation, bool save) -> (Tensor, Tensor)",
        "(Tensor grad, Tensor x, Tensor domain, Tensor weight, Tensor domain_weight, Tensor saved, str activation,"
        " int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    ),
    fakes=(_forward_fake, _backward_fake),
    keep=_keep,
    gradients=_gradients,
    reference=_reference,
    predicates={
        # First on a GPU, until one has measured the two; auto never takes it on a CPU.
        "triton": _backend.triton_support,
        "native": _backend.native_support("star_linear", on_gpu=True),
        "reference": _backend.reference_support,
    },
    autocast=True,
)
