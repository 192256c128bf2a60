"""What a terminal shows while the runs go: a bar with the time that is left, or where there is no terminal, lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable

from bench.reproduce.plan import Run
from bench.reproduce.results import Line


class Pace:
    """Seconds that runs will take, from what runs of their setting took, on this machine and this day if there are any.

    Args:
        lines: of earlier runs.
    """

    def __init__(self, lines: Iterable[Line]) -> None:
        self._known: dict[str, list[float]] = {}
        for line in lines:
            self._known.setdefault(self._name(line["study"], line["name"]), []).append(line["cpu_seconds"])
        self._stretch: list[float] = []

    @staticmethod
    def _name(study: str, name: str) -> str:
        return f"{study}: {name}"

    def learn(self, line: Line, seconds: float) -> None:
        """Add a run that took so many seconds of the clock."""
        self._known.setdefault(self._name(line["study"], line["name"]), []).append(line["cpu_seconds"])
        self._stretch = [*self._stretch[-9:], seconds / max(line["cpu_seconds"], 1e-9)]

    def left(self, runs: Iterable[Run]) -> float | None:
        """Of the clock; None before the first run."""
        if not self._known:
            return None
        means = {name: sum(found) / len(found) for name, found in self._known.items()}
        other = sum(means.values()) / len(means)  # a setting that never ran
        stretch = sum(self._stretch) / len(self._stretch) if self._stretch else 1.0
        return stretch * sum(means.get(self._name(run.study, run.name), other) for run in runs)


class Progress:
    """Told of every run; a context manager.

    Args:
        todo: the runs that are missing.
        done: how many are there.
        lines: of the results file.
    """

    def __init__(self, todo: list[Run], done: int, lines: list[Line]) -> None:
        self.todo, self.done, self.total, self.pace = list(todo), done, done + len(todo), Pace(lines)
        self.bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self.bar = Bar(*columns, console=Console(stderr=True))
            self.task = self.bar.add_task("", total=self.total, completed=done)

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def start(self, run: Run) -> None:
        """A run begins."""
        self._began = time.perf_counter()
        if self.bar is not None:
            text = f"{time_left(self.pace.left(self.todo))}  {run.study}: {run.name}, seed {run.seed}"
            self.bar.update(self.task, description=text)

    def end(self, run: Run, line: Line) -> None:
        """Its line is written."""
        seconds = time.perf_counter() - self._began
        self.pace.learn(line, seconds)
        self.todo.pop(0)
        self.done += 1
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done)
            return
        left = time_left(self.pace.left(self.todo))
        what = f"{run.study}: {run.name}, seed {run.seed}, lr {run.lr}  {seconds:.1f} s"
        print(f"{self.done}/{self.total}  {left}  {what}", file=sys.stderr, flush=True)


def time_left(seconds: float | None) -> str:
    """In words, of one width."""
    return "? min left" if seconds is None else f"{seconds / 60:3.0f} min left"
