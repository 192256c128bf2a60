"""python -m bench NAME ...: the same as python -m bench.NAME ..., and without a name, what there is."""

import ast
import importlib.util
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


def main() -> int:
    """Runs the module of that name; 2 where there is none."""
    if len(sys.argv) > 1 and importlib.util.find_spec(f"bench.{sys.argv[1]}") is not None:
        name = sys.argv.pop(1)
        runpy.run_module(f"bench.{name}", run_name="__main__", alter_sys=True)
        return 0
    print("python -m bench NAME ..., one of")
    for name, what in programs().items():
        print(f"  {name:<14} {what}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
