"""The papers' experiments again: trains what the results file lacks, and writes docs/reproduce.md from its lines.

    python -m bench.reproduce --data PATH [--only table,levels] [--results FILE]

A finished run is a line of the file, on the disk; Ctrl-C, or any other end, loses the run in progress and nothing else,
and the same command goes on. A page whose results file is another than the default one lies beside that file.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from bench import calibrate
from bench.record import ROOT
from bench.reproduce import page, plan, results
from bench.reproduce.progress import Progress
from bench.reproduce.rows import Rows
from bench.reproduce.summary import Summary
from bench.reproduce.training import train
from python_models.data import CensusFileError

RESULTS, PAGE = ROOT / "bench/results/reproduce.jsonl", ROOT / "docs/reproduce.md"


def missing(path: Path, rows: Rows, studies: list[str], seeds: int | None) -> tuple[list[plan.Run], list[plan.Run]]:
    """The runs that have a line, and those that have none. A rate that is not chosen yet has none."""
    lines = results.read(path)
    keys, done, todo = {line["key"] for line in lines}, [], []
    for run in plan.runs(studies, seeds):
        data = rows.fingerprint(run.setting.data)
        there = with_rate(run, lines, data).key(data) in keys
        (done if there else todo).append(run)
    return done, todo


def with_rate(run: plan.Run, lines: list[results.Line], data: str) -> plan.Run:
    """The run with the rate that the tuning runs of its setting chose, where they are there."""
    known = run.lr is not None or run.setting.network == plan.LOGISTIC
    return run if known else replace(run, lr=results.rate(lines, run.setting, data))


def complete(path: Path, rows: Rows, todo: list[plan.Run], progress: Progress) -> None:
    """Train these runs; each adds its line when it is done."""
    lines, cpu = results.read(path), calibrate.machine()["cpu"]
    for run in todo:
        data = rows.fingerprint(run.setting.data)
        run = with_rate(run, lines, data)
        progress.start(run)
        found = train(run, rows)
        budget = run.setting.budget
        line = {"key": run.key(data), "study": run.study, "name": run.name, "setting": asdict(run.setting)}
        line |= {"seed": run.seed, "lr": run.lr, "epochs": budget.epochs, "batch": budget.batch, "data": data, **found}
        line |= {"torch": torch.__version__, "cpu": cpu, "threads": torch.get_num_threads()}
        lines.append(results.append(path, line))
        progress.end(run, line)


def main(arguments: list[str] | None = None) -> int:
    """Trains, then writes the page; the exit status: 2 for a file that cannot be used, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m bench.reproduce", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="Census-Income: an official file, plain or .gz, or their directory")
    parser.add_argument("--only", default=",".join(plan.STUDIES), help=f"studies, by commas: {', '.join(plan.STUDIES)}")
    parser.add_argument("--seeds", type=int, help="runs of each setting (as the plan says)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file of lines")
    parser.add_argument("--page", type=Path, help="where the page goes (docs/reproduce.md, or beside --results)")
    parser.add_argument(
        "--render", action="store_true", help="write the page from the lines that are there, train nothing"
    )
    args = parser.parse_args(arguments)
    studies = args.only.split(",")
    if unknown := sorted({*studies} - {*plan.STUDIES}):
        parser.error(f"no {', '.join(unknown)}; there are {', '.join(plan.STUDIES)}")
    if args.data is None and not args.render and studies != ["synthetic"]:
        parser.error("--data: where is Census-Income? Only the synthetic study needs none")
    where = args.page or (PAGE if args.results == RESULTS else args.results.with_suffix(".md"))
    rows = Rows(args.data)
    try:
        if not args.render:
            done, todo = missing(args.results, rows, studies, args.seeds)
            if done:
                print(f"{args.results}: {len(done)} runs are there, {len(todo)} to go", file=sys.stderr)
            with Progress(todo, len(done), results.read(args.results)) as progress:
                complete(args.results, rows, todo, progress)
        census = None if args.data is None else rows.fingerprint("census")
        page.write(Summary(results.read(args.results), census), where)
    except (FileNotFoundError, CensusFileError, results.ResultsError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; {args.results} has every finished run, and the same command goes on", file=sys.stderr)
        return 130
    print(where)
    return 0


if __name__ == "__main__":
    sys.exit(main())
