"""Microbenchmarks under pytest-benchmark.

    pytest bench/ --benchmark-only [--shapes papers] [--dtypes float32,bfloat16] [-k "expert_mix and forward"]

Every operator and every network, forward, backward and both, at shapes of `bench.shapes`; one shape each by default.
A figure is taken only after output and gradients agreed with float64; else the test fails. The rivals run in turn with
ours in the same test, and what came of it is in a table below pytest-benchmark's, and in extra_info: {"backend",
"mode", "flops", "bytes", "percent_of_ceiling" (the least time that the ceilings of this machine allow, over ours),
"floor_ms", "floor_by", "peak_mib", "ms" (of all), "speed_up" (of ours over each; none where its check is not green),
"control_difference", "noisy" (ours timed twice differs by more than 5 %)}.

A regression fails the command where an earlier run was saved:

    pytest bench/ --benchmark-only --benchmark-autosave
    pytest bench/ --benchmark-only --benchmark-compare --benchmark-compare-fail=median:10%
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from bench import calibrate, report
from bench.contest import BACKWARD, BOTH, FORWARD, OURS
from bench.tables import Table
from bench.timing import is_noisy, synchronize, warm_up

WHATS = (FORWARD, BACKWARD, BOTH)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mtlkernels")
    group.addoption("--shapes", default="default", help="default, papers, all, tiny (a dry run), or a name's beginning")
    group.addoption("--dtypes", default="float32", help="comma-separated (default: %(default)s)")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--no-peak", action="store_true", help="without peak memory, which takes a process a test on a CPU")


@dataclass(frozen=True)
class Settings:
    """What a test needs to know beside its case: options of `measure`, and how a row becomes a benchmark."""

    device: str
    small: bool
    peak: bool
    ceilings: list[dict[str, Any]]

    def options(self) -> dict[str, Any]:
        """For bench.operators.measure and bench.architectures.measure."""
        timing = {"seconds": 0.0 if self.small else 0.2, "min_rounds": 2 if self.small else 5}
        return timing | {"device": self.device, "ceilings": self.ceilings, "memory": (OURS,) if self.peak else ()}

    def note(self, benchmark: Any, row: dict[str, Any], peak: dict[str, float | None] | None, mode: str) -> None:
        """Fails where ours is wrong; else puts what was measured beside the figure to come."""
        assert row["check"][OURS]["ok"], row["check"][OURS]
        kept = ("backend", "flops", "bytes", "floor_ms", "floor_by", "ms", "control_difference")
        benchmark.extra_info.update({name: row[name] for name in kept})
        benchmark.extra_info["percent_of_ceiling"] = row["share"] and 100 * row["share"]
        benchmark.extra_info.update(speed_up=row["ratio"], peak_mib=(peak or {}).get(OURS), mode=mode)
        benchmark.extra_info["noisy"] = is_noisy(row["control_difference"])

    def time(self, benchmark: Any, call: Callable[[], Any]) -> None:
        """The call, and what it launched, by pytest-benchmark's clock."""
        warm_up(call, 0.0 if self.small else 0.1, self.device)
        if torch.device(self.device).type != "cuda":
            benchmark(call)
        else:
            benchmark(lambda: (call(), synchronize(self.device)))


@pytest.fixture(scope="session")
def settings(request: pytest.FixtureRequest) -> Settings:
    option = request.config.getoption
    device, small = option("--device"), option("--shapes") == "tiny"
    dtypes = tuple(dict.fromkeys([torch.float32, *(getattr(torch, name) for name in option("--dtypes").split(","))]))
    sizes = calibrate.SMALL_SIZES if small else None
    rows = calibrate.ceilings(dtypes, device, seconds=0.0 if small else 0.1, sizes=sizes)
    return Settings(device, small, not option("--no-peak"), rows)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Ours beside each rival whose check is green."""
    session = getattr(config, "_benchmarksession", None)
    rows = [bench for bench in session.benchmarks if "speed_up" in bench.extra_info] if session else []
    if not rows:
        return
    noisy = sum(bench.extra_info["noisy"] for bench in rows)
    table = Table(
        title="ours and its rivals in turn", caption=f"~: ours timed twice differs by more than 5 % ({noisy})"
    )
    for head in ("benchmark", "ms", "% of\nceiling", "MiB", "time of a rival / ours"):
        table.add_column(head, justify="left" if head[:4] in ("benc", "time") else "right", overflow="fold")
    for bench in rows:
        extra = bench.extra_info
        share, peak = extra["percent_of_ceiling"], extra["peak_mib"]
        table.add_row(
            bench.name.partition("[")[2].rstrip("]"),
            ("~" if extra["noisy"] else "") + f"{extra['ms'][OURS]['median']:.4g}",
            "" if share is None else f"{share:.0f}",
            "" if peak is None else f"{peak:.0f}",
            ", ".join(
                f"{name} {'WRONG' if ratio is None else f'{ratio:.2f}x'}" for name, ratio in extra["speed_up"].items()
            ),
        )
    report.console().print(table)
