"""A run's pictures. Needs matplotlib. Line styles, shades and labels carry everything, as in python_models.viz."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from python_models.train.loop import Loop

_INK, _ACCENT, _GREY = "#222222", "#0b4f8a", "#6f6f6f"
_LINES = ["-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3))]
_POINTS = 200  # of a curve at most


def all_pictures(loop: Loop) -> dict[str, Figure]:
    """Every picture that the run has something for, by its title."""
    found = {}
    curve = loop.curve.read()
    if len(curve):
        found["Training loss"] = draw_losses(curve, loop.progress.history, loop.splits.train.task_names)
    if loop.progress.history:
        found["Validation metrics"] = draw_metrics(loop.progress.history)
    return found | _of_network(loop)


def _of_network(loop: Loop) -> dict[str, Figure]:
    """What the architecture has learned: gates, connections, a tree."""
    from python_models import viz

    core, tasks, found = loop.model.core, loop.splits.train.task_names, {}
    history = [each for each in loop.progress.history if each["gate_entropy"]]
    if history:
        rows = next(part for part in (loop.splits.test, loop.splits.validation) if len(part))
        rows = rows.select(torch.arange(min(4096, len(rows)))).to(loop.device)
        levels = viz.expert_weights(loop.model, rows.numeric, rows.categorical)
        found["What every task takes of every expert"] = viz.draw_expert_weights(levels, tasks)
        entropies = [[torch.tensor(level) for level in each["gate_entropy"]] for each in history]
        steps, to_experts = [each["step"] for each in history], not levels[0].num_tasks
        picture = viz.draw_gate_entropy(entropies, steps, tasks, to_experts=to_experts)
        found["How evenly the gates spread"] = picture
    if hasattr(core, "connections"):
        with torch.no_grad():
            found["Connections that are open"] = viz.draw_connections([z.cpu() for z in core.connections()], tasks)
    if hasattr(core, "partitions"):
        tree = core.partitions() if callable(core.partitions) else core.partitions
        found["Which tasks share which layers"] = viz.draw_task_tree(tree, tasks)
    return found


def draw_losses(curve: Tensor, history: Sequence[dict[str, Any]], tasks: Sequence[str]) -> Figure:
    """The tasks' losses, a panel each, over the steps [steps, 1+T]: their mean over windows, and on validation rows."""
    figure, grid = _grid(len(tasks))
    size = max(1, min(20, len(curve) // 30), len(curve) // _POINTS)
    windows = curve[: len(curve) // size * size].unflatten(0, (-1, size))
    at = (torch.arange(len(windows)) + 0.5) * size
    for t, (axes, name) in enumerate(zip(grid, tasks, strict=False)):
        losses = windows[..., 1 + t]
        if size > 2:
            axes.fill_between(at, losses.amin(1), losses.amax(1), color="#dfe6ee", lw=0)
        axes.plot(at, losses.mean(1), color=_ACCENT, lw=1.4, label="training")
        if history:
            points = [each["losses"][t] for each in history]
            axes.plot([each["step"] for each in history], points, "o--", color=_INK, ms=3.5, lw=1, label="validation")
        axes.set_title(name, loc="left", fontsize=10, weight="bold")
        # The first steps' losses must not flatten the rest.
        seen = losses.mean(1)[len(windows) // 20 :]
        seen = torch.cat((seen, torch.tensor([e["losses"][t] for e in history], dtype=seen.dtype)))
        seen = seen[seen.isfinite()]
        if len(seen) > 1 and seen.max() > seen.min():
            margin = 0.15 * float(seen.max() - seen.min())
            axes.set_ylim(float(seen.min()) - margin, float(seen.max()) + margin)
        axes.set_xlabel("step", fontsize=8)
    grid[0].legend(frameon=False, fontsize=8)
    return figure


def draw_metrics(history: Sequence[dict[str, Any]]) -> Figure:
    """Every metric on the validation rows, a panel each and a line a task."""
    tasks = history[-1]["tasks"]
    metrics = list(dict.fromkeys(name for values in tasks.values() for name in values))
    figure, grid = _grid(len(metrics))
    steps = [each["step"] for each in history]
    lines = {}
    for axes, metric in zip(grid, metrics, strict=False):
        for i, task in enumerate(tasks):  # a task looks the same in every panel
            if metric not in tasks[task]:
                continue
            values = [each["tasks"][task][metric] for each in history]
            style = {"ls": _LINES[i % len(_LINES)], "color": _ACCENT if i % 2 == 0 else _GREY}
            (lines[task],) = axes.plot(steps, values, "o", ms=3, lw=1.4, **style)
        if metric == "calibration":
            axes.axhline(1, color=_GREY, lw=0.8)
        axes.set_title(metric, loc="left", fontsize=10, weight="bold")
        axes.set_xlabel("step", fontsize=8)
    # Beside the panels: within one it would hide points.
    names = [task for task in tasks if task in lines]
    figure.legend([lines[task] for task in names], names, loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _grid(panels: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    across = 2 if panels == 4 else min(panels, 3)
    down = -(-panels // across)
    figure = Figure(figsize=(0.6 + 3.5 * across, 2.7 * down), layout="constrained")
    grid = list(figure.subplots(down, across, squeeze=False).flat)
    for axes in grid[panels:]:
        axes.set_visible(False)
    for axes in grid[:panels]:
        axes.grid(axis="y", color="#e4e4e4", lw=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, length=2)
    return figure, grid


def embedded(figure: Figure) -> str:
    """The figure as a PNG in a data URL."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
