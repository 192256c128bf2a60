"""One step of a network under the glass: the trace, what every operator costs and reaches, the memory, what to change.

    python -m bench profile MMoE [--sizes E=64] [--plain]
    python -m bench profile mine.py:Network --inputs 512,64 [--arguments experts=64]

Left behind are trace.json for chrome://tracing or Perfetto, operators.json, roofline.png, memory.png and one page with
all of it, report.html. Shares are of the time inside operators; the time of a step is that of steps nobody watches.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from bench import roofline, style
from bench.advice import Advice, advise
from bench.page import Page
from bench.tables import Table
from bench.target import Target
from bench.timing import interleaved
from bench.watch import Op, Step, watch


@dataclass
class Row:
    """All calls of one operator in one direction.

    Attributes:
        label: its name, without "backward" where `what` says so.
        share: of the time inside operators.
        reached: of its ceiling; bound: "arithmetic" or "memory".
    """

    label: str
    what: str
    ours: bool
    calls: int
    seconds: float
    flops: int
    bytes: int
    share: float
    reached: float
    bound: str
    scopes: list[str] = field(default_factory=list)


@dataclass
class Profile:
    """What was found of a target, on a machine of these rates."""

    target: Target
    step: Step
    rows: list[Row]
    advice: list[Advice]
    gflops: float
    gb_s: float


def profile(target: Target, gflops: float, gb_s: float, *, seconds: float = 1.0, rounds: int = 5) -> Profile:
    """Watches `rounds` steps, and times steps that nobody watches."""
    device = target.inputs[0].device
    for _ in range(2):  # what is done once only
        target.step()
    target.release()
    times = interleaved({"step": _clean(target)}, seconds=seconds, warmup_seconds=0.0, min_rounds=3, device=device)
    target.release()
    step = watch(target.network, _clean(target), clock=device.type, rounds=rounds, before=target.inputs)
    step.seconds = times["step"].median
    target.release()
    advice = advise(target, step, gflops, gb_s, seconds / 3)
    return Profile(target, step, rows(step, gflops, gb_s), advice, gflops, gb_s)


def _clean(target: Target):
    """A step into gradients that are not there yet: no operator adds to old ones."""

    def step() -> None:
        target.release()
        target.step()

    return step


def rows(step: Step, gflops: float, gb_s: float) -> list[Row]:
    """The operators of a step, the most expensive first; what moves and computes nothing is left out."""
    groups: dict[tuple[str, bool, bool], list[Op]] = {}
    for op in step.ops:
        if not op.is_view:
            groups.setdefault((_name(op), op.ours, op.backward), []).append(op)
    found, total = [], step.watched or 1.0
    for (name, ours, backward), ops in groups.items():
        spent, flops, moved = (sum(getattr(op, f) or 0 for op in ops) for f in ("seconds", "flops", "bytes"))
        least = sum(op.floor(gflops, gb_s) for op in ops)
        bound = "arithmetic" if flops / gflops > moved / gb_s else "memory"
        what = roofline.BACKWARD if backward else roofline.FORWARD
        scopes = list(dict.fromkeys(op.scope or "(network)" for op in ops))
        reached = least / spent if spent else 0.0
        found.append(Row(name, what, ours, len(ops), spent, flops, moved, spent / total, reached, bound, scopes))
    return sorted(found, key=lambda row: -row.seconds)


def _name(op: Op) -> str:
    name = op.name.removesuffix("_eager").removesuffix("_only").removesuffix("_into") if op.ours else op.name
    return name.removesuffix("_data").removesuffix("_backward") if op.backward else name


def table(found: Profile, least: float = 0.005) -> Table:
    """The operators that take at least this share."""
    step = found.step
    title = (
        f"{found.target.name}: a step of {step.seconds * 1e3:.2f} ms, {step.watched * 1e3:.2f} ms inside operators, "
        f"peak {step.peak() / 2**20:.1f} MiB"
    )
    caption = f"ceilings {found.gflops:.0f} GFLOP/s and {found.gb_s:.1f} GB/s; above 100 %: out of a cache; *: ours"
    made = Table(title=title, caption=caption)
    for head in ("operator", "what", "calls", "ms", "share", "GFLOP/s", "GB/s", "flop/B", "ceiling", "bound by"):
        words = head in ("operator", "what", "bound by")
        made.add_column(head, justify="left" if words else "right", no_wrap=True)
    for row in found.rows:
        if row.share >= least:
            made.add_row(*cells(row))
    rest = [row for row in found.rows if row.share < least]
    if rest:
        made.add_row(f"{len(rest)} others", "", str(sum(r.calls for r in rest)), *_time(rest), *[""] * 5)
    return made


def cells(row: Row) -> list[str]:
    """A row as text."""
    rate = [style.nice(n / row.seconds / 1e9) if row.seconds else "" for n in (row.flops, row.bytes)]
    intensity = style.nice(row.flops / row.bytes) if row.bytes else ""
    return [
        f"*{row.label}" if row.ours else row.label,
        row.what,
        str(row.calls),
        *_time([row]),
        *rate,
        intensity,
        f"{row.reached:.0%}",
        row.bound,
    ]


def _time(group: Sequence[Row]) -> tuple[str, str]:
    return f"{sum(row.seconds for row in group) * 1e3:.3f}", f"{sum(row.share for row in group):.1%}"


def points(found: Profile, least: float = 0.005) -> list[roofline.Point]:
    """The rows of at least this share, for the roofline."""
    return [
        roofline.Point(
            row.label + (f" x {row.calls}" if row.calls > 1 else ""),
            row.what, row.flops, row.bytes, row.seconds, row.ours, row.share
        )
        for row in found.rows
        if row.share >= least
    ]  # fmt: skip


def words(advice: Advice) -> str:
    """A piece of advice as text, its lines indented."""
    text = advice.text[0].upper() + advice.text[1:]
    if not advice.lines:
        return text + "."
    text += ". These lines give the same numbers"
    text += " exactly" if not advice.error else f" (to {advice.error:.0e})"
    if advice.ms:
        text += f", in {advice.ms[1]:.2f} ms in place of {advice.ms[0]:.2f} (forward and backward)"
    return text + ":\n\n" + "\n".join(f"    {line}" for line in advice.lines)


def timeline(found: Profile, foot: str) -> Figure:
    """What is alive after every operator, along the time of the step; forward and backward apart."""
    ops = found.step.ops
    ends = torch.tensor([op.seconds or 0.0 for op in ops]).cumsum(0).mul(1e3).tolist()
    live = [op.live / 2**20 for op in ops]
    starts = [0.0, *ends[:-1]]
    peak = max(range(len(ops)), key=lambda i: live[i])
    turn = next((starts[i] for i, op in enumerate(ops) if op.backward), ends[-1])
    with style.look():
        figure = Figure(figsize=(10, 4.6))
        axes = figure.add_axes((0.08, 0.16, 0.9, 0.7))
        top, end = max(live) * 1.3 or 1.0, ends[-1] or 1.0
        axes.set(xlim=(0, end), ylim=(0, top))
        xs, ys = [0.0, *ends], [0.0, *live]
        before = [x <= turn for x in xs]
        axes.fill_between(xs, ys, step="pre", where=before, color="#bcd3e8", linewidth=0)
        axes.fill_between(
            xs,
            ys,
            step="pre",
            where=[x >= turn for x in xs],
            facecolor="#ececec",
            edgecolor="#a8a8a8",
            hatch="///",
            linewidth=0,
        )
        axes.step(xs, ys, where="pre", color=style.OURS, linewidth=1.6)
        axes.axvline(turn, color=style.INK, linewidth=0.9, linestyle=(0, (4, 3)))
        for x, text in ((turn / 2, "forward"), ((turn + end) / 2, "backward")):
            axes.text(x, top * 0.965, text, ha="center", va="top", fontsize=10, weight="bold")
        kept = found.step.kept() / 2**20
        if kept:
            axes.annotate(
                f"kept for backward: {style.nice(kept)} MiB",
                (turn, kept), (-8, 8), textcoords="offset points", ha="right", fontsize=9,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
            )  # fmt: skip
            axes.plot(turn, kept, "D", color="white", markeredgecolor=style.INK, markersize=6, zorder=4)
        middle = (starts[peak] + ends[peak]) / 2
        label = f"peak {style.nice(live[peak])} MiB, in {ops[peak].name}"
        label += f" of {ops[peak].scope}" if ops[peak].scope else ""
        right = middle > end * 0.6
        axes.plot(middle, live[peak], "o", color=style.OURS, markeredgecolor="white", markersize=8, zorder=5)
        axes.annotate(
            label, (middle, live[peak]), (-8 if right else 8, 10), textcoords="offset points",
            ha="right" if right else "left", fontsize=9.5, weight="bold",
        )  # fmt: skip
        axes.set_xlabel("time inside operators, ms")
        axes.set_ylabel("memory beyond what was there, MiB")
        style.grid(axes, "y")
        figure.text(0.01, 0.95, f"{found.target.title}: memory along one step", fontsize=12, weight="bold", va="center")
        style.foot(figure, foot)
    return figure


def trace(target: Target, path: Path) -> None:
    """One step under torch.profiler, as a Chrome trace."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if target.inputs[0].is_cuda:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    target.release()
    with torch.profiler.profile(activities=kinds, record_shapes=True, profile_memory=True) as profiler:
        target.step()
    target.release()
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))


