"""mix: ``O[b,t,:] = sum_e (softmax(logits) + static)[b,t,e] H[b,e,:]``, all tasks in one pass over the experts."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import backend as _backend
from ..reference import mix as _plain
from ._arguments import FLOATS, check_dense
from ._operator import Grads, Operator
from .expert_linear import read_counts
from .routes import Routes


def mix(
    experts: Tensor,
    logits: Tensor | None = None,
    static: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    routes: Routes | None = None,
    backend: str | None = None,
) -> Tensor:
    """Every task's weighted sum of the experts: ``O = (softmax(logits) + static) H``, either part optional.

    Args:
        experts: H [B,E,D], float64, float32, bfloat16 or float16; any strides.
        logits: [B,T,E], or packed [B,R] with routes; softmax over the experts the row may use. Any float dtype.
        static: [T,E], packed [R] with routes, or, without logits, [T,E,D] (a weight a channel). Any float dtype.
        mask: [T,E] bool, True = may use. It rules over both parts: a masked expert is never read, so that a NaN in it
            does not matter; a row with none is 0.
        routes: in place of mask; see :class:`Routes`.
        backend: "native", "triton", "reference"; None follows :func:`mtlkernels.use_backend`.

    Returns:
        [B,T,D] in experts' dtype; weights and sums in float32 (float64 for float64), rounded once.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype or device does not fit; the message names it.

    MMoE (Ma et al., KDD 2018, section 4.2) mixes by logits, cross-stitch (Misra et al., CVPR 2016, eq. 1) by static
    weights, AdaTT (Li et al., KDD 2023, eq. 11) by both.
    """
    if routes is not None:
        if mask is not None:
            raise ValueError("give mask or routes, not both")
        if not isinstance(routes, Routes):
            raise TypeError(f"routes must be a mtlkernels.Routes; got {type(routes).__name__}")
    return _run(experts, logits, static, mask, routes, None, backend)


def gated_mix(
    experts: Tensor,
    logits: Tensor,
    *,
    mask: Tensor | None = None,
    routes: Routes | None = None,
    backend: str | None = None,
) -> Tensor:
    """``O = softmax(logits) H``, the gate of MMoE, CGC and PLE. Arguments as in :func:`mix`; logits must be given."""
    if logits is None:
        raise TypeError("logits must be a tensor; a mix by static weights alone is linear_mix")
    return mix(experts, logits, None, mask=mask, routes=routes, backend=backend)


def linear_mix(experts: Tensor, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """``O[b,t,:] = sum_e weight[t,e] H[b,e,:]``: cross-stitch, sluice, SNR-Aver.

    weight [T,E], or [T,E,D] with a weight a channel. Other arguments, result and errors as in :func:`mix`.
    """
    if weight is None:
        raise TypeError("weight must be a tensor")
    return _run(experts, None, weight, None, None, None, backend, "weight")


def adatt_mix(
    experts: Tensor,
    logits: Tensor,
    native: Tensor | None,
    *,
    experts_per_unit: Sequence[int],
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``O_t = (softmax(logits_t) + pad(v_t)) H``: AdaTT's gate over all experts plus its own experts' residual.

    The T rows are the first T units. ``experts_per_unit`` counts the experts of every unit, which are ordered unit by
    unit; native [sum(experts_per_unit[:T])] holds v the same way. None means unit weights, not learned, and needs one
    expert in each of the T units. Other arguments, result and errors as in :func:`mix`.

    Li et al., KDD 2023, eq. 7 to 11.
    """
    if logits is None:
        raise TypeError("logits must be a tensor")
    if experts_per_unit is None:
        raise TypeError("experts_per_unit must be a sequence of ints; got None")
    return _run(experts, logits, native, mask, None, experts_per_unit, backend, "native")


