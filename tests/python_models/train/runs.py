"""Small runs, and rows that fit."""

import io
import os
import signal
from typing import Any

import torch

from python_models.data import Splits, TaskData, make_synthetic
from python_models.train import checkpoint
from python_models.train.__main__ import train
from python_models.train.config import Config

SMALL = {
    "data": {"rows": [96, 48, 48], "in_features": 6, "binary": "bernoulli"},
    "model": {"options": {"num_experts": 3, "expert_dims": [[8], [4]]}, "towers": {"dims": [4]}},
    "train": {"epochs": 2, "batch_size": 16, "device": "cpu", "progress": False},
}


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, table by table."""
    tables = {k for k, v in over.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return {**base, **{k: merged(base[k], v) if k in tables else v for k, v in over.items()}}


def splits_for(name: str, rows: int = 96) -> Splits:
    """Rows that fit an architecture: one task and domains for STAR, clicks and conversions for ESMM."""
    made = make_synthetic((rows, 48, 48), 6, binary="bernoulli")
    if name not in ("STAR", "ESMM"):
        return made
    change = with_domain if name == "STAR" else clicks
    return Splits(*(change(part) for part in (made.train, made.validation, made.test)))


def with_domain(data: TaskData) -> TaskData:
    domain, labels = torch.arange(len(data)) % 3, data.labels[:, :1]
    return TaskData(data.numeric, data.categorical, labels, (), ("a",), domain=domain, num_domains=3)


def clicks(data: TaskData) -> TaskData:
    click, both = data.labels[:, 0], data.labels.prod(1)
    return TaskData(data.numeric, data.categorical, torch.stack((click, both), 1), (), ("click", "conversion"))


def lethal(config: Config, point: str = "", count: int = 0) -> None:
    """A whole run in a process of its own, which a `count`-th arrival at `point` kills."""
    torch.set_num_threads(1)
    holder, name = {"torn": (torch, "save"), "unnamed": (os, "replace"), "curve": (checkpoint.Curve, "append")}.get(
        point, (checkpoint, "write_atomic")
    )
    real, arrivals = getattr(holder, name), [0]

    def deadly(*given):
        arrivals[0] += 1
        if arrivals[0] < count:
            return real(*given)
        if point == "torn":  # half of a checkpoint
            whole = io.BytesIO()
            real(given[0], whole)
            given[1].write(whole.getvalue()[: whole.tell() // 2])
            given[1].flush()
        elif point == "curve":  # a row and a half
            with open(given[0].path, "ab") as file:
                file.write(bytes(12 * given[0].width))
        elif point == "named":
            real(*given)
        os.kill(os.getpid(), signal.SIGKILL)

    if count:
        setattr(holder, name, deadly)
    train(config, resume=True)
