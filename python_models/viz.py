"""Pictures of what a network has learned, and the numbers in them. Needs matplotlib.

Every ``draw_`` function returns a ``matplotlib.figure.Figure``: ``figure.savefig("experts.png")`` writes it, a notebook
shows it. Light and dark, line styles and labels carry everything, colour nothing.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from .adatt import AdaTT
from .mmoe import MMoE
from .ple import PLE

_INK, _ACCENT, _PALE = "#222222", "#0b4f8a", "#b5b5b5"
_SHADES = LinearSegmentedColormap.from_list("shades", ["#ffffff", "#9dbbd8", _ACCENT, "#04203a"])
_LINES = ["-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3))]
_MOST_NUMBERS = 24  # columns; with more of them cells are small and have no numbers


class ExpertWeights(NamedTuple):
    """One level: ``weights`` [rows,E], how much of every expert each row takes.

    ``experts_per_unit`` counts the experts of every task, then the shared ones, or names all as one unit. The rows are
    the ``num_tasks`` tasks, then the shared unit; 0 tasks: the experts of the next level.
    """

    weights: Tensor
    experts_per_unit: Sequence[int]
    num_tasks: int


def expert_weights(model: nn.Module, *inputs: Tensor, residual: bool = True) -> list[ExpertWeights]:
    """Mean gate weights over the rows of one pass in evaluation mode, a level each; AdaTT's with v added, unless told.

    ``model`` is an MMoE, CGC, PLE or AdaTT, or a model around one that hands ``return_gates`` on, such as
    :class:`~python_models.MultiTaskModel`; ``inputs`` are what it takes.
    """
    fusion = next((module for module in model.modules() if isinstance(module, (AdaTT, PLE, MMoE))), None)
    if fusion is None:
        raise TypeError(f"model must be or hold an MMoE, CGC, PLE or AdaTT; got {type(model).__name__}")
    training = model.training
    with torch.no_grad():
        _, gates = model.eval()(*inputs, return_gates=True)
        model.train(training)
        means = [level.mean(0).cpu() for level in gates]
        if isinstance(fusion, MMoE):
            tasks = [0] * (len(means) - 1) + [fusion.num_tasks]
            return [ExpertWeights(w, [w.shape[1]], n) for w, n in zip(means, tasks, strict=True)]
        if isinstance(fusion, AdaTT) and residual:
            means = [w + level.residual_weights().cpu() for w, level in zip(means, fusion.levels, strict=True)]
        units = [level.experts_per_unit for level in fusion.levels]
        return [ExpertWeights(w, counts, fusion.num_tasks) for w, counts in zip(means, units, strict=True)]


@torch.no_grad()
def gate_entropy(gates: Sequence[Tensor]) -> list[Tensor]:
    """How evenly each row spreads its weight, mean over the batch: [rows] a level, 0 for one expert, 1 for all alike.

    ``gates`` are [B,rows,E] a level, as ``return_gates=True`` gives them. The entropy is divided by the logarithm of
    the number of experts that the row reads; a row with one expert has 0.
    """
    found = []
    for weights in gates:
        routes = (weights > 0).any(0).sum(-1).clamp(min=2)
        found.append(torch.special.entr(weights).sum(-1).mean(0) / routes.log())
    return found


def draw_expert_weights(levels: Sequence[ExpertWeights], task_names: Sequence[str] | None = None) -> Figure:
    """Expert-to-task heat maps, a panel a level, as in Li et al., KDD 2023; a frame marks the experts a row owns.

    Darker is more; all panels share one scale. A weight below 0, which AdaTT's v can make, is hatched; an expert that a
    row does not read is blank.
    """
    if not levels:
        raise ValueError("levels must hold at least one level; got none")
    widest = max(level.weights.shape[1] for level in levels)
    tallest = [level.weights.shape[0] for level in levels]
    # To 0.5 at least: the near equal gates of a young network look pale.
    high = max(0.5, *(float(level.weights.abs().max()) for level in levels if level.weights.numel()))
    cell = 0.62 if widest <= _MOST_NUMBERS else 0.2
    size = 2.2 + cell * max(widest, 4), 0.6 + sum(min(0.42, 0.7 * cell) * n + 0.85 for n in tallest)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(levels), 1, squeeze=False, height_ratios=tallest)[:, 0]
    for i, (axes, level) in enumerate(zip(grid, levels, strict=True)):
        image = _heat_map(axes, level, task_names, high, cell)
        axes.set_title(f"level {i + 1}", loc="left", fontsize=10, weight="bold")
    negative = any((level.weights < 0).any() for level in levels)
    bar = figure.colorbar(image, ax=list(grid), shrink=min(1.0, 2.5 / figure.get_figheight()), aspect=14, pad=0.03)
    bar.outline.set_visible(False)
    bar.set_label("mean weight" + (", hatched: negative" if negative else ""), fontsize=9)
    bar.ax.tick_params(labelsize=8, length=2)
    return figure


def _inches(text: str, size: float) -> float:
    """About how wide a text of that size in points is, and some air."""
    return (0.6 * len(text) + 0.6) * size / 72


def _heat_map(
    axes: Axes, level: ExpertWeights, task_names: Sequence[str] | None, high: float, cell: float
) -> AxesImage:
    weights, counts = level.weights.double().numpy(), level.experts_per_unit
    rows, total = weights.shape
    units = len(counts)
    names = _names(max(rows, units) if level.num_tasks else 0, level.num_tasks, task_names)
    labels = names[:rows] if level.num_tasks else [f"to expert {e + 1}" for e in range(rows)]
    if sum(counts) != total or len(labels) != rows:
        raise ValueError(f"weights are {rows} x {total}: they do not fit {counts} experts and {level.num_tasks} tasks")
    image = axes.imshow(abs(weights), cmap=_SHADES, vmin=0, vmax=high, aspect="auto")
    for r, e in zip(*weights.nonzero(), strict=True):
        value, dark = weights[r, e], abs(weights[r, e]) > 0.4 * high
        plate = None
        if value < 0:
            shade = _PALE if dark else "#6f6f6f"
            axes.add_patch(Rectangle((e - 0.5, r - 0.5), 1, 1, fill=False, hatch="///", ec=shade, lw=0))
            plate = dict(facecolor=_SHADES(-value / high), edgecolor="none", pad=1.5)  # no hatch behind the number
        if total <= _MOST_NUMBERS:
            ink = "white" if dark else _INK
            axes.text(e, r, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink, bbox=plate)
    unit_names = ["experts"] if units == 1 else names
    tilt = any(_inches(name, 9) > n * cell for name, n in zip(unit_names, counts, strict=False) if n)
    begin, below = 0, dict(xycoords=axes.get_xaxis_transform(), textcoords="offset points", va="top")
    below |= dict(ha="right", rotation=30, rotation_mode="anchor") if tilt else dict(ha="center")
    for u, n in enumerate(counts):
        if n:
            lower = -16 if total <= _MOST_NUMBERS else -4  # below the numbers, where there are any
            axes.annotate(unit_names[u], (begin + (n - 1) / 2, 0), (0, lower), fontsize=9, **below)
            if begin:
                axes.axvline(begin - 0.5, color="white", lw=6)
            if units > 1 and u < rows:
                box = (begin - 0.46, u - 0.46), n - 0.08, 0.92
                axes.add_patch(Rectangle(*box, fill=False, ec=_INK, lw=1.5, zorder=3))
        begin += n
    numbers = [i + 1 for n in counts for i in range(n)] if total <= _MOST_NUMBERS else []
    axes.set_xticks(range(len(numbers)), numbers, fontsize=8)
    axes.set_yticks(range(rows), labels, fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def draw_gate_entropy(
    history: Sequence[Sequence[Tensor]],
    steps: Sequence[int] | None = None,
    task_names: Sequence[str] | None = None,
    *,
    to_experts: bool = False,
) -> Figure:
    """Gate entropy over training, a panel a level and a line a row: ``history[i]`` is :func:`gate_entropy` at a step.

    A line that falls to 0 is a gate that has settled on one expert. The rows of the last level are the tasks; below it
    they are the tasks, then the shared unit. With `to_experts`, or of another number, they are the next level's
    experts: MMoE's.
    """
    if not history or not history[0]:
        raise ValueError("history must hold at least one step with one level; got none")
    steps = list(range(1, len(history) + 1)) if steps is None else list(steps)
    if len(steps) != len(history):
        raise ValueError(f"steps has {len(steps)} entries for {len(history)} in history")
    tasks = len(history[0][-1]) if task_names is None else len(task_names)
    tallest = [max(2.1, 0.6 + 0.16 * len(level)) for level in history[0]]
    figure = Figure(figsize=(6.4, 0.5 + sum(tallest)), layout="constrained")
    grid = figure.subplots(len(tallest), 1, squeeze=False, sharex=True, height_ratios=tallest)[:, 0]
    for i, axes in enumerate(grid):
        lines = torch.stack([step[i].double().cpu() for step in history]).unbind(1)
        if len(lines) - tasks in (0, 1) and not (to_experts and i + 1 < len(grid)):  # 1: the shared unit's
            names = _names(len(lines), tasks, task_names)
        elif i + 1 < len(grid):
            names = [f"to expert {e + 1}" for e in range(len(lines))]
        else:
            raise ValueError(f"task_names has {tasks} names for {len(lines)} rows at level {i}")
        styles = [
            {"color": _ACCENT if r % 2 == 0 else "#6f6f6f", "ls": _LINES[r % len(_LINES)], "lw": 1.8}
            for r in range(len(lines))
        ]
        for line, style in zip(lines, styles, strict=True):
            axes.plot(steps, line.numpy(), marker="o" if len(steps) == 1 else None, ms=4, clip_on=False, **style)
        _label_ends(axes, [float(line[-1]) for line in lines], names, styles)
        axes.set_title(f"level {i + 1}", loc="left", fontsize=10, weight="bold")
        axes.set_xlim((min(steps), max(steps)) if len(steps) > 1 else (steps[0] - 1, steps[0]))
        axes.set_ylim(-0.03, 1.03)
        axes.set_yticks([0, 0.5, 1], ["0: one expert", "0.5", "1: all alike"], fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color="#e4e4e4", lw=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, length=2)
    grid[-1].set_xlabel("step", fontsize=9)
    figure.suptitle("gate entropy", x=0.01, ha="left", fontsize=11, weight="bold")
    return figure


def _names(wanted: int, tasks: int, task_names: Sequence[str] | None) -> list[str]:
    """`wanted` names: the tasks', then the shared unit's."""
    names = [f"task {t + 1}" for t in range(tasks)] if task_names is None else list(task_names)
    if tasks and len(names) != tasks:
        raise ValueError(f"task_names has {len(names)} names for {tasks} tasks")
    return [*names, "shared"][:wanted]


def _label_ends(axes: Axes, ends: Sequence[float], names: Sequence[str], styles: Sequence[dict[str, Any]]) -> None:
    """Every line's name behind its end, a piece of the line between; near names move apart, as little as it takes."""
    order, gap = sorted(range(len(ends)), key=lambda r: ends[r]), min(0.12, 1.04 / max(len(ends) - 1, 1))
    groups: list[tuple[float, int]] = []  # names that touch: the middle of them, and how many
    for r in order:
        middle, size = ends[r], 1
        while True:
            reach = gap * (size - 1) / 2
            middle = min(max(middle, reach - 0.02), 1.02 - reach)
            if not groups or groups[-1][0] + gap * (groups[-1][1] - 1) / 2 + gap <= middle - reach + 1e-9:
                break
            other, more = groups.pop()
            middle, size = (middle * size + other * more) / (size + more), size + more
        groups.append((middle, size))
    places = [middle + gap * (k - (size - 1) / 2) for middle, size in groups for k in range(size)]
    across = axes.get_yaxis_transform()
    for r, place in zip(order, places, strict=True):
        axes.plot([1.0, 1.07], [ends[r], place], transform=across, clip_on=False, **styles[r] | {"lw": 1.2})
        axes.text(1.08, place, names[r], transform=across, fontsize=8, va="center")


