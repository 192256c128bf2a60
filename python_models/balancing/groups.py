"""Learning rates by what a parameter is for."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from mtlkernels.nn import Towers

from ..adashare import AdaShare
from ..adatt import AdaTTLevel
from ..connections import Connections
from ..data.features import TableFeatures
from ..esmm import ESMM
from ..layers import Gates
from ..learned_branching import ParentChoice
from ..sluice import Sluice
from ..soft_ordering import SoftOrdering
from ..static_mix import Stitch
from ..ubernet import ScoreFusion
from .base import Balancer

GROUPS = {
    "sparse_embedding": 1.0,
    "bias_embedding": 1.0,
    "bottom": 0.1,
    "gates": 1.0,
    "towers": 1.0,
    "mixing": 1.0,
    "loss_weights": 1.0,
    "rotations": 1.0,
}
"""The groups and their rates, as multiples of the base rate."""

# Of classes that are not ours to mark, or whose own parameters alone mix. The innermost module that says something
# decides; a class of one's own says it by an attribute ``parameter_group``.
_MODULES: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Embedding, "sparse_embedding"),
    (nn.EmbeddingBag, "sparse_embedding"),
    (TableFeatures, "sparse_embedding"),
    (Gates, "gates"),
    (Towers, "towers"),
    (ESMM, "towers"),
    (Stitch, "mixing"),
    (ScoreFusion, "mixing"),
    (Connections, "mixing"),
    (ParentChoice, "mixing"),
    (Balancer, "loss_weights"),
)
_OWN: tuple[tuple[type[nn.Module], str], ...] = (
    (AdaTTLevel, "native"),
    (AdaShare, "policy_logits"),
    (Sluice, "beta"),
    (SoftOrdering, "logits"),
)
_UNDECAYED = ("mixing", "loss_weights", "rotations")


def param_groups(
    model: nn.Module,
    lr: float,
    multiples: Mapping[str, float] | None = None,
    *,
    also: Iterable[nn.Module] = (),
    where: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: every parameter of model and of `also` in exactly one. ::

        groups = param_groups(model, 1e-3, also=[balancer])
        optimizer = torch.optim.Adam(groups)
        bottom = torch.optim.SGD([g for g in groups if g["name"] == "bottom"])   # or one optimizer for some of them

    "sparse_embedding": shared tables. "bias_embedding": a task's own. "bottom": trunk and experts, all that nothing
    below names. "gates". "towers": auxiliary heads too. "mixing": what mixes streams without regard to the input, the
    weights of cross-stitch, sluice, AdaTT's native experts, SNR, AdaShare and the like. "loss_weights": what a balancer
    learns. "rotations": RotoGrad's. The innermost module that is of one of these decides, a class of one's own by the
    attribute ``parameter_group = "towers"``.

    Args:
        model: any module.
        lr: the base rate.
        multiples: rates of groups as multiples of lr, by name; 0.1 for "bottom" and 1 for the others, else. 100 for
            "mixing" suits cross-stitch networks under SGD.
        also: other modules that learn, such as the balancer.
        where: {pattern: group} over the parameters' names, ``{"domain_*": "towers"}``; the first that matches decides.

    Returns:
        ``{"params", "lr", "name"}`` a group that has parameters. "mixing", "loss_weights" and "rotations" add
        ``"weight_decay": 0.0``: there it would pull towards another method.

    Raises:
        TypeError, ValueError: naming the argument, for an unknown group, a rate that is no rate, or a pattern that
            matches nothing.
    """
    rates, where = dict(GROUPS), dict(where or {})
    for name, multiple in (multiples or {}).items():
        if name not in GROUPS:
            raise ValueError(f"multiples must name groups of {', '.join(GROUPS)}; got {name!r}")
        rates[name] = multiple
    for name, value in (("lr", lr), *((f"multiples[{name!r}]", rate) for name, rate in rates.items())):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be finite and at least 0; got {value!r}")
    for pattern, group in where.items():
        if group not in GROUPS:
            raise ValueError(f"where[{pattern!r}] must be one of {', '.join(GROUPS)}; got {group!r}")
    found: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    seen: set[int] = set()
    used: set[str] = set()
    for root in (model, *also):
        for name, parameter in root.named_parameters():
            pattern = next((p for p in where if fnmatchcase(name, p)), None)
            used.add(pattern)
            if id(parameter) not in seen:
                seen.add(id(parameter))
                found[_group(root, name) if pattern is None else where[pattern]].append(parameter)
    if left := [pattern for pattern in where if pattern not in used]:
        raise ValueError(f"where[{left[0]!r}] matches no parameter that an earlier pattern leaves")
    return [
        {"params": params, "lr": lr * rates[name], "name": name} | ({"weight_decay": 0.0} if name in _UNDECAYED else {})
        for name, params in found.items()
        if params
    ]


def _group(root: nn.Module, name: str) -> str:
    """The group of a parameter by its path from the root."""
    *path, last = name.split(".")
    modules = [root]
    for part in path:
        modules.append(getattr(modules[-1], part))
    if any(isinstance(modules[-1], kind) and last == own for kind, own in _OWN):
        return "mixing"
    for module in reversed(modules):
        group = getattr(module, "parameter_group", None)
        if group is None:
            group = next((group for kind, group in _MODULES if isinstance(module, kind)), None)
        if group is not None:
            if group not in GROUPS:
                raise ValueError(f"parameter_group of {type(module).__name__} must be one of {', '.join(GROUPS)}")
            return group
    return "bottom"
