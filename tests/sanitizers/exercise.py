"""python -m tests.sanitizers.exercise BACKEND CASES THREADS: random calls of every operator, and in C++ training steps,
for a sanitizer to watch.

With more than one Python thread each makes calls of its own at the same time as the others.
"""

import os
import random
import sys
import threading

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import torch
from hypothesis import HealthCheck, Phase, given, settings

from python_models import PLE, AdaTT, MMoE
from tests.fuzz.agreement import check
from tests.fuzz.calls import OPERATORS, build, call_of


def calls(cases: int) -> list[dict]:
    """That many sound calls of every operator, the same ones every time."""
    found = []
    for op in OPERATORS:

        @settings(max_examples=cases, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(call_of(op))
        def collect(call: dict) -> None:
            if call["spoil"] == "sound" and build(call) is not None:
                found.append(call)

        collect()
    return found


def steps() -> None:
    """Training steps whose gradients take the place of what they are by (mtlkernels.mixture)."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for network in (
            AdaTT(7, 3, [2, 1, 3], 0, [[9, 5], [6]]),
            PLE(7, 2, [1, 2], 1, [[33]]),
            MMoE(7, 2, 3, [[5, 17]]),
        ):
            for rows in (1, 3, 70, 300):
                network.to(dtype)(torch.randn(rows, 7, dtype=dtype)).sum().backward()


def main(backend: str, cases: int, threads: int) -> int:
    torch.set_num_threads(1 if threads > 1 else 2)
    every, failed = calls(cases), []

    def work(worker: int) -> None:
        mine = list(every)
        random.Random(worker).shuffle(mine)
        if backend == "native":
            steps()
        for call in mine[: len(every) * 2 // (threads + 1)]:
            try:
                check(call, (backend,))
            except AssertionError as error:
                failed.append(f"{call}: {error}")

    workers = [threading.Thread(target=work, args=(k,)) for k in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print(*failed, f"{len(every)} calls, {threads} threads, {len(failed)} wrong", sep="\n")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
