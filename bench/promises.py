"""What the kernels have to show on a GPU, line by line: what is asked, what was measured, whether it holds.

    python -m bench.promises [--only mix,products] [--budget SECONDS] [--out FILE]

Every line is measured beside its rival or its ceiling in this run, and counts only where ours agreed with float64. The
lines come in the order of what they are worth: with a budget the rest is left out, and named. Operands lie outside the
L2 cache, which is overwritten before every sample, and what can be is replayed as a CUDA graph; a training step is
timed as it is launched, too. A line that does not hold is a result, not a failure: only a wrong number is one.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mtlkernels as mtl
from bench import architectures, calibrate, contest, operators, record
from bench.contest import AUTOTUNED, BACKWARD, FORWARD, OURS, Contestant
from bench.cost import floor, nbytes, watched
from bench.graphs import captured, copies_for
from bench.papers import TINY, Sizes
from bench.shapes import tiny
from bench.subjects import Operands, Shape, find
from bench.tables import Console, Table
from bench.timing import interleaved

GRAPH = ", graph"
TWO_CALLS = "expert_linear, then mix"
REPO, UNBIND = architectures.REPOSITORY
_ADATT = {"B": 16384, "U": 5, "E": 10, "K": 256}
_MIXES = {
    "mix/adatt": ({"B": 16384, "T": 5, "E": 10, "D": 256}, {"B": 16384, "T": 5, "E": 10, "D": 128}),
    "mix/gated": ({"B": 16384, "T": 4, "E": 8, "D": 128},),
}
_PRODUCTS = ({**_ADATT, "N": 256}, {**_ADATT, "N": 128}, {"B": 16384, "E": 8, "K": 512, "N": 512})
_FUSED = ({**_ADATT, "T": 5, "N": 256}, {"B": 16384, "T": 4, "E": 8, "K": 256, "N": 128})
_STEP = Sizes(B=16384, T=5, m=2)
_SERVED = (1, 64, 256)


@dataclass(frozen=True)
class Line:
    """One promise: `asked` is the least (or, where `most`, the largest) `found` with which it holds."""

    what: str
    asked: float
    found: float | None  # None: ours or its rival was wrong, or could not run
    figures: dict[str, Any]
    most: bool = False

    @property
    def holds(self) -> bool | None:
        """None where nothing was found."""
        return None if self.found is None else self.found <= self.asked if self.most else self.found >= self.asked


class Setting(NamedTuple):
    """Where and how long; ceilings are those of bench.calibrate."""

    device: str
    small: bool
    seconds: float
    ceilings: list[dict[str, Any]]

    def shape(self, shape: Shape) -> Shape:
        """The shape, or a tiny one for a dry run."""
        return tiny(shape) if self.small else shape

    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Those that are measured."""
        return (torch.float32,) if self.small else (torch.bfloat16, torch.float32)

    def times(self, steps: dict[str, Callable[[], Any]], launched: bool = False) -> dict[str, float]:
        """Median milliseconds of every variant, in turn."""
        found = interleaved(steps, seconds=self.seconds * len(steps), warmup_seconds=self.seconds / 10, min_rounds=3,
                            device=self.device, hide_launch=not launched)  # fmt: skip
        return {name: timing.median * 1e3 for name, timing in found.items()}


def mixes(on: Setting) -> Iterator[Line]:
    """The mix, forward and backward, against the bytes it has to move at the measured bandwidth of a copy."""
    for name, shapes in _MIXES.items():
        for shape, dtype in ((s, d) for s in shapes for d in on.dtypes()):
            for row in _measured(on, name, shape, dtype, (FORWARD, BACKWARD)):
                green = row["check"][OURS]["ok"]
                yield Line(_title(row, "of copy bandwidth"), 0.85, row["share"] if green else None, row)


def products(on: Setting) -> Iterator[Line]:
    """expert_linear with bias and ReLU against cuBLAS' batched product alone, its operands laid out for it."""
    subject, rival = find("expert_linear"), "bmm alone"
    for shape, dtype in ((on.shape(s), d) for s in _PRODUCTS for d in on.dtypes()):
        operands, grad = operators.prepare(subject, shape, dtype, on.device)
        ours = operators.on_backend(subject, "auto")
        check = operators.check(ours, operands, grad, operators.truth(subject, operands, grad), subject)
        sets = [operators.copied(operands) for _ in range(copies_for(nbytes(operands), on.device))]
        steps = {OURS: [operators.step(ours, own, subject.leaves, grad, FORWARD) for own in sets]}
        steps[rival] = [_bmm(own) for own in sets]
        ms = on.times({name: captured(calls, on.device)[0] for name, calls in steps.items()})
        label = {"op": subject.op, "form": "", "shape": shape, "dtype": str(dtype).removeprefix("torch.")}
        row = label | {"what": FORWARD, "check": {OURS: asdict(check)}, "ms": ms}
        yield Line(_title(row, f"{rival} / ours"), 1.0, ms[rival] / ms[OURS] if check.ok else None, row)


