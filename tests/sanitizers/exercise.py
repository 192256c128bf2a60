"""python -m tests.sanitizers.exercise BACKEND CASES THREADS: random calls of every operator, for a sanitizer to watch.

With more than one Python thread each makes calls of its own at the same time as the others.
"""

import os
import random
import sys
import threading

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import torch
from hypothesis import HealthCheck, Phase, given, settings

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


def main(backend: str, cases: int, threads: int) -> int:
    torch.set_num_threads(1 if threads > 1 else 2)
    every, failed = calls(cases), []

    def work(worker: int) -> None:
        mine = list(every)
        random.Random(worker).shuffle(mine)
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
