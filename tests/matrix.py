"""python -m tests.matrix: the operator library, built once, under every Python and torch that it is for.

Each Python found here, with each torch asked for, gets an environment of its own, under a path with spaces: torch from
pip and nothing else (no numpy, no compiler on PATH), the package as it lies here, read-only. `python -m mtlkernels` has
to load the library, find every operator right and write nothing into the installation. And the sources have to compile
with the headers of every torch. The exit status is 1 where one does not. Gigabytes are fetched for every torch, and
deleted afterwards.
"""

import argparse
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TORCHES = ("2.11.0", "2.12.0", "2.13.0")
BARE = """
import sys
try:
    import numpy
except ImportError:
    sys.exit("no numpy")
"""


class Cell(NamedTuple):
    """What came of one Python with one torch."""

    python: str
    torch: str
    problem: str  # "" where all is right
    said: str
    seconds: float


def interpreters(wanted: list[str]) -> dict[str, Path]:
    """Of every version that is here its interpreter: this one, one of pyenv's, or one on PATH."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = {}
    for version in wanted:
        places = [Path(sys.executable)] if version == "{}.{}".format(*sys.version_info) else []
        places += sorted(pyenv.glob(f"{version}.*/bin/python"))
        places += [Path(p) for p in [shutil.which(f"python{version}")] if p]
        if places:
            found[version] = places[0]
    return found


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and time: what a write would change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.stat()
        found[str(path.relative_to(folder))] = status.st_size, status.st_mtime_ns
    return found


def install(target: Path) -> Path:
    """The package with its library, and no right to write there."""
    package = target / "mtlkernels"
    shutil.copytree(ROOT / "mtlkernels", package, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*package.rglob("*"), package]:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    return package


def remove(folder: Path) -> None:
    """Read-only folders too."""
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(path.stat().st_mode | stat.S_IWUSR)
    shutil.rmtree(folder)


def self_test(python: Path, package: Path, place: Path) -> tuple[str, str]:
    """What is wrong with the installation, or nothing; and what the self-test printed."""
    nothing, home = place / "no programs", place / "no home"
    nothing.mkdir(exist_ok=True)
    home.mkdir(exist_ok=True)
    # Where one may write everywhere (root), Python's own caches would change the installation too.
    env = {"PATH": str(nothing), "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    env |= {"PYTHONPATH": str(package.parent), "PYTHONWARNINGS": "error::RuntimeWarning"}
    before = contents(package)
    done = subprocess.run([python, "-m", "mtlkernels"], cwd=home, env=env, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)  # fmt: skip
    said = done.stdout
    if done.returncode:
        return f"exit status {done.returncode}", said
    if not re.search(r"^loaded +True$", said, re.M):
        return "the library is not loaded", said
    if contents(package) != before:
        return "it wrote into the installation", said
    return "", said


def compiled(environment: Path, place: Path) -> tuple[str, str]:
    """What is wrong with the CPU library where this environment's torch gives the headers; and what was printed."""
    tree = place / "sources"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "build", "lib", "_build_info*", "__pycache__"))
    headers = next(environment.glob("lib/python*/site-packages"))
    env = os.environ | {"PYTHONPATH": str(headers), "MTLKERNELS_CUDA": "0"}
    done = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree, env=env,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    return "the sources do not compile" if done.returncode else "", done.stdout


def attempt(version: str, python: Path, torch: str, place: Path, cache: Path, build: bool) -> Cell:
    """Makes the environment, tries it, where asked to compiles with its torch, and deletes it."""
    began, folder = time.perf_counter(), place / f"Python {version} with torch {torch}"
    inside = folder / "environment" / "bin" / "python"
    pip = [inside, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--cache-dir", cache]
    problem = said = ""
    try:
        for command in ([python, "-m", "venv", folder / "environment"], [*pip, f"torch=={torch}"]):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode:
                return Cell(version, torch, "cannot be installed", done.stdout, time.perf_counter() - began)
        bare = subprocess.run([inside, "-c", BARE], stderr=subprocess.PIPE, text=True)
        problem, said = self_test(inside, install(folder / "read only"), folder)
        if not problem and "no numpy" not in bare.stderr:
            said += "\n(numpy came with torch)"
        if build and not problem:
            problem, printed = compiled(folder / "environment", folder)
            said += printed + "\n(the sources compile)"
    finally:
        if folder.exists():
            remove(folder)
    return Cell(version, torch, problem, said, time.perf_counter() - began)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__.splitlines()[0])
    parser.add_argument("--python", nargs="+", default=PYTHONS, help="versions (default: those that are here)")
    parser.add_argument("--torch", nargs="+", default=TORCHES)
    parser.add_argument("--place", help="where the environments go (default: the folder of temporary files)")
    args = parser.parse_args()
    pythons, cells = interpreters(args.python), []
    for version in args.python:
        if version not in pythons:
            print(f"Python {version}: not on this machine")
    with tempfile.TemporaryDirectory(prefix="install matrix ", dir=args.place) as place:
        for torch in args.torch:
            for i, (version, python) in enumerate(pythons.items()):
                cell = attempt(version, python, torch, Path(place), Path(place, "cache"), build=not i)
                cells.append(cell)
                marks = (" right, ", "numpy came", "the sources compile")
                tail = [line for line in cell.said.splitlines() if any(mark in line for mark in marks)]
                what = cell.problem or f"ok: {', '.join(tail)}"
                print(f"Python {version}, torch {torch:<8} {what} ({cell.seconds:.0f} s in all)", flush=True)
    wrong = [cell for cell in cells if cell.problem]
    for cell in wrong:
        print(f"\nPython {cell.python}, torch {cell.torch}: {cell.problem}\n{cell.said[-3000:]}")
    print(f"\n{len(cells) - len(wrong)} of {len(cells)} installations work")
    return bool(wrong) or not cells


if __name__ == "__main__":
    sys.exit(main())
