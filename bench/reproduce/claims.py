"""What the papers say of which network is better, and what the figures say to it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bench.reproduce.plan import CORRELATIONS, STUDIES, SYNTHETICS, TABLE, Setting
from bench.reproduce.summary import MEAN, Difference, Summary

CLEAR, NOISE, AGAINST, MISSING = "as in the paper", "within the noise", "the other way round", "not run"


def verdict(difference: Difference | None) -> str:
    """What a difference, positive where it is as the paper says, is worth: against its 95 % interval."""
    if difference is None:
        return MISSING
    if abs(difference.mean) <= difference.reach:
        return NOISE
    return CLEAR if difference.mean > 0 else AGAINST


@dataclass(frozen=True)
class Claim:
    """What a paper says: one setting of a study is better than another one, of the study or else of the table.

    Attributes:
        source: paper and place.
        study: of bench.reproduce.plan.
        better, worse: names in it.
    """

    source: str
    study: str
    better: str
    worse: str

    @property
    def ordering(self) -> str:
        """In words."""
        if self.study in SYNTHETICS:
            (better, p), (worse, q) = self.better.split(), self.worse.split()
            words = f"{better} below {worse} at {p}" if p == q else f"{better} at {p} below at {q}"
            return f"{words}, weights {SYNTHETICS[self.study]}"
        return " above ".join(self._words(name) for name in (self.better, self.worse))

    def _words(self, name: str) -> str:
        if name not in STUDIES[self.study] or self.study not in ("experts", "levels"):
            return name
        counted = name.replace("a task", "expert a task" if name == "1 a task" else "experts a task")
        return f"AdaTT-sp with {counted}"

    def _setting(self, name: str) -> Setting:
        return STUDIES[self.study].get(name) or TABLE[name]

    def difference(self, summary: Summary, task: str = MEAN) -> Difference | None:
        """Positive where the claim holds: of AUC, or of the logarithm of the squared error of synthetic tasks.

        Of the logarithm, since a seed that stays stuck has many times the error of the others.
        """
        settings = self._setting(self.better), self._setting(self.worse)
        if self.study not in SYNTHETICS:
            return summary.difference(*settings, task)
        return summary.difference(*settings, task, "mse", lambda error: -math.log(error))


CENSUS_PAPER = "AdaTT, table 5, of Census-Income"
INDUSTRY = "AdaTT, tables 1 to 4"
ABLATION, EXPERTS, LEVELS = "AdaTT, table 6", "AdaTT, table 7", "AdaTT, table 8"
CLAIMS = (
    Claim(CENSUS_PAPER, "table", "AdaTT-sp", "ML-MMoE"),
    Claim(CENSUS_PAPER, "table", "AdaTT-sp", "PLE"),
    Claim(CENSUS_PAPER, "table", "ML-MMoE", "PLE"),
    Claim(INDUSTRY, "table", "AdaTT", "SharedBottom"),
    Claim(INDUSTRY, "table", "AdaTT-sp", "SharedBottom"),
    Claim(INDUSTRY, "table", "MMoE", "SharedBottom"),
    Claim(INDUSTRY, "table", "ML-MMoE", "SharedBottom"),
    Claim(INDUSTRY, "table", "PLE", "SharedBottom"),
    Claim(INDUSTRY, "table", "CrossStitch", "SharedBottom"),
    Claim(INDUSTRY, "experts", "1 a task", "CrossStitch"),
    Claim(INDUSTRY, "table", "AdaTT", "MMoE"),
    Claim(INDUSTRY, "table", "AdaTT", "PLE"),
    Claim(ABLATION, "residual", "AdaTT-sp", "AdaTT-sp without"),
    Claim(ABLATION, "residual", "AdaTT", "AdaTT without"),
    Claim(EXPERTS, "experts", "2 a task", "1 a task"),
    Claim(EXPERTS, "experts", "3 a task", "2 a task"),
    Claim(EXPERTS, "experts", "4 a task", "3 a task"),
    Claim(EXPERTS, "experts", "4 a task", "1 a task"),
    Claim(LEVELS, "levels", "3 levels", "2 levels"),
    Claim(LEVELS, "levels", "4 levels", "3 levels"),
    Claim(LEVELS, "levels", "5 levels", "4 levels"),
    Claim(LEVELS, "levels", "5 levels", "2 levels"),
    *(
        Claim("MMoE, synthetic study", study, f"{better} {p}", f"{worse} {p}")
        for study in SYNTHETICS
        for p in CORRELATIONS
        for better, worse in (("MMoE", "SharedBottom"), ("OMoE", "SharedBottom"), ("MMoE", "OMoE"))
        if (better, worse, p) != ("MMoE", "OMoE", 1.0)  # there the paper finds no difference
    ),
    *(
        Claim("MMoE, synthetic study", study, f"{name} 1.0", f"{name} 0.5")
        for study in SYNTHETICS
        for name in ("SharedBottom", "OMoE", "MMoE")
    ),
)
