"""Pictures of what `run` and `sweep` left in files of lines.

A roofline with every operator of ours on it, bars of every rival's time over ours, and time and memory against what was
swept. Figures whose check failed are left out, and said to be.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench import calibrate, roofline, slopes, style, swept
from bench.contest import OURS
from bench.lines import SWEPT
from bench.papers import ARCHITECTURES

Entries = Sequence[dict[str, Any]]
ORDER = (OURS, "plain", "plain formula", *swept.ALL)  # the rest as they come
UNITS = {"ms": "ms", "peak_mib": "MiB"}
_WORDS = {"experts": "number of experts", "tasks": "number of tasks", "batch": "rows of the batch", "width": "width"}


def title_of(what: str) -> str:
    """What is measured, in words."""
    return {"forward": "forward", "backward": "backward", "fwd + bwd": "training step (forward and backward)"}[what]


def operators(head: dict[str, Any], entries: Entries, dtype: str) -> Figure | None:
    """The roofline of every operator of ours in one dtype; None without one."""
    import torch

    points = []
    # Networks have theirs where a file has nothing else.
    some = [entry for entry in entries if entry["subject"] not in ARCHITECTURES] or entries
    for entry in some:
        own = entry["ours"] and entry["variant"] == OURS and entry["dtype"] == dtype and entry["flops"] is not None
        if own and entry["check"]["ok"]:
            seconds = entry["ms"]["median"] / 1e3
            label = f"{entry['subject']}, {entry['name']}"
            points.append(roofline.Point(label, entry["what"], entry["flops"], entry["bytes"], seconds))
    if not points:
        return None
    machine = head["machine"]
    rates = calibrate.rates(head["ceilings"], getattr(torch, dtype), machine["threads"])
    device = entries[0]["device"]
    foot = f"{style.where(machine, device)}. Medians. Above the line: out of a cache, or by skipping what is closed."
    return roofline.draw(points, *rates, f"Roofline: mtlkernels, {dtype}", foot)


def bars(head: dict[str, Any], entries: Entries, what: str, dtype: str) -> Figure | None:
    """Every rival's time over ours, subject by subject; None where there are none."""
    subjects: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for entry in entries:
        if entry["what"] == what and entry["dtype"] == dtype and entry["axis"] is None:
            subjects.setdefault((entry["subject"], entry["name"]), {})[entry["variant"]] = entry
    subjects = {key: own for key, own in subjects.items() if OURS in own and any(e["ratio"] for e in own.values())}
    if not subjects:
        return None
    rivals = _ordered(v for own in subjects.values() for v, e in own.items() if v != OURS and e["ratio"])
    several = len({name for _, name in subjects}) > 1 and len(subjects) > len({subject for subject, _ in subjects})
    height = sum(0.30 * sum(bool(own.get(v, {}).get("ratio")) for v in rivals) + 0.22 for own in subjects.values())
    longest = max(e["ratio"] or 0 for own in subjects.values() for e in own.values())
    with style.look():
        tall = height + 1.35
        figure = Figure(figsize=(10, tall))
        axes = figure.add_axes((0.26, 0.75 / tall, 0.72, 1 - 1.3 / tall))
        log = longest > 12
        least = min(0.5, 0.8 * min(e["ratio"] for own in subjects.values() for e in own.values() if e["ratio"]))
        axes.set_xscale("log" if log else "linear")
        axes.set_xlim(least if log else 0, longest * (7 if log else 1.5))
        at, middles, labels = 0.0, [], []
        for (subject, name), own in subjects.items():
            start = at
            for rival in rivals:
                entry = own.get(rival)
                if entry is None or not entry["ratio"]:
                    continue
                colour, hatch = _kind(rival)
                axes.barh(at, entry["ratio"], 0.82, color=colour, edgecolor=style.INK, hatch=hatch, linewidth=0.6)
                text = f"{'~' if entry['noisy'] else ''}{entry['ratio']:.2f}x  {rival}"
                axes.annotate(
                    text, (max(entry["ratio"], 1), at), (6, 0), textcoords="offset points", va="center", fontsize=8.5
                )
                at += 1
            middles.append((start + at - 1) / 2)
            ms = own[OURS]["ms"]["median"]
            labels.append(f"{subject}{', ' + name if several else ''}\nours {style.nice(ms)} ms")
            at += 0.75
        axes.axvline(1, color=style.OURS, linewidth=2.2, zorder=3)
        axes.annotate(
            "mtlkernels", (1, 1), (0, 3), textcoords="offset points", xycoords=axes.get_xaxis_transform(),
            ha="center", fontsize=9.5, weight="bold", color=style.OURS,
        )  # fmt: skip
        axes.set_ylim(at - 0.9, -0.75)
        axes.set_yticks(middles, labels, fontsize=9)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("time / time of mtlkernels" + (", logarithmic" if log else ""))
        if log:
            style.log_ticks(axes.xaxis, axes.get_xlim())
        style.grid(axes, "x")
        figure.text(0.01, 1 - 0.2 / tall, _head(what, dtype), fontsize=12, weight="bold", va="center")
        device = entries[0]["device"]
        noisy = any(own[OURS]["noisy"] for own in subjects.values())
        foot = f"{style.where(head['machine'], device)}. Medians of variants timed in turn, every check green."
        style.foot(figure, foot + (" ~: noisy." if noisy else ""))
    return figure


