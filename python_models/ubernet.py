"""UberNet: one trunk; every task reads scores off all of its depths, and fuses them."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import mtlkernels as mtl
from mtlkernels.arguments import count, counts, is_one_of
from mtlkernels.nn import ExpertLinear, ExpertMLP

from .layers import RoutedMix, check_input

Outputs = Tensor | dict[str, Tensor]
# Without scale and shift, which the linear layer behind has anyway: so the norm is the same for all tasks.
SKIP_NORMS: dict[str | None, Callable[..., nn.Module]] = {
    None: lambda width, **factory: nn.Identity(),
    "batch": lambda width, **factory: nn.BatchNorm1d(width, affine=False, **factory),
    "layer": lambda width, **factory: nn.LayerNorm(width, elementwise_affine=False, **factory),
}


class UberNet(nn.Module):
    """A shared trunk with heads of its own: [B,K] -> [B,T], or {name: [B,n]}, as Towers gives (Kokkinos, CVPR 2017).

    ``h_l = act(W_l h_(l-1))``; scores ``s_tl = U_tl norm(h_l)``, C_t of them, are a task's from depth l;
    ``o_t = Q_t [s_t1; ...; s_tL]``. Several views of a row (feature subsets, history windows), in place of the paper's
    image pyramid, go through the same trunk and the same U; Q_t then reads the scores of all depths and views, the
    views of a depth behind one another.

    Args:
        in_features: K.
        num_tasks: T.
        dims: widths of the trunk's layers, one a depth.
        out_features: outputs of a task, one int for all or one a task.
        task_names: names of the tasks, "task0", "task1", ... by default.
        skip_features: C, scores of a task at a depth, one int for all or one a task; None: as many as its outputs.
        skip_norm: "batch", as in the paper, over the rows and views; "layer", or None.
        views: R; x is then [B,R,K].
        activation, dropout, norm: of the trunk, as in :class:`mtlkernels.nn.ExpertMLP`.

    A task with as many scores as outputs starts with the mean of its scores. A task whose outputs get no gradient, as
    from the losses of :func:`mtlkernels.masked_bce` where none of its labels is there, leaves its parameters with
    exactly zero gradient.

    Raises:
        TypeError, ValueError: naming the argument, at construction, or for an x of another shape.
    """

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        dims: Sequence[int],
        out_features: int | Sequence[int] = 1,
        task_names: Sequence[str] | None = None,
        *,
        skip_features: int | Sequence[int] | None = None,
        skip_norm: str | None = "batch",
        views: int = 1,
        activation: str | None = "relu",
        dropout: float = 0.0,
        norm: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.num_tasks = count("in_features", in_features, 0), count("num_tasks", num_tasks, 1)
        self.views, dims = count("views", views, 1), counts("dims", dims, 0)
        if not dims:
            raise ValueError("dims must name at least one layer; got an empty sequence")
        if skip_norm is not None and not is_one_of(skip_norm, SKIP_NORMS):
            raise ValueError(f"skip_norm must be None, 'batch' or 'layer'; got {skip_norm!r}")
        self.out_features = _per_task("out_features", out_features, num_tasks)
        chosen = self.out_features if skip_features is None else skip_features
        self.skip_features = _per_task("skip_features", chosen, num_tasks)
        self.task_names = [f"task{t}" for t in range(num_tasks)] if task_names is None else list(task_names)
        if len(set(self.task_names)) != num_tasks or not all(isinstance(name, str) for name in self.task_names):
            raise ValueError(f"task_names must be {num_tasks} different strings; got {self.task_names}")
        self.trunk, self.norms, self.skips = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        factory = {"device": device, "dtype": dtype}
        for width_in, width in zip([in_features, *dims], dims, strict=False):
            layer = ExpertMLP(1, width_in, [width], activation=activation, dropout=dropout, norm=norm, **factory)
            self.trunk.append(layer)
            self.norms.append(SKIP_NORMS[skip_norm](width, **factory))
            self.skips.append(ExpertLinear(1, width, sum(self.skip_features), **factory))
        self.fusion = ScoreFusion(self.skip_features, self.out_features, len(dims) * views, **factory)

    def forward(self, x: Tensor, with_scores: bool = False) -> Outputs | tuple[Outputs, list[Outputs]]:
        """The outputs; `with_scores` also the scores of every depth and view, for :func:`deeply_supervised`."""
        if self.views == 1:
            check_input(x, 1, self.in_features)
        elif not isinstance(x, Tensor) or x.shape[1:] != (self.views, self.in_features):
            found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be [B,{self.views},{self.in_features}] (rows, views, features); got {found}")
        batch = x.shape[0]
        h, found = x.reshape(batch * self.views, self.in_features), []
        for layer, norm, skip in zip(self.trunk, self.norms, self.skips, strict=True):
            h = layer(h).squeeze(1)
            found.append(skip(norm(h)).view(batch, self.views, skip.out_features))
        scores = found[0] if len(found) == 1 else torch.cat(found, 1)
        outputs = self._named(self.fusion(scores), self.out_features)
        if not with_scores:
            return outputs
        return outputs, [self._named(s, self.skip_features) for s in scores.unbind(1)]

    def _named(self, flat: Tensor, widths: list[int]) -> Outputs:
        if flat.shape[1] == self.num_tasks:
            return flat
        return dict(zip(self.task_names, flat.split(widths, 1), strict=True))

    def parameter_sets(self) -> tuple[list, list[list]]:
        """The shared parameters, and those of each task, as :class:`python_models.accumulator.AsyncTaskAccumulator`
        takes them: a task's are (parameter, start, stop), a part of the flattened tensor.
        """
        tasks = self.fusion.parameter_sets()
        for skip in self.skips:
            begin = 0
            for own, scores in zip(tasks, self.skip_features, strict=True):
                end, width = begin + scores, skip.in_features
                own += [(skip.weight, begin * width, end * width), (skip.bias, begin, end)]
                begin = end
        return list(self.trunk.parameters()), tasks


class ScoreFusion(nn.Module):
    """``o_t = Q_t s_t + q_t``: scores [B,S,sum(C)] of S depths and views -> [B,sum(O)], task t's behind task t-1's.

    ``weight`` is [T,O,S*C] where all tasks have as many scores and outputs, [sum(O),1,S*C] where as many scores, and
    else packed, output by output; ``bias`` [sum(O)].
    """

    def __init__(
        self,
        skip_features: list[int],
        out_features: list[int],
        slots: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.skip_features, self.out_features, self.slots = skip_features, out_features, slots
        num_tasks, rows, width = len(out_features), sum(out_features), slots * skip_features[0]
        self.mix = None
        shape, self.units = (num_tasks, out_features[0], width), None
        if len(set(skip_features)) > 1:
            shape = (slots * sum(c * n for c, n in zip(skip_features, out_features, strict=True)),)
            reads = [range(t, slots * num_tasks, num_tasks) for t, n in enumerate(out_features) for _ in range(n)]
            self.mix = RoutedMix(skip_features * slots, reads, device)
        elif len(set(out_features)) > 1:
            shape, self.units = (rows, 1, width), out_features
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The mean of the scores, where a task has as many as outputs; else as ``torch.nn.Linear``."""
        for (_, *weights), (_, *biases) in self.parameter_sets():
            rows, part = biases[1] - biases[0], self.weight.view(-1)[slice(*weights)].view(biases[1] - biases[0], -1)
            bias = self.bias[slice(*biases)]
            if part.shape[1] == self.slots * rows:
                eye = torch.eye(rows, device=part.device, dtype=part.dtype)
                part.copy_(eye.repeat(1, self.slots) / self.slots)
                bias.zero_()
                continue
            bound = 1 / math.sqrt(part.shape[1])
            part.uniform_(-bound, bound)
            bias.uniform_(-bound, bound)

    def parameter_sets(self) -> list[list[tuple[nn.Parameter, int, int]]]:
        """Of each task: its part of the flattened weight, and of the bias."""
        found, at, row = [], 0, 0
        for scores, outputs in zip(self.skip_features, self.out_features, strict=True):
            size = self.slots * scores * outputs
            found.append([(self.weight, at, at + size), (self.bias, row, row + outputs)])
            at, row = at + size, row + outputs
        return found

    def forward(self, scores: Tensor) -> Tensor:
        if self.mix is not None:
            mixed = self.mix(scores.flatten(1).unsqueeze(-1), static=self.weight).squeeze(-1)
            return mixed + self.bias.to(mixed.dtype)
        batch, tasks = scores.shape[0], len(self.out_features)
        by_task = scores.view(batch, self.slots, tasks, self.skip_features[0]).transpose(1, 2)
        by_task = by_task.reshape(batch, tasks, self.slots * self.skip_features[0])
        bias = self.bias.view(self.weight.shape[:2])
        return mtl.expert_linear(by_task, self.weight, bias, experts_per_unit=self.units).flatten(1)


def deeply_supervised(
    loss: Callable[[Outputs], Tensor], outputs: Outputs, scores: Sequence[Outputs], weight: float = 0.0
) -> Tensor:
    """``loss(outputs) + weight * sum of loss(s) over the scores`` of :meth:`UberNet.forward`, which are then trained as
    outputs; they have to be as many as these. The loss is not called for a weight of 0.
    """
    total = loss(outputs)
    return total + weight * sum(loss(s) for s in scores) if weight else total


def _per_task(name: str, value: int | Sequence[int], num_tasks: int) -> list[int]:
    found = counts(name, [value] * num_tasks if isinstance(value, int) else value, 1)
    if len(found) != num_tasks:
        raise ValueError(f"{name} has {len(found)} entries for num_tasks={num_tasks}: {found}")
    return found