def draw_connections(
    gates: Sequence[Tensor], output_names: Sequence[str] | None = None, input_name: str = "x"
) -> Figure:
    """Sub-networks and the connections between them, levels from bottom to top (SNR: Ma et al., AAAI 2019).

    ``gates[k]`` is [I,J], from 0 to 1: how open, or in how many samples open, the way from sub-network j of level k to
    sub-network i of the next is. Wider and darker is more open; a closed way is not drawn. A sub-network that reads
    nothing, or that nothing reads, is dashed. The lowest ones read ``input_name``.
    """
    if not gates:
        raise ValueError("gates must hold at least one level; got none")
    for k, (below, above) in enumerate(zip(gates, gates[1:], strict=False)):
        if below.shape[0] != above.shape[1]:
            raise ValueError(
                f"gates[{k + 1}] reads {above.shape[1]} sub-networks (columns), gates[{k}] has {below.shape[0]} rows"
            )
    sizes = [gates[0].shape[1], *(level.shape[0] for level in gates)]
    widest, top = max(sizes), len(gates)
    names = [f"task {t + 1}" for t in range(sizes[-1])] if output_names is None else list(output_names)
    if len(names) != sizes[-1]:
        raise ValueError(f"output_names has {len(names)} names for {sizes[-1]} outputs")
    spacing = [(widest / max(n, 1)) ** 0.5 for n in sizes]
    unit = max(1.05, *((_inches(name, 9) + 0.25) / spacing[-1] for name in names))  # inches
    figure = Figure(figsize=(1.1 + unit * (widest + 0.5), 1.6 + 1.25 * len(gates)), layout="constrained")
    axes = figure.subplots()
    places = [[(i - (n - 1) / 2) * space for i in range(n)] for n, space in zip(sizes, spacing, strict=True)]
    left = -widest / 2 - 0.9 / unit
    for k, level in enumerate(gates):
        for i, row in enumerate(level.double().cpu().tolist()):
            for j, value in enumerate(row):
                if value > 0:
                    shade = _SHADES(0.25 + 0.75 * min(value, 1.0))
                    ends = [places[k][j], places[k + 1][i]], [k, k + 1]
                    axes.plot(*ends, color=shade, lw=0.6 + 3.4 * value, zorder=1 + value, solid_capstyle="round")
        share = float((level > 0).double().mean()) if level.numel() else 0.0
        axes.text(left, k + 0.5, f"{share:.0%} open", fontsize=8, va="center", ha="left", color=_INK)
    for place in places[0]:
        axes.plot([0, place], [-0.7, 0], color=_PALE, lw=0.8, zorder=0)
    _box(axes, 0, -0.7, input_name)
    for k, n in enumerate(sizes):
        for i in range(n):
            reads = k == 0 or bool((gates[k - 1][i] > 0).any())
            is_read = k == top or bool((gates[k][:, i] > 0).any())
            live = reads and is_read
            _box(axes, places[k][i], k, names[i] if k == top else f"{i + 1}", live)
    axes.set_xlim(left - 0.05, widest / 2 + 0.3)
    axes.set_ylim(-1.0, top + 0.3)
    axes.set_axis_off()
    return figure


