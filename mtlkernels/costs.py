"""What a call costs: floating-point operations and bytes, from the shapes of its dispatcher op's arguments alone.

A multiply-add counts 2, an exponential 1, and small terms are left out. Bytes are what has to pass between the
processor and memory: every argument and every result once, statistics that are kept for backward left out. Where a
backward pass takes two kernels that read one tensor, it counts twice. A mask's content is not looked at: all its
entries count as allowed.

torch.utils.flop_counter knows the operations as soon as it is imported; the bytes are for measurements.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reference.expert_linear import NEED_INPUT


class Cost(NamedTuple):
    flops: int
    bytes: int


def cost(op: str, *args: Any) -> Cost:
    """Of the dispatcher op `op` ("mix", "mix_eager", "mix_only", "mix_backward") with these arguments, maybe on meta.

    Raises KeyError for an op without a formula.
    """
    return COSTS[op.removesuffix("_eager").removesuffix("_only")](*args)


def size(*tensors: Tensor | None) -> int:
    """Bytes of all of them."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def expert_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, counts: Sequence[int] | None, activation: str, save: bool
) -> Cost:
    outputs = x.shape[0] * weight.shape[0] * weight.shape[1]
    written = outputs * x.element_size() * (2 if save and activation in NEED_INPUT else 1)
    return Cost(2 * outputs * weight.shape[2], size(x, weight, bias) + written)


def expert_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    saved: Tensor,
    counts: Sequence[int] | None,
    activation: str,
    needs: int,
) -> Cost:
    to_x, to_weight, to_bias = _bits(needs, 3)
    product = 2 * grad.numel() * weight.shape[2]
    dz = _through(grad, activation)
    moved = to_x * (dz + size(weight, x)) + max(to_weight, to_bias) * dz + to_weight * size(x, weight)
    moved += to_bias * weight.shape[0] * weight.shape[1] * weight.element_size()
    return Cost((to_x + to_weight) * product + to_bias * grad.numel(), moved)


def expert_linear_backward_into(
    grad: Tensor, x: Tensor, weight: Tensor, counts: Sequence[int] | None, through: str, needs: int
) -> Cost:
    return expert_linear_backward(grad, x, weight, grad, counts, "", needs | 1)


def mix(
    experts: Tensor,
    logits: Tensor | None,
    static: Tensor | None,
    mask: Tensor | None,
    columns: Tensor | None,
    native: Sequence[int] | None,
) -> Cost:
    rows, routes = _routes(experts.shape[1], logits, static, mask, columns)
    batch, _, width = experts.shape
    softmax = 0 if logits is None else 4 * batch * routes
    written = batch * rows * width * experts.element_size()
    return Cost(2 * batch * routes * width + softmax, size(experts, logits, static) + written)


def mix_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    experts: Tensor,
    logits: Tensor | None,
    static: Tensor | None,
    mask: Tensor | None,
    columns: Tensor | None,
    native: Sequence[int] | None,
    lse: Tensor,
    needs: int,
) -> Cost:
    to_experts, to_logits, to_static = _bits(needs, 3)
    _, routes = _routes(experts.shape[1], logits, static, mask, columns)
    to_weights = max(to_logits, to_static)
    flops = (to_experts + to_weights) * 2 * routes * experts.shape[0] * experts.shape[2]
    flops += to_logits * 5 * routes * experts.shape[0]
    moved = size(grad, logits, static) + (to_experts + to_weights) * size(experts)
    return Cost(flops, moved + to_logits * size(logits) + to_static * size(static))


def mix_backward_into(
    grad: Tensor,
    experts: Tensor,
    logits: Tensor | None,
    static: Tensor | None,
    columns: Tensor | None,
    native: Sequence[int] | None,
    through: str,
    needs: int,
) -> Cost:
    return mix_backward(grad, None, experts, logits, static, None, columns, native, grad, needs | 1)


def expert_mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    static: Tensor | None,
    mask: Tensor | None,
    columns: Tensor | None,
    counts: Sequence[int] | None,
    activation: str,
) -> Cost:
    num_experts, width, features = weight.shape
    rows, routes = _routes(num_experts, logits, static, mask, columns)
    batch = x.shape[0]
    flops = 2 * batch * width * (num_experts * features + routes) + (0 if logits is None else 4 * batch * routes)
    return Cost(flops, size(x, weight, bias, logits, static) + batch * rows * width * x.element_size())


def expert_mix_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    static: Tensor | None,
    mask: Tensor | None,
    columns: Tensor | None,
    counts: Sequence[int] | None,
    activation: str,
    lse: Tensor,
    needs: int,
) -> Cost:
    """The experts computed once more, their gradient stored once and read once."""
    own, outputs = _expert_mix_gradients(grad, x, weight, bias, logits, static, mask, columns, needs)
    stored = 2 * outputs * x.element_size() if needs & 6 else 0
    return Cost(own.flops + 2 * outputs * weight.shape[2], own.bytes + stored)


