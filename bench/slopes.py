"""What a sweep shows: how time and memory grow, and where one variant overtakes another."""

import math
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from bench.timing import NOISE_LIMIT

FROM = {"experts": 32}  # below, what a call costs before any arithmetic bends the line
FLAT = {"experts": (8, 512)}  # where a cost for each should be the same
RESOLVED = 1.0  # MiB: a resident size moves by some pages, so that less counts as this


class Growth(NamedTuple):
    """time and memory as powers of what is swept, over the points from `start` on; peak: largest over smallest MiB."""

    axis: str
    what: str
    variant: str
    start: int
    end: int
    time: float | None
    memory: float | None
    peak_ratio: float | None


class Each(NamedTuple):
    """Milliseconds for each of what is swept, between the points `start` and `end`; spread: largest / smallest - 1."""

    axis: str
    what: str
    variant: str
    start: int
    end: int
    first: float
    last: float
    spread: float


class Crossover(NamedTuple):
    """From about `at` on, `faster` is the faster of the two."""

    axis: str
    what: str
    faster: str
    slower: str
    at: float


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """The least-squares slope of log y against log x; None for fewer than two x, or where a y is not positive."""
    if len({x for x, _ in points}) < 2 or any(y <= 0 for _, y in points):
        return None
    xs, ys = [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    above = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return above / sum((x - mean_x) ** 2 for x in xs)


def curves(figures: Iterable[dict[str, Any]], field: str) -> dict[tuple[str, str], dict[str, dict[int, float]]]:
    """(axis, what) -> variant -> at -> milliseconds ("ms") or MiB ("peak_mib"), in the order of at.

    Only of figures whose check is green; they are all of one dtype.
    """
    found: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for entry in sorted((e for e in figures if e["axis"] is not None), key=lambda e: e["at"]):
        value = entry["ms"]["median"] if field == "ms" else entry[field]
        if value is not None and entry["check"]["ok"]:
            curve = found.setdefault((entry["axis"], entry["what"]), {}).setdefault(entry["variant"], {})
            curve[entry["at"]] = value
    return found


def growth(figures: list[dict[str, Any]]) -> list[Growth]:
    """The slopes of every variant, from FROM on where the axis has one, else over the upper half of the points."""
    memory, found = curves(figures, "peak_mib"), []
    for (axis, what), variants in curves(figures, "ms").items():
        for variant, times in variants.items():
            ats = list(times)
            start = FROM.get(axis, ats[len(ats) // 2 - 1] if len(ats) > 2 else ats[0])
            upper = [(at, ms) for at, ms in times.items() if at >= start]
            known = memory.get((axis, what), {}).get(variant, {})
            peaks = {at: max(mib, RESOLVED) for at, mib in known.items() if at >= start}
            ratio = max(peaks.values()) / min(peaks.values()) if len(peaks) > 1 else None
            slopes = slope(upper), slope(list(peaks.items()))
            found.append(Growth(axis, what, variant, start, ats[-1], *slopes, ratio))
    return found


def each(figures: list[dict[str, Any]]) -> list[Each]:
    """The cost for each of what is swept, of the axes that have a range where it should be flat."""
    found = []
    for (axis, what), variants in curves(figures, "ms").items():
        low, high = FLAT.get(axis, (1, 0))
        for variant, times in variants.items():
            costs = {at: ms / at for at, ms in times.items() if low <= at <= high}
            if len(costs) > 1:
                (start, first), *_, (end, last) = costs.items()
                spread = max(costs.values()) / min(costs.values()) - 1
                found.append(Each(axis, what, variant, start, end, first, last, spread))
    return found


def crossovers(figures: list[dict[str, Any]]) -> list[Crossover]:
    """Where the faster of two variants changes, between points where both are apart by more than noise."""
    found = []
    for (axis, what), variants in curves(figures, "ms").items():
        for a, b in combinations(variants, 2):
            before: tuple[int, float] | None = None
            for at in (at for at in variants[a] if at in variants[b]):
                apart = math.log(variants[a][at] / variants[b][at])
                if abs(apart) <= math.log(1 + NOISE_LIMIT):
                    continue
                if before is not None and (before[1] > 0) != (apart > 0):
                    share = before[1] / (before[1] - apart)
                    where = math.exp(math.log(before[0]) * (1 - share) + math.log(at) * share)
                    found.append(Crossover(axis, what, *((a, b) if apart < 0 else (b, a)), where))
                before = (at, apart)
    return found
