"""The pictures of files of lines, and the one page that holds them.

    python -m bench pictures bench/out/run.jsonl bench/out/sweep.jsonl [--out bench/out/report]

Of a run come roofline-DTYPE.png and bars-WHAT-DTYPE.png, of a sweep cost-AXIS-DTYPE.png and memory-AXIS-DTYPE.png; the
page has them all and the numbers behind them.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench import charts, lines, slopes, style
from bench.page import Page


def pictures(head: dict[str, Any], entries: charts.Entries) -> Iterator[tuple[str, str, Figure]]:
    """(file name without its ending, title, picture) of all there is to show of one file."""
    for dtype in dict.fromkeys(entry["dtype"] for entry in entries):
        figure = charts.operators(head, entries, dtype)
        if figure is not None:
            yield f"roofline-{dtype}", f"Roofline of the operators, {dtype}", figure
        for what in dict.fromkeys(entry["what"] for entry in entries):
            figure = charts.bars(head, entries, what, dtype)
            if figure is not None:
                word = {"fwd + bwd": "step"}.get(what, what)
                yield f"bars-{word}-{dtype}", f"Against rivals: {charts.title_of(what)}, {dtype}", figure
        for axis in dict.fromkeys(entry["axis"] for entry in entries if entry["axis"] is not None):
            for field, word, name in (("ms", "Time", "cost"), ("peak_mib", "Memory", "memory")):
                figure = charts.growth(head, entries, axis, field, dtype)
                if figure is not None:
                    yield f"{name}-{axis}-{dtype}", f"{word} against {axis}, {dtype}", figure


def write(paths: Sequence[Path], out: Path) -> list[Path]:
    """The PNGs and report.html: the files that were written.

    Raises ResultsFileError for a file of another format, ValueError where there is nothing to show, or where two files
    have a picture of one name.
    """
    written: list[Path] = []
    page: Page | None = None
    for path in paths:
        head, *rest = lines.read(path)
        found = lines.figures(rest)
        if page is None:
            page = Page("mtlkernels, measured", style.where(head["machine"], found[0]["device"] if found else "cpu"))
        for name, title, figure in pictures(head, found):
            file = out / f"{name}.png"
            if file in written:
                raise ValueError(f"paths: two files have a picture {name}; write them to two folders")
            written.append(style.save(figure, file))
            page.heading(title)
            page.picture(figure, title)
        _numbers(page, path, found)
    if not written:
        raise ValueError(f"paths: nothing to show in {', '.join(map(str, paths))}")
    return [page.write(out / "report.html"), *written]


def _numbers(page: Page, path: Path, found: charts.Entries) -> None:
    """The slopes of a sweep, the crossovers, and all figures."""
    if not found:
        return
    grown = slopes.growth(list(found))
    if grown:
        page.heading("Slopes in log-log")
        heads = ["axis", "what", "variant", "from", "to", "time", "memory", "largest / smallest peak"]
        text = lambda n: "" if n is None else f"{n:.2f}"  # noqa: E731
        rows = [
            [g.axis, g.what, g.variant, str(g.start), str(g.end), text(g.time), text(g.memory), text(g.peak_ratio)]
            for g in grown
        ]
        page.table(heads, rows, left=(0, 1, 2))
        for c in slopes.crossovers(list(found)):
            page.text(f"{c.what}: from about {c.axis} = {c.at:.3g} on {c.faster} is faster than {c.slower}.")
    page.heading(f"Figures of {path.name}")
    heads = [
        "subject",
        "shape",
        "dtype",
        "what",
        "variant",
        "ms",
        "20-80 %",
        "time / ours",
        "of ceiling",
        "MiB",
        "check",
    ]
    page.table(heads, [_cells(entry) for entry in found], left=(0, 1, 2, 3, 4))


def _cells(entry: dict[str, Any]) -> list[str]:
    ms = entry["ms"]
    return [
        entry["subject"],
        entry["name"],
        entry["dtype"],
        entry["what"],
        entry["variant"],
        ("~" if entry["noisy"] else "") + style.nice(ms["median"]),
        f"{style.nice(ms['q20'])}-{style.nice(ms['q80'])}",
        "" if entry["ratio"] is None else f"{entry['ratio']:.2f}x",
        "" if entry["share"] is None else f"{entry['share']:.0%}",
        "" if entry["peak_mib"] is None else f"{entry['peak_mib']:.1f}",
        "ok" if entry["check"]["ok"] else "FAILED",
    ]
