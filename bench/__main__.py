"""python -m bench NAME ...: the same as python -m bench.NAME ..., and without a name, what there is."""

import importlib.util
import pkgutil
import runpy
import sys

import bench


def main() -> int:
    """Runs the module of that name; 2 where there is none."""
    if len(sys.argv) > 1 and importlib.util.find_spec(f"bench.{sys.argv[1]}") is not None:
        name = sys.argv.pop(1)
        runpy.run_module(f"bench.{name}", run_name="__main__", alter_sys=True)
        return 0
    print("python -m bench NAME, one of:", ", ".join(sorted(m.name for m in pkgutil.iter_modules(bench.__path__))))
    return 2


if __name__ == "__main__":
    sys.exit(main())