def _bmm(operands: Operands) -> Callable[[], Tensor]:
    x, weight = operands["x"], operands["weight"]
    units = x.unsqueeze(1) if x.dim() == 2 else x
    inputs = units.repeat_interleave(len(weight) // units.shape[1], 1).transpose(0, 1).contiguous()
    return lambda: torch.bmm(inputs, weight.transpose(1, 2))


def fused(on: Setting) -> Iterator[Line]:
    """expert_mix, forward, against the two operators that it fuses."""

    def two(o: Operands) -> Tensor:
        banked = mtl.expert_linear(o["x"], o["weight"], o["bias"], experts_per_unit=o["counts"], activation="relu")
        return mtl.mix(banked, o["logits"])

    for shape, dtype in ((s, d) for s in _FUSED for d in on.dtypes()):
        for row in _measured(on, "expert_mix", shape, dtype, (FORWARD,), rival=(TWO_CALLS, two)):
            yield Line(_title(row, f"{TWO_CALLS} / ours"), 1.3, row["ratio"][TWO_CALLS], row)


def _measured(
    on: Setting, name: str, shape: Shape, dtype: torch.dtype, whats: tuple[str, ...], **changes: Any
) -> list[dict[str, Any]]:
    options = {"seconds": on.seconds, "min_rounds": 3, "ceilings": on.ceilings, "whats": whats}
    subject = replace(find(name), **changes)
    return operators.measure(subject, on.shape(shape), dtype=dtype, device=on.device, **options)


def _title(row: dict[str, Any], against: str) -> str:
    sizes = " ".join(f"{letter}={size}" for letter, size in row["shape"].items())
    return f"{row['op']}{'/' * bool(row['form'])}{row['form']} {sizes} {row['dtype']}, {row['what']}: {against}"


def steps(on: Setting) -> Iterator[Line]:
    """AdaTT's training step as it is launched, against the authors' structure: time and memory."""
    for experts in (2,) if on.small else (2, 1, 3, 4):
        yield from _step(on, replace(_STEP, m=experts), (REPO, UNBIND))


def tuned_steps(on: Setting) -> Iterator[Line]:
    """The same as CUDA graphs, max-autotune among them: it compiles for minutes."""
    yield from _step(on, _STEP, (REPO, UNBIND) if on.small else (REPO, UNBIND, AUTOTUNED), graphs=True)


def _step(on: Setting, sizes: Sizes, rivals: tuple[str, ...], graphs: bool = False) -> Iterator[Line]:
    sizes, dtype = (TINY, torch.float32) if on.small else (sizes, torch.bfloat16)
    found = architectures.contestants("AdaTT-sp", sizes, dtype, on.device, rivals)
    expected = architectures.truth("AdaTT-sp", sizes, found[architectures.PLAIN])
    first = contest.first_steps(found, "AdaTT-sp")
    checks = {who: contest.compare(architectures.results(c), expected, dtype) for who, c in found.items()}
    # A graph of its own is what max-autotune makes.
    calls = {who: _graph(c, on.device) if graphs and who != AUTOTUNED else c.step for who, c in found.items()}
    ms = on.times(calls, launched=True)
    label = {"name": "AdaTT-sp", "sizes": asdict(sizes), "dtype": str(dtype)[6:], "device": on.device}
    figures = label | {"check": {who: asdict(check) for who, check in checks.items()}, "ms": ms, "first_step_s": first}
    title = f"AdaTT-sp T={sizes.T} m={sizes.m} B={sizes.B} {label['dtype']}, step{GRAPH * graphs}: "
    asked = {AUTOTUNED: 1.3} if AUTOTUNED in rivals else {REPO: 3.0}
    for who, least in asked.items():
        green = who in found and checks[who].ok and checks[OURS].ok
        yield Line(f"{title}{who} / ours", least, ms[who] / ms[OURS] if green else None, figures)
    if not graphs:
        peak = {who: architectures.step_memory(label, who, contest.BOTH) for who in (OURS, REPO, UNBIND)}
        share = None if not peak[REPO] or peak[OURS] is None else peak[OURS] / peak[REPO]
        yield Line(f"{title}peak memory, ours / {REPO}", 0.5, share, label | {"peak_mib": peak}, most=True)


def _graph(contestant: Contestant, device: str) -> Callable[[], Any]:
    """Forward and backward as one graph; gradients are returned, not left in .grad, which a graph would own."""
    leaves = [contestant.x, *contestant.network.parameters()]
    step = lambda: torch.autograd.grad(contestant.call(contestant.x), leaves, contestant.grad)  # noqa: E731
    return captured([step], device)[0]


def served(on: Setting) -> Iterator[Line]:
    """Few rows as one CUDA graph, against its kernels' floors: an empty kernel each, and the bytes and operations."""
    empty = _empty_kernel(on)
    for rows, dtype in ((b, d) for b in _SERVED for d in on.dtypes()):
        sizes = TINY if on.small else replace(_STEP, B=rows)
        ours = architectures.contestants("AdaTT-sp", sizes, dtype, on.device)[OURS]
        call = ours.work(FORWARD)
        ms, kernels = on.times({OURS: captured([call], on.device)[0]})[OURS], _kernels(call, on.device)
        least = floor(watched(call)[1], *calibrate.rates(on.ceilings, dtype))
        floors = None if least is None else kernels * empty + least.ms
        figures = {"kernels": kernels, "empty_kernel_ms": empty, "floor_ms": floors, "ms": ms}
        title = f"AdaTT-sp T={sizes.T} m={sizes.m} B={sizes.B} {str(dtype)[6:]}, inference{GRAPH}: time / floors"
        yield Line(title, 1.5, floors and ms / floors, figures, most=True)


def _empty_kernel(on: Setting, kernels: int = 32) -> float:
    """Milliseconds of a kernel that does next to nothing, among others in a graph."""
    flag = torch.zeros(1, device=on.device)
    return on.times({"": captured([lambda: [flag.add_(1) for _ in range(kernels)]], on.device)[0]})[""] / kernels


def _kernels(call: Callable[[], Any], device: str) -> int:
    """How many kernels and copies a call launches; 0 on a CPU."""
    if device == "cpu":
        return 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


PROMISES = {"steps": steps, "mix": mixes, "products": products, "fused": fused, "served": served}
PROMISES |= {"tuned": tuned_steps}


def main() -> int:
    """Measures, prints a table, writes JSON after every line; 1 where ours was wrong or failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.promises", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="shapes of a few numbers: a dry run of the whole path")
    parser.add_argument("--only", default=",".join(PROMISES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds, after which no line is begun")
    parser.add_argument("--seconds", type=float, default=0.3, help="of timing for each variant (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench/out/promises.json"))
    args = parser.parse_args()
    if unknown := sorted(set(args.only.split(",")) - set(PROMISES)):
        parser.error(f"--only: no {', '.join(unknown)}; there are {', '.join(PROMISES)}")
    began, seconds = time.perf_counter(), 0.0 if args.small else args.seconds
    sizes = calibrate.SMALL_SIZES if args.small else None
    ceilings = calibrate.ceilings((torch.float32, torch.bfloat16), args.device, seconds=seconds, sizes=sizes)
    on = Setting(args.device, args.small, seconds, ceilings)
    result: dict[str, Any] = {"machine": calibrate.machine(), **record.sources(), "ceilings": ceilings}
    result |= {"lines": [], "failed": {}, "left out": []}
    for name in args.only.split(","):
        try:
            for line in PROMISES[name](on):
                result["lines"].append(asdict(line) | {"of": name, "holds": line.holds})
                _write(args.out, result)  # a run that is cut off leaves what it has
                print(f"{time.perf_counter() - began:4.0f} s  {_said(line)}", flush=True)
                if time.perf_counter() - began > args.budget:
                    result["left out"].append(f"the rest of {name}")
                    break
        except RuntimeError as error:
            result["failed"][name] = str(error)
            print(f"{name} failed: {error}", flush=True)
        _write(args.out, result)
    Console(width=140).print(table(result["lines"]))
    print(*(f"left out for want of time: {what}" for what in result["left out"]), f"{args.out}", sep="\n")
    return 1 if result["failed"] or any(line["found"] is None for line in result["lines"]) else 0


def _said(line: Line) -> str:
    found = "wrong, or not measured" if line.found is None else f"{line.found:.2f}"
    return f"{line.what}: {found}, asked {'at most' if line.most else 'at least'} {line.asked:g}"


def table(lines: list[dict[str, Any]]) -> Table:
    """Every line with what is asked and what was found."""
    found = Table(title="What is asked of the kernels, and what they show")
    for head in ("line", "asked", "found", "holds"):
        found.add_column(head, justify="left" if head == "line" else "right")
    for line in lines:
        asked = f"{'<=' if line['most'] else '>='} {line['asked']:g}"
        value = "" if line["found"] is None else f"{line['found']:.2f}"
        found.add_row(line["what"], asked, value, {True: "yes", False: "no", None: "WRONG"}[line["holds"]])
    return found


def _write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
