"""What the compiler made of the kernels, kept as a table: registers, shared memory, spills and matrix instructions.

    python tests/triton/compile_table.py        writes compiled.json anew, after a change that was meant

A row that moves without anybody having meant it is the compiler, or a change with a price: half the occupancy, a tile
that fell off the tensor cores. Small changes of registers and shared memory pass.
"""

import json
import os
import subprocess
import sys
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
TABLE = HERE / "compiled.json"
TARGETS = (80, 90, 100)
COMMAND = "python tests/triton/compile_table.py"
_FACTS = (
    "kernel",
    "registers",
    "stack",
    "local",
    "shared",
    "wgmma",
    "tcgen05",
    "mma",
    "tile",
    "warps",
    "module",
    "target",
)
_LEAST, _SHARE = {"registers": 16, "shared": 4096}, 0.15  # changes below either are small


@lru_cache
def compile_for(target: int, *extra: str) -> list[dict]:
    """What compile_ahead.py reports; in a process where the interpreter is off."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(HERE.parents[1]), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    command = [sys.executable, str(HERE / "compile_ahead.py"), str(target), *extra]
    done = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def spills(one: dict) -> bool:
    """A frame of 8 bytes is none of spills: for those kernels ptxas -v reports 0 bytes spilled."""
    return one["stack"] > 8 or one["local"] > 0


def instructions(one: dict) -> str:
    """The best class of matrix instructions that the kernel has, or "none"."""
    return next((name for name in ("tcgen05", "wgmma", "mma") if one[name]), "none")


def rows(found: list[dict]) -> dict[str, dict]:
    """The table's rows: what identifies a kernel, and the facts about it."""
    table = {}
    for one in found:
        labels = {name: value for name, value in one.items() if name not in _FACTS and value not in (None, [], {})}
        flags = labels.pop("flags", {})
        words = [f"sm_{one['target']}", f"{one['module']}.{one['kernel']}"]
        words += [f"{name}={value}" for name, value in sorted({**flags, **labels}.items())]
        key = " ".join(words)
        facts = {"instructions": instructions(one), "spills": spills(one), "warps": one["warps"], "tile": one["tile"]}
        facts |= {name: one[name] for name in _LEAST}
        assert table.setdefault(key, facts) == facts, f"two kernels that differ are called {key}"
    return table


def differences(expected: dict[str, dict], found: dict[str, dict], *, everything: bool = True) -> list[str]:
    """A line for each row that is not as the table says; everything: `found` ought to have no other rows than that."""
    lines = [f"no longer compiled: {key}" for key in expected if key not in found]
    lines += [f"not in the table: {key}" for key in found if everything and key not in expected]
    for key in (key for key in expected if key in found):
        for name, before in expected[key].items():
            now = found[key][name]
            small = name in _LEAST and abs(now - before) <= max(_LEAST[name], _SHARE * before)
            if now != before and not small:
                lines.append(f"{name} {before} -> {now}: {key}")
    return lines


def stored(target: int) -> dict[str, dict]:
    """The table's rows for one GPU architecture."""
    table = json.loads(TABLE.read_text())["rows"]
    return {key: facts for key, facts in table.items() if key.startswith(f"sm_{target} ")}


def same_compiler() -> bool:
    """Whether the table was made with the Triton that is installed: each version lays kernels out differently."""
    return json.loads(TABLE.read_text())["triton"] == version("triton")


def main() -> None:
    """Writes the table anew and prints what changed."""
    table = {key: facts for target in TARGETS for key, facts in rows(compile_for(target)).items()}
    if TABLE.exists():
        before = json.loads(TABLE.read_text())["rows"]
        print(*differences(before, table), sep="\n")
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(facts)}" for key, facts in sorted(table.items()))
    TABLE.write_text(f'{{"triton": {json.dumps(version("triton"))}, "rows": {{\n{lines}\n}}}}\n')
    print(f"{TABLE}: {len(table)} rows")


if __name__ == "__main__":
    main()
