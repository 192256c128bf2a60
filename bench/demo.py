"""Trains AdaTT-sp and MMoE of two levels, and sets one training step beside the same network as people write it.

    python -m bench.demo [--data PATH]

Without --data the tasks are synthetic, those of the MMoE paper, the label saying whether the score is above its median;
with it they are Census-Income's three. Prints the test metrics of every task and a table of step time and peak memory,
and leaves demo.json and demo.png under bench/out/.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench import calibrate
from bench.contest import COMPILED, OURS, Task
from bench.picture import LABELS, draw
from bench.report import console as report_console
from bench.report import step_table
from bench.reproduce.plan import CENSUS, TABLE
from bench.reproduce.training import model_config
from bench.step import measure_step
from bench.tables import Console, Table
from python_models.data import CensusFileError, Splits, load_census, make_synthetic
from python_models.train import evaluate, fit, registry

EPOCHS = 5
NETWORKS = ("AdaTT-sp", "ML-MMoE")
LEARNING_RATE = 1e-3
SYNTHETIC_ROWS = (30_000, 2_000, 20_000)
STEP_VARIANTS = (OURS, "unbind", COMPILED)


def load(path: Path | None) -> tuple[str, Splits]:
    """The data's name and its parts: Census-Income from a file or directory, or synthetic tasks for None."""
    if path is None:
        return "synthetic tasks", make_synthetic(SYNTHETIC_ROWS, binary="median")
    return "Census-Income", load_census(path, seed=0)


def train(splits: Splits, epochs: int, console: Console) -> dict[str, Any]:
    """Trains every network on the training rows: {network: {test, seconds, parameters}}."""
    found = {}
    for name in NETWORKS:
        torch.manual_seed(0)
        model = registry.build(model_config(TABLE[name], len(splits.train)), splits.train)
        parameters = sum(p.numel() for p in model.parameters())
        console.print(f"{name}: {parameters:,} parameters, {len(splits.train):,} rows, {epochs} epochs")
        start = time.perf_counter()
        fit(model, splits.train, epochs=epochs, batch_size=CENSUS.batch, lr=LEARNING_RATE, progress=True)
        seconds = time.perf_counter() - start
        found[name] = {"test": evaluate(model, splits.test), "seconds": seconds, "parameters": parameters}
    return found


def metrics_table(name: str, trained: dict[str, Any]) -> Table:
    """AUC, log loss and normalised entropy on the test rows, a row for each network and task."""
    table = Table(title=f"{name}, test rows", caption="NE: log loss over that of the base rate, less is better")
    for head in ("network", "task", "AUC", "log loss", "NE"):
        table.add_column(head, justify="left" if head in ("network", "task") else "right")
    for network, record in trained.items():
        for task, values in record["test"].items():
            table.add_row(network, task, *(f"{values[k]:.4f}" for k in ("auc", "log_loss", "ne")))
    return table


def main() -> int:
    """Trains, measures, prints, draws; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="Census-Income: an official file, plain or .gz, or their directory")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the step table")
    parser.add_argument("--out", type=Path, default=Path("bench/out"), help="folder of demo.json and demo.png")
    args = parser.parse_args()
    console = report_console()
    began = time.perf_counter()
    try:
        name, splits = load(args.data)
    except (FileNotFoundError, CensusFileError) as error:
        print(error, file=sys.stderr)
        return 2
    trained = train(splits, args.epochs, console)
    console.print(metrics_table(name, trained))
    records = []
    with console.status("checking and timing one training step of each variant"):
        for network in ("AdaTT", "MMoE"):
            task = Task(network, device=args.device)
            records.append(measure_step(task, seconds=8.0, min_rounds=5, variants=STEP_VARIANTS))
            console.print(step_table(records[-1], LABELS))
    machine = calibrate.machine()
    args.out.mkdir(parents=True, exist_ok=True)
    draw(records, machine, args.out / "demo.png")
    seconds = time.perf_counter() - began
    result = {"data": name, "machine": machine, "epochs": args.epochs, "lr": LEARNING_RATE, "batch": CENSUS.batch}
    result |= {"networks": trained, "step": records, "seconds": seconds}
    (args.out / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"{args.out / 'demo.png'}, {args.out / 'demo.json'}, {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
