"""From lines to figures: scores of a setting over its seeds, and differences of two settings seed by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from bench.reproduce.plan import LOGISTIC, TUNING_SEED, Setting
from bench.reproduce.results import Line, of, rate

MEAN = "mean"


@dataclass(frozen=True)
class Difference:
    """Of two settings, the mean over the seeds that both have, with its standard error; `count` such seeds."""

    mean: float
    error: float
    count: int

    @property
    def reach(self) -> float:
        """Half of the 95 % interval of the mean, by Student's distribution; infinite for one seed."""
        if self.count < 2:
            return math.inf
        from scipy.stats import t

        return float(t.ppf(0.975, self.count - 1)) * self.error


class Summary:
    """What the lines say about every setting of one data set.

    Args:
        lines: of the results file.
        census: fingerprint of the Census-Income rows; None takes those of the last line about any.
        synthetic: the same of synthetic tasks.
    """

    def __init__(self, lines: list[Line], census: str | None = None, synthetic: str | None = None) -> None:
        self.lines, self._data = lines, {"census": census, "synthetic": synthetic}
        for line in reversed(lines):
            kind = self._kind(line["setting"]["data"])
            self._data[kind] = self._data[kind] or line["data"]

    @staticmethod
    def _kind(data: str) -> str:
        return "synthetic" if data.startswith("synthetic") else "census"

    def data(self, setting: Setting) -> str:
        """The fingerprint of its rows; "" where no line has such rows."""
        return self._data[self._kind(setting.data)] or ""

    def lr(self, setting: Setting) -> float | None:
        """The rate that was chosen; None without one."""
        return None if setting.network == LOGISTIC else rate(self.lines, setting, self.data(setting))

    def tests(self, setting: Setting) -> list[Line]:
        """The lines of its seeds with the chosen rate, in the order of the seeds; failed runs are not among them."""
        found = {
            line["seed"]: line
            for line in of(self.lines, setting, self.data(setting))
            if line["seed"] != TUNING_SEED and "test" in line and line["lr"] == self.lr(setting)
        }
        return [found[seed] for seed in sorted(found)]

    def failed(self) -> list[Line]:
        """Runs whose loss was no number at some step."""
        return [line for line in self.lines if "failed" in line]

    def scores(self, setting: Setting, metric: str = "auc") -> dict[int, dict[str, float]]:
        """{seed: {task: value, "mean": their mean}}."""
        found = {}
        for line in self.tests(setting):
            values = {task: each[metric] for task, each in line["test"].items()}
            found[line["seed"]] = {**values, MEAN: statistics.fmean(values.values())}
        return found

    def column(self, setting: Setting, task: str = MEAN, metric: str = "auc") -> list[float]:
        """One task's values over the seeds."""
        return [values[task] for values in self.scores(setting, metric).values()]

    def difference(
        self,
        better: Setting,
        worse: Setting,
        task: str = MEAN,
        metric: str = "auc",
        measure: Callable[[float], float] = lambda value: value,
    ) -> Difference | None:
        """Of the measure of the metric, better - worse; None where no seed has both."""
        a, b = self.scores(better, metric), self.scores(worse, metric)
        values = [measure(a[seed][task]) - measure(b[seed][task]) for seed in a.keys() & b.keys()]
        if not values:
            return None
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
        return Difference(statistics.fmean(values), error, len(values))
