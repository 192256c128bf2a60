"""One training step of every variant of one network: same weights, checked against float64, ready to be timed.

A speed-up may only be shown for a variant whose output and gradients agreed, in the same run, with the float64 network
of plain modules: `check` says so.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.memory import peak_memory
from bench.rivals import Batched, Level, PerExpert, Take, gradient, levels_of, value
from mtlkernels.slices import backward_in_slices
from python_models import AdaTT, MMoE

OURS = "ours"
COMPILED, AUTOTUNED = "torch.compile", "torch.compile, max-autotune"
SLICED, SLICE_ROWS = "ours, 512 rows at a time", 512
VARIANTS = (OURS, SLICED, "slices", "unbind", "batched", COMPILED)
FORWARD, BACKWARD, BOTH = "forward", "backward", "fwd + bwd"  # forward: without gradients, as in serving

# Largest relative L2 error against float64, of the output and of a gradient. A gradient's is larger by nature: where
# rounding moves a pre-activation across zero, a whole ReLU gradient is there or not.
LIMITS = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 2e-3),
    torch.bfloat16: (3e-2, 1.5e-1),
    torch.float16: (4e-3, 5e-2),
}


@dataclass(frozen=True)
class Task:
    """What is built and timed: one level of AdaTT (AdaTT-sp, x [B,T,K]) or MMoE (x [B,K])."""

    network: str = "AdaTT"
    tasks: int = 4
    experts_per_task: int = 2
    batch: int = 4096
    in_features: int = 256
    dims: tuple[int, ...] = (256, 128)
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0

    @property
    def num_experts(self) -> int:
        """E."""
        return self.tasks * self.experts_per_task

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of x, weights and output."""
        return getattr(torch, self.dtype)

    def variants(self) -> tuple[str, ...]:
        """The variants there are: an x [B,K] has no task to slice."""
        return VARIANTS if self.network == "AdaTT" else tuple(v for v in VARIANTS if v != "slices")

    def gemm_flops(self) -> int:
        """Floating-point operations of the matrix products of a step: forward, and twice that backward."""
        widths = (self.in_features, *self.dims)
        experts = sum(k * n for k, n in zip(widths, self.dims, strict=False)) * self.num_experts
        gates = self.tasks * self.num_experts * self.in_features
        return 3 * 2 * self.batch * (experts + gates)


def compiled(network: nn.Module | Callable[..., Tensor], variant: str) -> Callable[..., Tensor]:
    """The network under torch.compile, as the variant's name says; what it draws is what eager mode draws."""
    options = torch._inductor.list_mode_options("max-autotune") if variant == AUTOTUNED else {}
    return torch.compile(network, dynamic=False, options=options | {"fallback_random": True})


@dataclass(frozen=True)
class Check:
    """A variant's largest relative L2 errors against float64, and whether they lie within the dtype's limits."""

    output: float
    gradient: float
    worst: str
    ok: bool


