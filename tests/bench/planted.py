"""A regression planted on purpose: expert_mix with a second pass over the experts.

    python -m tests.bench.planted FOLDER

writes before.jsonl, again.jsonl (the same once more) and twice.jsonl (with the second pass) as they lie in recorded/.
"""

import sys
from pathlib import Path
from unittest.mock import patch

from torch import Tensor

from bench import calibrate, sweep, swept
from bench.contest import BOTH, FORWARD
from bench.jobs import work_off
from bench.lines import Lines

SHAPE = {"B": 512, "T": 4, "E": 64, "K": 128, "N": 128}


def twice(x: Tensor, weight: Tensor, bias: Tensor, logits: Tensor) -> Tensor:
    """The same result, in twice the time."""
    out, second = (right(x, weight, bias, logits) for _ in range(2))
    return (out + second) / 2


right = swept.expert_mix


def measured(path: Path, seconds: float, planted: bool = False) -> Path:
    """A sweep of two numbers of experts."""
    todo = sweep.plan(SHAPE, {"experts": [32, 64]})
    options = {"dtypes": ("float32",), "device": "cpu", "whats": (FORWARD, BOTH), "memory": False}
    with patch.object(swept, "expert_mix", twice if planted else right):
        lines = Lines(path, "sweep", calibrate.machine(), lambda: [])
        work_off(sweep.jobs(todo, (swept.EXPERT_MIX, swept.TWO_CALLS), seconds=seconds, **options), lines, print)
    return path


if __name__ == "__main__":
    for name in ("before", "again", "twice"):
        measured(Path(sys.argv[1]) / f"{name}.jsonl", 2.0, planted=name == "twice")