def expert_mix_saving(x: Tensor, weight: Tensor, *rest: Any) -> Cost:
    """The experts' outputs are written too."""
    flops, moved = expert_mix(x, weight, *rest)
    return Cost(flops, moved + x.shape[0] * weight.shape[0] * weight.shape[1] * x.element_size())


def expert_mix_saving_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    static: Tensor | None,
    mask: Tensor | None,
    columns: Tensor | None,
    counts: Sequence[int] | None,
    activation: str,
    saved: Tensor,
    needs: int,
) -> Cost:
    """The experts' outputs are read."""
    own, outputs = _expert_mix_gradients(grad, x, weight, bias, logits, static, mask, columns, needs)
    return Cost(own.flops, own.bytes + outputs * x.element_size())


def _expert_mix_gradients(grad, x, weight, bias, logits, static, mask, columns, needs) -> tuple[Cost, int]:
    """What every way of getting at the experts' outputs leaves to do, and how many outputs there are."""
    to_x, to_weight, to_bias, to_logits, to_static = _bits(needs, 5)
    num_experts, width, features = weight.shape
    _, routes = _routes(num_experts, logits, static, mask, columns)
    batch, to_experts = x.shape[0], max(to_x, to_weight, to_bias)
    outputs = batch * num_experts * width
    flops = (to_x + to_weight) * 2 * outputs * features + to_bias * outputs
    flops += (to_experts + max(to_logits, to_static)) * 2 * batch * routes * width + to_logits * 5 * batch * routes
    moved = size(grad, x, weight, bias, logits, static) + to_x * size(x) + to_weight * size(x, weight)
    moved += to_bias * num_experts * width * weight.element_size() + to_logits * size(logits) + to_static * size(static)
    return Cost(flops, moved), outputs


def snr_linear(
    x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor | None, activation: str, skip_closed: bool, save: bool
) -> Cost:
    """As if every gate were open."""
    outputs = x.shape[0] * weight.shape[0] * weight.shape[2]
    written = outputs * x.element_size() * (2 if save and activation in NEED_INPUT else 1)
    return Cost(2 * x.shape[0] * weight.numel(), size(x, weight, gate, bias) + written)


def snr_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    gate: Tensor,
    saved: Tensor,
    activation: str,
    skip_closed: bool,
    needs: int,
) -> Cost:
    to_x, to_weight, to_gate, to_bias = _bits(needs, 4)
    by_batch = max(to_weight, to_gate)
    flops = (to_x + by_batch) * 2 * x.shape[0] * weight.numel() + (to_weight + to_gate) * 2 * weight.numel()
    moved = _through(grad, activation) + size(gate) + (to_x + by_batch) * size(x)
    moved += (max(to_x, to_gate) + to_weight) * size(weight) + to_gate * size(gate)
    moved += to_bias * weight.shape[0] * weight.shape[2] * weight.element_size()
    return Cost(flops + to_bias * grad.numel(), moved)


def star_linear(
    x: Tensor,
    domain: Tensor,
    weight: Tensor,
    domain_weight: Tensor,
    bias: Tensor | None,
    domain_bias: Tensor | None,
    activation: str,
    save: bool,
) -> Cost:
    batch, present = x.shape[0], _present(x, domain_weight)
    written = batch * weight.shape[0] * x.element_size() * (2 if save and activation in NEED_INPUT else 1)
    moved = size(x, domain, weight, bias, domain_bias) + present * weight.numel() * domain_weight.element_size()
    return Cost((2 * batch + present) * weight.numel(), moved + written)


def star_linear_backward(
    grad: Tensor,
    x: Tensor,
    domain: Tensor,
    weight: Tensor,
    domain_weight: Tensor,
    saved: Tensor,
    activation: str,
    needs: int,
) -> Cost:
    to_x, to_weight, to_domain, to_bias, to_domain_bias = _bits(needs, 5)
    batch, present, product = x.shape[0], _present(x, domain_weight), max(_bits(needs >> 1, 2))
    flops = (to_x + product) * 2 * batch * weight.numel()
    flops += (to_x + to_weight + to_domain) * present * weight.numel() + max(to_bias, to_domain_bias) * grad.numel()
    own = present * weight.numel() * domain_weight.element_size()
    moved = _through(grad, activation) + size(domain) + (to_x + product) * size(x)
    moved += (1 + to_weight) * size(weight) + (1 + to_domain) * own
    biases = (to_bias + to_domain_bias * domain_weight.shape[0]) * weight.shape[0] * weight.element_size()
    return Cost(flops, moved + biases)


def partitioned_norm(x: Tensor, domain: Tensor, weight: Tensor, bias: Tensor, domain_weight: Tensor, *_: Any) -> Cost:
    """As if a domain's rows stayed in a cache between the statistics and their use."""
    return Cost(8 * x.numel(), 2 * size(x) + size(domain) + 16 * _present(x, domain_weight) * x.shape[1])


