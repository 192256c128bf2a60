"""Time and memory of a mixture of experts against the number of experts, tasks and rows, and against the width.

    python -m bench sweep --experts 8:1024 [--tasks 4] [--batch 1024] [--width 128] [--what forward,step]

lo:hi doubles from lo to hi, a,b,c are taken as they are, a single number is where the others stay meanwhile. Every
point times expert_mix, expert_linear with mix, and one module an expert in turn, after a check of each against float64;
--rivals adds baddbmm, torch.compile and its max-autotune. Shown are the slopes of time and memory in log-log, and where
the faster of two changes. Ctrl-C keeps what was measured, and the same command goes on.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import slopes, swept
from bench.cost import floor, watched
from bench.graphs import captured
from bench.jobs import Job
from bench.lines import FIGURE, SWEPT, figure, remark
from bench.memory import peak_memory
from bench.tables import Table
from bench.timing import control_difference, interleaved, is_noisy

AXES = {"experts": "E", "tasks": "T", "batch": "B", "width": "N"}
BASE = {"B": 1024, "T": 4, "E": 32, "K": 256, "N": 128}
_MIB = 1 << 20


def points(text: str, name: str) -> list[int]:
    """ "8:1024" doubles, "8:1024:4" quadruples, "1,3,9" is as it is. ValueError, with `name`, for anything else."""
    try:
        if ":" not in text:
            found = [int(word) for word in text.split(",")]
        else:
            low, high, factor = [int(word) for word in text.split(":")] + [2] * (2 - text.count(":"))
            found = [low] if 0 < low < high and factor > 1 else []
            while found and found[-1] < high:
                found.append(min(found[-1] * factor, high))
    except ValueError:  # no number, or too many of them
        found = []
    if not found or min(found) < 1 or found != sorted(set(found)):
        raise ValueError(f"{name}: got {text!r}, expected growing numbers as in 8:1024, 8:1024:4 or 8,32,128")
    return found


def plan(base: dict[str, int], axes: dict[str, list[int]]) -> list[tuple[str, int, dict[str, int]]]:
    """(axis, at, shape) of every point; an axis of one point only moves the base."""
    base = base | {AXES[axis]: ats[0] for axis, ats in axes.items() if len(ats) == 1}
    return [(axis, at, base | {AXES[axis]: at}) for axis, ats in axes.items() if len(ats) > 1 for at in ats]


def jobs(
    todo: list[tuple[str, int, dict[str, int]]],
    variants: tuple[str, ...],
    *,
    dtypes: tuple[str, ...],
    device: str,
    whats: tuple[str, ...],
    seconds: float,
    min_rounds: int = 5,
    memory: bool = True,
    rates: Callable[[torch.dtype], tuple[float, float]] | None = None,
) -> Iterator[Job]:
    """A job for each point, dtype and direction. rates: dtype -> GFLOP/s and GB/s of the machine."""
    variants = tuple(dict.fromkeys([swept.EXPERT_MIX, *variants]))
    for dtype in dtypes:
        for axis, at, shape in todo:
            for what in whats:
                about = {"subject": SWEPT, "shape": shape, "dtype": dtype, "device": device, "what": what}
                extra = {"name": f"{axis}={at}", "axis": axis, "at": at}
                options = {"seconds": seconds, "min_rounds": min_rounds, "memory": memory, "rates": rates}
                go = functools.partial(measure, about, extra, variants, **options)
                yield Job(f"{axis} = {at}, {dtype}, {what}", about, variants, go)


def measure(
    about: dict[str, Any],
    extra: dict[str, Any],
    variants: tuple[str, ...],
    *,
    seconds: float,
    min_rounds: int = 5,
    memory: bool = True,
    rates: Callable[[torch.dtype], tuple[float, float]] | None = None,
) -> list[dict[str, Any]]:
    """Checks, times and weighs the variants at one point, all on the same numbers: their figures, and remarks."""
    shape, device, what = about["shape"], about["device"], about["what"]
    dtype = getattr(torch, about["dtype"])
    numbers = swept.Numbers(shape, dtype, device)
    expected = swept.truth(numbers, (what,))
    torch._dynamo.reset()  # else it would give up after a few shapes
    room, found, contenders, checks = free_bytes(device), [], {}, {}
    for variant in variants:
        wanted = swept.needed_bytes(variant, shape, dtype.itemsize, what)
        if wanted > 0.7 * room:
            text = f"does not fit: about {wanted / 2**30:.1f} GiB of {room / 2**30:.1f}"
            found.append(remark(text, **about, variant=variant))
            continue
        try:
            contender = swept.Contender(variant, numbers)
            checks[variant] = swept.check(contender.results(what), expected, dtype)
        except Exception as error:  # whatever keeps Inductor from compiling, or a backend from running it
            if variant == swept.EXPERT_MIX:
                raise
            text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            found.append(remark(text, **about, variant=variant))
            continue
        contenders[variant] = contender
    ours = swept.EXPERT_MIX
    if ours not in contenders:  # what needs least does not fit
        left = "not measured without expert_mix"
        return found + [remark(left, **about, variant=variant) for variant in contenders]
    steps, modes = {}, {}
    for variant, contender in contenders.items():
        steps[variant], modes[variant] = captured([contender.work(what)], device)
    timing = {"seconds": seconds, "warmup_seconds": seconds / 10, "min_rounds": min_rounds}
    times = interleaved(steps, **timing, device=device, control=ours, hide_launch=True)
    difference = control_difference(times, ours)
    for variant, contender in contenders.items():
        green = checks[variant].ok and checks[ours].ok
        fields = about | extra | {"variant": variant, "ours": swept.is_ours(variant), "mode": modes[variant]}
        fields |= {"ms": times[variant].as_ms(), "check": asdict(checks[variant])}
        fields["ratio"] = times[variant].median / times[ours].median if green and variant != ours else None
        fields |= {"control_difference": difference, "noisy": is_noisy(difference)}
        if swept.is_ours(variant):
            fields["backend"], spent = watched(contender.work(what))
            least = None if rates is None else floor(spent, *rates(dtype))
            fields |= {"flops": spent and spent.flops, "bytes": spent and spent.bytes}
            fields |= {"floor_ms": least and least.ms, "floor_by": least and least.by}
            fields["share"] = least and least.ms / fields["ms"]["median"]
        found.append(figure(**fields))
    del contenders, steps, numbers, expected, contender  # before another process needs the room
    for entry in found if memory else ():
        if entry["kind"] == FIGURE:
            try:
                entry["peak_mib"] = weigh(entry)
            except RuntimeError as error:  # its process was killed, or took too long: the time is measured all the same
                entry["note"] = f"no peak memory: {str(error).splitlines()[-1]}"
    return found


def weigh(entry: dict[str, Any]) -> float | None:
    """MiB at the peak of the figure's call beyond its operands and results."""
    words = {name: entry[name] for name in ("variant", "shape", "dtype", "device", "what")}
    peak = peak_memory("bench.swept:build_step", words, device=entry["device"], timeout=600)
    kept = swept.kept_bytes(entry["shape"], getattr(torch, entry["dtype"]).itemsize, entry["what"])
    return None if peak is None else max(0.0, peak - kept / _MIB)