def write(found: Profile, machine: dict[str, Any], out: Path) -> list[Path]:
    """The trace, the numbers, the pictures and the page: the files that were written."""
    out.mkdir(parents=True, exist_ok=True)
    trace(found.target, out / "trace.json")
    device = found.target.inputs[0].device.type
    line = style.where(machine, device)
    head = f"{found.target.title}: operators of one step, {', '.join(str(list(t.shape)) for t in found.target.inputs)}"
    roof = roofline.draw(points(found), found.gflops, found.gb_s, head, f"{line}. Numbered by their share of the step.")
    shown = timeline(found, f"{line}. Scratch memory that an operator frees before it ends is not seen.")
    numbers = {"target": found.target.name, "machine": machine, "gflops": found.gflops, "gb_s": found.gb_s}
    numbers |= {"step_ms": found.step.seconds * 1e3, "peak_bytes": found.step.peak(), "kept_bytes": found.step.kept()}
    numbers |= {"operators": [asdict(row) for row in found.rows], "advice": [asdict(a) for a in found.advice]}
    (out / "operators.json").write_text(json.dumps(numbers, indent=1) + "\n")
    page = Page(f"{found.target.title}: one step", line)
    page.text(
        f"A step takes {found.step.seconds * 1e3:.2f} ms. Watched, {found.step.watched * 1e3:.2f} ms lie inside "
        f"operators. At its peak {found.step.peak() / 2**20:.1f} MiB are alive that were not before."
    )
    page.heading("What to change")
    for advice in found.advice:
        text, _, lines = words(advice).partition("\n\n")
        page.text(text)
        if lines:
            page.code("\n".join(advice.lines))
    if not found.advice:
        page.text("Nothing stands out.")
    page.heading("Roofline")
    page.picture(roof, f"Roofline of the operators of {found.target.name}")
    page.heading("Memory")
    page.picture(shown, f"Memory along a step of {found.target.name}")
    page.heading("Operators")
    heads = ["operator", "direction", "calls", "ms", "share", "GFLOP/s", "GB/s", "flop/byte", "of ceiling", "bound by"]
    page.table(heads, [cells(row) for row in found.rows], left=(0, 1, 9))
    page.write(out / "report.html")
    files = [style.save(roof, out / "roofline.png"), style.save(shown, out / "memory.png")]
    return [out / "report.html", *files, out / "trace.json", out / "operators.json"]
