"""Looks for better tiles of the Triton kernels of mix and expert_linear than pick_mix and pick_gemm choose.

    python -m bench tune [--kernels mix,linear] [--dtype bfloat16] [--budget 420] [--out bench/out/tune.json]
    python -m bench tune --interpret          a dry run without a GPU, in Triton's interpreter, on tiny shapes

For every kernel, shape and dtype the candidates are tried from the usual tile outwards until the share of the budget is
spent: each is compiled, compared with float64, and timed with a cold L2 cache. The best few and the usual one are then
timed in turn. Nothing is changed: the rows that gain are for pick_* in mtlkernels/triton/config.py, by hand.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench import calibrate, report
from bench.contest import LIMITS, relative_error
from bench.graphs import captured
from bench.operators import prepare, truth
from bench.shapes import SHAPES, tiny
from bench.subjects import find
from bench.tiles import gemm_candidates, mix_candidates
from bench.timing import AGAIN, control_difference, interleaved

Tile = tuple[int, ...]
_FINAL = 4  # candidates that are timed beside the usual one at the end


@dataclass
class Problem:
    """One kernel at one shape: how to run it, what must come out, and whose choice of a tile to overrule."""

    kernel: str
    shape_name: str
    shape: dict[str, int]
    dtype: torch.dtype
    module: ModuleType
    picker: str
    run: Callable[[], tuple[Tensor, ...]]
    expected: list[Tensor]
    limit: float

    def picked(self) -> tuple[tuple, dict, Tile]:
        """What the launcher asks the pick function, and what that answers; the first question where it asks twice."""
        asked: list[tuple[tuple, dict, Tile]] = []
        usual = getattr(self.module, self.picker)

        def spy(*args: Any, **options: Any) -> Tile:
            asked.append((args, options, usual(*args, **options)))
            return asked[-1][2]

        with _replaced(self.module, self.picker, spy):
            self.run()
        return asked[0]

    def forced(self, tile: Tile, args: tuple, options: dict) -> Callable[[], tuple[Tensor, ...]]:
        """`run` with this tile wherever the pick function is given these arguments."""
        usual = getattr(self.module, self.picker)

        def pick(*given: Any, **further: Any) -> Tile:
            return tile if (given, further) == (args, options) else usual(*given, **further)

        def run() -> tuple[Tensor, ...]:
            with _replaced(self.module, self.picker, pick):
                return self.run()

        return run

    def error(self, found: tuple[Tensor, ...]) -> float:
        """The largest relative error of the results."""
        return max(relative_error(f, e) for f, e in zip(found, self.expected, strict=True))


@contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def mix_problems(subject: str, name: str, shape: dict[str, int], dtype: torch.dtype, device: str) -> list[Problem]:
    """mix forward and backward at one shape."""
    from mtlkernels.triton import mix as launcher

    found = find(subject)
    operands, grad = prepare(found, shape, dtype, device)
    out, *gradients = truth(found, operands, grad)
    call = (operands["experts"], operands["logits"], operands.get("native"), None, None, operands.get("counts"))
    lse = launcher.mix(*call)[1]
    needs, count = (7, 3) if "native" in operands else (3, 2)
    common = {"shape_name": name, "shape": shape, "dtype": dtype, "module": launcher, "picker": "pick_mix"}
    backward = lambda: launcher.mix_backward(grad, None, *call, lse, needs)[:count]  # noqa: E731
    limits = LIMITS[dtype]
    return [
        Problem("mix forward", **common, run=lambda: launcher.mix(*call)[:1], expected=[out], limit=limits[0]),
        Problem("mix backward", **common, run=backward, expected=gradients, limit=limits[1]),
    ]


def linear_problems(name: str, shape: dict[str, int], dtype: torch.dtype, device: str) -> list[Problem]:
    """expert_linear with relu at one shape: forward, the gradient of x, those of weight and bias."""
    from mtlkernels.triton import expert_linear as launcher

    found = find("expert_linear")
    operands, grad = prepare(found, shape, dtype, device)
    out, dx, dweight, dbias = truth(found, operands, grad)
    x, weight, bias, counts = (operands[k] for k in ("x", "weight", "bias", "counts"))
    saved = launcher.expert_linear(x, weight, bias, counts, "relu", True)[0]

    def gradients(needs: int, some: slice) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: launcher.expert_linear_backward(grad, x, weight, saved, counts, "relu", needs)[some]

    common = {"shape_name": name, "shape": shape, "dtype": dtype, "module": launcher, "picker": "pick_gemm"}
    forward = lambda: launcher.expert_linear(x, weight, bias, counts, "relu", False)[:1]  # noqa: E731
    limits = LIMITS[dtype]
    return [
        Problem("linear forward", **common, run=forward, expected=[out], limit=limits[0]),
        Problem("linear dx", **common, run=gradients(1, slice(0, 1)), expected=[dx], limit=limits[1]),
        Problem("linear dw", **common, run=gradients(6, slice(1, 3)), expected=[dweight, dbias], limit=limits[1]),
    ]


def search(
    problem: Problem, device: str, budget: float, *, limit: int | None = None, small: bool = False
) -> dict[str, Any]:
    """Tries tiles for `budget` seconds (`limit` of them at most) and times the best beside the usual one."""
    until = time.perf_counter() + 0.7 * budget
    args, options, usual = problem.picked()
    candidates = (mix_candidates if problem.picker == "pick_mix" else gemm_candidates)(*args, **options)
    runs: dict[Tile, Callable[[], Any]] = {}
    refused, wrong = 0, []
    for tile in candidates[:limit]:
        run = problem.forced(tile, args, options)
        try:
            error = problem.error(run())
        except Exception as failure:  # too much shared memory, or a tile that the compiler cannot lay out
            if tile == usual:
                raise RuntimeError(f"{problem.kernel} at {problem.shape_name}: {usual} does not run") from failure
            refused += 1
            continue
        if error <= problem.limit:
            runs[tile] = run
        else:
            wrong.append({"tile": tile, "error": error})
        if time.perf_counter() > until:
            break
    seconds, rounds = (0.0, 2) if small else (min(2.0, 0.1 * budget), 7)
    timing = {"seconds": seconds, "warmup_seconds": 0.0, "min_rounds": rounds, "device": device, "hide_launch": True}
    found: dict[str, Any] = {"kernel": problem.kernel, "shape_name": problem.shape_name, "shape": problem.shape}
    found |= {"dtype": str(problem.dtype).removeprefix("torch."), "arguments": [list(args), options]}
    found |= {"usual": usual, "tried": len(runs) + refused + len(wrong), "of": len(candidates), "refused": refused}
    found |= {"fields": list(usual._fields), "wrong": wrong}
    if usual not in runs:
        return found | {"best": None, "gain": None, "rows": [], "control_difference": None}
    times = interleaved({str(tuple(tile)): run for tile, run in runs.items()}, **timing)
    order = sorted(runs, key=lambda tile: times[str(tuple(tile))].median)
    final = {usual: runs[usual]} | {tile: runs[tile] for tile in order[:_FINAL]}
    replays = {str(tuple(tile)): captured([run], device)[0] for tile, run in final.items()}
    name = str(tuple(usual))
    times = interleaved(replays, **timing, control=name)
    best = min(final, key=lambda tile: times[str(tuple(tile))].median)
    rows = [{"tile": tile, "ms": times[str(tuple(tile))].as_ms()} for tile in final]
    gain = times[name].median / times[str(tuple(best))].median
    again = {"control_ms": times[name + AGAIN].as_ms(), "control_difference": control_difference(times, name)}
    return found | {"best": best, "gain": gain, "rows": rows, **again}


def plan(kernels: list[str], small: bool) -> list[tuple[str, str, dict[str, int]]]:
    """What is tuned: subject, name of the shape, shape."""
    subjects = {"mix": ("mix/gated", "mix/adatt"), "linear": ("expert_linear",)}
    chosen = [(s, name, shape) for kernel in kernels for s in subjects[kernel] for name, shape in SHAPES[s].items()]
    if small:
        return [(s, name, tiny(shape)) for s, name, shape in chosen if name in ("AdaTT Census",)]
    return [entry for entry in chosen if entry[1] != "MMoE 8 x 16"]  # 16 columns: a launch, not a matter of tiles


def main(arguments: list[str] | None = None) -> int:
    """Tunes, prints a table, writes JSON; 1 where the usual tile gave wrong results."""
    parser = argparse.ArgumentParser(prog="python -m bench tune", description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", default="mix,linear", help="comma-separated (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="comma-separated (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=420, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--interpret", action="store_true", help="a dry run on a CPU: tiny shapes, float32, few tiles")
    parser.add_argument("--out", type=Path, default=Path("bench/out/tune.json"))
    args = parser.parse_args(arguments)
    if args.interpret:
        args.dtype = "float32"
        if os.environ.get("TRITON_INTERPRET") != "1":  # read when triton is imported, which torch has done by now
            again = [sys.executable, "-m", "bench.tune", *(sys.argv[1:] if arguments is None else arguments)]
            return subprocess.run(again, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode
    elif not torch.cuda.is_available():
        parser.error("there is no GPU here; --interpret is the dry run without one")
    device, began = "cpu" if args.interpret else "cuda", time.perf_counter()
    dtypes = [getattr(torch, name) for name in args.dtype.split(",")]
    todo = [(dtype, *entry) for dtype in dtypes for entry in plan(args.kernels.split(","), args.interpret)]
    result: dict[str, Any] = {"machine": calibrate.machine(), "interpret": args.interpret, "rows": []}
    console = report.console()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for i, (dtype, subject, name, shape) in enumerate(todo):
        if subject == "expert_linear":
            problems = linear_problems(name, shape, dtype, device)
        else:
            problems = mix_problems(subject, name, shape, dtype, device)
        left = max(1.0, args.budget - (time.perf_counter() - began)) / (len(todo) - i)
        for problem in problems:
            options = {"limit": 3 if args.interpret else None, "small": args.interpret}
            result["rows"].append(search(problem, device, left / len(problems), **options))
            args.out.write_text(json.dumps(result, indent=1) + "\n")  # after each: the next may be cut off
    result["seconds"] = time.perf_counter() - began
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    console.print(report.tile_table(result["rows"]))
    console.print(f"{args.out}, {result['seconds']:.0f} s")
    return 1 if any(row["best"] is None for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
