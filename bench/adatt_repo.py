"""The structures of facebookresearch/AdaTT (``mtl_lib.py``) as plain modules, with its state_dict keys.

One module an expert and a gate; each of them reads ``inputs[:, unit, :]`` anew, the outputs are stacked and mixed by
``bmm``. `build` makes the structure with the numbers of one of our networks; x [B,K] is expanded to one input a unit,
as ``CentralTaskArch`` does. With ``take="unbind"`` the same modules read ``inputs.unbind(1)``: the gradient of a slice
fills a whole tensor of the inputs' size, and there is one for each reader.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from python_models import PLE as OurPLE
from python_models import AdaTT, MMoE
from python_models import CrossStitch as OurCrossStitch
from python_models import SharedBottom as OurSharedBottom
from python_models.interop import export_state

SLICES, UNBIND = "slices", "unbind"


class MLP(nn.Module):
    """ReLU after every layer, the last one included."""

    def __init__(self, width: int, dims: Sequence[int]) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for dim in dims:
            parts += [nn.Linear(width, dim), nn.ReLU()]
            width = dim
        self.mlp_net = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp_net(x)


class Reader(nn.Module):
    """How experts and gates get their unit of inputs [B,U,K]."""

    units = 1

    def __init__(self, take: str = SLICES) -> None:
        super().__init__()
        self.take = take

    def unit(self, inputs: Tensor) -> Callable[[int], Tensor]:
        """Gives the inputs of unit u."""
        if self.take == SLICES:
            return lambda u: inputs[:, u, :]
        return inputs.unbind(1).__getitem__

    def each(self, x: Tensor) -> Tensor:
        """x [B,K] as every unit's input."""
        return x.unsqueeze(1).expand(-1, self.units, -1) if x.dim() == 2 else x


def gate(width: int, routes: int) -> nn.Sequential:
    """Logits and softmax."""
    return nn.Sequential(nn.Linear(width, routes), nn.Softmax(-1))


def widths(width: int, dims: Sequence[Sequence[int]]) -> list[int]:
    """What every level reads."""
    return [width, *(level[-1] for level in dims[:-1])]


class Fusion(Reader):
    """AdaTTSp ("att_sp"), AdaTTWSharedExps ("att_g") and PLE ("ple"): [B,U,K] or [B,K] -> [B,T,D].

    own: experts of every task; shared: those of the shared unit, which is the last and has no output at the last level.
    """

    def __init__(
        self,
        kind: str,
        width: int,
        dims: Sequence[Sequence[int]],
        own: Sequence[int],
        shared: int = 0,
        residual: bool = True,
        take: str = SLICES,
    ) -> None:
        super().__init__(take)
        self.kind, self.counts, self.tasks, self.residual = (
            kind,
            [*own, *([shared] if shared else [])],
            len(own),
            residual,
        )
        self.units, self.shared = len(self.counts), shared
        self.experts, self.gate_weights = nn.ModuleList(), nn.ModuleList()
        levels, total = len(dims), sum(self.counts)
        for i, (k, level) in enumerate(zip(widths(width, dims), dims, strict=True)):
            rows = self.tasks + (shared > 0 and i + 1 < levels)
            self.experts.append(nn.ModuleList(MLP(k, level) for _ in range(total)))
            routes = [own[u] + shared if kind == "ple" and u < self.tasks else total for u in range(rows)]
            self.gate_weights.append(nn.ModuleList(gate(k, n) for n in routes))
        learned = residual and kind != "ple" and any(n != 1 for n in self.counts)
        if kind == "att_sp" and learned:
            self.self_exp_weights = nn.ParameterList(torch.randn(self.tasks, own[0]) for _ in dims)
        if kind == "att_g" and learned:
            self.self_exp_weights = nn.ParameterList(
                torch.randn(levels - (u == self.tasks), n) for u, n in enumerate(self.counts)
            )

    def forward(self, x: Tensor) -> Tensor:
        inputs, mix = self.each(x), {"att_sp": self.mix_sp, "att_g": self.mix_general, "ple": self.mix_ple}[self.kind]
        reads = [u for u, n in enumerate(self.counts) for _ in range(n)]
        for i, (experts, gates) in enumerate(zip(self.experts, self.gate_weights, strict=True)):
            unit = self.unit(inputs)
            outputs = torch.stack([expert(unit(u)) for expert, u in zip(experts, reads, strict=True)], 1)
            inputs = mix(i, outputs, [weigh(unit(u)) for u, weigh in enumerate(gates)])
        return inputs

    def mix_sp(self, level: int, outputs: Tensor, weights: list[Tensor]) -> Tensor:
        """Two sums: all experts by the gates, own experts by v."""
        mixed = torch.bmm(torch.stack(weights, 1), outputs)
        if not self.residual:
            return mixed
        if not hasattr(self, "self_exp_weights"):
            return mixed + outputs
        own = outputs.view(len(outputs), self.tasks, self.counts[0], -1)
        return mixed + torch.einsum("te,bted->btd", self.self_exp_weights[level], own)

    def mix_general(self, level: int, outputs: Tensor, weights: list[Tensor]) -> Tensor:
        """One sum: v goes into the gates, in place."""
        gates, begin = torch.stack(weights, 1), 0
        for u, n in enumerate(self.counts[: gates.shape[1] if self.residual else 0]):
            own = self.self_exp_weights[u][level] if hasattr(self, "self_exp_weights") else gates.new_ones(n)
            gates[:, u, begin : begin + n] += own.unsqueeze(0)
            begin += n
        return torch.bmm(gates, outputs)

    def mix_ple(self, level: int, outputs: Tensor, weights: list[Tensor]) -> Tensor:
        """A bmm a unit: own experts and the shared ones, which lie last; the shared unit takes all."""
        mixed, begin = [], 0
        for u, w in enumerate(weights):
            read = outputs
            if u < self.tasks:
                read = torch.cat([outputs[:, begin : begin + self.counts[u]], outputs[:, -self.shared :]], 1)
                begin += self.counts[u]
            mixed.append(torch.bmm(w.unsqueeze(1), read))
        return torch.cat(mixed, 1)


