"""Balancing methods by name, and what they are given of a model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from python_models.data import TaskData
from python_models.settings import ConfigError, nearest
from python_models.train.config import Balancing
from python_models.train.registry import TaskModel


class _Sum(nn.Module):
    def backward(self, losses, penalty=None, **_):
        total = losses.sum() if penalty is None else losses.sum() + penalty
        total.backward()
        return total.detach()

    def end_epoch(self, losses=None): ...


class Balance:
    def __init__(self, module, model):
        self.module, self.model = module, model

    def __call__(self, losses: Tensor, *, penalty: Tensor | None, active: Tensor | None) -> Tensor:
        return self.module.backward(losses, penalty=penalty, active=active)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def to(self, device):
        self.module.to(device)
        return self


def build(config: Balancing, data: TaskData, model: TaskModel) -> Balance:
    if config.name != "FixedWeights":
        raise ConfigError(f"balancing.name is {config.name!r}{nearest(config.name, ['FixedWeights'])}")
    return Balance(_Sum(), model)