def draw_task_tree(partitions: Sequence[Sequence[Sequence[int]]], task_names: Sequence[str] | None = None) -> Figure:
    """Which tasks share which layers: ``partitions[k]`` are the groups of tasks that share layer k, from the input up.

    Every task must be in one group a layer, and a group may only split on the way up, as in branched networks
    (Vandenhende et al., BMVC 2020; Guo et al., ICML 2020).
    """
    if not partitions:
        raise ValueError("partitions must hold at least one layer; got none")
    tasks = sorted(t for group in partitions[0] for t in group)
    above: dict[int, int] = {}
    paths: dict[int, list[int]] = {t: [] for t in tasks}
    for k, groups in enumerate(partitions):
        if sorted(t for group in groups for t in group) != list(range(len(tasks))):
            raise ValueError(f"partitions[{k}] must hold every task 0..{len(tasks) - 1} once; got {groups}")
        now = {t: min(group) for group in groups for t in group}
        for group in groups:
            if k and len({above[t] for t in group}) > 1:
                raise ValueError(f"partitions[{k}] joins tasks {list(group)}, which part before: {partitions[k - 1]}")
        above = now
        for t in tasks:
            paths[t].append(now[t])
    names = [f"task {t + 1}" for t in tasks] if task_names is None else list(task_names)
    if len(names) != len(tasks):
        raise ValueError(f"task_names has {len(names)} names for {len(tasks)} tasks")
    place = {t: x for x, t in enumerate(sorted(tasks, key=lambda t: (paths[t], t)))}
    unit = max(1.15, *(_inches(name, 9) + 0.25 for name in names))  # inches
    figure = Figure(figsize=(1.6 + unit * len(tasks), 1.0 + 0.95 * len(partitions)), layout="constrained")
    axes = figure.subplots()
    nodes: list[tuple[float, list[int]]] = []
    for k, groups in enumerate(partitions):
        parents, nodes = nodes, [(sum(place[t] for t in group) / len(group), list(group)) for group in groups]
        for x, group in nodes:
            for parent, members in parents:
                if group[0] in members:
                    axes.plot([parent, x], [k - 1, k], color=_INK, lw=0.8 + 0.9 * len(group), zorder=1)
            if len(group) > 1:
                _box(axes, x, k, f"{len(group)} tasks")
            else:
                axes.plot(x, k, "o", color=_INK, ms=5, zorder=3)
        axes.text(-1.0, k, f"layer {k + 1}", fontsize=8, va="center", ha="left", color="#5a5a5a")
    for t in tasks:
        x = next(x for x, group in nodes if t in group)
        axes.plot([x, place[t]], [len(partitions) - 1, len(partitions)], color=_INK, lw=1.7, zorder=1)
        _box(axes, place[t], len(partitions), names[t])
    axes.set_xlim(-1.05, len(tasks) - 0.4)
    axes.set_ylim(-0.4, len(partitions) + 0.4)
    axes.set_axis_off()
    return figure


def _box(axes: Axes, x: float, y: float, text: str, live: bool = True) -> None:
    ink, line = (_INK, "-") if live else ("#8a8a8a", "--")
    box = dict(boxstyle="round,pad=0.45", facecolor="white", edgecolor=ink, linestyle=line)
    axes.text(x, y, text, ha="center", va="center", fontsize=9, color=ink, zorder=4, bbox=box)
