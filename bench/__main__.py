"""python -m bench NAME ...: what there is to measure with, under one name.

`run` and `sweep` are in `bench.cli`; every other module with a main() is a command too, and takes its own words. Where
typer is not installed, as on a bare machine with a GPU, these others still are.
"""

import ast
import runpy
import sys
from pathlib import Path


def programs() -> dict[str, str]:
    """The modules that can be run, each with the first line of what it says of itself."""
    found = {}
    here = Path(__file__).parent
    for path in sorted((*here.glob("[!_]*.py"), *here.glob("*/__main__.py"))):
        text = path.read_text()
        if "\ndef main(" in text:
            found[path.parent.name if path.stem == "__main__" else path.stem] = (
                ast.get_docstring(ast.parse(text)) or ""
            ).split("\n")[0]
    return found


def pass_on(name: str, words: list[str]) -> None:
    """Runs the module bench.<name> with these words, as python -m would."""
    sys.argv[1:] = words
    runpy.run_module(f"bench.{name}", run_name="__main__", alter_sys=True)


def main() -> int:
    """Runs what is named; 2 where there is none."""
    if len(sys.argv) > 1 and sys.argv[1] in programs():
        pass_on(sys.argv[1], sys.argv[2:])
        return 0
    try:
        from bench.cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(f"run and sweep need {error.name}. python -m bench NAME ..., one of")
        for name, what in programs().items():
            print(f"  {name:<14} {what}")
        return 2
    app(prog_name="python -m bench")
    return 0


if __name__ == "__main__":
    sys.exit(main())
