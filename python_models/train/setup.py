"""The device and the optimizer of a configuration."""

from __future__ import annotations

import inspect
import math
from fnmatch import fnmatchcase
from typing import Any

import torch

from python_models.balancing.groups import GROUPS, param_groups
from python_models.settings import ConfigError, nearest
from python_models.train.config import Config, Optimizer


def find_device(name: str) -> torch.device:
    """ "auto" is the first GPU, or else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"train.device is {name!r}: {error}") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"train.device is {name!r}, and torch sees no GPU")
        device = torch.device("cuda", device.index or 0)
    return device


def make_optimizer(config: Config, model: torch.nn.Module, balancer: torch.nn.Module) -> torch.optim.Optimizer:
    """Of torch.optim, by name, over all parameters; `groups` and `rates` make groups with a rate of their own.

    What the balancer learns has no weight decay.
    """
    chosen = config.optimizer
    kinds = {
        name: kind
        for name, kind in vars(torch.optim).items()
        if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and name not in ("Optimizer", "LBFGS")
    }
    if chosen.name not in kinds:
        raise ConfigError(f"optimizer.name is {chosen.name!r}{nearest(chosen.name, kinds)}")
    valid = [word for word in inspect.signature(kinds[chosen.name]).parameters if word not in ("params", "lr")]
    for option in chosen.options:
        if option not in valid:
            raise ConfigError(f"unknown key optimizer.options.{option} of {chosen.name}{nearest(option, valid)}")
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    by_kind = _kinds_factors(chosen, model, balancer)
    groups: dict[tuple[float, bool], list[Any]] = {}
    used = set()
    for name, parameter in named:
        pattern = next((p for p in chosen.rates if fnmatchcase(name, p)), None)
        used.add(pattern)
        factor = by_kind.get(id(parameter), 1.0) if pattern is None else chosen.rates[pattern]
        if (
            isinstance(factor, bool)
            or not isinstance(factor, (int, float))
            or not (factor >= 0 and math.isfinite(factor))
        ):
            raise ConfigError(f"optimizer.rates.{pattern} must be a number of at least 0; got {factor!r}")
        groups.setdefault((float(factor), True), []).append(parameter)
    for pattern in chosen.rates:
        if pattern not in used:
            raise ConfigError(
                f"optimizer.rates.{pattern} matches no parameter{nearest(pattern, [n for n, _ in named])}"
            )
    for parameter in balancer.parameters():
        if parameter.requires_grad:
            groups.setdefault((by_kind.get(id(parameter), 1.0), False), []).append(parameter)
    lists = [
        {"params": params, "lr": chosen.lr * factor}
        | ({} if decayed or "weight_decay" not in valid else {"weight_decay": 0.0})
        for (factor, decayed), params in groups.items()
    ]
    options = dict(chosen.options)
    if "fused" in valid and not {"fused", "foreach", "capturable"} & set(options):
        options["fused"] = True
    try:
        return kinds[chosen.name](lists, lr=chosen.lr, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer.options of {chosen.name}: {error}") from error


def _kinds_factors(chosen: Optimizer, model: torch.nn.Module, balancer: torch.nn.Module) -> dict[int, float]:
    """{id of a parameter: the factor of its kind}, where the configuration says any."""
    if not chosen.groups:
        return {}
    for name in chosen.groups:
        if name not in GROUPS:
            raise ConfigError(f"unknown key optimizer.groups.{name}{nearest(name, GROUPS)}")
    try:
        found = param_groups(model, 1.0, {**dict.fromkeys(GROUPS, 1.0), **chosen.groups}, also=[balancer])
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer.groups: {error}") from error
    return {id(parameter): float(group["lr"]) for group in found for parameter in group["params"]}
