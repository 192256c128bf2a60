"""Small runs, and rows that fit."""

from typing import Any

import torch

from python_models.data import Splits, TaskData, make_synthetic

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
