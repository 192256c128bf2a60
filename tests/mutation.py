"""python -m tests.mutation [--sample 40] [--seed 1] [--only ops|csrc] [--out FILE]: how many planted faults show.

A mutant is one place of mtlkernels/ops or csrc/cpu changed: a comparison, an operator, a constant, min for max. Each is
tried in a copy of the project: by random calls, by the tests of the operator where those see nothing, then by the tests
that go over all operators, and in C++ at last by the random calls of tests/sanitizers, under AddressSanitizer. Places
that only tune are left out by name, for they change no result: thread counts, prefetching, how many rows and columns a
piece of work has, the estimate of its cost, the size of scratch memory.
"""

import argparse
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rich.progress import Progress

from tests.sanitizers.instrumented import ADDRESS, run

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("csrc", "mtlkernels", "python_models", "bench", "tests", "setup.py", "pyproject.toml", "README.md", "LICENSE")
# Of each file, the operators that random calls are made of, and the tests that come after them.
PYTHON = {
    "expert_linear.py": ("expert_linear", "test_expert_linear.py"),
    "mix.py": ("mix", "test_mix.py test_routes.py"),
    "routes.py": ("mix", "test_routes.py"),
    "expert_mix.py": ("expert_mix", "test_expert_mix.py test_expert_mix_system.py"),
    "snr_linear.py": ("snr_linear", "test_snr_linear.py test_snr_linear_op.py"),
    "star_linear.py": ("star_linear", "test_star_linear.py test_star_linear_autograd.py"),
    "partitioned_norm.py": ("partitioned_norm", "test_partitioned_norm.py test_partitioned_norm_torch.py"),
    "hard_concrete.py": ("hard_concrete hard_concrete_l0", "test_hard_concrete.py"),
    "esmm_loss.py": ("esmm_loss", "test_esmm_loss.py test_losses.py"),
    "masked_bce.py": ("masked_bce", "test_masked_bce.py test_losses.py"),
    "_targets.py": ("masked_bce esmm_loss", "test_masked_bce.py test_esmm_loss.py test_losses.py"),
    "_arguments.py": ("expert_linear", "test_expert_linear.py test_expert_mix.py test_calls.py"),
}
NATIVE = {
    "expert_linear.cpp": PYTHON["expert_linear.py"],
    "expert_linear_few.cpp": PYTHON["expert_linear.py"],
    "expert_linear_backward.cpp": PYTHON["expert_linear.py"],
    "mix.cpp": PYTHON["mix.py"],
    "expert_mix.cpp": PYTHON["expert_mix.py"],
    "expert_mix_call.cpp": PYTHON["expert_mix.py"],
    "expert_mix_backward.cpp": PYTHON["expert_mix.py"],
    "snr_linear.cpp": PYTHON["snr_linear.py"],
    "star_linear.cpp": PYTHON["star_linear.py"],
    "domains.cpp": PYTHON["star_linear.py"],
    "partitioned_norm.cpp": PYTHON["partitioned_norm.py"],
    "hard_concrete.cpp": PYTHON["hard_concrete.py"],
    "esmm_loss.cpp": PYTHON["esmm_loss.py"],
    "masked_bce.cpp": PYTHON["masked_bce.py"],
}
SWAPS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "+": "-", "-": "+", "*": "+", "and": "or"}
SWAPS |= {
    "or": "and",
    "&&": "||",
    "||": "&&",
    "not in": "in",
    "is": "is not",
    "True": "False",
    "False": "True",
    "0": "1",
}
SWAPS |= {"true": "false", "false": "true", "1": "2", "2": "3", "std::min": "std::max", "std::max": "std::min"}
# The tests that go over all operators.
SHARED = ("partial_gradients", "sizes", "calls", "compile", "autograd", "bad_input", "bad_rest", "mix_numerics")
SHARED += ("star_linear_numerics",)
# How work is cut, spread and fetched: another number there is as right.
TUNING = re.compile(
    r"constexpr|ahead|Ahead|stream|kStream|threads|\bwork\b|work\(|run_tasks|lane|kLane|kDomainCost|splits|slices|block_rows|"
    r"kColumns|kRows|kNumbers|kTasks|kSum|kPart|kSet|kPhase|kBlock|kEnough|kFew|grain|round_up|reserve|is_compiling|"
    r"goes_straight|explain|scratch|\bbytes\(|(fit|block|most|target|space) = std::(max|clamp)"
)


class Mutant(NamedTuple):
    """A file, the line and column of a change, and what stands there instead."""

    file: str
    line: int
    column: int
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column} {self.old} -> {self.new}"

    def apply(self, text: str) -> str:
        lines = text.splitlines(keepends=True)
        line = lines[self.line - 1]
        assert line[self.column : self.column + len(self.old)] == self.old
        lines[self.line - 1] = line[: self.column] + self.new + line[self.column + len(self.old) :]
        return "".join(lines)


def of_python(path: Path) -> Iterator[Mutant]:
    """The mutants of a Python file: not of its types, its strings and its tables of schemas."""
    file, text = str(path.relative_to(ROOT)), path.read_text()
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        line, column = token.start
        code = lines[line - 1] if line <= len(lines) else ""
        if token.string not in SWAPS or TUNING.search(code) or token.type == tokenize.STRING:
            continue
        if re.match(r"\s*(def |class |import |from |@|\"|[a-z_]+: )", code) or "->" in code or "**" in code:
            continue
        if token.string in "*" or (token.string == "-" and code[column + 1 : column + 2].isdigit()):
            continue  # keyword-only markers and unpacking; negative indices
        yield Mutant(file, line, column, token.string, SWAPS[token.string])


