"""Every operator once, forward and backward, at a size that a memory checker can stand, on every backend that can.

    python -m bench.small_calls [--device cuda] [--backends native,triton] [--dtype float32,bfloat16]

What compute-sanitizer runs; the results are compared with float64, so that the calls are real ones.
"""

import argparse
import sys

import torch

from bench.operators import can_run, check, on_backend, prepare, truth
from bench.shapes import SHAPES, odd, tiny
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
            for name, size in (("tiny", tiny), ("odd", odd)):
                operands, grad = prepare(subject, size(next(iter(SHAPES[subject.name].values()))), dtype, args.device)
                expected = truth(subject, operands, grad)
                for backend in args.backends.split(","):
                    what = f"{subject.name} {name} {backend} {dtype}"
                    if not can_run(subject, backend, operands):
                        print(f"{what}: left out, the backend does not run it here")
                        continue
                    found = check(on_backend(subject, backend), operands, grad, expected, subject)
                    bad += not found.ok
                    print(f"{what}: {'ok' if found.ok else 'WRONG'}: {found}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
