"""Compiles the kernels for one GPU architecture, without a GPU, and prints what came out as JSON lines.

    python compile_ahead.py 90 [all]

Run in a process of its own, without TRITON_INTERPRET: test_ahead.py does.
"""

import importlib
import sys

OPERATORS = (
    "mix",
    "expert_linear",
    "expert_mix",
    "losses",
    "partitioned_norm",
    "star_linear",
    "snr_linear",
    "hard_concrete",
)


def main(target: int, everything: bool) -> None:
    for name in OPERATORS:
        module = importlib.import_module(f"ahead.{name}")
        module.usual(target)
        if everything:
            module.rest(target)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:] == ["all"])
