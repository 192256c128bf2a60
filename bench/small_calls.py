"""Every operator once, forward and backward, at a size that a memory checker can stand, on every backend that can.

    python -m bench.small_calls [--device cuda] [--backends native,triton] [--dtype float32,bfloat16]

What compute-sanitizer runs; the results are compared with float64, so that the calls are real ones.
"""

import argparse
import sys

import torch

from bench.contest import OURS
from bench.operators import check, prepare, truth, variants
from bench.shapes import SHAPES, tiny
from bench.subjects import available


def main() -> int:
    """Prints a line a call; 1 where one failed or was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.small_calls", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backends", default="native,triton")
    parser.add_argument("--dtype", default="float32,bfloat16")
    args = parser.parse_args()
    bad = 0
    for dtype in (getattr(torch, name) for name in args.dtype.split(",")):
        for subject in available():
            shape = tiny(next(iter(SHAPES[subject.name].values())))
            operands, grad = prepare(subject, shape, dtype, args.device)
            expected = truth(subject, operands, grad)
            for backend in args.backends.split(","):
                what = f"{subject.name} {backend} {dtype}"
                try:
                    found = check(variants(subject, backend)[OURS], operands, grad, expected, subject)
                except ValueError as error:
                    if "cannot run" not in str(error):
                        raise
                    print(f"{what}: left out: {error}")
                    continue
                bad += not found.ok
                print(f"{what}: {'ok' if found.ok else 'WRONG'}: {found}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
