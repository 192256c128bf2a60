"""Where the numbers of a network lie: its tensors beside the keys that a layout gives them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from mtlkernels.nn import ExpertMLP, Towers

from ..adatt import AdaTT
from ..cross_stitch import CrossStitch
from ..esmm import ESMM
from ..mmoe import MMoE
from ..ple import PLE
from .layouts import Layout


@dataclass
class Site:
    """One linear layer of theirs with its norm, or one matrix: views into our tensors, and the keys, part by part.

    Parts are "weight", "bias", "norm.weight", ..., or "static". A part has no view where we have no such tensor, and no
    key where they have none. ``row`` and ``rows``: the view is that row of a matrix of so many.
    """

    views: dict[str, Tensor]
    keys: dict[str, str]
    norm: str | None = None
    norms: tuple[str | None, ...] = (None,)
    norm_bias: bool = True
    row: int | None = None
    rows: int = 0


class Level(NamedTuple):
    """What the networks have in common: a bank, its gates, how many experts each unit has, AdaTT's static weights."""

    experts: nn.Module
    gates: nn.Module | None
    units: Sequence[int]
    adatt: nn.Module | None = None
    matrix: Tensor | None = None


@dataclass
class Walk:
    """The sites of a network in a layout; raises ValueError or TypeError where the layout has no place for it."""

    network: nn.Module
    layout: Layout
    levels: list[Level] = field(init=False)

    def __post_init__(self) -> None:
        layout, network = self.layout, self.network
        if not isinstance(network, layout.network):
            raise TypeError(f"this layout is for {layout.network.__name__}; got {type(network).__name__}")
        if isinstance(network, (AdaTT, PLE)):
            adatt = isinstance(network, AdaTT)
            self.levels = [
                Level(level.experts, level.gates, level.experts_per_unit, level if adatt else None)
                for level in network.levels
            ]
            shared = network.num_units > network.num_tasks
            if shared != layout.shared_unit:
                raise ValueError(f"shared_experts must {'not ' if shared else ''}be there in this layout")
        elif isinstance(network, MMoE):
            if network.omoe:
                raise ValueError("omoe: this layout has a gate for every task")
            pairs = zip(network.experts, network.gates, strict=True)
            # 1 of modules of one's own, which mlp() refuses.
            self.levels = [Level(experts, gates, [getattr(experts, "num_experts", 1)]) for experts, gates in pairs]
        elif isinstance(network, CrossStitch):
            pairs = zip(network.experts, network.stitches, strict=True)
            self.levels = [Level(bank, None, [1] * network.num_tasks, matrix=stitch.weight) for bank, stitch in pairs]
        elif isinstance(network, ESMM):
            self.levels = []  # two towers
        else:
            self.levels = [Level(network.bottom, None, [1])]
        if len(self.levels) > 1 and "{l}" not in layout.expert:
            raise ValueError(f"this layout has one level; expert_dims has {len(self.levels)}")

    def fusion(self) -> Iterator[Site]:
        if isinstance(self.network, ESMM):
            yield from self._towers(self.network.hidden, self.network.last, [1, 1])
            return
        tasks = self.network.num_tasks
        for number, level in enumerate(self.levels):
            e = 0
            for u, n in enumerate(level.units):
                for i in range(n):
                    key = self._of("expert", u, tasks).format(l=number, u=u, e=e, i=i)
                    yield from self.mlp(level.experts, e, key)
                    e += 1
            if level.gates is not None:
                yield from self._gates(level.gates, number, tasks)
        if self.layout.static:
            yield from self._static()

    def _of(self, name: str, unit: int, tasks: int) -> str | None:
        """The template of that name for a unit."""
        return (unit >= tasks and getattr(self.layout, f"shared_{name}")) or getattr(self.layout, name)

    def mlp(self, bank: nn.Module, e: int, key: str) -> Iterator[Site]:
        """The layers of expert e."""
        if not isinstance(bank, ExpertMLP):
            raise TypeError("the network has modules of its own (expert=, gate= or tower=), which no layout knows")
        for k, (linear, norm) in enumerate(zip(bank.linears, bank.norms, strict=True)):
            names = {f"{n}k": n * k for n in (2, 4)} | {"4k+1": 4 * k + 1, "k": k}
            rows = slice(e * linear.out_features, (e + 1) * linear.out_features)
            at = self.layout.norm and f"{key}.{self.layout.norm.format_map(names)}"
            yield self._site(linear, norm, rows, f"{key}.{self.layout.linear.format_map(names)}", at, e)

    def _site(self, linear, norm, rows: slice, key: str, norm_key: str | None, e: int = 0, bias: bool = True) -> Site:
        """Rows of a bank of linear layers and its norm; `bias`: whether theirs has one."""
        weight = linear.weight.detach()
        # view, not flatten, which may copy: what is read goes into the views.
        views = {"weight": weight.view(-1, *weight.shape[2:])[rows] if weight.numel() else weight.flatten(0, 1)[rows]}
        views |= _rows(linear, rows, e, ("bias",))
        keys = {"weight": f"{key}.weight"}
        kind = getattr(norm, "kind", "batch" if isinstance(norm, nn.BatchNorm1d) else None)
        if kind is not None:
            views |= {f"norm.{part}": view for part, view in _rows(norm, rows, e).items()}
        if bias:
            keys["bias"] = f"{key}.bias"
        if norm_key:
            names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
            keys |= {f"norm.{part}": f"{norm_key}.{part}" for part in names}
        norms = self.layout.norms if norm_key else (None,)
        if kind is not None and kind not in norms:
            raise ValueError(f"this layout has no {kind} norm at {key!r}; the network has one")
        return Site(views, keys, kind, norms, self.layout.norm_bias)

    def _gates(self, gates: nn.Module, number: int, tasks: int) -> Iterator[Site]:
        hidden, begin = gates.hidden, 0
        if gates.custom is not None:
            raise TypeError("the network has modules of its own (expert=, gate= or tower=), which no layout knows")
        if (gates.logits.bias is not None) != self.layout.gate_bias:
            raise ValueError(f"this layout needs a network with gate_bias={self.layout.gate_bias}")
        for u, n in enumerate(gates.routes):
            at = self._of("gate_hidden", u, tasks)
            if hidden is not None:
                if at is None:
                    raise ValueError("this layout has linear gates; the network has gate_dims")
                yield from self.mlp(hidden, u, at.format(l=number, u=u))
            norm = self._of("gate_norm", u, tasks)
            rows, begin = slice(begin, begin + n), begin + n
            key = self._of("gate", u, tasks).format(l=number, u=u)
            norm = norm and norm.format(l=number, u=u)
            yield self._site(gates.logits, gates.norm, rows, key, norm, bias=self.layout.gate_bias)

    def _static(self) -> Iterator[Site]:
        """v of AdaTT, where it is learned."""
        by_level, parts = "{l}" in self.layout.static, {}
        for number, level in enumerate(self.levels):
            if level.matrix is not None:
                yield Site({"static": level.matrix.detach()}, {"static": self.layout.static.format(l=number)})
                continue
            adatt = level.adatt
            expected = any(n != 1 for n in level.units)
            if adatt.residual and any(learned != expected for _, learned in adatt.weights):
                raise ValueError("single_expert='per_unit' has no place in this layout, which follows 'paper'")
            if adatt.native is None:
                continue
            sizes = level.units[: adatt.rows]
            if by_level:
                if len(set(sizes)) > 1:
                    raise ValueError(f"this layout takes equal task_experts; got {sizes} at level {number}")
                view = adatt.native.detach().view(len(sizes), -1)
                yield Site({"static": view}, {"static": self.layout.static.format(l=number)})
                continue
            for u, view in enumerate(adatt.native.detach().split(sizes)):
                parts.setdefault(u, []).append(view)
        for u, views in parts.items():
            if len({view.numel() for view in views}) > 1:
                raise ValueError(f"this layout takes as many experts at every level; unit {u} has unequal counts")
            for row, view in enumerate(views):
                yield Site({"static": view}, {"static": self.layout.static.format(u=u)}, row=row, rows=len(views))

    def towers(self, towers: nn.Module) -> Iterator[Site]:
        if not isinstance(towers, Towers) or towers.towers is not None:
            raise TypeError("the towers are modules of their own, which no layout knows")
        yield from self._towers(towers.hidden, towers.last, towers.out_features)

    def _towers(self, hidden: nn.Module | None, last: nn.Module, outputs: Sequence[int]) -> Iterator[Site]:
        depth, begin = 0, 0
        for t, n in enumerate(outputs):
            u = self.layout.names[t] if self.layout.names else t
            if hidden is not None:
                depth = len(hidden.linears)
                yield from self.mlp(hidden, t, self.layout.tower.format(u=u))
            key = self.layout.tower_last.format_map({"u": u, "4k": 4 * depth})
            site = self._site(last, None, slice(begin, begin + n), key, None)
            if self.layout.tower_bias:
                site.keys["bias"] = self.layout.tower_bias.format(u=u)
            yield site
            begin += n


def _rows(module: nn.Module, rows: slice, e: int, names: Sequence[str] = ()) -> dict[str, Tensor]:
    """Those rows of a module's [E,N] tensors; of a norm's counter [E] the e-th."""
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    views = {}
    for name in names or held:
        if held.get(name) is not None:
            tensor = held[name].detach()
            counter = name == "num_batches_tracked"
            views[name] = tensor.view(-1)[e if counter else rows] if tensor.dim() else tensor
    return views
