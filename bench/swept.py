"""What is swept: a mixture of experts, softmax(logits) over relu(x W_e + b_e), by ours and as people write it.

x [B,K] and logits [B,T,E] to [B,T,N]. All variants have the same numbers, and each its own parameters, laid out as it
wants them: one module an expert has E of each.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import mtlkernels as mtl
from bench.contest import AUTOTUNED, COMPILED, LIMITS, Check, compiled, relative_error
from bench.operators import BOTH, FORWARD
from bench.rivals import linear
from bench.subjects import Draw

EXPERT_MIX, TWO_CALLS, MODULES, BATCHED = "expert_mix", "expert_linear + mix", "a module an expert", "baddbmm + bmm"
VARIANTS = (EXPERT_MIX, TWO_CALLS, MODULES)  # of a sweep by default
ALL = (*VARIANTS, BATCHED, COMPILED, AUTOTUNED)
_SLICE = 1 << 24  # numbers of the experts' outputs at a time, where float64 computes what is expected


class Numbers:
    """The data and weights of a shape {B, T, E, K, N}."""

    def __init__(self, shape: dict[str, int], dtype: torch.dtype, device: str) -> None:
        draw = Draw(dtype, device)
        batch, experts = shape["B"], shape["E"]
        self.x, self.logits = draw.normal(batch, shape["K"]), draw.normal(batch, shape["T"], experts)
        self.weight, self.bias = draw.weight(experts, shape["N"], shape["K"]), draw.normal(experts, shape["N"])
        self.grad = draw.normal(batch, shape["T"], shape["N"])


class Stacked(nn.Module):
    """Weights [E,N,K], and a call of (x, weight, bias, logits)."""

    def __init__(self, numbers: Numbers, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight, self.bias, self.call = nn.Parameter(numbers.weight), nn.Parameter(numbers.bias), call

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        return self.call(x, self.weight, self.bias, logits)


class Modules(nn.Module):
    """An nn.Linear and a ReLU an expert, called one by one, their outputs stacked."""

    def __init__(self, numbers: Numbers) -> None:
        super().__init__()
        pairs = zip(numbers.weight, numbers.bias, strict=True)
        self.experts = nn.ModuleList(nn.Sequential(linear(w, b), nn.ReLU()) for w, b in pairs)

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        return torch.bmm(torch.softmax(logits, -1), torch.stack([expert(x) for expert in self.experts], 1))


def expert_mix(x: Tensor, weight: Tensor, bias: Tensor, logits: Tensor) -> Tensor:
    """Ours in one call."""
    return mtl.expert_mix(x, weight, bias, logits, activation="relu")


def two_calls(x: Tensor, weight: Tensor, bias: Tensor, logits: Tensor) -> Tensor:
    """Ours in two."""
    return mtl.mix(mtl.expert_linear(x, weight, bias, activation="relu"), logits)


def batched(x: Tensor, weight: Tensor, bias: Tensor, logits: Tensor) -> Tensor:
    """One batched product over [E,B,K]."""
    inputs = x.expand(weight.shape[0], *x.shape)
    hidden = torch.baddbmm(bias.unsqueeze(1), inputs, weight.transpose(1, 2)).relu()
    return torch.bmm(torch.softmax(logits, -1), hidden.transpose(0, 1))


def is_ours(variant: str) -> bool:
    """Whether the variant calls our operators."""
    return variant.partition(", ")[0] in (EXPERT_MIX, TWO_CALLS)


class Contender:
    """One variant with parameters and inputs of its own, which want gradients."""

    def __init__(self, variant: str, numbers: Numbers) -> None:
        name, _, backend = variant.partition(", ") if is_ours(variant) else (variant, "", "")
        calls = {EXPERT_MIX: expert_mix, TWO_CALLS: two_calls, BATCHED: batched}
        self.backend = backend or "auto"
        if name in calls:
            self.network: nn.Module = Stacked(numbers, calls[name])
        elif name in (MODULES, COMPILED, AUTOTUNED):
            self.network = Modules(numbers)
        else:
            raise ValueError(
                f"variant: got {variant!r}, expected one of {ALL}, or ours with a backend, as in 'mix, native'"
            )
        self.call = compiled(self.network, name) if name in (COMPILED, AUTOTUNED) else self.network
        self.x, self.logits = (t.detach().clone().requires_grad_() for t in (numbers.x, numbers.logits))
        self.grad = numbers.grad
        self.leaves = [self.x, self.logits, *self.network.parameters()]

    def forward(self) -> Tensor:
        """[B,T,N]; nothing is kept for a backward pass."""
        with torch.no_grad(), mtl.use_backend(self.backend):
            return self.call(self.x, self.logits)

    def both(self) -> tuple[Tensor, ...]:
        """[B,T,N], and the gradients of the leaves."""
        with mtl.use_backend(self.backend):
            out = self.call(self.x, self.logits)
            return out.detach(), *torch.autograd.grad(out, self.leaves, self.grad)

    def work(self, what: str) -> Callable[[], Any]:
        """The call that is timed."""
        return self.forward if what == FORWARD else self.both

    def results(self, what: str) -> list[Tensor]:
        """Output; with gradients those of x, logits, weight [E,N,K] and bias [E,N] too."""
        if what == FORWARD:
            return [self.forward()]
        out, x, logits, *rest = self.both()
        if isinstance(self.network, Modules):
            rest = [torch.stack(rest[0::2]), torch.stack(rest[1::2])]
        return [out, x, logits, *rest]


def truth(numbers: Numbers, whats: tuple[str, ...]) -> list[Tensor]:
    """The results in float64, some rows at a time: the experts' outputs of all would not always fit."""
    weight, bias = (t.double().requires_grad_(BOTH in whats) for t in (numbers.weight, numbers.bias))
    rows = max(1, _SLICE // max(bias.numel(), 1))
    parts: list[list[Tensor]] = []
    for x, logits, grad in zip(*(t.split(rows) for t in (numbers.x, numbers.logits, numbers.grad)), strict=True):
        x, logits = (t.double().requires_grad_(BOTH in whats) for t in (x, logits))
        out = batched(x, weight, bias, logits)
        if BOTH in whats:
            out.backward(grad.double())
        parts.append([out.detach(), x.grad, logits.grad])
    if BOTH not in whats:
        return [torch.cat([part[0] for part in parts])]
    return [*(torch.cat(list(part)) for part in zip(*parts, strict=True)), weight.grad, bias.grad]


def check(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> Check:
    """`found`, the output or output and gradients, against `expected` within the limits of `dtype`."""
    names = ("x", "logits", "weight", "bias")
    output, *gradients = (relative_error(f, e) for f, e in zip(found, expected, strict=False))
    worst, name = max(zip(gradients, names, strict=False), default=(0.0, ""))
    limits = LIMITS[dtype]
    return Check(output, worst, name, output <= limits[0] and worst <= limits[1])


def needed_bytes(variant: str, shape: dict[str, int], itemsize: int, what: str) -> int:
    """About what a variant takes at its peak: its parameters with their gradients, and the experts' outputs."""
    outputs = shape["B"] * shape["E"] * shape["N"] * itemsize
    weights = shape["E"] * shape["N"] * shape["K"] * itemsize
    if what == FORWARD:
        kept = 0 if variant.startswith(EXPERT_MIX) else 1 if is_ours(variant) else 2
    else:
        kept = 2 if is_ours(variant) else 4
    return kept * outputs + (1 if what == FORWARD else 2) * weights


def kept_bytes(shape: dict[str, int], itemsize: int, what: str) -> int:
    """What a call returns: the output, or that and all gradients."""
    output = shape["B"] * shape["T"] * shape["N"]
    if what == FORWARD:
        return output * itemsize
    inputs = shape["B"] * (shape["K"] + shape["T"] * shape["E"])
    return (output + inputs + shape["E"] * shape["N"] * (shape["K"] + 1)) * itemsize


def build_step(
    variant: str, shape: dict[str, int], dtype: str, device: str, what: str
) -> tuple[Callable[[], Any], Callable[[], None]]:
    """A step and its release, for `bench.memory`."""
    return Contender(variant, Numbers(shape, getattr(torch, dtype), device)).work(what), lambda: None
