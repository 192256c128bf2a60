"""Architectures by name: their options, what they want of the data, and the whole model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import nn

import python_models as models
from python_models.balancing import AuxiliaryHeads, TaskBiasEmbedding
from python_models.data import TableFeatures, TaskData
from python_models.layers import Blocks
from python_models.settings import nearest
from python_models.train.config import ConfigError, Model
from python_models.train.model import PENALTIES, TaskModel

# Said by the data, or no matter of a file.
_GIVEN = {"in_features", "num_tasks", "num_domains", "task_names", "device", "dtype", "expert", "gate"}
_NOT_IN_TABLES = {"views", "context_features"}  # inputs beside x, which a row of a table has not
_ROUTING = ("beta", "gamma", "zeta", "delta", "clamp")
# What **blocks and its like stand for, by the constructor's own word.
_MORE = {
    "blocks": tuple(f.name for f in fields(Blocks) if f.name not in _GIVEN),
    "options": (*(f.name for f in fields(Blocks) if f.name not in _GIVEN), *_ROUTING),
    "layers": ("activation", "dropout", "norm"),
}
_OWN_HEADS = ("UberNet", "MRN")  # their outputs are the tasks'
_WHOLE = (*_OWN_HEADS, "STAR", "ESMM")  # without towers of ours
_LEVELS = [[64], [32]]
# Where a constructor asks for a size and the configuration names none.
DEFAULTS: dict[str, dict[str, Any]] = {
    "SharedBottom": {"dims": [64, 32]},
    "MMoE": {"num_experts": 8, "expert_dims": [[64, 32]]},
    "CGC": {"task_experts": 2, "shared_experts": 2, "expert_dims": [64, 32]},
    "PLE": {"task_experts": 2, "shared_experts": 2, "expert_dims": _LEVELS},
    "AdaTT": {"task_experts": 2, "shared_experts": 1, "expert_dims": _LEVELS},
    "CrossStitch": {"expert_dims": _LEVELS},
    "Sluice": {"expert_dims": [[32], [32]]},
    "SNRTrans": {"num_experts": 4, "expert_dims": _LEVELS},
    "SNRAver": {"num_experts": 4, "expert_dims": _LEVELS},
    "MTAN": {"dims": [64, 32]},
    "SoftOrdering": {"width": 32, "num_modules": 3},
    "SoftSharing": {"dims": [64, 32]},
    "AdaShare": {"expert_dims": [[32], [32]]},
    "LearnedBranching": {"num_experts": 4, "expert_dims": _LEVELS},
    "BranchedMTL": {"expert_dims": _LEVELS},  # and all tasks together below, each alone above
    "UberNet": {"dims": [64, 32]},
    "MRN": {"dims": [64], "head_dims": [32]},
    "STAR": {"dims": [64, 32]},
    "ESMM": {"dims": [64, 32]},
}


def names() -> list[str]:
    """Every architecture."""
    return [name for name in models.__all__ if name not in ("MultiTaskModel", "Towers")]


def options(name: str) -> list[str]:
    """What ``[model.options]`` may say of an architecture."""
    found, words = [], inspect.signature(getattr(models, name)).parameters
    for word, parameter in words.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            gates = "gate_dims" in words
            found += [more for more in _MORE[word] if gates or not more.startswith("gate")]
        elif word not in _GIVEN | _NOT_IN_TABLES and not (name in _OWN_HEADS and word == "out_features"):
            found.append(word)
    return list(dict.fromkeys(found))


def check_data(name: str, data: TaskData) -> None:
    """ConfigError where a data set lacks what the network takes, or has what it cannot give."""
    tasks = ", ".join(data.task_names)
    if name == "STAR":
        if data.domain is None:
            raise ConfigError("model.name STAR needs a domain of every row; this data has none (schema key: domain)")
        if len(data.task_names) != 1 or data.kinds[0] == "multiclass":
            raise ConfigError(f"model.name STAR has one output for its domains, so one task; this data has {tasks}")
    if name == "ESMM":
        if data.kinds != ("binary", "binary"):
            raise ConfigError(
                "model.name ESMM needs two binary tasks, first the click, then the conversion; this data has "
                + ", ".join(f"{task} ({kind})" for task, kind in zip(data.task_names, data.kinds, strict=True))
            )
        try:
            models.ESMM.validate(*data.labels.unbind(1))
        except ValueError as error:
            raise ConfigError(
                f"model.name ESMM takes {data.task_names[0]} as click, {data.task_names[1]} as conversion: {error}"
            ) from error


def build(config: Model, data: TaskData) -> TaskModel:
    """The whole model for a data set. ConfigError naming the key where name, options or data do not fit."""
    if config.name not in names():
        raise ConfigError(f"model.name is {config.name!r}{nearest(config.name, names())}")
    valid = options(config.name)
    for option in config.options:
        if option not in valid:
            raise ConfigError(f"unknown key model.options.{option} of {config.name}{nearest(option, valid)}")
    check_data(config.name, data)
    features = TableFeatures.of(data, config.embedding_dim)
    if not features.out_features:
        raise ConfigError("the data has no inputs: no numbers, and no categories with model.embedding_dim above 0")
    sizes = _sizes(config.name, features.out_features, data)
    chosen = {**DEFAULTS.get(config.name, {}), **_without_empty(config.options)}
    if config.name == "BranchedMTL" and "partitions" not in chosen:
        chosen["partitions"] = _split_at_last(len(data.task_names), len(chosen["expert_dims"]))
    try:
        network = core = getattr(models, config.name)(**sizes, **chosen)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.options of {config.name}: {error}") from error
    if config.name not in _WHOLE:
        network = models.MultiTaskModel(core, _towers(config, core.out_features, data))
    penalty = PENALTIES.get(config.name, (None, 0.0))[1] if config.penalty is None else config.penalty
    if config.penalty and config.name not in PENALTIES:
        raise ConfigError(f"model.penalty is for {', '.join(PENALTIES)}; {config.name} has no penalty")
    return TaskModel(config.name, features, network, penalty, _bias(config, data), _auxiliary(config, core, data))


def _sizes(name: str, in_features: int, data: TaskData) -> dict[str, Any]:
    if name == "STAR":
        return {"in_features": in_features, "num_domains": data.num_domains}
    if name == "ESMM":
        return {"in_features": in_features}
    sizes: dict[str, Any] = {"in_features": in_features, "num_tasks": len(data.task_names)}
    return {**sizes, **_outputs(data)} if name in _OWN_HEADS else sizes


def _outputs(data: TaskData) -> dict[str, Any]:
    return {"out_features": list(data.outputs), "task_names": list(data.task_names)}


def _towers(config: Model, in_features: int, data: TaskData) -> nn.Module:
    towers = _without_empty(vars(config.towers))
    try:
        return models.Towers(in_features, len(data.task_names), **{"dims": (), **towers}, **_outputs(data))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.towers: {error}") from error


def _bias(config: Model, data: TaskData) -> TaskBiasEmbedding | None:
    """The tasks' own biases of some categorical columns."""
    if not config.bias:
        return None
    names = list(data.categorical_names)
    for column in config.bias:
        if column not in names:
            raise ConfigError(f"model.bias names {column!r}, which is no categorical column{nearest(column, names)}")
    if config.name == "ESMM" or max(data.outputs) > 1:
        raise ConfigError("model.bias is added to one number a task: not for ESMM, nor for tasks of several classes")
    try:
        return TaskBiasEmbedding(len(data.task_names), data.vocab_sizes, [names.index(c) for c in config.bias])
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.bias: {error}") from error


def _auxiliary(config: Model, core: nn.Module, data: TaskData) -> AuxiliaryHeads | None:
    """Second heads, where the network has towers of ours."""
    kappa, tasks = config.auxiliary.kappa, len(data.task_names)
    if not kappa:
        return None
    if config.name in _WHOLE:
        raise ConfigError(f"model.auxiliary is for networks under towers; {config.name} has its own outputs")
    try:
        return AuxiliaryHeads(core.out_features, tasks, config.auxiliary.dims, kappa=kappa, **_outputs(data))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.auxiliary: {error}") from error


def _without_empty(options: Mapping[str, Any]) -> dict[str, Any]:
    """TOML has no None: "" stands for it."""
    return {name: value for name, value in options.items() if value != ""}


def _split_at_last(tasks: int, depths: int) -> list[list[list[int]]]:
    """One cluster of all tasks at every depth but the last, where each is alone."""
    return [[list(range(tasks))]] * (depths - 1) + [[[t] for t in range(tasks)]]
