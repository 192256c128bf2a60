"""Builds, tests and measures on this machine's GPU, part by part, into one results file.

    python -m bench.gpu_check [--parts build,promises,device,tests,sanitizer,bench,tune] [--limit SECONDS] [--out FILE]
    python -m bench.gpu_check --device cpu --small      a dry run without a GPU
    python -m bench.gpu_check --combine A B --out C

Every part is a process of its own with a time limit, so that a crash, a hang or a poisoned CUDA context costs that part
alone; what it wrote until then is kept, and the status says what happened. The parts may be spread over several calls:
each adds to the file, whose form bench/record.py describes. The exit status is 1 where a part failed.
"""

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import calibrate, record
from bench.outcomes import outcomes

# The operators whose tests on the GPU are one part: where a kernel hangs or breaks the GPU, its part alone is lost.
ON_DEVICE = {
    "device-expert_linear": ("expert_linear",),
    "device-mix": ("mix",),
    "device-expert_mix": ("expert_mix",),
    "device-snr_linear": ("snr_linear",),
    "device-star_linear": ("star_linear",),
    "device-partitioned_norm": ("partitioned_norm",),
    "device-small": ("hard_concrete", "hard_concrete_l0", "esmm_loss", "masked_bce"),
}
GROUPS = {"device": tuple(ON_DEVICE), "bench": ("promises", "ceilings", "operators", "step")}
# What matters most comes first: a machine may be there for minutes only.
ORDER = ("build", "promises", *ON_DEVICE, "tests", "slow", "sanitizer", "ceilings", "operators", "step", "tune")
_OPTIONAL = ("xdist", "pytest_timeout", "rich", "hypothesis", "sklearn", "pandas", "matplotlib")
_LEAST = 5.0  # seconds: with less left, a part is not begun


@dataclass(frozen=True)
class Part:
    """One process: its command, its time limit, and the JSON file (or, for tests, JUnit file) that it leaves.

    `out` is relative to the repository, where the command runs.
    """

    name: str
    command: list[str]
    limit: float
    out: Path
    environment: dict[str, str] = field(default_factory=dict)


