"""The training step beside the same network as people write it, mix alone, and the cost of a call.

    python -m bench.step [--quick] [--tasks 4,8] [--dtype float32,bfloat16] [--out bench/out/step.json]

All variants of a step have the same weights and data, are checked against float64 first, and are timed in turn. Peak
memory comes from a fresh process each. "of GEMM floor" is the time of the step's matrix products at the machine's best
measured rate for the dtype, as a share of the step's time.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import calibrate, contest, parts, report
from bench.contest import OURS, Task
from bench.picture import draw
from bench.timing import AGAIN, control_difference, interleaved


def measure_step(
    task: Task,
    *,
    seconds: float,
    min_rounds: int = 5,
    variants: tuple[str, ...] | None = None,
    rate: float | None = None,
    memory: bool = True,
) -> dict[str, Any]:
    """Checks, times and weighs the variants of one task. rate: GFLOP/s of the machine's products, for the GEMM floor.

    Returns {task, rows, control_ms, control_difference, gemm_floor_ms}; a row is {variant, ms, ratio (its time over
    ours; None unless its check and ours are green), peak_mib, floor_share, check, first_step_s}.
    """
    contestants = contest.build_all(task, variants)
    checks, first = contest.check_all(task, contestants)
    steps = {name: contestant.step for name, contestant in contestants.items()}
    times = interleaved(
        steps, seconds=seconds, warmup_seconds=0.0, min_rounds=min_rounds, device=task.device, control=OURS
    )
    for contestant in contestants.values():
        contestant.release()
    floor = None if rate is None else task.gemm_flops() / (rate * 1e9)
    rows = []
    for name in contestants:
        green = checks[name].ok and checks[OURS].ok
        rows.append(
            {
                "variant": name,
                "ms": times[name].as_ms(),
                "ratio": times[name].median / times[OURS].median if green else None,
                "peak_mib": contest.step_memory(name, task) if memory else None,
                "floor_share": None if floor is None else floor / times[name].median,
                "check": asdict(checks[name]),
                "first_step_s": first[name],
            }
        )
    return {
        "task": asdict(task),
        "rows": rows,
        "control_ms": times[OURS + AGAIN].as_ms(),
        "control_difference": control_difference(times, OURS),
        "gemm_floor_ms": None if floor is None else floor * 1e3,
    }


def main() -> None:
    """Measures, prints tables, writes JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds: for a look, not for a figure to keep")
    parser.add_argument("--small", action="store_true", help="a network of a few numbers: a dry run of the whole path")
    parser.add_argument("--seconds", type=float, help="of timing for each network and dtype (default: 25, quick 5)")
    parser.add_argument("--tasks", default="4,8", help="numbers of tasks (default: %(default)s)")
    parser.add_argument("--dtype", default="float32,bfloat16", help="dtypes of the step (default: %(default)s)")
    parser.add_argument("--network", default="AdaTT", choices=("AdaTT", "MMoE"))
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--experts-per-task", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="step,mix,overhead", help="parts to measure (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench/out/step.json"))
    args = parser.parse_args()
    console = report.console()
    wanted, dtypes = args.only.split(","), args.dtype.split(",")
    sizes: dict[str, Any] = {}
    if args.small:
        args.quick, args.tasks, args.batch, args.seconds = True, "2", 32, 0.0
        wanted, dtypes, sizes = ["step"], dtypes[:1], {"in_features": 16, "dims": (16, 8)}
    seconds = (5.0 if args.quick else 25.0) if args.seconds is None else args.seconds
    began = time.perf_counter()
    result: dict[str, Any] = {"machine": calibrate.machine(), "quick": args.quick}
    if "step" in wanted:
        result["ceilings"] = calibrate.ceilings(
            tuple(getattr(torch, d) for d in dict.fromkeys(["float32", *dtypes])),
            args.device,
            seconds=0.0 if args.small else 0.1 if args.quick else 0.4,
            sizes=calibrate.SMALL_SIZES if args.small else None,
        )
        result["step"] = []
        for dtype in dtypes:
            for tasks in (int(t) for t in args.tasks.split(",")):
                options = {"dtype": dtype, "device": args.device, **sizes}
                task = Task(args.network, tasks, args.experts_per_task, args.batch, **options)
                record = measure_step(
                    task,
                    seconds=seconds,
                    min_rounds=3 if args.quick else 5,
                    variants=(contest.OURS, "unbind", "batched") if args.small else None,
                    rate=calibrate.best_rate(result["ceilings"], task.torch_dtype),
                    memory=not args.small,
                )
                result["step"].append(record)
                console.print(report.step_table(record))
    if "mix" in wanted:
        result["mix"] = []
        for dtype in dtypes:
            rows = parts.measure_mix(dtype=dtype, device=args.device, seconds=0.5 if args.quick else 3.0)
            result["mix"] += rows
            console.print(report.mix_table(rows))
    if "overhead" in wanted:
        result["overhead"] = parts.measure_overhead(args.device, seconds=0.2 if args.quick else 1.0)
        console.print(report.overhead_table(result["overhead"]))
    result["seconds"] = time.perf_counter() - began
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for dtype in dtypes if "step" in wanted and not args.small else ():
        records = [r for r in result["step"] if r["task"]["dtype"] == dtype]
        draw(records, result["machine"], args.out.with_name(f"{args.out.stem}_{dtype}.png"))
    console.print(f"{args.out}, {result['seconds']:.0f} s")


if __name__ == "__main__":
    main()
