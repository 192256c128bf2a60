"""The roofline: what every operator reaches, under what the machine can (Williams et al., CACM 2009).

Along x operations a byte, along y GFLOP/s, both logarithmic. The slope is the copy bandwidth and the flat part the best
matrix product, as `bench.calibrate` measured them. A point's distance to the line is what is left to gain; one above it
read from a cache. What does no arithmetic lies at the left edge, as high above its end of the slope as its bandwidth.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench import style

FORWARD, BACKWARD, STEP = "forward", "backward", "fwd + bwd"
_OTHER = "#e2e2e2"
_MARKERS = {FORWARD: "o", BACKWARD: "s", STEP: "^"}


@dataclass(frozen=True)
class Point:
    """One operator: its work, its seconds, what ran ("forward", "backward", "fwd + bwd"), whether it is ours."""

    label: str
    what: str
    flops: float
    bytes: float
    seconds: float
    ours: bool = True
    share: float | None = None  # of a step

    def reached(self, gflops: float, gb_s: float) -> float:
        """The share of its ceiling."""
        return max(self.flops / gflops, self.bytes / gb_s) / 1e9 / self.seconds


def draw(points: Sequence[Point], gflops: float, gb_s: float, title: str, foot: str) -> Figure:
    """The roofline with every point, numbered, the key beside it. ValueError without a point."""
    points = [p for p in points if p.seconds > 0 and p.bytes > 0]
    if not points:
        raise ValueError("points: got none that takes time and moves bytes")
    points = sorted(points, key=lambda p: (-(p.share or 0.0), p.flops / p.bytes))
    least = min([p.flops / p.bytes for p in points if p.flops] + [gflops / gb_s / 8])
    left = 10 ** np.floor(np.log10(least) - 0.15)
    if any(not p.flops for p in points):
        left /= 2
    right = max([p.flops / p.bytes for p in points] + [gflops / gb_s * 4]) * 2
    rows = len(points)
    with style.look():
        figure = Figure(figsize=(11.5, max(5.6, 1.6 + 0.2 * rows)), layout=None)
        axes = figure.add_axes((0.07, 0.12, 0.5, 0.79))
        xs = [max(p.flops / p.bytes, left * 1.25) for p in points]
        ys = [
            p.flops / p.seconds / 1e9 if p.flops else p.bytes / p.seconds / 1e9 * x
            for p, x in zip(points, xs, strict=True)
        ]
        axes.set(
            xscale="log", yscale="log", xlim=(left, right), ylim=(min(min(ys) / 2, left * gb_s), max(gflops, *ys) * 3)
        )
        knee = gflops / gb_s
        axes.plot([left, knee, right], [left * gb_s, gflops, gflops], color=style.INK, linewidth=1.8, zorder=2)
        axes.fill_between(
            [left, knee, right], [left * gb_s, gflops, gflops], axes.get_ylim()[0], color="#f4f4f4", zorder=0
        )
        for part, alpha in ((0.5, (0, (4, 3))), (0.1, (0, (1, 2)))):
            roof = np.array([left * gb_s, gflops, gflops]) * part
            axes.plot([left, knee, right], roof, color="#999999", linewidth=0.8, linestyle=alpha, zorder=1)
            axes.annotate(
                f"{part:.0%}",
                (right, gflops * part),
                (-3, 2),
                textcoords="offset points",
                ha="right",
                fontsize=8,
                color=style.PALE,
            )
        style.grid(axes)
        for p, x, y in zip(points, xs, ys, strict=True):
            face = style.OURS if p.ours else _OTHER
            axes.plot(
                x,
                y,
                _MARKERS[p.what],
                markersize=7.5,
                color=face,
                markeredgecolor=style.INK,
                markeredgewidth=0.8,
                zorder=3,
            )
        axes.set_xlabel("operations per byte moved")
        axes.set_ylabel("GFLOP/s")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
        figure.text(0.01, 0.965, title, fontsize=12, weight="bold", va="center")
        _legend(axes, points)
        _name_ceilings(axes, left, knee, right, gflops, gb_s, list(zip(xs, ys, strict=True)))
        style.place(axes, list(zip(xs, ys, strict=True)), [str(i + 1) for i in range(rows)])
        _key(figure, points, gflops, gb_s)
        style.foot(figure, foot)
    return figure


def _name_ceilings(
    axes: Axes, left: float, knee: float, right: float, gflops: float, gb_s: float, points: list[tuple[float, float]]
) -> None:
    """What the two parts of the line are, written along each where the points are farthest."""
    spots = axes.transData.transform(points)
    corners = axes.transData.transform([(left, left * gb_s), (knee, gflops), (right, gflops)])
    texts = f"{style.nice(gb_s)} GB/s, copy", f"{style.nice(gflops)} GFLOP/s, matrix product"
    for text, a, b in zip(texts, corners[:-1], corners[1:], strict=True):
        half = 90 if b[1] == a[1] else 68  # about half of the text, in dots
        long = np.hypot(*(b - a))
        shares = np.linspace(min(half / long, 0.5), max(1 - half / long, 0.5), 15)
        at = max((a + (b - a) * share for share in shares), key=lambda p, half=half: _distance(spots, p, half))
        axes.annotate(
            text,
            axes.transData.inverted().transform(at),
            (-4, 5) if b[1] > a[1] else (0, 6),
            textcoords="offset points",
            rotation=np.degrees(np.arctan2(*(b - a)[::-1])),
            rotation_mode="anchor",
            ha="center",
            fontsize=9,
        )


def _distance(spots: np.ndarray, at: np.ndarray, half: float) -> float:
    """To the nearest point, of a text about so wide above `at`."""
    away = np.abs(spots - at - (0, 10))
    return np.hypot(np.maximum(away[:, 0] - half, 0), away[:, 1]).min()


def _legend(axes: Axes, points: Sequence[Point]) -> None:
    kinds = [what for what in _MARKERS if any(p.what == what for p in points)]
    handles = [_mark(what, "#ffffff", label=what) for what in kinds]
    whose = {p.ours for p in points}
    if len(whose) == 2:
        handles += [_mark("forward", style.OURS, label="mtlkernels"), _mark("forward", _OTHER, label="torch")]
    axes.legend(handles=handles, loc="lower right", fontsize=9, handletextpad=0.2, borderaxespad=0.2)


def _mark(what: str, face: str, size: float = 7.0, **more: Any) -> Line2D:
    return Line2D(
        [], [], marker=_MARKERS[what], color=face, markeredgecolor=style.INK, markersize=size, linestyle="", **more
    )


def _key(figure: Figure, points: Sequence[Point], gflops: float, gb_s: float) -> None:
    axes = figure.add_axes((0.585, 0.06, 0.41, 0.86))
    rows, mixed = len(points), len({p.ours for p in points}) == 2
    axes.set(xlim=(0, 1), ylim=(max(rows, 22) + 0.5, -1.6))
    axes.set_axis_off()
    with_share = any(p.share is not None for p in points)
    heads = [(0.985, "of ceiling"), (0.80, "ms")] + ([(0.66, "of step")] if with_share else [])
    for x, head in heads:
        axes.text(x, -0.4, head, ha="right", va="center", fontsize=8.5, color=style.PALE)
    for i, p in enumerate(points):
        axes.text(0.045, i + 0.6, str(i + 1), ha="right", va="center", fontsize=9)
        face = style.OURS if p.ours else _OTHER
        axes.plot(
            0.075, i + 0.6, _MARKERS[p.what], markersize=6.5, color=face, markeredgecolor=style.INK, markeredgewidth=0.7
        )
        axes.text(
            0.10,
            i + 0.6,
            p.label if len(p.label) < 40 else p.label[:38] + "...",
            va="center",
            fontsize=9,
            weight="bold" if p.ours and mixed else "normal",
        )
        axes.text(0.985, i + 0.6, f"{p.reached(gflops, gb_s):.0%}", ha="right", va="center", fontsize=9)
        axes.text(0.80, i + 0.6, style.nice(p.seconds * 1e3), ha="right", va="center", fontsize=9)
        if p.share is not None:
            axes.text(0.66, i + 0.6, f"{p.share:.0%}", ha="right", va="center", fontsize=9)
