"""Microbenchmarks under pytest-benchmark.

    pytest bench/ --benchmark-only [--shapes papers] [--dtypes float32,bfloat16] [-k "expert_mix and forward"]

Every operator and every network, forward, backward and both, at shapes of `bench.shapes`; one shape each by default.
A figure is taken only after output and gradients agreed with float64; else the test fails. The rivals run in turn with
ours in the same test, and what came of it is in extra_info: {"backend", "mode", "flops", "bytes", "share" (of the least
time that the ceilings of this machine allow), "floor_ms", "floor_by", "peak_mib", "ms" (of all), "speed_up" (of ours
over each; none where its check is not green), "control_difference", "noisy"}.

A regression fails the command where an earlier run was saved:

    pytest bench/ --benchmark-only --benchmark-autosave
    pytest bench/ --benchmark-only --benchmark-compare --benchmark-compare-fail=median:5%
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from bench import calibrate
from bench.contest import BACKWARD, BOTH, FORWARD, OURS
from bench.timing import is_noisy, synchronize

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

    def options(self, what: str) -> dict[str, Any]:
        """For bench.operators.measure and bench.architectures.measure."""
        timing = {"seconds": 0.0 if self.small else 0.2, "min_rounds": 2 if self.small else 5}
        # A backward pass lies within both, and so does its peak.
        weighed = (OURS,) if self.peak and what != BACKWARD else ()
        return timing | {"device": self.device, "ceilings": self.ceilings, "memory": weighed}

    def note(self, benchmark: Any, row: dict[str, Any], peak: dict[str, float | None] | None, mode: str) -> None:
        """Fails where ours is wrong; else puts what was measured beside the figure to come."""
        assert row["check"][OURS]["ok"], row["check"][OURS]
        kept = ("backend", "flops", "bytes", "share", "floor_ms", "floor_by", "ms", "control_difference")
        benchmark.extra_info.update({name: row[name] for name in kept})
        benchmark.extra_info.update(speed_up=row["ratio"], peak_mib=(peak or {}).get(OURS), mode=mode)
        benchmark.extra_info["noisy"] = is_noisy(row["control_difference"])

    def awaited(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """The call, and what it launched."""
        if torch.device(self.device).type != "cuda":
            return call

        def run() -> None:
            call()
            synchronize(self.device)

        return run


@pytest.fixture(scope="session")
def settings(request: pytest.FixtureRequest) -> Settings:
    option = request.config.getoption
    device, small = option("--device"), option("--shapes") == "tiny"
    dtypes = tuple(dict.fromkeys([torch.float32, *(getattr(torch, name) for name in option("--dtypes").split(","))]))
    sizes = calibrate.SMALL_SIZES if small else None
    rows = calibrate.ceilings(dtypes, device, seconds=0.0 if small else 0.1, sizes=sizes)
    return Settings(device, small, not option("--no-peak"), rows)
