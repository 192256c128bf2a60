"""The pictures of the page. Places, markers and line styles carry everything: they are the same in grey."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from bench.reproduce.plan import CORRELATIONS, STUDIES, SYNTHETICS, TABLE, Setting
from bench.reproduce.results import Line
from bench.reproduce.summary import MEAN, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _ACCENT, _GREY, _PALE = "#222222", "#0b4f8a", "#6f6f6f", "#e4e4e4"
_LINES = {"SharedBottom": (":", _GREY, 2.2), "OMoE": ("--", _INK, 1.6), "MMoE": ("-", _ACCENT, 2.0)}
_PAPERS = ("AdaTT-sp", "AdaTT", "MMoE")  # in bold


def draw(summary: Summary, folder: Path) -> list[Path]:
    """Every picture for which there are lines; a list of the files."""
    made = []
    for name, make in (("table", draw_table), ("studies", draw_studies), ("synthetic", draw_synthetic)):
        figure = make(summary)
        if figure is not None:
            path = folder / f"reproduce-{name}.png"
            figure.savefig(path, dpi=130, metadata={"Software": None})
            made.append(path)
    return made


def ranked(summary: Summary) -> list[str]:
    """The names of the table that have test lines, the best mean first."""
    known = [name for name, setting in TABLE.items() if summary.tests(setting)]
    return sorted(known, key=lambda name: -statistics.fmean(summary.column(TABLE[name])))


def draw_table(summary: Summary) -> Figure | None:
    """Test AUC of every architecture, a panel a task: seeds as grey ticks, mean and standard deviation on them."""
    from matplotlib.figure import Figure

    names = ranked(summary)
    if not names:
        return None
    tasks = [MEAN, *next(iter(summary.scores(TABLE[names[0]]).values()))][:-1]
    figure = Figure(figsize=(11, 0.9 + 0.25 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    for axes, task in zip(panels, tasks, strict=True):
        for place, name in enumerate(names):
            _point(axes, summary.column(TABLE[name], task), place, name in _PAPERS, across=True)
        if "SharedBottom" in names:
            axes.axvline(
                statistics.fmean(summary.column(TABLE["SharedBottom"], task)), color=_GREY, lw=1, ls=":", zorder=0
            )
        _clean(axes, "x")
        title = "mean over the tasks" if task == MEAN else task.replace("_", " ")
        axes.set_title(title, loc="left", fontsize=10, weight="bold")
        axes.locator_params(axis="x", nbins=4)
    panels[0].set_yticks(range(len(names)), names, fontsize=8.5)
    for label in panels[0].get_yticklabels():
        label.set_weight("bold" if label.get_text() in _PAPERS else "normal")
    panels[0].invert_yaxis()
    figure.suptitle("Test AUC on Census-Income. Dotted: SharedBottom", x=0.01, ha="left", fontsize=10)
    return figure


def _point(axes: Axes, values: list[float], place: float, filled: bool, across: bool) -> None:
    """Seeds, mean and standard deviation at a place of the other axis."""
    mean, spread = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0

    def at(x: list[float], y: list[float]) -> tuple[list[float], list[float]]:
        return (x, y) if across else (y, x)

    axes.plot(*at(values, [place] * len(values)), "|" if across else "_", color="#9a9a9a", ms=7, zorder=1)
    axes.plot(*at([mean - spread, mean + spread], [place, place]), color=_INK, lw=1.4, zorder=2)
    face = _ACCENT if filled else "white"
    axes.plot(*at([mean], [place]), "o", ms=5.5, color=_INK, mfc=face, zorder=3)


def _clean(axes: Axes, lines: str) -> None:
    axes.grid(axis=lines, color=_PALE, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, length=2)


def draw_studies(summary: Summary) -> Figure | None:
    """AdaTT's three studies, mean test AUC over the tasks."""
    from matplotlib.figure import Figure

    titles = {"residual": "with and without residual", "experts": "experts of AdaTT-sp", "levels": "levels of AdaTT-sp"}
    known = {study: _known(summary, STUDIES[study]) for study in titles}
    if not any(known.values()):
        return None
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axes, (study, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        columns = known[study]
        for place, values in enumerate(columns.values()):
            _point(axes, values, place, True, across=False)
        if study != "residual" and len(columns) > 1:
            means = [statistics.fmean(values) for values in columns.values()]
            axes.plot(range(len(means)), means, color=_ACCENT, lw=1, ls="--", zorder=0)
        labels = [name.replace(" without", "\nwithout") for name in columns]
        axes.set_xticks(range(len(columns)), labels, fontsize=8)
        axes.set_xlim(-0.5, max(len(columns), 1) - 0.5)
        _clean(axes, "y")
        axes.set_title(title, loc="left", fontsize=10, weight="bold")
    figure.axes[0].set_ylabel("test AUC, mean of the tasks", fontsize=8)
    return figure


def _known(summary: Summary, settings: dict[str, Setting]) -> dict[str, list[float]]:
    columns = {name: summary.column(setting) for name, setting in settings.items()}
    return {name: values for name, values in columns.items() if values}


def draw_synthetic(summary: Summary) -> Figure | None:
    """MMoE's synthetic study: the training loss, a panel a correlation and a row a length of the weights.

    Of the seeds the median, in the band of the middle 60 %.
    """
    from matplotlib.figure import Figure

    lines = {study: _curves(summary, study) for study in SYNTHETICS}
    lines = {study: found for study, found in lines.items() if any(found.values())}
    if not lines:
        return None
    figure = Figure(figsize=(11, 0.4 + 2.8 * len(lines)), layout="constrained")
    grid = figure.subplots(len(lines), len(CORRELATIONS), sharex=True, sharey="row", squeeze=False)
    for panels, (study, found) in zip(grid, lines.items(), strict=True):
        for axes, p in zip(panels, CORRELATIONS, strict=True):
            for name, (style, colour, width) in _LINES.items():
                if runs := found[f"{name} {p}"]:
                    windows = [sorted(window) for window in zip(*(run["curve"] for run in runs), strict=True)]
                    steps = [(i + 0.5) * runs[0]["steps"] / len(windows) for i in range(len(windows))]
                    low, high = ([w[round(q * (len(w) - 1))] for w in windows] for q in (0.2, 0.8))
                    axes.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
                    middle = [statistics.median(window) for window in windows]
                    axes.plot(steps, middle, ls=style, color=colour, lw=width, label=name)
            axes.set_yscale("log")
            _clean(axes, "y")
            title = f"correlation {p}, weights {SYNTHETICS[study]}"
            axes.set_title(title, loc="left", fontsize=10, weight="bold")
        panels[0].set_ylabel("training loss", fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("step", fontsize=8)
    grid[0][0].legend(frameon=False, fontsize=8, handlelength=3)
    return figure


def _curves(summary: Summary, study: str) -> dict[str, list[Line]]:
    return {name: summary.tests(setting) for name, setting in STUDIES[study].items()}
