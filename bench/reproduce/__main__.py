"""Trains what is missing, then writes the page: ``python -m bench.reproduce --data PATH``."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from bench import calibrate
from bench.record import ROOT
from bench.reproduce import plan, results
from bench.reproduce.rows import Rows
from bench.reproduce.training import train
from python_models.data import CensusFileError

RESULTS = ROOT / "bench/results/reproduce.jsonl"


def complete(path: Path, rows: Rows, studies: list[str], seeds: int | None, progress: Progress) -> None:
    """Train every run of the studies that has no line yet; each adds its line when it is done."""
    todo = list(plan.runs(studies, seeds))
    lines = results.read(path)
    done = {line["key"] for line in lines}
    machine = calibrate.machine()
    progress.begin(todo)
    for run in todo:
        data = rows.fingerprint(run.setting.data)
        lr = run.lr
        if lr is None and run.setting.network != "logistic regression":
            lr = results.rate(lines, run.setting, data)
        run = replace(run, lr=lr)
        key = run.key(data)
        if key in done:
            progress.skip(run)
            continue
        progress.start(run)
        found = train(run, lr, rows)
        line = {"key": key, "study": run.study, "name": run.name, "setting": asdict(run.setting)}
        line |= {"seed": run.seed, "lr": lr, "epochs": run.setting.budget.epochs, "batch": run.setting.budget.batch}
        line |= {"data": data, **found, "torch": torch.__version__, "cpu": machine["cpu"]}
        line["threads"] = torch.get_num_threads()
        results.append(path, line)
        lines.append(line)
        done.add(key)
        progress.end(run)


class Progress:
    """A bar with the time that is left where there is a terminal, and a line a run where there is none."""

    def begin(self, todo: list[plan.Run]) -> None:
        self.left, self.total, self.began, self.trained = len(todo), len(todo), time.perf_counter(), 0

    def skip(self, run: plan.Run) -> None:
        self.left -= 1

    def start(self, run: plan.Run) -> None:
        self.at = time.perf_counter()

    def end(self, run: plan.Run) -> None:
        self.left -= 1
        self.trained += 1
        now = time.perf_counter()
        eta = (now - self.began) / self.trained * self.left / 60
        print(
            f"{self.total - self.left}/{self.total}  {run.study}: {run.name}, seed {run.seed}, lr {run.lr}  "
            f"{now - self.at:.1f} s, {eta:.0f} min left",
            file=sys.stderr,
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.reproduce", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="Census-Income: an official file, plain or .gz, or their directory")
    parser.add_argument("--only", default=",".join(plan.STUDIES), help="studies, by commas (all of them)")
    parser.add_argument("--seeds", type=int, help="runs of each setting (as the plan says)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    studies = args.only.split(",")
    rows = Rows(args.data)
    try:
        complete(args.results, rows, studies, args.seeds, Progress())
    except (FileNotFoundError, CensusFileError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
