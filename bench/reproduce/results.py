"""The results file: a JSON line a finished run. A line that was cut off while it was written is no line."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.reproduce.plan import TUNING_SEED, Setting

Line = dict[str, Any]


class ResultsError(ValueError):
    """A results file with a line that is none."""


def read(path: Path) -> list[Line]:
    """All whole lines; [] where there is no file. ResultsError naming the line that is damaged."""
    found = []
    text = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(text.split(b"\n")[:-1], 1):  # behind the last newline is nothing, or a torn line
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise ResultsError(f"{path}, line {number}: is no JSON ({error}); delete it") from error
    return found


def append(path: Path, line: Line) -> Line:
    """Add a line, on the disk when this returns, and give it as it will be read; a torn one before it is cut away."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write((text := json.dumps(line)).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return json.loads(text)


def of(lines: list[Line], setting: Setting, data: str) -> list[Line]:
    """The lines of a setting, with its present budget, on rows of that fingerprint."""
    wanted = json.loads(json.dumps({"setting": asdict(setting), "data": data}))
    wanted |= {"epochs": setting.budget.epochs, "batch": setting.budget.batch}
    return [line for line in lines if all(line.get(name) == value for name, value in wanted.items())]


def rate(lines: list[Line], setting: Setting, data: str) -> float | None:
    """The rate whose tuning run has the least validation loss; None while one is missing."""
    losses = {
        line["lr"]: min(line.get("validation_loss", [math.inf]))  # none where the run failed
        for line in of(lines, setting, data)
        if line["seed"] == TUNING_SEED
    }
    if not set(setting.budget.rates) <= set(losses):
        return None
    return min(setting.budget.rates, key=losses.__getitem__)
