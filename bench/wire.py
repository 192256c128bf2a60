"""Bytes on the wire of a training step, on paper: for any network, plan and number of ranks, without a rank.

A collective is counted as a ring does it, which is the least any algorithm sends: of R ranks each sends 2 (R-1)/R of
what is all-reduced, and (R-1)/R of the whole of what is gathered or reduce-scattered. The network runs on the meta
device for the sizes, so that 65,536 experts cost nothing. :mod:`tests.distributed.test_wire` counts real steps' bytes
and finds these numbers exactly.

    python -m bench.wire             the table and, with --picture PATH, the picture
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import nn

import mtlkernels as mtl
from mtlkernels.nn import ExpertLinear, ExpertMLP
from python_models import MMoE, MultiTaskModel, Towers
from python_models.parallel import Mixed, mixed_banks, sharded_banks

Calls = dict[nn.Module, list[tuple[torch.Size, bool]]]


@dataclass(frozen=True)
class Sent:
    """A collective: its kind, the elements of the whole tensor, their bytes, and what for."""

    kind: str
    elements: int
    itemsize: int
    what: str


def ring(kind: str, size: int, ranks: int) -> Fraction:
    """Bytes that each of the ranks sends for a collective over a tensor of `size` bytes, the whole of it."""
    return Fraction({"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}[kind] * (ranks - 1) * size, ranks)


def padded(size: int, ranks: int) -> int:
    """The first dimension as collectives carry it: equal parts."""
    return -(-size // ranks) * ranks


def expert_step(model: nn.Module, rows: int, ranks: int, grad_input: bool = False, itemsize: int = 4) -> Iterator[Sent]:
    """The collectives of one training step with experts sharded over `ranks`, all of which read the same rows.

    model: not spread, on any device. grad_input: x needs a gradient, as an embedding's output does.
    """
    calls = _calls(model, rows, grad_input)
    mixed = mixed_banks(model)
    for bank in sharded_banks(model):
        for shape, wants in calls[bank]:  # several, where layers share a bank
            if wants:
                yield Sent("all_reduce", shape.numel(), itemsize, "gradient of the experts' input")
            if bank in mixed:
                continue
            out = shape[0] * padded(bank.num_experts, ranks) * bank.out_features
            yield Sent("all_gather", out, itemsize, "the experts' outputs")
        if bank in mixed:
            yield from _mix(bank, mixed[bank], rows, calls, itemsize)


def _mix(bank: nn.Module, how: Mixed, rows: int, calls: Calls, itemsize: int) -> Iterator[Sent]:
    routes = how.gates.routes
    if how.sharded:
        for shape, wants in calls[how.gates.logits]:
            if wants:
                yield Sent("all_reduce", shape.numel(), itemsize, "gradient of the gates' input")
    else:
        yield Sent("all_reduce", rows * sum(routes), itemsize, "gradient of the logits")
    for what in ("largest", "sum", "gradient's sum"):
        yield Sent("all_reduce", rows * len(routes), max(itemsize, 4), f"softmax: {what}")
    yield Sent("all_reduce", rows * how.outputs * bank.out_features, itemsize, "what the experts mix to")
    if how.native:
        yield Sent("all_reduce", how.native, itemsize, "gradient of the residual weights")


def row_step(parameters: list[torch.Size], ranks: int, plan: str, itemsize: int = 4) -> Iterator[Sent]:
    """The collectives of one step with rows of its own on each rank: "data" or "fsdp", over parameters as ranks have
    them."""
    whole = sum(padded(s[0] if len(s) else 1, ranks) * s[1:].numel() for s in parameters)
    if plan == "data":
        yield Sent("all_reduce", sum(s.numel() for s in parameters), itemsize, "gradients")
    else:
        yield Sent("all_gather", whole, itemsize, "parameters")
        yield Sent("reduce_scatter", whole, itemsize, "gradients")


def sent(collectives: Iterator[Sent], ranks: int) -> Fraction:
    """Bytes that each rank sends."""
    return sum((ring(c.kind, c.elements * c.itemsize, ranks) for c in collectives), Fraction(0))


def _calls(model: nn.Module, rows: int, grad_input: bool) -> Calls:
    """Of every bank's calls: the shape of the input, and whether that needs a gradient."""
    found, hooks = {}, []

    def note(module: nn.Module, args: tuple) -> None:
        found.setdefault(module, []).append((args[0].shape, args[0].requires_grad))

    for module in model.modules():
        if isinstance(module, (ExpertMLP, ExpertLinear)):
            hooks.append(module.register_forward_pre_hook(note))
    parameter = next(model.parameters())
    width = getattr(model, "fusion", model).in_features
    x = torch.empty(rows, width, device=parameter.device, dtype=parameter.dtype, requires_grad=grad_input)
    with mtl.use_backend("reference"):
        model(x)
    for hook in hooks:
        hook.remove()
    return found
