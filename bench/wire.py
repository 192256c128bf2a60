"""Bytes on the wire of a training step, on paper: for any network, plan and number of ranks, without a rank.

A collective is counted as a ring does it, which is the least any algorithm sends: of R ranks each sends 2 (R-1)/R of
what is all-reduced, and (R-1)/R of the whole of what is gathered or reduce-scattered. The network runs on the meta
device for the sizes, so that 65,536 experts cost nothing. :mod:`tests.distributed.test_wire` counts real steps' bytes
and finds these numbers exactly.

    python -m bench.wire             the table and, with --picture PATH, the picture
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import nn

import mtlkernels as mtl
from mtlkernels.nn import ExpertLinear, ExpertMLP
from python_models import MMoE, MultiTaskModel, Towers
from python_models.parallel import Mixed, mixed_banks, sharded_banks
from python_models.parallel_features import INPUTS, OUTPUTS, feature_cuts, width
from python_models.snr import TransLevel
from python_models.star_layers import StarLinear

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
            if wants and not how.joint:
                yield Sent("all_reduce", shape.numel(), itemsize, "gradient of the gates' input")
    else:
        yield Sent("all_reduce", rows * sum(routes), itemsize, "gradient of the logits")
    for what in ("largest", "sum", "gradient's sum"):
        yield Sent("all_reduce", rows * len(routes), max(itemsize, 4), f"softmax: {what}")
    yield Sent("all_reduce", rows * len(routes) * bank.out_features, itemsize, "what the experts mix to")
    if how.native:
        yield Sent("all_reduce", how.native, itemsize, "gradient of the residual weights")


def feature_step(
    model: nn.Module, rows: int, ranks: int, grad_input: bool = False, itemsize: int = 4
) -> Iterator[Sent]:
    """The collectives of one step with layers cut by features over `ranks`, which read the same rows; arguments as in
    :func:`expert_step`.
    """
    calls = _calls(model, rows, grad_input)
    for layer, how in feature_cuts(model).items():
        units = layer.num_experts if isinstance(layer, ExpertLinear) else 1
        if isinstance(layer, TransLevel):
            units = layer.connections.upper
        for shape, wants in calls[layer]:
            if wants and how != INPUTS:
                yield Sent("all_reduce", shape.numel(), itemsize, "gradient of the layers' input")
            if how == INPUTS:
                yield Sent("all_reduce", shape[0] * units * width(layer), itemsize, "the layers' outputs, added up")
            elif how == OUTPUTS:
                yield Sent(
                    "all_gather", shape[0] * units * padded(width(layer), ranks), itemsize, "the layer's outputs"
                )
            if isinstance(layer, TransLevel) and layer.connections.log_alpha is not None:
                connections = layer.connections.upper * layer.connections.lower
                yield Sent("all_reduce", connections, itemsize, "gradient of the connections")


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
    """Of every bank's and layer's calls: the shape of the input, and whether that needs a gradient."""
    found, hooks = {}, []

    def note(module: nn.Module, args: tuple) -> None:
        found.setdefault(module, []).append((args[0].shape, args[0].requires_grad))

    for module in model.modules():
        if isinstance(module, (ExpertMLP, ExpertLinear, TransLevel, StarLinear)):
            hooks.append(module.register_forward_pre_hook(note))
    parameter = next(model.parameters())
    inputs = (model.fusion if isinstance(model, MultiTaskModel) else model).in_features
    x = torch.empty(rows, inputs, device=parameter.device, dtype=parameter.dtype, requires_grad=grad_input)
    with mtl.use_backend("reference"):
        model(x)
    for hook in hooks:
        hook.remove()
    return found


# What the table is about: one level of MMoE under embeddings, whose input has a gradient.
IN, TASKS, OUT, ROWS = 512, 8, 128, 1024


def network(experts: int) -> nn.Module:
    fusion = MMoE(IN, TASKS, experts, [[OUT]], device="meta")
    return MultiTaskModel(fusion, Towers(OUT, TASKS, [32], device="meta"))


def both(model: nn.Module, rows: int, data: int, experts: int) -> Fraction:
    """Bytes a rank sends on a mesh of data x experts ranks, `rows` each: rows averaged, experts sharded; 1 is none."""
    total = Fraction(0)
    banks = [*sharded_banks(model), *(m.gates.logits for m in mixed_banks(model).values() if m.sharded)]
    spread = {p for bank in banks for p in bank.parameters()}
    if experts > 1:
        total += sent(expert_step(model, rows * experts, experts, grad_input=True), experts)
    if data > 1:
        # The first rank's part, the largest.
        own = [math.ceil(Fraction(p.numel(), experts)) if p in spread else p.numel() for p in model.parameters()]
        total += sent(row_step([torch.Size([n]) for n in own], data, "data"), data)
    return total


def table(ranks: list[int], experts: list[int]) -> list[dict]:
    """Bytes of every plan, and the best mesh, for each number of ranks and of experts."""
    found = []
    for e in experts:
        model = network(e)
        for r in ranks:
            meshes = {d: both(model, ROWS, d, r // d) for d in (2**i for i in range(r.bit_length())) if r // d <= e}
            best = min(meshes, key=meshes.get)
            sent_by = {"data": meshes[r], "sharded": meshes.get(1), "best": meshes[best]}
            row = {k: None if v is None else float(v) for k, v in sent_by.items()}
            found.append({"ranks": r, "experts": e, **row, "ranks along experts": r // best})
    return found


def crossover(ranks: int) -> int:
    """The least number of experts, of at least one a rank, from which sharding them sends less than data parallelism.

    All collectives of either are all-reduces, so the ring's factor falls out: it is parameters against activations.
    """
    low, high = 1, 1 << 24
    while low < high:
        e = (low + high) // 2
        model = network(e)
        if both(model, ROWS, 1, ranks) < both(model, ROWS, ranks, 1):
            high = e
        else:
            low = e + 1
    return max(low, ranks)


def draw(rows: list[dict], path: Path) -> None:
    """Bytes against experts at 64 ranks, and the best mesh of every size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "font.family": "sans-serif"})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6))
    line = [row for row in rows if row["ranks"] == 64]
    styles = {
        "data": ("data parallel", "#8a8a8a", "--"),
        "sharded": ("experts sharded over all", "#c26a00", "-."),
        "best": ("best mesh of both", "#0b4f8a", "-"),
    }
    for key, (label, colour, dashes) in styles.items():
        points = [(row["experts"], row[key] / 2**20) for row in line if row[key] is not None]
        left.plot(*zip(*points, strict=True), dashes, color=colour, label=label, linewidth=2)
    at = crossover(64)
    left.axvline(at, color="#222222", linewidth=1, linestyle=":")
    left.annotate(f"{at} experts", (at, left.get_ylim()[1]), xytext=(4, -12), textcoords="offset points", fontsize=9)
    left.set(xscale="log", yscale="log", xlabel="experts", ylabel="MiB sent by a rank, a step")
    left.set_title("64 ranks", loc="left", weight="bold")
    left.legend(frameon=False)
    left.spines[["top", "right"]].set_visible(False)
    ranks, experts = sorted({r["ranks"] for r in rows}), sorted({r["experts"] for r in rows})
    grid = {(row["ranks"], row["experts"]): row["ranks along experts"] for row in rows}
    image = [[math.log2(grid[r, e]) for e in experts] for r in ranks]
    right.imshow(image, origin="lower", cmap="Blues", aspect="auto", vmin=0, vmax=13)
    for y, r in enumerate(ranks):
        for x, e in enumerate(experts):
            right.text(x, y, str(grid[r, e]), ha="center", va="center", fontsize=8)
    right.set_xticks(range(len(experts)), [str(e) for e in experts], rotation=45)
    right.set_yticks(range(len(ranks)), [str(r) for r in ranks])
    right.set(xlabel="experts", ylabel="ranks")
    right.set_title("Best mesh: ranks along experts", loc="left", weight="bold")
    figure.suptitle(
        f"Bytes on the wire, by the model: MMoE, {IN} inputs with gradient, {TASKS} tasks, experts [{OUT}], "
        f"{ROWS} rows a rank, float32, rings",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = table([2**i for i in range(1, 11)], [2**i for i in range(3, 17)])
    print("ranks  experts  data MiB  sharded MiB  best MiB  ranks along experts")
    for row in rows:
        mib = ["-" if row[k] is None else f"{row[k] / 2**20:.1f}" for k in ("data", "sharded", "best")]
        print(
            f"{row['ranks']:5} {row['experts']:8} {mib[0]:>9} {mib[1]:>12} {mib[2]:>9} {row['ranks along experts']:20}"
        )
    print("crossover, experts:", {2**i: crossover(2**i) for i in range(1, 11)})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    if options.picture:
        draw(rows, options.picture)


if __name__ == "__main__":
    main()
