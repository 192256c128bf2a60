"""What the training methods cost: a step of AdaTT beside one that runs a backward a task and does no more with it.

    python -m bench.balancing [--seconds 8] [--tasks 8] [--batch 4096] [--out bench/out/balancing.json]

The baseline runs T backward passes that add up in .grad; "sum" is the ordinary step, one backward of the summed losses.
Methods are timed in turn on the same network and data. Each one's gradients are checked before: finite, and, of the
towers, equal to the ordinary step's.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import calibrate, report
from bench.tables import Table
from bench.timing import control_difference, interleaved, is_noisy
from python_models import AdaTT, MultiTaskModel, Towers
from python_models.balancing import MGDA, Balancer, GradDrop, GradNorm, PCGrad, UncertaintyWeighting

BASELINE = "T backward passes"
LIMIT = 1.15  # of the baseline


class Step:
    """A network, its batch, and a step of one method: forward and .grad, no optimizer."""

    def __init__(self, tasks: int, rows: int, features: int = 256) -> None:
        torch.manual_seed(0)
        self.model = MultiTaskModel(AdaTT(features, tasks, 2, expert_dims=[[256, 128]]), Towers(128, tasks))
        self.x, self.y = torch.randn(rows, features), torch.rand(rows, tasks).round()
        self.shared = list(self.model.fusion.parameters())

    def losses(self) -> tuple[list[Tensor], Tensor]:
        """Each task's loss, a scalar of its own, and the representation [B,T,D]."""
        z = self.model.fusion(self.x)
        logits = self.model.towers(z)
        each = torch.nn.functional.binary_cross_entropy_with_logits
        return [each(logit, y) for logit, y in zip(logits.unbind(1), self.y.unbind(1), strict=True)], z

    def by(self, method: Balancer, *, at: str = "shared") -> Callable[[], None]:
        """A step of the method, which works on the shared parameters or on the representation."""

        def step() -> None:
            self.model.zero_grad()
            losses, z = self.losses()
            method.backward(losses, **({"shared": self.shared} if at == "shared" else {"representation": z}))

        return step

    def baseline(self) -> None:
        """One backward a task."""
        self.model.zero_grad()
        losses, _ = self.losses()
        for i, loss in enumerate(losses):
            loss.backward(retain_graph=i + 1 < len(losses))

    def total(self) -> None:
        """The ordinary step."""
        self.model.zero_grad()
        torch.stack(self.losses()[0]).sum().backward()


def methods(step: Step) -> dict[str, Callable[[], None]]:
    """Every step that is timed, by name."""
    tasks = step.y.shape[1]
    last = list(step.model.fusion.levels[-1].experts.linears[-1].parameters())
    return {
        BASELINE: step.baseline,
        "sum": step.total,
        "UncertaintyWeighting": step.by(UncertaintyWeighting(["binary"] * tasks)),
        "GradNorm, last layer": step.by(GradNorm(tasks, measured_on=last)),
        "GradNorm, all shared": step.by(GradNorm(tasks)),
        "PCGrad": step.by(PCGrad(tasks)),
        "MGDA": step.by(MGDA(tasks)),
        "MGDA-UB": step.by(MGDA(tasks), at="representation"),
        "GradDrop": step.by(GradDrop(tasks), at="representation"),
    }


def check(step: Step, name: str, run: Callable[[], None]) -> bool:
    """Gradients are finite; towers', where no weight changes them, those of the ordinary step."""
    step.total()
    wanted = [p.grad.clone() for p in step.model.towers.parameters()]
    run()
    found = [p.grad for p in step.model.parameters()]
    towers = [p.grad for p in step.model.towers.parameters()]
    same = all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(towers, wanted, strict=True))
    return all(g is not None and g.isfinite().all() for g in found) and same


def measure(tasks: int = 8, rows: int = 4096, seconds: float = 8.0) -> dict[str, Any]:
    """{tasks, rows, control, results}; a result is {method, ms, ratio to the baseline, check}.

    control: by what share the baseline, timed twice, differs from itself.
    """
    step = Step(tasks, rows)
    runs = methods(step)
    checks = {name: check(step, name, run) for name, run in runs.items()}
    times = interleaved(runs, seconds=seconds, warmup_seconds=0.0, min_rounds=5, control=BASELINE)
    base = times[BASELINE].median
    results = [
        {"method": name, "ms": times[name].as_ms(), "ratio": times[name].median / base, "check": checks[name]}
        for name in runs
    ]
    return {"tasks": tasks, "rows": rows, "control": control_difference(times, BASELINE), "results": results}


def main() -> None:
    """Measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.balancing", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8.0, help="of timing (default: %(default)s)")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--out", type=Path, default=Path("bench/out/balancing.json"))
    args = parser.parse_args()
    found = measure(args.tasks, args.batch, args.seconds)
    table = Table(title=f"AdaTT, {args.tasks} tasks, batch {args.batch}")
    for head in ("method", "ms", f"of {BASELINE}", f"at most {LIMIT}", "check"):
        table.add_column(head, justify="left" if head == "method" else "right")
    for row in found["results"]:
        limited = row["method"].split(",")[0] in ("GradNorm", "PCGrad", "MGDA")
        verdict = ("yes" if row["ratio"] <= LIMIT else "no") if limited else ""
        table.add_row(row["method"], f"{row['ms']['median']:.0f}", f"{row['ratio']:.2f}x", verdict,
                      "ok" if row["check"] else "wrong")  # fmt: skip
    report.console().print(table)
    again = " Noisy: run it again." if is_noisy(found["control"]) else ""
    print(f"The baseline timed twice differs by {found['control']:.1%}.{again}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"machine": calibrate.machine(), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