def parts(names: list[str], device: str, small: bool, folder: Path, tests: list[str]) -> list[Part]:
    """The parts of these names, or of these groups, in the order in which they run."""
    wanted = {part for name in names for part in GROUPS.get(name, (name,))}
    unknown = wanted - set(ORDER)
    if unknown:
        raise SystemExit(f"--parts: there is no {', '.join(sorted(unknown))}; there are {', '.join((*ORDER, *GROUPS))}")
    python, on = [sys.executable, "-m"], ["--device", device]
    dtypes = "float32" if device == "cpu" else "float32,bfloat16"
    least = ["--small"] if small else []
    # A test file that cannot be imported here costs itself alone.
    pytest = [*python, "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    pytest += ["-n", str(max(1, min(14, (os.cpu_count() or 1) - 2)))] if _has("xdist") else []  # most of it compiles
    pytest += ["--timeout", "300"] if _has("pytest_timeout") else []
    cuda = {"MTLKERNELS_CUDA": "0" if device == "cpu" else "1"}
    if device != "cpu" and "MTLKERNELS_CUDA_ARCHS" not in os.environ:
        cuda["MTLKERNELS_CUDA_ARCHS"] = _architecture()
    calibrated = [*python, "bench.calibrate", *on, "--seconds", "0.02" if small else "0.5", *least]
    calibrated += ["--dtype", dtypes if device == "cpu" else "float32,tf32,bfloat16,float16"]
    beside = least or ["--memory", "--backends", "native,triton"]
    promises = [*python, "bench.promises", *on, *(least or ["--budget", "240"])]
    step = [*python, "bench.step", *on, *(least or ["--dtype", dtypes, "--seconds", "8"])]
    tune = [*python, "bench.tune", *(["--interpret"] if device == "cpu" else ["--budget", "420"])]
    commands = {
        "build": ([*python, "bench.build"], 540, cuda),
        "tests": ([*pytest, "-m", "not slow", "--ignore=tests/gpu", *tests], 540, {"OMP_NUM_THREADS": "2"}),
        "slow": ([*pytest, "-m", "slow", *tests], 570, {"OMP_NUM_THREADS": "2"}),
        "sanitizer": ([*python, "bench.sanitizer"], 570, {}),
        "promises": (promises, 330, {}),
        "ceilings": (calibrated, 90, {}),
        "operators": ([*python, "bench.operators", *on, "--dtype", dtypes, *beside], 400, {}),
        "step": (step, 300, {}),
        "tune": (tune, 540, {}),
    }
    for name, operators in ON_DEVICE.items():
        # -vv undoes -q: where a kernel hangs, the end of the log names its test and says where that stands.
        command = [
            *pytest,
            "-vv",
            "-o",
            "faulthandler_timeout=100",
            "-m",
            "not slow",
            "tests/gpu",
            "-k",
            chosen(operators),
        ]
        commands[name] = (command, 400, {"OMP_NUM_THREADS": "2"})
    found = []
    for name in (name for name in ORDER if name in wanted):
        command, limit, environment = commands[name]
        out = folder / (f"{name}.xml" if name in ("tests", "slow", *ON_DEVICE) else f"{name}.json")
        into = f"--junitxml={out}" if out.suffix == ".xml" else f"--out={out}"
        found.append(Part(name, [*command, into], limit, out, environment))
    return found


def chosen(operators: tuple[str, ...]) -> str:
    """For pytest's -k, which looks for parts of names: the tests of these operators and of no other."""
    others = [name for names in ON_DEVICE.values() for name in names if name not in operators]
    longer = [name for name in others if any(operator in name for operator in operators)]
    return f"({' or '.join(operators)})" + "".join(f" and not {name}" for name in longer)


def _has(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def _architecture() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}" + ("a" if major == 9 else "")


def run(part: Part, limit: float) -> dict[str, Any]:
    """Runs one part; its status, seconds, what it left, and on failure the end of what it printed."""
    out = record.ROOT / part.out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    log, began = out.with_suffix(".log"), time.perf_counter()
    environment = {**os.environ, **part.environment, "PYTHONUNBUFFERED": "1"}
    options = {"stderr": subprocess.STDOUT, "cwd": record.ROOT, "env": environment, "start_new_session": True}
    with log.open("w") as output:
        process = subprocess.Popen(part.command, stdout=output, **options)
        try:
            status, reason = _verdict(process.wait(timeout=limit))
        except BaseException as error:  # a time limit, or somebody stops us: the children have to go in either case
            _stop(process)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            status, reason = "failed", f"stopped at its limit of {limit:.0f} s"
    entry: dict[str, Any] = {"status": status, "seconds": round(time.perf_counter() - began, 1), **record.sources()}
    entry |= {"command": [word.replace(sys.executable, "python") for word in part.command]}
    try:
        found = outcomes(out) if out.suffix == ".xml" else json.loads(out.read_text())
    except (OSError, ValueError) as error:
        found = None
        if status == "passed":
            status, reason = "failed", f"it left no result: {error}"
    if isinstance(found, dict) and found.get("status") == "skipped":
        status, reason = "skipped", found["reason"]
    entry |= {"status": status, "result": found} | ({"reason": reason} if reason else {})
    if status == "failed":
        entry["tail"] = log.read_text(errors="replace").replace(f"{record.ROOT}/", "").splitlines()[-30:]
    return entry


def _verdict(returncode: int) -> tuple[str, str]:
    if returncode == 0:
        return "passed", ""
    if returncode < 0:
        return "failed", f"killed by {signal.Signals(-returncode).name}"
    return "failed", f"exit status {returncode}"


def _stop(process: subprocess.Popen) -> None:
    """Ends the process and its children; an interrupt first, on which pytest still writes what it found."""
    for what, patience in ((signal.SIGINT, 15), (signal.SIGKILL, 15)):
        try:
            os.killpg(process.pid, what)
            process.wait(timeout=patience)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            process.wait()
            return


def main(arguments: list[str] | None = None) -> int:
    """Runs the parts, merges each into the results file; 1 where one failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--parts", default=",".join(ORDER), help="comma-separated; bench: promises,ceilings,operators,step"
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a dry run without a GPU")
    parser.add_argument("--small", action="store_true", help="sizes of a few numbers: a dry run of the whole path")
    parser.add_argument("--limit", type=float, help="seconds for all parts together; each has its own limit, too")
    parser.add_argument("--tests", nargs="*", default=[], help="what to give to pytest (default: all tests)")
    parser.add_argument("--out", type=Path, help="results file (default: bench/results/<date>-<gpu>.json)")
    parser.add_argument("--combine", nargs=2, type=Path, metavar=("A", "B"), help="put two results files into --out")
    args = parser.parse_args(arguments)
    if args.combine:
        record.combine(*args.combine, args.out or args.combine[0])
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print(f"gpu-check: torch {torch.__version__} sees no GPU here (a dry run: --device cpu --small)")
        return 2
    machine = calibrate.machine() | {"device": args.device}
    default = record.name_for(machine, datetime.date.today())
    path = args.out or (record.RESULTS if args.device == "cuda" else Path("bench/out")) / default
    folder = Path("bench/out") / ("gpu-check-small" if args.small else "gpu-check")
    missing = [name for name in _OPTIONAL if not _has(name)]
    if missing:
        print(f"gpu-check: going without {', '.join(missing)}: fewer tests, in one process, or plainer tables")
    began, failed = time.perf_counter(), []
    for part in parts(args.parts.split(","), args.device, args.small, folder, args.tests):
        left = part.limit if args.limit is None else min(part.limit, args.limit - (time.perf_counter() - began))
        print(f"gpu-check: {part.name} ...", flush=True)
        if left < _LEAST:
            entry: dict[str, Any] = {"status": "failed", "reason": "not begun: no time was left", **record.sources()}
        else:
            entry = run(part, left)
        record.merge(path, calibrate.machine() | {"device": args.device}, {part.name: entry})
        failed += [part.name] if entry["status"] == "failed" else []
        print(*entry.get("tail", []), sep="\n")
        print(f"gpu-check: {part.name} {entry['status']} {entry.get('seconds', 0):.0f} s {entry.get('reason', '')}")
    print(f"gpu-check: {path}" + (f"; FAILED: {', '.join(failed)}" if failed else "; all parts passed"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