class Contestant:
    """A network and the data of its step: ``step()`` runs forward and backward, ``release()`` drops the gradients.

    ``work(what)`` is what is timed: the step, a forward pass without gradients, or a backward pass again and again over
    one forward.
    """

    def __init__(self, network: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> None:
        self.network, self.call, self.x, self.grad = network, call, x, grad

    def release(self) -> None:
        """Drops the gradients of x and of the parameters."""
        self.x.grad = None
        self.network.zero_grad(set_to_none=True)

    def step(self) -> Tensor:
        """Forward and backward; returns the output [B,T,D]."""
        self.release()
        out = self.call(self.x)
        out.backward(self.grad)
        return out

    def work(self, what: str) -> Callable[[], Any]:
        """A call of forward, backward, or both."""
        if what == BOTH:
            return self.step
        if what == FORWARD:
            return torch.no_grad()(lambda: self.call(self.x))
        out = self.call(self.x)
        leaves = [self.x, *(p for p in self.network.parameters() if p.requires_grad)]
        return lambda: torch.autograd.grad(out, leaves, self.grad, retain_graph=True)

    def levels(self, take: Take) -> list[Level]:
        """The parameters, or their gradients, in the common layout."""
        return levels_of(self.network, take)


class Sliced(Contestant):
    """The step in slices of rows, by `mtlkernels.slices`."""

    def step(self) -> Tensor:
        """As of all rows at once, but that this much of the batch is in memory at a time."""
        self.release()
        outputs = []

        def loss(x: Tensor, grad: Tensor) -> Tensor:
            out = self.call(x)
            outputs.append(out.detach())
            return (out * grad).sum()

        backward_in_slices(loss, self.x, self.grad, rows=SLICE_ROWS, reduction="sum")
        return torch.cat(outputs)


def build_ours(task: Task) -> nn.Module:
    """Our network for the task, initialised from its seed; the gates' biases too, which otherwise start at 0."""
    torch.manual_seed(task.seed)
    dims = [list(task.dims)]
    if task.network == "AdaTT":
        net = AdaTT(task.in_features, task.tasks, task.experts_per_task, expert_dims=dims, gate_init="torch_default")
    elif task.network == "MMoE":
        net = MMoE(task.in_features, task.tasks, task.num_experts, expert_dims=dims, gate_init="torch_default")
    else:
        raise ValueError(f"network: got {task.network!r}, expected 'AdaTT' or 'MMoE'")
    return net.to(task.device, task.torch_dtype)


def make_data(task: Task) -> tuple[Tensor, Tensor]:
    """x [B,T,K] or [B,K], a leaf that wants its gradient, and the gradient [B,T,D] that comes from above."""
    generator = torch.Generator().manual_seed(task.seed + 1)
    shape = (task.batch, task.tasks, task.in_features) if task.network == "AdaTT" else (task.batch, task.in_features)
    x = torch.randn(shape, generator=generator)
    grad = torch.randn(task.batch, task.tasks, task.dims[-1], generator=generator)
    x, grad = (t.to(task.device, task.torch_dtype) for t in (x, grad))
    return x.requires_grad_(), grad


def build(variant: str, task: Task, levels: list[Level] | None = None) -> Contestant:
    """The variant with the weights `levels` (by default those of our network for the task)."""
    x, grad = make_data(task)
    if variant in (OURS, SLICED):
        network = build_ours(task)
        return (Contestant if variant == OURS else Sliced)(network, network, x, grad)
    if variant not in (*VARIANTS, AUTOTUNED):
        raise ValueError(f"variant: got {variant!r}, expected one of {(*VARIANTS, AUTOTUNED)}")
    levels = levels if levels is not None else levels_of(build_ours(task), value)
    if variant == "batched":
        network = Batched(levels)
        return Contestant(network, network, x, grad)
    inputs = "shared" if task.network == "MMoE" else "slices" if variant == "slices" else "unbind"
    network = PerExpert(levels, inputs)
    return Contestant(network, compiled(network, variant) if variant in (COMPILED, AUTOTUNED) else network, x, grad)


def build_step(variant: str, **task: Any) -> tuple[Callable[[], Any], Callable[[], None]]:
    """A step and its release, for `bench.memory`."""
    contestant = build(variant, Task(**{**task, "dims": tuple(task["dims"])}))
    return contestant.step, contestant.release


def build_all(task: Task, variants: tuple[str, ...] | None = None) -> dict[str, Contestant]:
    """Every variant, all with the weights of ours."""
    ours = build(OURS, task)
    levels = ours.levels(value)
    return {name: ours if name == OURS else build(name, task, levels) for name in variants or task.variants()}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, L2 in float64; the plain norm where nothing is expected; inf for a NaN."""
    if found.shape != expected.shape:
        raise ValueError(f"found: got shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    found, expected = found.detach(), expected.detach()
    difference = float((found.double() - expected.double()).norm())
    size = float(expected.double().norm())
    error = difference / size if size > 0 else difference
    return error if error == error else float("inf")


def results(contestant: Contestant) -> dict[str, Tensor]:
    """Output, gradient of x and of every parameter, under common names, after one step."""
    out = contestant.step()
    found = {"output": out.detach(), "x": contestant.x.grad}
    for k, level in enumerate(contestant.levels(gradient)):
        found |= level.named(f"level {k} ")
    contestant.release()
    return found


def truth(task: Task, levels: list[Level]) -> dict[str, Tensor]:
    """The results of the float64 network of plain modules with these weights on the task's data."""
    exact = [_double(level) for level in levels]
    inputs = "shared" if task.network == "MMoE" else "unbind"
    network = PerExpert(exact, inputs)
    x, grad = make_data(task)
    return results(Contestant(network, network, x.detach().double().requires_grad_(), grad.double()))


def _double(level: Level) -> Level:
    return replace(
        level,
        weight=[w.double() for w in level.weight],
        bias=[b.double() for b in level.bias],
        gate_weight=level.gate_weight.double(),
        gate_bias=level.gate_bias.double(),
        native=None if level.native is None else level.native.double(),
    )


def check(contestant: Contestant, expected: dict[str, Tensor], dtype: torch.dtype) -> Check:
    """Compares a variant's results with those of `truth`; a missing result counts as an infinite error."""
    return compare(results(contestant), expected, dtype)


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> Check:
    """The output and the worst of the rest against `expected`, within the limits of `dtype`."""
    errors = {k: relative_error(found[k], v) if k in found else float("inf") for k, v in expected.items()}
    output = errors.pop("output")
    worst = max(errors, key=errors.__getitem__)
    limits = LIMITS[dtype]
    return Check(output, errors[worst], worst, output <= limits[0] and errors[worst] <= limits[1])


def check_all(task: Task, contestants: dict[str, Contestant]) -> tuple[dict[str, Check], dict[str, float]]:
    """Checks every contestant, and says how many seconds its first step took; see `first_steps`."""
    expected = truth(task, contestants[OURS].levels(value))
    first = first_steps(contestants, task)
    return {name: check(found, expected, task.torch_dtype) for name, found in contestants.items()}, first


def first_steps(contestants: dict[str, Contestant], what: object) -> dict[str, float]:
    """How many seconds each contestant's first step takes (torch.compile compiles in it).

    A contestant that torch.compile cannot compile here is taken out of `contestants`; RuntimeError names any other
    that fails, and `what` it should have run.
    """
    first = {}
    for name, contestant in list(contestants.items()):
        start = time.perf_counter()
        try:
            contestant.step()
        except Exception as error:  # no C++ compiler, a Python it does not know: whatever keeps Inductor from working
            if name not in (COMPILED, AUTOTUNED):
                raise RuntimeError(f"{name} failed on {what}") from error
            print(f"{name} cannot compile the network here, and is left out: {str(error).splitlines()[0]}")
            del contestants[name]
            continue
        first[name] = time.perf_counter() - start
    return first


def step_memory(variant: str, task: Task) -> float | None:
    """MiB at the peak of one step of the variant, above what stays between steps."""
    return peak_memory("bench.contest:build_step", {"variant": variant, **asdict(task)}, device=task.device)
