"""How pictures look: what tells things apart in colour does so in grey too, by its marker, its dashes or its hatch."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

OURS, INK, PALE, FAINT = "#0b4f8a", "#222222", "#6d6d6d", "#d9d9d9"
# From dark to light; a rival's marker, dashes and hatch are its own.
COLOURS = ("#0b4f8a", "#c2571a", "#4f8f4a", "#8a6bb0", "#b08a2e", "#5f9ea0", "#a04a6a", "#777777")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.3)), (0, (6, 2, 1, 2)), (0, (3, 1)), (0, (8, 3)), (0, (2, 3)), (0, (4, 1, 1, 1)))
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "---", "ooo", "+++")
_LOOK = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": INK,
    "ytick.color": INK,
    "hatch.linewidth": 0.7,
    "legend.frameon": False,
    "svg.fonttype": "path",
}


def look() -> Any:
    """Within it, figures are made in this look."""
    return rc_context(_LOOK)


def grid(axes: Axes, which: str = "both") -> None:
    """Faint lines behind what is drawn."""
    axes.grid(True, axis=which, color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)


def plain_ticks(axis: Any, values: Sequence[float]) -> None:
    """Ticks at these values, written as they are: 1024, and not 10^3."""
    axis.set_ticks(list(values), [f"{value:g}" for value in values])
    axis.set_ticks([], minor=True)


def log_ticks(axis: Any, limits: tuple[float, float]) -> None:
    """Ticks of a logarithmic axis in plain numbers: 1, 2, 5, 10, or where there are many decades 1, 10, 100."""
    few = limits[1] < limits[0] * 3000
    axis.set_major_locator(LogLocator(10, (1, 2, 5) if few else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def nice(value: float) -> str:
    """Three digits, and no exponent where it can be helped."""
    if value == 0:
        return "0"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.001 else f"{value:.1e}"


def where(machine: dict[str, Any], device: str = "cpu") -> str:
    """The machine in a line."""
    threads = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"
    name = machine["gpu"] if device == "cuda" else f"{machine['cpu']}, {threads}"
    return f"{name}, torch {machine['torch']}"


def foot(figure: Figure, text: str) -> None:
    """A small line under the picture."""
    figure.text(0.01, 0.008, text, fontsize=8.5, color=PALE, va="bottom")


def spread_labels(axes: Axes, entries: list[tuple[float, float, str, dict[str, Any]]]) -> None:
    """Texts beside the right ends (x, y) of lines, in the right margin, pushed apart where they would overlap."""
    figure = axes.figure
    scale = figure.dpi / 72
    edge = axes.transAxes.transform((1, 0))[0]
    low, high = (axes.transAxes.transform((0, y))[1] for y in (0, 1))
    spots = sorted((*axes.transData.transform((x, y))[::-1], i) for i, (x, y, _, _) in enumerate(entries))
    tall = [9 * 1.3 * scale * (entries[i][2].count("\n") + 1) + 3 * scale for _, _, i in spots]
    heights = [spot[0] for spot in spots]
    for _ in range(500):
        moved = 0.0
        for k in range(len(heights) - 1):
            short = (tall[k] + tall[k + 1]) / 2 - (heights[k + 1] - heights[k])
            if short > 0.01:
                heights[k] -= short / 2
                heights[k + 1] += short / 2
                moved = max(moved, short)
        if heights:
            heights[0] = max(heights[0], low + tall[0] / 2)
            heights[-1] = min(heights[-1], high)
        if moved < 0.1:
            break
    for height, (at, x, i) in zip(heights, spots, strict=True):
        px, py, text, how = entries[i]
        offset = ((edge - x) / scale + 14, (height - at) / scale)
        line = {"arrowstyle": "-", "color": how.get("color", PALE), "linewidth": 0.6, "shrinkA": 0, "shrinkB": 5}
        axes.annotate(
            text, (px, py), offset, textcoords="offset points", va="center", fontsize=9, arrowprops=line,
            annotation_clip=False, linespacing=1.15, **how,
        )  # fmt: skip


def place(axes: Axes, points: Sequence[tuple[float, float]], texts: Sequence[str], fontsize: float = 8.5) -> None:
    """A short text beside every point (in data), where it covers neither another text nor a point."""
    figure = axes.figure
    renderer = FigureCanvasAgg(figure).get_renderer()
    spots = axes.transData.transform(points)
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in spots]
    inside = axes.get_window_extent(renderer)
    for (x, y), point, text in zip(spots, points, texts, strict=True):
        probe = axes.annotate(text, point, (0, 0), textcoords="offset points", fontsize=fontsize)
        size = probe.get_window_extent(renderer)
        probe.remove()
        best = None
        for radius in (5, 10, 16, 23, 31, 41, 53, 67):
            for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8)):
                left = x + dx * (radius + 3) + (0 if dx > 0 else -size.width if dx < 0 else -size.width / 2)
                low = y + dy * (radius + 3) + (0 if dy > 0 else -size.height if dy < 0 else -size.height / 2)
                box = Bbox.from_bounds(left, low, size.width, size.height)
                hits = sum(box.overlaps(other) for other in taken) + (not _within(box, inside)) * 3
                if best is None or hits < best[0]:
                    best = (hits, box, radius)
                if not hits:
                    break
            if best is not None and not best[0]:
                break
        _, box, radius = best
        taken.append(box)
        scale = 72 / figure.dpi
        arrow = {"arrowstyle": "-", "color": PALE, "linewidth": 0.5} if radius > 10 else None
        axes.annotate(
            text,
            point,
            ((box.x0 - x) * scale, (box.y0 - y) * scale),
            textcoords="offset points",
            fontsize=fontsize,
            arrowprops=arrow,
            annotation_clip=False,
        )


def _within(box: Bbox, other: Bbox) -> bool:
    return box.x0 >= other.x0 and box.x1 <= other.x1 and box.y0 >= other.y0 and box.y1 <= other.y1


def png(figure: Figure, dpi: int = 150) -> bytes:
    """The picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def save(figure: Figure, path: Path, dpi: int = 150) -> Path:
    """Writes the picture, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(figure, dpi))
    return path