def partitioned_norm_backward(
    grad: Tensor, x: Tensor, domain: Tensor, weight: Tensor, domain_weight: Tensor, *rest: Any
) -> Cost:
    """As the forward: the gradient and x are read once."""
    return Cost(12 * x.numel(), size(grad, x, domain) + (rest[-1] & 1) * size(x))


def esmm_loss(ctr_logit: Tensor, cvr_logit: Tensor, click: Tensor, conversion: Tensor, weight: float) -> Cost:
    """The loss and both gradients in one pass."""
    return Cost(40 * ctr_logit.numel(), size(ctr_logit, cvr_logit, click, conversion) + size(ctr_logit, cvr_logit))


def masked_bce(logits: Tensor, labels: Tensor, mask: Tensor | None) -> Cost:
    """The losses and the gradient in one pass; half of esmm_loss's work for each logit, which has two a row."""
    return Cost(20 * logits.numel(), size(logits, labels, mask) + size(logits))


def hard_concrete(log_alpha: Tensor, noise: Tensor | None, *_: float) -> Cost:
    """Twelve operations an element, two logarithms and an exponential among them; six without noise."""
    return Cost((6 if noise is None else 12) * log_alpha.numel(), size(log_alpha, noise) + 2 * size(log_alpha))


def hard_concrete_backward(grad: Tensor, s: Tensor, *_: Any) -> Cost:
    return Cost(6 * s.numel(), size(grad, s) + size(s))


def hard_concrete_l0(log_alpha: Tensor, *_: float) -> Cost:
    return Cost(7 * log_alpha.numel(), 2 * size(log_alpha))


def scaled(grad: Tensor, *saved: Tensor) -> Cost:
    """Backward of a loss whose gradients its forward wrote: they are read, multiplied by grad and written."""
    return Cost(sum(t.numel() for t in saved), 2 * size(*saved))


COSTS: dict[str, Callable[..., Cost]] = {
    f.__name__: f
    for f in (
        expert_linear,
        expert_linear_backward,
        expert_linear_backward_into,
        mix,
        mix_backward,
        mix_backward_into,
        expert_mix,
        expert_mix_backward,
        expert_mix_saving,
        expert_mix_saving_backward,
        snr_linear,
        snr_linear_backward,
        star_linear,
        star_linear_backward,
        partitioned_norm,
        partitioned_norm_backward,
        esmm_loss,
        masked_bce,
        hard_concrete,
        hard_concrete_backward,
        hard_concrete_l0,
    )
} | {f"{name}_backward": scaled for name in ("esmm_loss", "masked_bce", "hard_concrete_l0")}


def _bits(needs: int, count: int) -> list[int]:
    return [needs >> i & 1 for i in range(count)]


def _through(grad: Tensor, activation: str) -> int:
    """Bytes read for a gradient through an activation: with one, what the forward saved is read as well."""
    return size(grad) * (2 if activation else 1)


def _present(x: Tensor, domain_weight: Tensor) -> int:
    """Domains in a batch: all, unless there are fewer rows."""
    return min(domain_weight.shape[0], x.shape[0])


def _routes(
    num_experts: int, logits: Tensor | None, static: Tensor | None, mask: Tensor | None, columns: Tensor | None
) -> tuple[int, int]:
    """Output rows T, and how many (row, expert) pairs a batch row has: R packed, else T * E."""
    if columns is not None:
        return columns.shape[0], static.shape[0] if logits is None else logits.shape[1]
    rows = (logits.shape[1] if logits is not None else (static if mask is None else mask).shape[0])  # fmt: skip
    return rows, rows * num_experts


def _register(counter: Any) -> None:
    """Tell torch.utils.flop_counter the formulas of the ops that exist."""
    for namespace in ("mtlkernels", "mtlkernels_triton"):
        for name, formula in COSTS.items():
            for full in (name, f"{name}_eager", f"{name}_only"):
                op = getattr(getattr(torch.ops, namespace), full, None)
                if op is not None and op not in counter.flop_registry:
                    counter.register_flop_formula(op, get_raw=True)(_flops(formula))


def _flops(formula: Callable[..., Cost]) -> Callable[..., int]:
    return lambda *args, out_val=None, **_: formula(*args).flops


class _AfterImport(importlib.abc.MetaPathFinder):
    """Registers when torch.utils.flop_counter is imported: importing it here would import triton, 0.2 s for nothing."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "torch.utils.flop_counter":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: Any) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register
        return spec


def register() -> None:
    """Have FlopCounterMode count the operators. Called once, when the package is imported."""
    if "torch.utils.flop_counter" in sys.modules:
        _register(sys.modules["torch.utils.flop_counter"])
    else:
        sys.meta_path.insert(0, _AfterImport())
