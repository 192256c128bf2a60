"""Step times that can be compared: variants in turn, in one process, on the same data, with quantiles and a control.

Times of one variant taken in one go and of another a minute later differ by what the machine did in between. Here every
round runs every variant once, forwards in one round and backwards in the next, so that a slow second hits them all and
no variant always runs in the cache its neighbour left behind. The control (A/A) is one variant timed twice under two
names: a difference between two variants means nothing unless it is larger than the one between these.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

NOISE_LIMIT = 0.05  # an A/A difference above this flags the whole run
AGAIN = " (again)"  # suffix of the control's second name
_L2_BYTES = 256 << 20  # more than any GPU's L2, zeroed between samples so that each starts cold


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant: the median, the 20 % and 80 % quantiles, and how many samples they rest on."""

    median: float
    q20: float
    q80: float
    samples: int

    def as_ms(self) -> dict[str, float | int]:
        """The same in milliseconds, for a JSON file."""
        return {k: v if k == "samples" else v * 1e3 for k, v in asdict(self).items()}


def quantile(samples: Sequence[float], q: float) -> float:
    """The q-quantile of `samples`, interpolated between neighbours.

    Raises ValueError when there is no sample or q is outside [0, 1].
    """
    if not samples:
        raise ValueError("samples: got none, expected at least one")
    if not 0.0 <= q <= 1.0:
        raise ValueError(f"q: got {q}, expected a number in [0, 1]")
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def summarise(samples: Sequence[float]) -> Timing:
    """Median and 20/80 quantiles of `samples`; ValueError when there is none."""
    return Timing(quantile(samples, 0.5), quantile(samples, 0.2), quantile(samples, 0.8), len(samples))


def turn_order(names: Sequence[str], turn: int) -> list[str]:
    """The order of the variants in round `turn`: as given in even rounds, backwards in odd ones."""
    return list(names) if turn % 2 == 0 else list(reversed(names))


def interleaved(
    variants: dict[str, Callable[[], Any]],
    *,
    seconds: float,
    warmup_seconds: float = 0.5,
    min_rounds: int = 5,
    device: str | torch.device = "cpu",
    control: str | None = None,
    on_round: Callable[[], None] | None = None,
    hide_launch: bool = False,
) -> dict[str, Timing]:
    """Times every variant in turn until `seconds` are spent and `min_rounds` rounds are done.

    Each variant first runs alone for `warmup_seconds`, once at least. `control` names the variant that is timed a
    second time, under its name plus " (again)". The garbage collector rests meanwhile. On a GPU the L2 cache is
    overwritten before every sample, and CUDA events take the time. It includes what the host needs to launch the work,
    unless `hide_launch`: then the host launches while the GPU still overwrites the L2 cache, some 60 us, and what fits
    into these does not count. `on_round` is called after every round (a progress bar). Raises ValueError
    when there is no variant or `control` is not one of them.
    """
    if not variants:
        raise ValueError("variants: got none, expected at least one")
    if control is not None and control not in variants:
        raise ValueError(f"control: got {control!r}, expected one of {sorted(variants)}")
    calls = dict(variants)
    if control is not None:
        calls[control + AGAIN] = variants[control]
    device = torch.device(device)
    flush = torch.empty(_L2_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
    for call in variants.values():
        warm_up(call, warmup_seconds, device)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        turn = 0
        while turn < min_rounds or time.perf_counter() < end:
            for name in turn_order(names, turn):
                samples[name].append(_sample(calls[name], device, flush, hide_launch))
            turn += 1
            if on_round is not None:
                on_round()
    finally:
        if collecting:
            gc.enable()
    return {name: summarise(values) for name, values in samples.items()}


def synchronize(device: str | torch.device) -> None:
    """Waits for what was launched on a GPU; nothing on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def warm_up(call: Callable[[], Any], seconds: float, device: str | torch.device) -> None:
    """Calls for so long, once at least."""
    end = time.perf_counter() + seconds
    while True:
        call()
        synchronize(device)
        if time.perf_counter() >= end:
            return


def _sample(call: Callable[[], Any], device: torch.device, flush: torch.Tensor | None, hide_launch: bool) -> float:
    if flush is None:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    if not hide_launch:
        synchronize(device)
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def control_difference(timings: dict[str, Timing], control: str) -> float:
    """How far the two medians of the variant timed twice lie apart, as a share of the smaller one."""
    first, second = timings[control].median, timings[control + AGAIN].median
    return abs(first - second) / min(first, second)


def is_noisy(difference: float) -> bool:
    """True when the same work timed twice differs by more than NOISE_LIMIT: the run should be repeated."""
    return difference > NOISE_LIMIT


def per_call(
    call: Callable[[], Any],
    *,
    seconds: float = 0.5,
    calls: int = 100,
    blocks: int = 5,
    device: str | torch.device = "cpu",
) -> float:
    """Seconds of one short call: the median over loops of `calls` calls in each of `blocks` blocks, the least of those.

    For calls of microseconds, where one interrupt is larger than what is measured: the median drops single interrupts,
    the minimum drops a block in which somebody else had the core. A GPU is awaited between the loops, outside the
    clock: what is measured is the time to launch.
    """
    for _ in range(2 * calls):
        call()
    medians = []
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(blocks):
            loops: list[float] = []
            end = time.perf_counter() + seconds / blocks
            while len(loops) < 5 or time.perf_counter() < end:
                start = time.perf_counter()
                for _ in range(calls):
                    call()
                loops.append((time.perf_counter() - start) / calls)
                synchronize(device)
            medians.append(quantile(loops, 0.5))
    finally:
        if collecting:
            gc.enable()
    return min(medians)
