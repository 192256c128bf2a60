"""Training methods by name, and what each is given of a model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

import python_models.balancing as methods
from mtlkernels.nn import ExpertMLP
from python_models.layers import ModuleBank
from python_models.settings import ConfigError, nearest
from python_models.train.config import Balancing
from python_models.train.model import TaskModel

# Said by the data, the model or other keys.
_GIVEN = {"num_tasks", "kinds", "weighting", "measured_on", "features", "device", "dtype"}
_BASES = ("Balancer", "GradientMethod")
# Methods whose work is on a tensor between the trunk and the tasks.
ON_REPRESENTATION = ("GradDrop", "RotoGrad")


def _kinds() -> dict[str, type[methods.Balancer]]:
    public = {name: getattr(methods, name) for name in methods.__all__ if name not in _BASES}
    return {name: kind for name, kind in public.items() if inspect.isclass(kind) and issubclass(kind, methods.Balancer)}


def names(*, weightings: bool = False) -> list[str]:
    """Every method, or those that only weigh."""
    return [name for name in _kinds() if not weightings or "weighting" not in _words(name)]


def _words(name: str) -> list[str]:
    return list(inspect.signature(_kinds()[name]).parameters)


def options(name: str) -> list[str]:
    """What ``[balancing.options]`` may say of a method."""
    return [word for word in _words(name) if word not in _GIVEN]


class Balance:
    """A method and the model it works for; called in place of ``loss.backward()``.

    Attributes:
        module: the method, whose state is a checkpoint's.
    """

    def __init__(self, module: methods.Balancer, shared: list[nn.Parameter], split: nn.Module | None) -> None:
        self.module, self.shared = module, shared
        self._representation: list[Tensor] = []
        if split is not None:
            split.register_forward_hook(lambda _module, _inputs, output: self._note(output))

    def deployed(self, model: TaskModel) -> dict[str, Tensor]:
        """The weights of a model that does without the method."""
        return model.state_dict()

    def deploy(self, model: TaskModel, done: bool) -> None:
        """Have the model do without the method from now on; `done`: its weights are deployed ones already."""

    def _note(self, output: Tensor) -> None:
        if output.requires_grad:
            self._representation[:] = [output]

    def __call__(self, losses: Sequence[Tensor], *, penalty: Tensor | None, active: Tensor | None) -> Tensor:
        """Fill .grad; the total, detached."""
        given: dict[str, Any] = {"shared": self.shared, "penalty": penalty, "active": active}
        if self._representation:
            given["representation"] = self._representation.pop()
        return self.module.backward(losses, **given)


class Turning(Balance):
    """RotoGrad, whose rotations stand between SharedBottom and its towers until they are folded into these."""

    module: methods.RotoGrad

    def __init__(self, module: methods.RotoGrad, shared: list[nn.Parameter], core: nn.Module) -> None:
        super().__init__(module, shared, None)
        self._turn = core.register_forward_hook(lambda _module, _inputs, output: self._turned(output[:, 0]))

    def _turned(self, z: Tensor) -> Tensor:
        self._note(z)
        return self.module.rotate(z)

    def deployed(self, model: TaskModel) -> dict[str, Tensor]:
        towers = copy.deepcopy(model.network.towers)
        copy.deepcopy(self.module).fold(towers)
        return model.state_dict() | {f"network.towers.{k}": v for k, v in towers.state_dict().items()}

    def deploy(self, model: TaskModel, done: bool) -> None:
        if not done:
            self.module.fold(model.network.towers)
        self._turn.remove()


def build(config: Balancing, kinds: Sequence[str], model: TaskModel) -> Balance:
    """The method that a configuration names, for tasks by the kinds of their losses. ConfigError naming the key."""
    shared = shared_parameters(config, model)
    bank = last_bank(model)
    weighting = None
    if config.weighting:
        weighting = _make("weighting", config.weighting, config.weighting_options, kinds, bank, names(weightings=True))
    elif config.weighting_options:
        raise ConfigError("balancing.weighting_options need a balancing.weighting")
    if config.name == "RotoGrad" and (model.name != "SharedBottom" or config.representation):
        raise ConfigError("balancing.name RotoGrad turns the one representation that every tower reads: SharedBottom's")
    module = _make("name", config.name, config.options, kinds, bank, names(), weighting)
    if isinstance(module, methods.RotoGrad):
        return Turning(module, shared, model.core)
    split = None
    if config.representation or config.name in ON_REPRESENTATION:
        split = bank
        if config.representation:
            parts = dict(model.named_modules())
            if config.representation not in parts:
                hint = nearest(config.representation, [name for name in parts if name])
                raise ConfigError(f"balancing.representation is {config.representation!r}{hint}")
            split = parts[config.representation]
        if split is None:
            raise ConfigError(f"balancing.representation must name a module of {model.name}, whose output tasks read")
    return Balance(module, shared, split)


def _make(
    key: str,
    name: str,
    chosen: dict[str, Any],
    kinds: Sequence[str],
    bank: nn.Module | None,
    known: list[str],
    weighting: methods.Balancer | None = None,
) -> methods.Balancer:
    if name not in known:
        raise ConfigError(f"balancing.{key} is {name!r}{nearest(name, known)}")
    words, prefix = _words(name), "options" if key == "name" else "weighting_options"
    for option in chosen:
        if option not in options(name):
            raise ConfigError(f"unknown key balancing.{prefix}.{option} of {name}{nearest(option, options(name))}")
    given = {
        "num_tasks": len(kinds),
        "kinds": kinds,
        # GradNorm's W: the last layer below the towers.
        "measured_on": None if bank is None else list(bank.parameters())[-2:],
        "weighting": weighting,
        "features": getattr(bank, "out_features", None),
    }
    if weighting is not None and "weighting" not in words:
        raise ConfigError(f"balancing.weighting goes with a method that works on gradients; {name} weighs by itself")
    try:
        return _kinds()[name](**{word: given[word] for word in words if word in given}, **chosen)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"balancing.{prefix} of {name}: {error}") from error


def shared_parameters(config: Balancing, model: TaskModel) -> list[nn.Parameter]:
    """Those whose names match ``balancing.shared``; without patterns all but the tasks' own."""
    named = dict(model.named_parameters())
    for pattern in config.shared:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise ConfigError(f"balancing.shared {pattern!r} matches no parameter{nearest(pattern, named)}")
    if config.shared:
        return [p for name, p in named.items() if any(fnmatchcase(name, pattern) for pattern in config.shared)]
    own = {id(p) for p in model.task_parameters()}
    found = [p for p in named.values() if id(p) not in own]
    return found or list(named.values())


def last_bank(model: TaskModel) -> nn.Module | None:
    """The last bank of experts below the towers: what it gives is what the tasks mix, or read."""
    own = {id(p) for p in model.task_parameters()}
    found = None
    for name, module in model.core.named_modules():
        if isinstance(module, (ExpertMLP, ModuleBank)) and "gates" not in name:
            parameters = list(module.parameters())
            if parameters and id(parameters[0]) not in own:
                found = module
    return found