def _head(what: str, dtype: str) -> str:
    return f"{title_of(what).capitalize()}, {dtype}: time over ours; beyond the line is slower than ours"


def _kind(rival: str) -> tuple[str, str]:
    """Colour and hatch: plain modules and formulas, what a compiler makes of them, and what is written by hand."""
    if rival.startswith("plain"):
        return "#ffffff", "///"
    return ("#a9b8c4", "...") if rival.startswith("torch.compile") else ("#c9c9c9", "")


def _ordered(names: Any) -> list[str]:
    found = list(dict.fromkeys(names))
    return sorted(found, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


def growth(head: dict[str, Any], entries: Entries, axis: str, field: str, dtype: str) -> Figure | None:
    """Time ("ms") or peak memory ("peak_mib") against what was swept, a panel each direction; None without."""
    own = [e for e in entries if e["subject"] == SWEPT and e["axis"] == axis and e["dtype"] == dtype]
    found = {what: lines for (_, what), lines in slopes.curves(own, field).items()}
    found = {what: {v: c for v, c in lines.items() if len(c) > 1} for what, lines in found.items()}
    found = {what: lines for what, lines in found.items() if lines}
    if not found:
        return None
    variants = _ordered(v for lines in found.values() for v in lines)
    slope = {(g.what, g.variant): g.time if field == "ms" else g.memory for g in slopes.growth(own)}
    starts = {g.start for g in slopes.growth(own)}
    panels = len(found)
    with style.look():
        figure = Figure(figsize=(5.9 * panels + 0.4, 5.0) if panels > 1 else (8, 5.0))
        wide = 1 / panels
        for i, (what, lines) in enumerate(found.items()):
            room = 0.265 if panels > 1 else 0.27  # of the panel, for the labels at the lines' ends
            axes = figure.add_axes((wide * (i + 0.115), 0.15, wide * (0.87 - room), 0.66))
            axes.set(xscale="log", yscale="log")
            ends, least, most = [], np.inf, 0.0
            for variant, curve in lines.items():
                k = variants.index(variant)
                ats = list(curve)
                ys = [max(v, slopes.RESOLVED) if field == "peak_mib" else v for v in curve.values()]
                least, most = min(least, *ys), max(most, *ys)
                first = k == 0
                axes.plot(
                    ats, ys, color=style.COLOURS[k % 8], marker=style.MARKERS[k % 8], linestyle=style.DASHES[k % 8],
                    linewidth=2.4 if first else 1.6, markersize=7 if first else 6,
                    markeredgecolor="white", markeredgewidth=0.8, zorder=4 if first else 3,
                )  # fmt: skip
                grows = slope.get((what, variant))
                text = variant + ("" if grows is None else f"\nslope {grows:.2f}")
                weight = "bold" if first else "normal"
                ends.append((ats[-1], ys[-1], text, {"color": style.COLOURS[k % 8], "weight": weight}))
            points = sorted({at for curve in lines.values() for at in curve})
            _guide(axes, points, least, most)
            style.plain_ticks(axes.xaxis, points if len(points) < 9 else points[::2])
            style.log_ticks(axes.yaxis, axes.get_ylim())
            axes.set_xlabel(_WORDS[axis])
            axes.set_ylabel("time, ms" if field == "ms" else "peak memory beyond operands and results, MiB")
            axes.set_title(title_of(what).capitalize() if what != "fwd + bwd" else "Training step", pad=9)
            style.grid(axes)
            style.spread_labels(axes, ends)
        figure.text(0.01, 0.955, _swept_title(own, axis, field, dtype), fontsize=12, weight="bold", va="center")
        start = ", ".join(f"{axis} = {s}" for s in sorted(starts))
        foot = (
            f"{style.where(head['machine'], own[0]['device'])}. Slopes in log-log from {start} on; thin line: slope 1."
        )
        if field == "peak_mib":
            foot += " Less than 1 MiB is drawn as 1."
        style.foot(figure, foot)
    return figure


def _guide(axes: Any, points: Sequence[int], least: float, most: float) -> None:
    """A thin line of slope 1 through the middle, within what the curves span."""
    low, high = points[0], points[-1]
    level = np.sqrt(least * most) / np.sqrt(low * high)
    xs = np.geomspace(low, high, 64)
    ys = xs * level
    keep = (ys >= least) & (ys <= most)
    axes.plot(xs[keep], ys[keep], color="#9a9a9a", linewidth=0.8, zorder=1)
    axes.set_ylim(least / 1.6, most * 1.6)


def _swept_title(own: Entries, axis: str, field: str, dtype: str) -> str:
    from bench.sweep import AXES

    fixed = ", ".join(f"{letter}={size}" for letter, size in own[0]["shape"].items() if letter != AXES[axis])
    what = "Time" if field == "ms" else "Memory"
    return f"{what} against the {_WORDS[axis]}: a mixture of experts, {dtype}, {fixed}"
