"""The parts by themselves: mix beside softmax + bmm, and what one call of an operator costs before any arithmetic."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mtlkernels as mtl
from bench.contest import LIMITS, OURS, relative_error
from bench.timing import control_difference, interleaved, per_call

MIX_SHAPES = tuple((tasks, experts) for tasks in (4, 8) for experts in (8, 16))
PLAIN = "softmax + bmm"
Mix = Callable[[list[Tensor]], Tensor]


def mix_operands(
    batch: int, tasks: int, experts: int, width: int, dtype: torch.dtype, device: str, native: bool
) -> tuple[list[Tensor], Tensor]:
    """experts [B,E,D], logits [B,T,E], with `native` v [E], all leaves that want gradients; and a gradient [B,T,D]."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, experts, width), (batch, tasks, experts)] + ([(experts,)] if native else [])
    leaves = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    return leaves, torch.randn(batch, tasks, width, generator=generator).to(device, dtype)


def mixes(kind: str, tasks: int, experts: int) -> dict[str, Mix]:
    """Ours and the plain one, of "gated_mix" or "adatt_mix" (v padded to [T,E], added to the softmax, one bmm)."""
    if kind == "gated_mix":
        return {
            OURS: lambda leaves: mtl.gated_mix(leaves[0], leaves[1]),
            PLAIN: lambda leaves: torch.bmm(torch.softmax(leaves[1], -1), leaves[0]),
        }
    counts = [experts // tasks] * tasks

    def padded(leaves: list[Tensor]) -> Tensor:
        own = torch.block_diag(*leaves[2].view(tasks, -1).unbind())
        return torch.bmm(torch.softmax(leaves[1], -1) + own, leaves[0])

    return {OURS: lambda leaves: mtl.adatt_mix(*leaves, experts_per_unit=counts), PLAIN: padded}


def measure_mix(
    *, batch: int = 4096, width: int = 128, dtype: str = "float32", device: str = "cpu", seconds: float = 3.0
) -> list[dict[str, Any]]:
    """One row a mix, shape and direction: milliseconds of both, their ratio if the check is green, and the control."""
    rows = []
    torch_dtype = getattr(torch, dtype)
    for kind in ("gated_mix", "adatt_mix"):
        for tasks, experts in MIX_SHAPES:
            leaves, grad = mix_operands(batch, tasks, experts, width, torch_dtype, device, kind == "adatt_mix")
            calls = mixes(kind, tasks, experts)
            ok = all(_agrees(call, calls[PLAIN], leaves, grad) for call in calls.values())
            for backward in (False, True):
                steps = {name: _mix_step(call, leaves, grad, backward) for name, call in calls.items()}
                times = interleaved(steps, seconds=seconds, warmup_seconds=0.2, device=device, control=OURS)
                ratio = times[PLAIN].median / times[OURS].median
                rows.append(
                    {"mix": kind, "tasks": tasks, "experts": experts, "width": width, "batch": batch, "dtype": dtype}
                    | {"what": "fwd + bwd" if backward else "forward", "check": ok}
                    | {"ms": {name: times[name].as_ms() for name in calls}, "ratio": ratio if ok else None}
                    | {"control_difference": control_difference(times, OURS)}
                )
    return rows


def _mix_step(call: Mix, leaves: list[Tensor], grad: Tensor, backward: bool) -> Callable[[], Any]:
    def forward() -> Tensor:
        return call(leaves)

    def both() -> None:
        for leaf in leaves:
            leaf.grad = None
        call(leaves).backward(grad)

    return both if backward else forward


def _agrees(call: Mix, plain: Mix, leaves: list[Tensor], grad: Tensor) -> bool:
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = plain(exact)
    out = call(leaves)
    output, gradient = LIMITS[leaves[0].dtype]
    if relative_error(out, expected) > output:
        return False
    wanted = torch.autograd.grad(expected, exact, grad.double())
    found = torch.autograd.grad(out, leaves, grad)
    return all(relative_error(f, w) <= gradient for f, w in zip(found, wanted, strict=True))


def tiny_calls(device: str = "cpu", *, with_grad: bool) -> dict[str, Callable[[], Any]]:
    """One call of each operator on tensors of a few numbers, so that what is left is the call; and of a plain bmm."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).requires_grad_(with_grad)

    x, weight, bias = leaf(2, 2, 4), leaf(2, 4, 4), leaf(2, 4)
    experts, logits, native = leaf(2, 2, 4), leaf(2, 2, 2), leaf(2)
    gates = leaf(2, 2, 2)
    counts = [1, 1]
    return {
        "expert_linear": lambda: mtl.expert_linear(x, weight, bias, activation="relu"),
        "mix": lambda: mtl.mix(experts, logits),
        "gated_mix": lambda: mtl.gated_mix(experts, logits),
        "adatt_mix": lambda: mtl.adatt_mix(experts, logits, native, experts_per_unit=counts),
        "torch.bmm": lambda: torch.bmm(gates, experts),
        "F.softmax + torch.bmm": lambda: torch.bmm(F.softmax(logits, -1), experts),
    }


def measure_overhead(device: str = "cpu", *, seconds: float = 0.5) -> list[dict[str, Any]]:
    """Microseconds of one forward call of each operator, without gradient (plain tensors) and with (leaves want it)."""
    rows = []
    plain, differentiable = tiny_calls(device, with_grad=False), tiny_calls(device, with_grad=True)
    for name in plain:
        without, with_grad = (
            per_call(calls[name], seconds=seconds, device=device) * 1e6 for calls in (plain, differentiable)
        )
        rows.append({"call": name, "us": without, "us_with_gradient": with_grad})
    return rows
