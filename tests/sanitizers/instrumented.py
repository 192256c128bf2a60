"""The project's sources copied aside and compiled with a sanitizer, and Python started there with its runtime."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("csrc", "mtlkernels", "python_models", "bench", "tests", "setup.py", "pyproject.toml", "README.md", "LICENSE")
# -O1 comes after setup.py's own -O3 and takes its place: this is for looking, and compiles in half the time.
ADDRESS = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")
THREAD = ("-O1", "-g1", "-fsanitize=thread")
RUNTIMES = {ADDRESS: ("libasan.so", "libubsan.so"), THREAD: ("libtsan.so",)}


def tree(flags: tuple[str, ...], change: tuple[str, str, str] | None = None) -> Path:
    """A copy of the project whose library is compiled with `flags`; made once for each content of the sources.

    change: (file, text that occurs once in it, what to put there), for a fault that has to be noticed.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or sys.platform != "linux":
        pytest.skip("no g++ on Linux")
    if not all(Path(_runtime(name)).is_absolute() for name in RUNTIMES.get(flags, ())):
        pytest.skip("this compiler has no sanitizer runtimes")
    sources = {p: p.read_bytes() for p in sorted((ROOT / "csrc").rglob("*")) if p.is_file()}
    key = hashlib.sha256(repr((sources, flags, change, torch.__version__)).encode()).hexdigest()[:20]
    folder = Path(tempfile.gettempdir()) / f"mtlkernels-sanitizers-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    place = folder / key
    if not (place / "built").exists():
        shutil.rmtree(place, ignore_errors=True)
        for name in COPIED:
            _copy(ROOT / name, place / name)
        if change is not None:
            file, old, new = change
            text = (place / file).read_text()
            assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in {file}"
            (place / file).write_text(text.replace(old, new))
        wrapper = place / "cxx"
        wrapper.write_text(f'#!/bin/sh\nexec "{compiler}" "$@" {" ".join(flags)}\n')
        wrapper.chmod(0o755)
        environment = {**os.environ, "CXX": str(wrapper), "MTLKERNELS_CUDA": "0"}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (place / "built").touch()
    for name in ("tests", "mtlkernels"):  # Python as it is now, beside the library that the sources make
        shutil.copytree(ROOT / name, place / name, dirs_exist_ok=True, ignore=_IGNORED)
    return place


_IGNORED = shutil.ignore_patterns("__pycache__", "*.so", "lib")


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=_IGNORED)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def _runtime(name: str) -> str:
    """The path of a runtime library, or its bare name where the compiler does not have it."""
    compiler = os.environ.get("CXX", "g++")
    return subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()


def run(place: Path, flags: tuple[str, ...], *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """``python -m tests.sanitizers.exercise <arguments>`` in the copy, under the runtime of `flags`."""
    suppressed = place / "tests" / "sanitizers" / "suppressed.txt"
    found = {
        **os.environ,
        "LD_PRELOAD": ":".join(_runtime(name) for name in RUNTIMES[flags]),
        "PYTHONPATH": str(place),
        "OMP_NUM_THREADS": "1",
        # What Python and torch never free is not ours to look for.
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": f"exitcode=66:suppressions={suppressed}",
        **environment,
    }
    # ThreadSanitizer cannot place its shadow memory where addresses are drawn at random.
    fixed = ["setarch", "-R"] if flags == THREAD and shutil.which("setarch") else []
    command = [*fixed, sys.executable, "-W", "ignore", "-m", "tests.sanitizers.exercise", *arguments]
    return subprocess.run(command, cwd=place, env=found, capture_output=True, text=True, timeout=900)
