"""Peak memory of one training step.

On a CPU the step runs in a fresh process, since memory that another variant has touched would hide or add to it. The
process takes two steps, drops the gradients, hands free memory back to the system, takes its resident size as the
baseline, resets the high-water mark (VmHWM) and takes one more step. malloc is told to keep no freed tensor, so that
the resident size is what is alive. On a GPU the allocator's own high-water mark serves, in this process.

    python -m bench.memory bench.rivals:build_step '{"variant": "unbind", ...}'
"""

import ctypes
import gc
import importlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import mtlkernels as mtl

MIB = 1 << 20
# Fixed thresholds: glibc otherwise raises them as it sees large blocks freed, and then keeps up to 32 MiB of each.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


def peak_memory(target: str, kwargs: dict[str, Any], *, device: str = "cpu", timeout: float = 300.0) -> float | None:
    """MiB that one step needs above what stays between steps; None where it cannot be measured (a CPU without /proc).

    `target` is "module:function"; function(**kwargs) returns (step, release): a step to take, and a function that drops
    the gradients. Raises RuntimeError, with the end of the child's messages, when the child fails or takes too long.
    """
    if device != "cpu":
        return _peak_on_gpu(*_resolve(target)(**kwargs))
    if not Path("/proc/self/status").exists():
        return None
    command = [sys.executable, "-m", "bench.memory", target, json.dumps(kwargs)]
    environment = {**os.environ, **_MALLOC, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    root = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{target} {kwargs}: the measuring process took more than {timeout:.0f} s") from error
    if done.returncode != 0:
        raise RuntimeError(f"{target} {kwargs}: the measuring process failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])["peak_mib"]


def _resolve(target: str) -> Any:
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)


def _peak_on_gpu(step: Any, release: Any) -> float:
    for _ in range(2):
        step()
    release()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    release()
    return peak / MIB


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # a sandbox without it: the high-water mark since the start of the process has to do
        return False
    return True


def _trim() -> None:
    gc.collect()
    mtl.empty_cache()  # else what our pool keeps would pass for memory that the step does not need
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # not glibc
        pass


def _peak_on_cpu(step: Any, release: Any) -> float:
    for _ in range(2):
        step()
    release()
    _trim()
    before = _status("VmRSS")
    if _reset_high_water():
        step()
        return (_status("VmHWM") - before) / MIB
    step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / MIB


def main() -> None:
    """The child: builds the step, measures it, prints one line of JSON."""
    target, kwargs = sys.argv[1], json.loads(sys.argv[2])
    print(json.dumps({"peak_mib": _peak_on_cpu(*_resolve(target)(**kwargs))}))


if __name__ == "__main__":
    main()
