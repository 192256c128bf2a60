"""The ceilings of this machine: how fast it copies, and how fast it multiplies matrices.

    python -m bench.calibrate [--seconds 0.5] [--out bench/out/ceilings.json]

A step time says little by itself; as a share of what the same machine reaches on the bare matrix products it does. The
rate of a product is the best over a few sizes and over every way torch has to compute it, since on some processors the
default path (MKL) reaches half of what oneDNN does.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.tables import Console, Table
from bench.timing import synchronize

SIZES = ((4096, 256, 256), (4096, 256, 128), (4096, 256, 2048), (2048, 2048, 2048))  # (M, K, N) of x [M,K] w [N,K]
GPU_SIZES = SIZES + ((8192, 2048, 2048), (8192, 8192, 8192))
SMALL_SIZES = ((64, 64, 64),)
_COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}  # many times the largest cache: what is copied is never in it
TF32 = "tf32"


def machine() -> dict[str, Any]:
    """What a figure of this run depends on: processor, cores, threads, versions, backends."""
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mkl": torch.backends.mkl.is_available(),
        "onednn": torch.backends.mkldnn.is_available(),
        "triton": _version("triton"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    if torch.cuda.is_available():
        found |= _gpu()
    try:
        import mtlkernels

        found["build"] = {k: v for k, v in mtlkernels.build_info().items() if k != "library"}  # its path is nobody's
    except ImportError:
        found["build"] = None
    return json.loads(json.dumps(found, default=str))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> dict[str, Any]:
    facts = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        driver = None
    return {
        "driver": driver,
        "cuda": torch.version.cuda,
        "capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "l2_mib": facts.L2_cache_size >> 20,
        "memory_gib": round(facts.total_memory / 2**30, 1),
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def copy_bandwidth(device: str = "cpu", *, seconds: float = 0.5) -> float:
    """GB/s read and written together while copying a buffer larger than any cache."""
    size = _COPY_BYTES[torch.device(device).type]
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * size / _fastest(lambda: target.copy_(source), seconds, device) / 1e9


def gemm_paths(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """Every way torch has here to compute x [M,K] times weight [N,K] transposed, into [M,N]."""
    paths = {"torch.mm": lambda: torch.mm(x, weight.t(), out=out)}
    if x.device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        paths["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return paths


def gemm_rates(
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    seconds: float = 0.5,
    sizes: tuple[tuple[int, int, int], ...] | None = None,
) -> list[dict[str, Any]]:
    """GFLOP/s of every size by every path that takes `dtype`, best first; `seconds` are spent on each."""
    rates = []
    for m, k, n in sizes or (SIZES if device == "cpu" else GPU_SIZES):
        x = torch.randn(m, k, device=device).to(dtype)
        weight = torch.randn(n, k, device=device).to(dtype)
        out = torch.empty(m, n, device=device, dtype=dtype)
        for path, call in gemm_paths(x, weight, out).items():
            try:
                taken = _fastest(call, seconds, device)
            except RuntimeError:  # oneDNN without this type on this processor
                continue
            rates.append({"m": m, "k": k, "n": n, "path": path, "gflops": 2 * m * k * n / taken / 1e9})
    return sorted(rates, key=lambda rate: -rate["gflops"])


def _fastest(call: Callable[[], Any], seconds: float, device: str) -> float:
    """Seconds of the fastest call: a ceiling is what the machine can do, not what it did on average."""
    calls = 1 if device == "cpu" else 10  # enough to hide a launch
    call()
    times: list[float] = []
    until = time.perf_counter() + seconds
    while not times or time.perf_counter() < until:  # once may take seconds, where a type has no instructions
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(device)
        times.append((time.perf_counter() - start) / calls)
    return min(times)


def ceilings(
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
    device: str = "cpu",
    *,
    threads: tuple[int, ...] | None = None,
    seconds: float = 0.3,
    tf32: bool = False,
    sizes: tuple[tuple[int, int, int], ...] | None = None,
) -> list[dict[str, Any]]:
    """One row a number of threads (by default one, and as many as torch uses now): copy GB/s and the GEMM rates.

    tf32: a GPU's float32 products in its short float32 format, too, under that name.
    """
    now = torch.get_num_threads()
    rows = []
    try:
        for count in threads or (tuple(sorted({1, now})) if device == "cpu" else (now,)):
            torch.set_num_threads(count)
            row: dict[str, Any] = {"threads": count, "copy_gb_s": copy_bandwidth(device, seconds=seconds), "gemm": {}}
            for dtype in dtypes:
                row["gemm"][str(dtype).removeprefix("torch.")] = gemm_rates(dtype, device, seconds=seconds, sizes=sizes)
            if tf32 and device != "cpu":
                row["gemm"][TF32] = _in_tf32(lambda: gemm_rates(torch.float32, device, seconds=seconds, sizes=sizes))
            rows.append(row)
    finally:
        torch.set_num_threads(now)
    return rows


def _in_tf32(measure: Callable[[], Any]) -> Any:
    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, TF32
    try:
        return measure()
    finally:
        products.fp32_precision = before


def best_rate(rows: list[dict[str, Any]], dtype: torch.dtype, threads: int | None = None) -> float:
    """GFLOP/s of the fastest product in the row of `threads`, by default as many as torch uses now.

    A 16-bit product may as well be computed in float32, and is faster so where the processor has no 16-bit arithmetic.
    """
    row = _row(rows, threads)
    wanted = (
        {str(dtype).removeprefix("torch."), "float32"} if dtype.itemsize == 2 else {str(dtype).removeprefix("torch.")}
    )
    return max(rates[0]["gflops"] for name, rates in row["gemm"].items() if name in wanted)


def rates(rows: list[dict[str, Any]], dtype: torch.dtype, threads: int | None = None) -> tuple[float, float]:
    """GFLOP/s as `best_rate`, and GB/s of a copy."""
    return best_rate(rows, dtype, threads), _row(rows, threads)["copy_gb_s"]


def _row(rows: list[dict[str, Any]], threads: int | None) -> dict[str, Any]:
    return next(row for row in rows if row["threads"] == (threads or torch.get_num_threads()))


def main() -> None:
    """Prints the ceilings as a table and, with --out, leaves them as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.calibrate", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="spent on each product (default: %(default)s)")
    parser.add_argument("--dtype", default="float32,bfloat16", help="some, on a GPU tf32 too (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="tiny products: a dry run of the whole path")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    names = args.dtype.split(",")
    dtypes = tuple(getattr(torch, name) for name in names if name != TF32)
    options = {"tf32": TF32 in names, "sizes": SMALL_SIZES if args.small else None}
    rows = ceilings(dtypes, args.device, seconds=args.seconds, **options)
    table = Table(title=f"{machine()['gpu'] if args.device == 'cuda' else machine()['cpu']}: ceilings")
    for head in ("threads", "what", "size M,K,N", "path", "rate"):
        table.add_column(head, justify="right" if head in ("threads", "rate") else "left")
    for row in rows:
        size = f"{_COPY_BYTES[torch.device(args.device).type] >> 20} MiB"
        table.add_row(str(row["threads"]), "copy", size, "copy_", f"{row['copy_gb_s']:.1f} GB/s")
        for dtype, rates in row["gemm"].items():
            for rate in rates:
                size = f"{rate['m']}, {rate['k']}, {rate['n']}"
                table.add_row("", dtype, size, rate["path"], f"{rate['gflops']:.0f} GFLOP/s")
    Console().print(table)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"machine": machine(), "ceilings": rows}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