class MLMMoE(Reader):
    """MMoE with levels: every gate reads the raw x. [B,K] -> [B,T,D]."""

    def __init__(
        self,
        width: int,
        dims: Sequence[Sequence[int]],
        gate_dims: Sequence[int],
        tasks: int,
        num_experts: int,
        take: str = SLICES,
    ) -> None:
        super().__init__(take)
        self.units, self.experts, self.gates = num_experts, nn.ModuleList(), nn.ModuleList()
        last = gate_dims[-1] if gate_dims else width
        for i, (k, level) in enumerate(zip(widths(width, dims), dims, strict=True)):
            rows = num_experts if i + 1 < len(dims) else tasks
            self.experts.append(nn.ModuleList(MLP(k, level) for _ in range(num_experts)))
            self.gates.append(
                nn.ModuleList(nn.Sequential(MLP(width, gate_dims), *gate(last, num_experts)) for _ in range(rows))
            )

    def forward(self, x: Tensor) -> Tensor:
        inputs = self.each(x)
        for experts, gates in zip(self.experts, self.gates, strict=True):
            unit = self.unit(inputs)
            outputs = torch.stack([expert(unit(e)) for e, expert in enumerate(experts)], 1)
            inputs = torch.bmm(torch.stack([weigh(x) for weigh in gates], 1), outputs)
        return inputs


class CrossStitch(Reader):
    """An expert a task, and a linear layer over the tasks after each level. [B,T,K] or [B,K] -> [B,T,D]."""

    def __init__(self, width: int, dims: Sequence[Sequence[int]], tasks: int, take: str = SLICES) -> None:
        super().__init__(take)
        self.units, self.experts, self.stitchs = tasks, nn.ModuleList(), nn.ModuleList()
        for k, level in zip(widths(width, dims), dims, strict=True):
            self.experts.append(nn.ModuleList(MLP(k, level) for _ in range(tasks)))
            self.stitchs.append(nn.Linear(tasks, tasks, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.each(x)
        for experts, stitch in zip(self.experts, self.stitchs, strict=True):
            unit = self.unit(x)
            outputs = torch.stack([expert(unit(t)) for t, expert in enumerate(experts)], 1)
            x = stitch(outputs.transpose(1, 2)).transpose(1, 2)
        return x


class SharedBottom(nn.Module):
    """One MLP for all tasks. [B,K] -> [B,T,D]."""

    def __init__(self, width: int, dims: Sequence[int], tasks: int) -> None:
        super().__init__()
        self.bottom_projection, self.tasks = MLP(width, dims), tasks

    def forward(self, x: Tensor) -> Tensor:
        return self.bottom_projection(x).unsqueeze(1).expand(-1, self.tasks, -1)


class CentralTaskArch(nn.Module):
    """A structure, and an MLP and a linear layer a task: [B,K] -> [B,T] logits."""

    def __init__(self, fusion: nn.Module, width: int, tasks: int, dims: Sequence[int]) -> None:
        super().__init__()
        self.mtl_arch = fusion
        last = dims[-1] if dims else width
        self.task_modules = nn.ModuleList(nn.Sequential(MLP(width, dims), nn.Linear(last, 1)) for _ in range(tasks))

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.mtl_arch(x)
        return torch.cat([tower(outputs[:, t, :]) for t, tower in enumerate(self.task_modules)], 1)


def _dims(banks: Any) -> list[list[int]]:
    return [[layer.out_features for layer in bank.linears] for bank in banks]


def _fusion(ours: nn.Module, take: str) -> tuple[Fusion, str]:
    first, tasks = ours.levels[0], ours.num_tasks
    own, shared = first.experts_per_unit[:tasks], sum(first.experts_per_unit[tasks:])
    kind = "ple" if isinstance(ours, OurPLE) else "att_g" if shared else "att_sp"
    residual = kind != "ple" and first.residual
    dims = _dims(level.experts for level in ours.levels)
    return Fusion(kind, ours.in_features, dims, own, shared, residual, take), f"adatt.{kind}"


def build(ours: nn.Module, take: str = SLICES) -> nn.Module:
    """The structure with the numbers of `ours`; TypeError where the repository has none like it."""
    if isinstance(ours, (AdaTT, OurPLE)):
        theirs, layout = _fusion(ours, take)
    elif isinstance(ours, MMoE):
        theirs = MLMMoE(ours.in_features, _dims(ours.experts), [], ours.num_tasks, ours.experts[0].num_experts, take)
        layout = "adatt.mmoe"
    elif isinstance(ours, OurCrossStitch):
        theirs, layout = CrossStitch(ours.in_features, _dims(ours.experts), ours.num_tasks, take), "adatt.cross_st"
    elif isinstance(ours, OurSharedBottom):
        (dims,) = _dims([ours.bottom])
        theirs, layout = SharedBottom(ours.in_features, dims, ours.num_tasks), "adatt.share_bottom"
    else:
        raise TypeError(f"ours: got {type(ours).__name__}, which facebookresearch/AdaTT has no structure for")
    state = export_state(ours, layout)
    example = next(iter(state.values()))
    theirs.to(example.device, example.dtype).load_state_dict(state)
    return theirs
