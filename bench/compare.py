"""What changed between two results files, or two files of lines.

    python -m bench.compare A B [--all] [--fail [PERCENT]]

Shown are the figures whose 20 to 80 % ranges do not overlap and whose medians differ by more than the noise limit (with
--all every figure), the parts that ended differently, and the tests that began or ceased to fail. With --fail the exit
status is 1 where a figure of ours became worse by more than 10 %, or a check is no longer green: a gate for
regressions. Two runs of the same sources on a quiet machine differed by 6 %, though ours timed twice in each by 1 %.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import lines, record, report
from bench.contest import OURS
from bench.tables import Table
from bench.timing import NOISE_LIMIT
from mtlkernels.backend import BACKENDS

_PAGES = 1.0  # MiB


@dataclass(frozen=True)
class Figure:
    """One measured number with its range. rate: more is better, as with GB/s; ours: and not a rival's, or a ceiling."""

    value: float
    low: float
    high: float
    unit: str
    rate: bool = False
    ours: bool = True


def figures(results: dict[str, Any]) -> dict[str, Figure]:
    """Every figure of a results file under a name that the same figure has in another file."""
    found: dict[str, Figure] = {}
    for part, read in (
        ("ceilings", _ceilings),
        ("operators", _operators),
        ("step", _steps),
        ("tune", _tiles),
        ("lines", _lines),
    ):
        measured = results["parts"].get(part, {}).get("result")
        if isinstance(measured, dict):
            found |= {f"{part}: {name}": figure for name, figure in read(measured)}
    return found


