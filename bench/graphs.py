"""What makes a short call measurable: operands that lie outside the L2 cache, and on a GPU CUDA graphs."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

_MOST = 16  # copies of the operands
_CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def copies_for(operand_bytes: int, device: str, cache_bytes: int | None = None) -> int:
    """How many copies of the operands to rotate, so that one is out of the L2 cache when its turn comes.

    Three caches' worth, since a call reads and writes more than its operands.
    """
    cache_bytes = l2_bytes(device) if cache_bytes is None else cache_bytes
    return min(_MOST, max(1, math.ceil(3 * cache_bytes / max(operand_bytes, 1))))


def l2_bytes(device: str) -> int:
    """The L2 cache of a GPU, or those of the CPU cores that torch uses; 0 where the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    for cache in _CPU_CACHES.glob("index*"):
        try:
            level, size = ((cache / name).read_text().strip() for name in ("level", "size"))
        except OSError:
            continue
        if level == "2" and size.endswith("K"):
            return torch.get_num_threads() * int(size[:-1]) * 1024
    return 0


def rotating(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """One callable that runs the next of `calls` each time, round and round."""
    if len(calls) == 1:
        return calls[0]
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def captured(calls: Sequence[Callable[[], Any]], device: str) -> tuple[Callable[[], Any], str]:
    """The calls in rotation, and how they run.

    That is "graph" (each captured once, and replayed), "events" where they cannot be captured, with the reason, or on a
    CPU "clock".
    """
    if torch.device(device).type != "cuda":
        return rotating(calls), "clock"
    try:
        return rotating([_graph(call) for call in calls]), "graph"
    except Exception as error:  # an operation that no graph takes: torch raises several types for these
        torch.cuda.synchronize()
        return rotating(calls), f"events ({str(error).splitlines()[0][:80]})"


@contextmanager
def captured_later(device: str | torch.device) -> Iterator[None]:
    """Runs on the stream that `captured` takes: a forward pass whose backward is to be captured alone has to.

    For a backward pass runs on its forward's stream, and the default one cannot be captured.
    """
    if torch.device(device).type != "cuda":
        yield
        return
    side, current = _side_stream(), torch.cuda.current_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)


@lru_cache
def _side_stream() -> Any:
    return torch.cuda.Stream()


def _graph(call: Callable[[], Any]) -> Callable[[], None]:
    before = torch.cuda.get_sync_debug_mode()
    with captured_later("cuda"):
        for _ in range(2):  # what is done once only, such as compiling and choosing algorithms
            call()
        # A call that asks the GPU for a size raises here, and not in the middle of a capture.
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=_side_stream()):
        call()
    return graph.replay