_CPP = re.compile(
    r"(?<= )(<=|>=|==|!=|&&|\|\||[<>+*-])(?= )|\bstd::(?:min|max)\b|\b(?:true|false)\b|(?<![\w.])[012](?![\w.])"
)


def of_cpp(path: Path) -> Iterator[Mutant]:
    """The mutants of a C++ file: not of comments, directives, checks of dtypes and what only tunes."""
    file = str(path.relative_to(ROOT))
    for number, line in enumerate(path.read_text().splitlines(), 1):
        code = line.split("//")[0]
        if re.match(r"\s*(#|template|using|m\.impl)", code) or TUNING.search(code) or '"' in code:
            continue
        for found in _CPP.finditer(code):
            if found.group() in SWAPS:
                yield Mutant(file, number, found.start(), found.group(), SWAPS[found.group()])


def copied(place: Path, flags: tuple[str, ...] = ("-O1",)) -> None:
    """The project in `place`, its library compiled there, in a third of the time that optimising takes."""
    place.mkdir(exist_ok=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "lib")
    for name in COPIED:
        source = ROOT / name
        shutil.copytree(source, place / name, ignore=ignored) if source.is_dir() else shutil.copy2(source, place / name)
    wrapper = place / "cxx"
    wrapper.write_text(f'#!/bin/sh\nexec "{shutil.which(os.environ.get("CXX", "g++"))}" "$@" {" ".join(flags)}\n')
    wrapper.chmod(0o755)
    assert build(place), "the project does not compile"


def build(place: Path) -> bool:
    environment = {**os.environ, "CXX": str(place / "cxx"), "MTLKERNELS_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return not subprocess.run(command, cwd=place, env=environment, capture_output=True).returncode


def killed(place: Path, operators: str, tests: str) -> str:
    """What noticed: "random calls", "tests", or "" where nothing did."""
    environment = {**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    calls = "import sys\nfrom tests.mutation import try_calls\ntry_calls(sys.argv[1].split())"
    for what, command in {
        "random calls": ["-c", calls, operators],
        "tests": ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow",
                  *(f"tests/ops/{name}" for name in tests.split())],
        "shared tests": ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow",
                         *(f"tests/ops/test_{name}.py" for name in SHARED)],
    }.items():  # fmt: skip
        try:
            done = subprocess.run([sys.executable, "-W", "ignore", *command], cwd=place, env=environment,
                                  capture_output=True, timeout=900)  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"{what} (no end)"
        if done.returncode:
            return what
    return ""


def read_or_written_outside(place: Path, mutant: Mutant) -> bool:
    """Whether AddressSanitizer sees something at random calls, in a copy of its own that is made for the first one."""
    if not place.exists():
        copied(place, ADDRESS)
    path = place / mutant.file
    text = path.read_text()
    path.write_text(mutant.apply(text))
    try:
        return build(place) and run(place, ADDRESS, "native", "60", "1").returncode != 0
    except subprocess.TimeoutExpired:
        return True
    finally:
        path.write_text(text)


def try_calls(operators: list[str]) -> None:
    """A hundred random calls of each operator, a fifth of them spoilt; an exception where one goes wrong."""
    from hypothesis import HealthCheck, Phase, given, settings

    from tests.fuzz.agreement import check
    from tests.fuzz.calls import call_of

    for op in operators:

        @settings(max_examples=100, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(call_of(op))
        def every(call: dict) -> None:
            check(call, ("native",))

        every()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.split(": ")[1].split(".")[0])
    parser.add_argument("--sample", type=int, default=40, help="mutants of each of the two (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=("ops", "csrc"))
    parser.add_argument("--out", type=Path, default=Path("bench/out/mutation.json"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rng, chosen = random.Random(args.seed), []
    for part, folder, files, of in (("ops", "mtlkernels/ops", PYTHON, of_python), ("csrc", "csrc/cpu", NATIVE, of_cpp)):
        every = [m for name in files for m in of(ROOT / folder / name)]
        print(f"{part}: {len(every)} mutants, {min(args.sample, len(every))} of them tried")
        if args.only in (None, part):
            chosen += [(part, files[Path(m.file).name], m) for m in rng.sample(every, min(args.sample, len(every)))]
    results = []
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        place = Path(folder, "plain")
        copied(place)
        for part, (operators, tests), mutant in progress.track(chosen, description="mutants"):
            path = place / mutant.file
            text = path.read_text()
            path.write_text(mutant.apply(text))
            by = killed(place, operators, tests) if part == "ops" or build(place) else "the compiler"
            path.write_text(text)
            if not by and part == "csrc" and read_or_written_outside(Path(folder, "sanitized"), mutant):
                by = "AddressSanitizer"
            results.append({"part": part, "mutant": str(mutant), "by": by})
            args.out.write_text(json.dumps({"seed": args.seed, "results": results}, indent=1) + "\n")
            progress.console.print(f"{mutant}: {by or 'SURVIVED'}", soft_wrap=True, markup=False, emoji=False)
        for part in ("ops", "csrc"):
            mine = [r for r in results if r["part"] == part and r["by"] != "the compiler"]
            if mine:
                score = sum(bool(r["by"]) for r in mine) / len(mine)
                progress.console.print(f"{part}: {score:.0%} of {len(mine)} killed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
