"""python -m tests.coverage [--only python cpp cuda] [--workers 2] [-- PYTEST...]: lines and branches the tests reach.

Three counts, each of tests that are not slow:

* ``python``: mtlkernels, python_models and bench, by coverage.py, in every process that the tests start.
* ``cpp``: csrc and csrc/cpu, by gcov, compiled without optimising in a copy of the project. A line that is compiled for
  several instruction sets or types is reached where one of them reaches it.
* ``cuda``: csrc/cuda, by gcov, as the emulated device runs it: kernels, launches and torch's side of them, without what
  only a GPU has (launch.h, primitives.cuh), which the emulation replaces.

In C++ the branches that only an exception takes are left out. What no test reached is listed in build/coverage, as
python.txt, cpp.txt and cuda.txt. The exit status is that of the tests.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.sanitizers.instrumented import ROOT, tree

OUT = ROOT / "build" / "coverage"
GCOV = ("-O0", "--coverage", "-fprofile-update=atomic")
# Of the C++ library, the tests that call it. Those of the Python sources: all, but those that only run copies of them.
TESTS = {
    "python": ("tests", "--ignore=tests/sanitizers"),
    "cpp": ("tests/ops", "tests/fuzz", "tests/test_backend.py", "tests/test_nn.py", "tests/test_pool.py"),
    "cuda": ("tests/cuda",),
}


def pytest(words: list[str], cwd: Path, before: tuple[str, ...] = (), **environment: str) -> int:
    """Runs the tests that are not slow; `before` are the words between python and -m pytest."""
    command = [sys.executable, *before, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *words]
    return subprocess.run(command, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}).returncode


def python(words: list[str]) -> int:
    def coverage(verb: str, *more: object, to: int | None = None) -> None:
        subprocess.run([sys.executable, "-m", "coverage", verb, data, *more], cwd=ROOT, stdout=to, check=True)

    data = f"--data-file={OUT / 'measured'}"
    coverage("erase")
    status = pytest(words, ROOT, before=("-m", "coverage", "run", data))
    coverage("combine", "-q")
    coverage("json", "-q", "-o", OUT / "python.json")
    with open(OUT / "python.txt", "w") as listed:
        coverage("report", "-m", "--skip-covered", to=listed.fileno())
    return status


def cpp(words: list[str]) -> int:
    place = tree(GCOV)
    for old in place.rglob("*.gcda"):
        old.unlink()
    status = pytest(words, place, PYTHONPATH=str(place))
    gcovr("cpp", place / "build", root=place, only=r"csrc/(cpu/.*|library\.cpp)")
    return status


def cuda(words: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        flags = {"TMPDIR": folder, "MTLKERNELS_EMULATION_FLAGS": " ".join(GCOV)}
        status = pytest(words, ROOT, **flags)
        sources = Path(folder, "csrc")  # where gcov looks for them: as tests/cuda/emulated.py lays them out
        shutil.copytree(ROOT / "csrc", sources)
        shutil.copytree(ROOT / "tests" / "emulation", sources / "cuda", dirs_exist_ok=True)
        for counters in Path(folder).rglob("*.gcda"):
            if not counters.with_suffix(".gcno").exists():
                counters.unlink()  # of kernels wrong on purpose, whose sources and notes went with the compiling
        emulation = "|".join(path.name.replace(".", r"\.") for path in (ROOT / "tests" / "emulation").iterdir())
        gcovr("cuda", Path(folder), root=Path(folder), only=rf"csrc/cuda/(?!({emulation})$).*",
              ran_in=sources / "cuda")  # fmt: skip
    return status


def gcovr(name: str, objects: Path, root: Path, only: str, ran_in: Path | None = None) -> None:
    """Writes <name>.json and <name>.txt of what the counters under `objects` say of the sources `only` matches.

    ran_in: where the compiler would find the sources by the names it was given, if that is not above the counters.
    """
    command = [sys.executable, "-m", "gcovr", "--root", root, "--filter", rf"{root.resolve()}/{only}", "--merge-lines"]
    command += ["--exclude-throw-branches", "--exclude-unreachable-branches", "--json-summary", OUT / f"{name}.json"]
    command += ["--gcov-object-directory", ran_in] if ran_in else []
    subprocess.run([*command, "--txt", OUT / f"{name}.txt", objects], cwd=root, check=True)


def counted(name: str) -> dict[str, list[int]]:
    """Of every part: lines, those of them reached, branches, those of them reached."""
    report, found = json.loads((OUT / f"{name}.json").read_text()), {}
    if name != "python":
        numbers = (report[f"{what}_{which}"] for what in ("line", "branch") for which in ("total", "covered"))
        return {"csrc/" + {"cpp": "cpu"}.get(name, name): list(numbers)}
    for file, entry in report["files"].items():
        part, of = Path(file).parts[0], entry["summary"]
        numbers = (of[key] for key in ("num_statements", "covered_lines", "num_branches", "covered_branches"))
        found[part] = [a + b for a, b in zip(found.get(part, (0, 0, 0, 0)), numbers, strict=True)]
    return found


def row(part: str, of: list[int]) -> str:
    shares = (f"{reached / max(every, 1):.1%} of {every:,}" for every, reached in (of[:2], of[2:]))
    return f"| `{part}` | {' | '.join(shares)} |"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.coverage", description=__doc__.split(": ")[1].split(".")[0])
    parser.add_argument("--only", nargs="+", choices=TESTS, default=list(TESTS), metavar="WHAT", help=", ".join(TESTS))
    parser.add_argument("--workers", type=int, default=1, help="processes that the tests are spread over")
    parser.add_argument("words", nargs="*", metavar="PYTEST", help="for pytest, in place of the tests that are run")
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    spread = ["-n", str(args.workers)] if args.workers > 1 else []
    failed = [name for name in args.only if globals()[name]([*spread, *(args.words or TESTS[name])])]
    print("| part | lines | branches |", "|---|---|---|", sep="\n")
    for name in args.only:
        print(*(row(part, numbers) for part, numbers in counted(name).items()), sep="\n")
    if failed:
        print("tests failed:", *failed)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
