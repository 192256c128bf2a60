"""Moving numbers between a network's tensors and a state_dict in another library's layout."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..esmm import ESMM
from ..multitask import MultiTaskModel
from .layouts import LAYOUTS
from .sites import Site, Walk

_EPS = 1e-5  # BatchNorm1d's own, which no state_dict holds


@torch.no_grad()
def import_state(
    model: nn.Module, state: Mapping[str, Tensor], layout: str, *, prefix: str = "", fold_norms: bool = False
) -> list[str]:
    """Copies another library's weights into `model`; nothing is copied unless all of it fits.

    Args:
        model: a network of this package with the sizes and options of the one that was saved (activation and dropout
            are in no state_dict), or a :class:`~python_models.MultiTaskModel`: then its towers are read too.
        state: the other library's ``state_dict()``.
        layout: one of :data:`~python_models.interop.LAYOUTS`.
        prefix: what the keys begin with, "module." for instance; keys without it are left.
        fold_norms: a BatchNorm that `model` lacks goes into the linear layer before it, by its running statistics: the
            same outputs in evaluation, but another network to train. Without it `model` has to have the norms
            (``norm="batch"``, and ``gate_logit_norm=True`` for torch-rechub), and continues training as theirs would.

    Returns:
        The keys that were left: those without the prefix, those of embeddings, those of towers if `model` has none, and
        those of tensors that the library keeps and never uses.

    Raises:
        TypeError, ValueError: the layout has no place for such a model, or the state does not fit: a key is missing or
            left over, or has another shape. The message names it.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a state_dict; got {type(state).__name__}")
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError("model is on the meta device and has no memory for weights: call to_empty first")
    walk, parts = _parts(model, layout, prefix)
    # First, for it also says what has no place in the layout.
    whole = _exported(model, layout, prefix, True)[0]
    writes: list[tuple[Tensor, Tensor]] = []
    known, taken = set(), set()
    for start, sites in parts:
        for site in sites:
            keys = {part: start + key for part, key in site.keys.items()}
            values = _read(site, keys, state, fold_norms)
            known.update(keys.values())
            taken.update(keys[part] for part in values if part in keys)
            writes.extend((view, values[part]) for part, view in site.views.items())
    spare = whole.keys() - known
    ignored = walk.layout.ignore
    if not isinstance(model, (MultiTaskModel, ESMM)):
        towers = (walk.layout.tower, walk.layout.tower_last, walk.layout.tower_bias or walk.layout.tower)
        ignored += tuple(template.split("{")[0] for template in towers)
    left = [key for key in state if key not in taken]
    for key in left:
        if key.startswith(prefix) and key not in spare and not key.removeprefix(prefix).startswith(ignored):
            hint = ": build the model with this norm, or fold a BatchNorm with fold_norms=True" if key in known else ""
            raise ValueError(f"state has the key {key!r}, which the model has no place for{hint}")
    for view, value in writes:
        view.copy_(value)
    return left


@torch.no_grad()
def export_state(model: nn.Module, layout: str, *, prefix: str = "", fold_norms: bool = False) -> dict[str, Tensor]:
    """`model`'s weights, copied, under another library's keys: its ``load_state_dict`` takes them with its embeddings.

    Args:
        model, layout, prefix: as in :func:`import_state`.
        fold_norms: where the library has a BatchNorm and `model` none, write one that changes nothing in evaluation.

    Raises:
        TypeError, ValueError: the layout has no place for such a model, or one place for tensors that differ.
    """
    state, twice = _exported(model, layout, prefix, fold_norms)
    if twice:
        raise ValueError(f"the layout has one tensor {twice[0]!r} where the model has several, which differ")
    return state


def _exported(model: nn.Module, layout: str, prefix: str, fold_norms: bool) -> tuple[dict[str, Tensor], list[str]]:
    """The state, and the keys under which it should hold several tensors that differ."""
    walk, parts = _parts(model, layout, prefix)
    state: dict[str, Tensor] = {}
    twice: list[str] = []
    for start, sites in parts:
        found: dict[str, Tensor] = {}
        for site in sites:
            for part, value in _written(site, fold_norms).items():
                key = site.keys[part]
                if not site.rows and key in found and not torch.equal(found[key], value):
                    twice.append(start + key)
                found[key] = torch.stack((*found.get(key, ()), value)) if site.rows else value.clone()
        if walk.layout.unused and not state:
            walk.layout.unused(found, [level.units for level in walk.levels], walk.network.num_tasks)
        state |= {start + key: value for key, value in found.items()}
    return state, twice


def _parts(model: nn.Module, layout: str, prefix: str) -> tuple[Walk, list[tuple[str, Iterable[Site]]]]:
    """The fusion network's sites and the towers', each with what their keys begin with."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")
    if not isinstance(model, MultiTaskModel):
        walk = Walk(model, LAYOUTS[layout])
        return walk, [(prefix, walk.fusion())]
    walk = Walk(model.fusion, LAYOUTS[layout])
    return walk, [(prefix + walk.layout.prefix, walk.fusion()), (prefix, walk.towers(model.towers))]


def _read(site: Site, keys: dict[str, str], state: Mapping[str, Tensor], fold: bool) -> dict[str, Tensor]:
    """The site's parts as the state has them, in our shapes; with them a norm's that was folded away."""
    has_batch_norm = keys.get("norm.running_mean") in state
    folds = fold and site.norm is None and has_batch_norm
    shapes = {part: view.shape for part, view in site.views.items()}
    if folds:
        shapes |= {part: shapes["bias"] for part in keys if part.startswith("norm.")}
        shapes["norm.num_batches_tracked"] = torch.Size([])
    values = {}
    for part, shape in shapes.items():
        if part == "bias" and has_batch_norm and not site.norm_bias:
            values[part] = torch.zeros_like(site.views[part])
            continue
        key = keys[part]
        if key not in state:
            raise ValueError(f"state has no key {key!r}, expected of shape {tuple(shape)}")
        whole = (site.rows, *shape) if site.rows else tuple(shape)
        if tuple(state[key].shape) != whole:
            raise ValueError(f"state's {key!r} has shape {tuple(state[key].shape)}; the model needs {whole}")
        values[part] = state[key][site.row] if site.rows else state[key]
    if folds:
        norm = {part.removeprefix("norm."): values[part].double() for part in values if part.startswith("norm.")}
        scale = norm["weight"] / (norm["running_var"] + _EPS).sqrt()
        values["weight"] = values["weight"].double() * scale.unsqueeze(1)
        values["bias"] = (values["bias"].double() - norm["running_mean"]) * scale + norm["bias"]
    return values


def _written(site: Site, fold: bool) -> dict[str, Tensor]:
    """The site's parts as the layout has them."""
    parts = dict(site.views)
    if site.norm is None and (fold and "batch" in site.norms or None not in site.norms):
        if not fold:
            raise ValueError(
                f"the layout has a norm at {site.keys['norm.weight']!r}, the model none: build it with norm='batch' (a "
                "gate with gate_logit_norm=True), or write norms that do nothing with fold_norms=True"
            )
        ones, counter = torch.ones_like(parts["bias"]), torch.zeros((), dtype=torch.long, device=parts["bias"].device)
        parts |= {"norm.weight": ones, "norm.bias": 0 * ones, "norm.running_mean": 0 * ones}
        parts |= {"norm.running_var": ones - _EPS, "norm.num_batches_tracked": counter}
    if not site.norm_bias and "norm.running_mean" in parts:
        # Without a bias the mean before the norm is that much lower.
        parts["norm.running_mean"] = parts["norm.running_mean"] - parts.pop("bias")
    return parts