def _run(
    experts: Tensor,
    logits: Tensor | None,
    static: Tensor | None,
    mask: Tensor | None,
    routes: Routes | None,
    units: Sequence[int] | None,
    backend: str | None,
    name: str = "static",
) -> Tensor:
    """Checks and runs; `name` is what the caller calls static, units are adatt_mix's experts_per_unit."""
    columns = None if routes is None else routes.columns
    if not torch.compiler.is_compiling() and OPERATOR.goes_straight(experts, backend):
        refused = None
        try:
            grad = experts.requires_grad
            here = columns is None or columns.is_cpu
            if logits is not None:
                grad, here = grad or logits.requires_grad, here and logits.is_cpu
            if static is not None:
                grad, here = grad or static.requires_grad, here and static.is_cpu
            counts = units
            if units is not None:
                counts = list(units)
                # The op's weights of 1 suit any counts, adatt_mix's do not.
                here = here and (static is not None or counts.count(1) == len(counts))
            if here and (mask is None or mask.is_cpu):
                if grad and torch.is_grad_enabled():
                    return OPERATOR.differentiable(experts, logits, static, mask, columns, counts)
                return OPERATOR.kernel(experts, logits, static, mask, columns, counts)
        except Exception as error:
            refused = error
        if refused is not None:
            try:
                _check_all(experts, logits, static, mask, routes, units, name)
                raise refused
            finally:
                del refused  # its traceback holds this frame
    counts = _check_all(experts, logits, static, mask, routes, units, name)
    grad = experts.requires_grad or (logits is not None and logits.requires_grad)
    grad = grad or (static is not None and static.requires_grad)
    which = _backend.choose("mix", backend, experts)
    return OPERATOR(which, grad, experts, logits, static, mask, columns, counts)


def _check_all(experts, logits, static, mask, routes, units, name) -> list[int] | None:
    """Raises what does not fit; returns units as a list."""
    if units is None:
        _check(experts, logits, static, mask, routes, name)
        return None
    _check(experts, logits, None, mask, None)
    counts, total = read_counts(units)
    num_rows = logits.shape[1]
    if total != experts.shape[1] or (counts and min(counts) < 0):
        raise ValueError(f"experts_per_unit must be counts that sum to {experts.shape[1]} experts; got {counts}")
    if num_rows > len(counts):
        raise ValueError(f"logits has {num_rows} rows, experts_per_unit only {len(counts)} units: row t is unit t")
    if static is None:
        if any(n != 1 for n in counts[:num_rows]):
            raise ValueError(f"native None needs one expert in each of the first {num_rows} units; got {counts}")
    else:
        _check_side("native", static, experts)
        if static.shape != (sum(counts[:num_rows]),):
            raise ValueError(f"native must be [{sum(counts[:num_rows])}], a weight an expert of the first {num_rows} "
                             f"units; got shape {tuple(static.shape)}")  # fmt: skip
    return counts