def _ceilings(measured: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    for row in measured["ceilings"]:
        with_threads = f"{row['threads']} threads, "
        yield with_threads + "copy", _rate(row["copy_gb_s"], "GB/s")
        for dtype, rates in row["gemm"].items():
            if rates:
                yield with_threads + f"{dtype} products", _rate(rates[0]["gflops"], "GFLOP/s")


def _operators(measured: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    for row in measured["rows"]:
        name = f"{row['op']}/{row['form']}" if row["form"] else row["op"]
        sizes = " ".join(f"{key}={size}" for key, size in row["shape"].items())
        for variant, ms in row["ms"].items():
            label = f"{name}, {sizes}, {row['dtype']}, {row['what']}, {variant}"
            yield label, _time(ms, variant in (OURS, *BACKENDS))
            beyond = (row["beyond_mib"] or {}).get(variant)
            if beyond is not None:
                yield f"{label}, memory", Figure(beyond, beyond, beyond, "MiB", ours=variant == OURS)


def _steps(measured: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    for record_ in measured.get("step", []):
        task = record_["task"]
        label = f"{task['network']}, {task['tasks']} x {task['experts_per_task']}, B={task['batch']}, {task['dtype']}"
        for row in record_["rows"]:
            yield f"{label}, {row['variant']}", _time(row["ms"], row["variant"] == OURS)
    for row in measured.get("mix", []):
        label = f"{row['mix']}, T={row['tasks']}, E={row['experts']}, {row['dtype']}, {row['what']}"
        for variant, ms in row["ms"].items():
            yield f"{label}, {variant}", _time(ms, variant == OURS)


def _tiles(measured: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    for row in measured["rows"]:
        for tried in row["rows"]:
            name = {str(row["usual"]): "usual", str(row["best"]): "best"}.get(str(tried["tile"]))
            if name:
                yield f"{row['kernel']}, {row['shape_name']}, {row['dtype']}, {name} tile", _time(tried["ms"])


def _lines(measured: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    for entry in measured["figures"]:
        sizes = " ".join(f"{key}={size}" for key, size in entry["shape"].items())
        label = f"{entry['subject']}, {sizes}, {entry['dtype']}, {entry['what']}, {entry['variant']}"
        yield label, _time(entry["ms"], entry["ours"])
        if (peak := entry["peak_mib"]) is not None:
            # The resident size that it comes from moves by some pages, and by blocks that malloc maps anew.
            yield f"{label}, memory", Figure(peak, peak - _PAGES, peak + _PAGES, "MiB", ours=entry["ours"])


def _time(ms: dict[str, float], ours: bool = True) -> Figure:
    return Figure(ms["median"], ms["q20"], ms["q80"], "ms", ours=ours)


def _rate(value: float, unit: str) -> Figure:
    return Figure(value, value, value, unit, rate=True, ours=False)


def changed(before: Figure, after: Figure) -> bool:
    """Whether two figures differ by more than what repeating a measurement does."""
    apart = before.high < after.low or after.high < before.low
    smaller = min(abs(before.value), abs(after.value))
    return apart and abs(after.value - before.value) > NOISE_LIMIT * smaller


def worse(first: dict[str, Any], second: dict[str, Any], limit: float = 0.1) -> list[str]:
    """The figures of ours that became worse by more than `limit`, and the tests and checks that fail and did not."""
    before, after = figures(first), figures(second)
    common = [name for name in before if name in after and before[name].ours and changed(before[name], after[name])]
    found = [name for name in common if _cost(after[name]) > (1 + limit) * _cost(before[name])]
    return found + [name for name in failing(second) if name not in failing(first)]


def _cost(figure: Figure) -> float:
    """What is better when it is smaller."""
    return 1 / figure.value if figure.rate and figure.value else figure.value


def read(path: Path) -> dict[str, Any]:
    """A results file, or a file of lines as if it were one of the part "lines".

    Raises ResultsFileError where it is neither, FileNotFoundError where there is none.
    """
    if not lines.is_lines(path):
        return record.read(path)
    head, *rest = lines.read(path)
    found = lines.figures(rest)
    bad = {}
    for name, entry in zip(_names(found), found, strict=True):
        if not entry["check"]["ok"]:
            bad[name] = f"off by {entry['check']['output']:.0e}, {entry['check']['gradient']:.0e}"
    part = {"status": "passed", "sources": head["sources"], "result": {"figures": found, "bad": bad}}
    return {"format": record.FORMAT, "machine": head["machine"], "parts": {"lines": part}}


def _names(found: list[dict[str, Any]]) -> list[str]:
    return [", ".join(lines.key(entry)) for entry in found]


def failing(results: dict[str, Any]) -> dict[str, str]:
    """Every failing test of the file, with its message."""
    found: dict[str, str] = {}
    for part in results["parts"].values():
        if isinstance(part.get("result"), dict):
            found |= part["result"].get("bad", {})
    return found


def figure_table(first: dict[str, Any], second: dict[str, Any], everything: bool) -> Table:
    """The figures that both files have."""
    before, after = figures(first), figures(second)
    common = [name for name in before if name in after]
    shown = [name for name in common if everything or changed(before[name], after[name])]
    only = f"{len(before) - len(common)} figures are in the first file alone, {len(after) - len(common)} in the second"
    table = Table(title=f"{len(shown)} of {len(common)} figures changed" if not everything else "figures", caption=only)
    for head in ("figure", "before", "after", "", "now"):
        table.add_column(head, justify="left" if head == "figure" else "right", overflow="fold")
    for name in shown:
        a, b = before[name], after[name]
        better = b.value > a.value if a.rate else b.value < a.value
        ratio = b.value / a.value if a.value else float("inf")
        word = ("better" if better else "worse") if changed(a, b) else "same"
        table.add_row(name, f"{a.value:.4g}", f"{b.value:.4g} {b.unit}", f"{ratio:.2f}x", word)
    return table


def remarks(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """What is not a figure: machines, statuses of parts, tests, sources that differ within a file."""
    lines = []
    for key in ("gpu", "cpu", "driver", "torch", "triton", "python", "threads"):
        a, b = first["machine"].get(key), second["machine"].get(key)
        if a != b:
            lines.append(f"{key}: {a} -> {b}")
    for name in dict.fromkeys([*first["parts"], *second["parts"]]):
        a, b = (results["parts"].get(name, {}).get("status", "not there") for results in (first, second))
        if a != b:
            lines.append(f"part {name}: {a} -> {b}")
    for which, results in (("first", first), ("second", second)):
        sources = {part.get("sources") for part in results["parts"].values()}
        if len(sources) > 1:
            lines.append(f"the parts of the {which} file were measured on {len(sources)} versions of the sources")
    before, after = failing(first), failing(second)
    lines += [f"now fails: {test}: {message}" for test, message in after.items() if test not in before]
    return lines + [f"fails no more: {test}" for test in before if test not in after]


def main(arguments: list[str] | None = None) -> int:
    """Prints the comparison; 2 where a file is none, and with --fail 1 where ours became worse."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "--fail",
        type=float,
        nargs="?",
        const=10.0,
        metavar="PERCENT",
        help="exit status 1 where ours got so much worse",
    )
    parser.add_argument("--all", action="store_true", help="the figures that did not change, too")
    args = parser.parse_args(arguments)
    try:
        first, second = read(args.before), read(args.after)
    except (record.ResultsFileError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    console = report.console()
    for line in remarks(first, second):
        console.print(line, markup=False, highlight=False)
    console.print(figure_table(first, second, args.all))
    return 1 if args.fail is not None and worse(first, second, args.fail / 100) else 0


if __name__ == "__main__":
    sys.exit(main())
