"""Compiles the kernels in place, for gpu-check, and says what came out.

python -m bench.build --out FILE
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from bench.record import ROOT


def main() -> int:
    """Builds; writes what build_info() then says; the builder's exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.build", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    done = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT)
    if done.returncode:
        return done.returncode
    import mtlkernels

    found = {key: value for key, value in mtlkernels.build_info().items() if key != "library"}
    args.out.write_text(json.dumps({"build_info": found}, default=str) + "\n")
    print(found)
    return 0 if found["loaded"] else 1


if __name__ == "__main__":
    sys.exit(main())