def _check_side(name: str, tensor: Tensor, experts: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
    check_dense(**{name: tensor})
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16; got {tensor.dtype}")
    if tensor.device != experts.device:
        raise ValueError(f"{name} is on {tensor.device}, experts on {experts.device}: they must be on one device")


def _check(
    experts: Tensor,
    logits: Tensor | None,
    static: Tensor | None,
    mask: Tensor | None,
    routes: Routes | None,
    name: str = "static",
) -> None:
    """Raises what does not fit; `name` is what the caller calls static."""
    if not isinstance(experts, Tensor):
        raise TypeError(f"experts must be a tensor; got {type(experts).__name__}")
    check_dense(**{"experts": experts, "logits": logits, name: static, "mask": mask})
    shape = experts.shape
    if len(shape) != 3:
        raise ValueError(f"experts must be [B,E,D]; got shape {tuple(shape)}")
    if experts.dtype not in FLOATS:
        raise TypeError(f"experts must be float64, float32, bfloat16 or float16; got {experts.dtype}")
    batch, num_experts, width = shape
    if routes is not None:
        if routes.num_experts != num_experts:
            raise ValueError(f"routes is over {routes.num_experts} experts, experts [B,E,D] has {num_experts}")
        if routes.columns.device != experts.device:
            where = f"routes is on {routes.columns.device}, experts on {experts.device}"
            raise ValueError(f"{where}: use routes.to(device)")
    rows = None if routes is None else routes.num_rows
    if logits is not None:
        _check_side("logits", logits, experts)
        found = logits.shape
        if routes is not None:
            if found != (batch, routes.num_routes):
                raise ValueError(f"logits must be packed [B,R] = {(batch, routes.num_routes)}; got {tuple(found)}")
        elif len(found) != 3 or found[0] != batch or found[2] != num_experts:
            raise ValueError(f"logits must be [B,T,E] = [{batch}, T, {num_experts}]; got {tuple(found)}")
        else:
            rows = found[1]
    if static is not None:
        _check_side(name, static, experts)
        found = static.shape
        if routes is not None:
            if found != (routes.num_routes,):
                raise ValueError(f"{name} must be packed [R] = [{routes.num_routes}]; got {tuple(found)}")
        elif len(found) == 3:
            if logits is not None or mask is not None:
                raise ValueError(f"{name} [T,E,D], a weight a channel, goes with neither logits nor mask")
            if found[1:] != (num_experts, width):
                raise ValueError(f"{name} must be [T,E,D] = [T, {num_experts}, {width}]; got {tuple(found)}")
        elif len(found) != 2 or found[1] != num_experts or (rows is not None and found[0] != rows):
            expected = f"[{'T' if rows is None else rows}, {num_experts}]"
            raise ValueError(f"{name} must be [T,E] = {expected}; got {tuple(found)}")
        else:
            rows = found[0]
    if logits is None and static is None:
        raise ValueError("give logits, static, or both: with neither there is nothing to mix by")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor; got {getattr(mask, 'dtype', type(mask).__name__)}")
        if mask.shape != (rows, num_experts) or mask.device != experts.device:
            raise ValueError(f"mask must be [T,E] = {(rows, num_experts)} on {experts.device}; "
                             f"got {tuple(mask.shape)} on {mask.device}")  # fmt: skip


def _forward_fake(experts, logits, static, mask, columns, native) -> tuple[Tensor, Tensor]:
    rows = _num_rows(logits, static, mask, columns)
    acc = torch.float64 if experts.dtype == torch.float64 else torch.float32
    out = experts.new_empty(experts.shape[0], rows, experts.shape[2])
    return out, experts.new_empty((0,) if logits is None else (experts.shape[0], rows), dtype=acc)


def _num_rows(logits: Tensor | None, static: Tensor | None, mask: Tensor | None, columns: Tensor | None) -> int:
    if columns is not None:
        return columns.shape[0]
    if logits is not None:
        return logits.shape[1]
    return (static if mask is None else mask).shape[0]


def _backward_fake(
    grad, grad_lse, experts, logits, static, mask, columns, native, lse, needs
) -> tuple[Tensor, Tensor, Tensor]:
    def like(tensor: Tensor | None, bit: int) -> Tensor:
        return tensor.new_empty(tensor.shape) if tensor is not None and needs & bit else experts.new_empty(0)

    return like(experts, 1), like(logits, 2), like(static, 4)


def _remember(kernel: Callable) -> Callable[..., Tensor]:
    def forward(ctx, experts, logits, static, mask, columns, native) -> Tensor:
        out, lse = kernel(experts, logits, static, mask, columns, native)
        ctx.save_for_backward(experts, logits, static, mask, columns, lse)
        ctx.values = (native,)
        return out

    return forward


def _gradients(backward, args: tuple, kept: tuple[Tensor], needs: Sequence[bool], grads: Grads) -> Grads:
    experts, logits, static, mask, columns, native = args
    grad, grad_lse = grads
    if grad is None and grad_lse is None:
        return None, None, None, None, None
    if grad is None:
        rows = _num_rows(logits, static, mask, columns)
        grad = experts.new_zeros(experts.shape[0], rows, experts.shape[2])
    wanted = needs[0] + 2 * needs[1] + 4 * needs[2]
    found = backward(grad, grad_lse, experts, logits, static, mask, columns, native, *kept, wanted)
    return (*(g if need else None for g, need in zip(found, needs[:3], strict=True)), None, None)


OPERATOR = Operator(
    "mix",
    num_tensors=5,
    schemas=(
        "(Tensor experts, Tensor? logits, Tensor? static, Tensor? mask, Tensor? columns, int[]? native)"
        " -> (Tensor, Tensor)",
        "(Tensor grad, Tensor? grad_lse, Tensor experts, Tensor? logits, Tensor? static, Tensor? mask,"
        " Tensor? columns, int[]? native, Tensor lse, int needs) -> (Tensor, Tensor, Tensor)",
    ),
    fakes=(_forward_fake, _backward_fake),
    keep=lambda args, outputs: (outputs[1],),
    gradients=_gradients,
    reference=_plain.mix,
    predicates={
        "native": _backend.native_support("mix", on_gpu=True),
        "triton": _backend.triton_support,
        "reference": _backend.reference_support,
    },
    remember=_remember,
    public=("mix", "gated_mix", "adatt_mix", "linear_mix"),
)
