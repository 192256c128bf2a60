"""python -m tests.fuzz [--cases 50000] [--seed N]: the long run, a line for every operator and network, what failed at
the end. The exit status is 1 where something did.
"""

import argparse
import json
import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from rich.progress import Progress

from tests.fuzz.agreement import EMULATED, check
from tests.fuzz.calls import OPERATORS, call_of
from tests.fuzz.networks import NETWORKS, check_network, network_of

TRITON_EVERY = 8  # its interpreter takes as long as the rest together


class Found(Exception):
    """A case that failed, with what was wrong."""


def subjects(rng: random.Random) -> dict[str, tuple[Any, Callable[[dict], str]]]:
    """What is tried: a strategy of cases, and the check of one."""

    def operator(call: dict) -> str:
        names = ("native", EMULATED, "triton") if rng.randrange(TRITON_EVERY) == 0 else ("native", EMULATED)
        return check(call, names)

    found = {op: (call_of(op), operator) for op in OPERATORS}
    return found | {name: (network_of(name), check_network) for name in NETWORKS}


def run(cases: int, first: int) -> list[str]:
    """Tries `cases` cases of everything together; returns what failed, shrunk."""
    torch.set_num_threads(1)
    # Three calls of an operator for one of a network: there are more ways to call them.
    every = subjects(random.Random(first))
    share = cases / (3 * len(OPERATORS) + len(NETWORKS))
    failures, outcomes = [], Counter()
    with Progress() as progress:
        task = progress.add_task("fuzz", total=cases)
        for name, (strategy, test) in every.items():
            wanted, began, counted = math.ceil(share * (3 if name in OPERATORS else 1)), time.perf_counter(), Counter()

            failures += _attempt(strategy, test, counted, wanted, first, lambda: progress.advance(task), name)
            outcomes += counted
            counts = ", ".join(f"{n} {what}" for what, n in sorted(counted.items()))
            progress.console.print(f"{name:<18} {counts}; {time.perf_counter() - began:.0f} s")
    print(f"{sum(outcomes.values())} cases: {dict(outcomes)}; {len(failures)} operators or networks failed")
    return failures


def _attempt(
    strategy: Any, test: Callable, counted: Counter, cases: int, first: int, advance: Callable, name: str
) -> list[str]:
    """Tries that many cases of one subject; what failed, at most one line."""
    phases = [Phase.generate, Phase.shrink]

    @seed(first)
    @settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=phases,
              report_multiple_bugs=False)  # fmt: skip
    @given(strategy)
    def attempt(case: dict) -> None:
        try:
            counted[test(case) or "no call"] += 1
        except Exception as error:
            raise Found(f"{_line(case)}\n    {type(error).__name__}: {str(error)[:500]}") from error
        finally:
            advance()

    try:
        attempt()
    except Found as error:
        return [f"{name}: {error}"]
    return []


def _line(case: dict) -> str:
    """The case as the corpus keeps it; as Python where it holds what JSON does not have."""
    try:
        return json.dumps(case)
    except TypeError:
        return repr(case)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split(": ")[1].split(",")[0])
    parser.add_argument("--cases", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30), help="of the cases (default: another)")
    args = parser.parse_args()
    print(f"--seed {args.seed}")
    failures = run(args.cases, args.seed)
    print(*failures, sep="\n")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
