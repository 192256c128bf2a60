"""Ranks on one machine, over gloo: processes forked from one that has imported torch already."""

import datetime
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["mtlkernels.sharding", "python_models.parallel", "torch.distributed.fsdp"])


def run(ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 60, dies: bool = False) -> list[Any]:
    """``function(rank, *args)`` on every rank of a new process group; what each returned, or with `dies` raised.

    A rank that ends without an answer has the answer None; one that is not done in time fails the test.
    """
    with tempfile.TemporaryDirectory() as store:
        pipes, processes = [], []
        for rank in range(ranks):
            ours, theirs = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(target=_rank, args=(theirs, rank, ranks, store, function, args), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        answers = []
        try:
            for rank, pipe in enumerate(pipes):
                if not pipe.poll(timeout):
                    raise TimeoutError(f"rank {rank} of {ranks} gave no answer in {timeout} s")
                try:
                    answers.append(pipe.recv())
                except EOFError:
                    answers.append(None)
        finally:
            for process in processes:
                process.join(5 if len(answers) == ranks else 0)
                if process.is_alive():
                    process.kill()
    for answer in answers:
        if isinstance(answer, Raised) and not dies:
            raise AssertionError(f"rank {answers.index(answer)}: {answer.text}")
    return answers


class Raised:
    """An exception of a rank."""

    def __init__(self, error: BaseException) -> None:
        self.kind, self.text = type(error).__name__, "".join(traceback.format_exception(error))


def _rank(pipe, rank: int, ranks: int, store: str, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}/store",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=20),
    )
    try:
        answer = function(rank, *args)
    except Exception as error:
        answer = Raised(error)
    pipe.send(answer)
    pipe.close()
    if not isinstance(answer, Raised):
        dist.barrier()
        dist.destroy_process_group()
    else:
        os._exit(1)