def free_bytes(device: str) -> float:
    """Memory that can still be had."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), float("inf"))


def table(figures: list[dict[str, Any]], axis: str, what: str) -> Table:
    """Milliseconds and MiB of every variant along one axis; a row a point."""
    rows = [entry for entry in figures if entry["axis"] == axis and entry["what"] == what]
    variants = list(dict.fromkeys(entry["variant"] for entry in rows))
    fixed = {name: size for name, size in rows[0]["shape"].items() if name != AXES[axis]}
    title = f"{what}, {rows[0]['dtype']}, {' '.join(f'{name}={size}' for name, size in fixed.items())}"
    noisy = sum(entry["noisy"] for entry in rows if entry["variant"] == swept.EXPERT_MIX)
    found = Table(title=title, caption=f"ms, and MiB beyond operands and results; ~: noisy ({noisy} points)")
    found.add_column(axis, justify="right")
    for variant in variants:
        found.add_column(variant.replace(", ", ",\n"), justify="right")
        found.add_column("MiB", justify="right")
    for at in sorted({entry["at"] for entry in rows}):
        cells = []
        for variant in variants:
            entry = next((e for e in rows if e["at"] == at and e["variant"] == variant), None)
            cells += ["", ""] if entry is None else [_ms(entry), _mib(entry["peak_mib"])]
        found.add_row(str(at), *cells)
    return found


def _ms(entry: dict[str, Any]) -> str:
    if not entry["check"]["ok"]:
        return "WRONG"
    return ("~" if entry["noisy"] else "") + f"{entry['ms']['median']:.4g}"


def _mib(peak: float | None) -> str:
    return "" if peak is None else f"{peak:.0f}"


def growth_table(figures: list[dict[str, Any]]) -> Table:
    """The slopes in log-log, of figures of one dtype."""
    caption = "peak: largest / smallest MiB, of at least 1"
    title = f"{figures[0]['dtype']}, slopes in log-log: 1 grows as what is swept, 0 stays"
    found = Table(title=title, caption=caption)
    for head in ("axis", "what", "variant", "from", "time", "memory", "peak"):
        found.add_column(head, justify="right" if head in ("from", "time", "memory", "peak") else "left")
    for g in slopes.growth(figures):
        numbers = ["" if n is None else f"{n:.2f}" for n in (g.time, g.memory, g.peak_ratio)]
        found.add_row(g.axis, g.what, g.variant, str(g.start), *numbers)
    return found


def each_lines(figures: list[dict[str, Any]]) -> list[str]:
    """What one of the swept costs, and how far from flat that is; a sentence a variant."""
    return [
        f"{e.what}, {e.variant}: one of the {e.axis} costs {e.first * 1e3:.3g} us at {e.start}, "
        f"{e.last * 1e3:.3g} us at {e.end}; within {e.spread:.0%} all along"
        for e in slopes.each(figures)
    ]


def crossover_lines(figures: list[dict[str, Any]]) -> list[str]:
    """Where the faster of two changes, a sentence each."""
    return [
        f"{c.what}: from about {c.axis} = {c.at:.3g} on {c.faster} is faster than {c.slower}"
        for c in slopes.crossovers(figures)
    ]
