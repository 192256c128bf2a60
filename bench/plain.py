"""Every architecture as people write it: one module an expert, gate or task, looped over, with the weights of ours.

Each class is made from our network and copies its numbers into ``torch.nn`` modules; the equations are those that our
network's docstring names. MMoE is `bench.rivals.PerExpert`; networks with a structure that is drawn or searched for are
in `bench.plain_searched`.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.rivals import PerExpert, levels_of, linear, value
from mtlkernels.nn import ExpertLinear


def wide(t: Tensor) -> Tensor:
    """What is drawn or chosen is computed in float32 at least, or a 16-bit network would choose otherwise."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def copied(t: Tensor) -> nn.Parameter:
    """A parameter with the numbers of `t`."""
    return nn.Parameter(t.detach().clone())


def linears(bank: ExpertLinear) -> nn.ModuleList:
    """A bank's layers, one by one."""
    biases = bank.bias if bank.bias is not None else [None] * bank.num_experts
    return nn.ModuleList(linear(w, b) for w, b in zip(bank.weight, biases, strict=True))


def gates_of(gates: nn.Module) -> nn.ModuleList:
    """A level's linear gates, one by one: a gate's rows lie behind one another, whether ours are packed or not."""
    weights, biases = gates.logits.weight.flatten(0, 1), gates.logits.bias.flatten()
    rows = zip(weights.split(gates.routes), biases.split(gates.routes), strict=True)
    return nn.ModuleList(linear(w, b) for w, b in rows)


def by_unit(level: nn.Module) -> nn.ModuleList:
    """A level's experts, a list for each unit."""
    experts = list(level.experts.to_modules())
    ends = torch.tensor(level.experts_per_unit).cumsum(0).tolist()
    return nn.ModuleList(
        nn.ModuleList(experts[end - n : end]) for n, end in zip(level.experts_per_unit, ends, strict=True)
    )


def mmoe(ours: nn.Module) -> PerExpert:
    """MMoE with one level."""
    return PerExpert(levels_of(ours, value), "shared")


class Tasks(nn.Module):
    """T networks of their own: soft sharing; over a bottom, MRN."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.bottom, self.stacked = nn.Identity(), not hasattr(ours, "towers")
        if self.stacked:
            self.networks = ours.experts.to_modules()
        else:
            (self.bottom,) = ours.bottom.bottom.to_modules()
            self.networks = towers(ours.towers.hidden, ours.towers.last)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bottom(x)
        outputs = [network(h) for network in self.networks]
        return torch.stack(outputs, 1) if self.stacked else torch.cat(outputs, 1)


def towers(hidden: nn.Module, last: ExpertLinear) -> nn.ModuleList:
    """Task by task, the hidden layers and the last."""
    return nn.ModuleList(nn.Sequential(a, b) for a, b in zip(hidden.to_modules(), linears(last), strict=True))


class SharedBottom(nn.Module):
    """One MLP."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.num_tasks = ours.num_tasks
        (self.bottom,) = ours.bottom.to_modules()

    def forward(self, x: Tensor) -> Tensor:
        return self.bottom(x).unsqueeze(1).expand(-1, self.num_tasks, -1)


class Units(nn.Module):
    """CGC, PLE and AdaTT: levels of units, each with experts, and a gate where it has an output."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.num_units, kind = ours.num_units, AdaTTLevel if hasattr(ours.levels[0], "native") else CGCLevel
        self.levels = nn.ModuleList(kind(level, ours.num_tasks) for level in ours.levels)

    def forward(self, x: Tensor) -> Tensor:
        units = [x] * self.num_units
        for level in self.levels:
            units = level(units)
        return torch.stack(units, 1)


class CGCLevel(nn.Module):
    """A task mixes its own experts and the shared ones, the shared unit all of them."""

    def __init__(self, level: nn.Module, num_tasks: int) -> None:
        super().__init__()
        self.num_tasks, self.experts, self.gates = num_tasks, by_unit(level), gates_of(level.gates)

    def forward(self, units: list[Tensor]) -> list[Tensor]:
        outputs = [[expert(h) for expert in experts] for experts, h in zip(self.experts, units, strict=True)]
        mixed = []
        for u, gate in enumerate(self.gates):
            read = outputs[u] + outputs[-1] if u < self.num_tasks else sum(outputs, [])
            weights = torch.softmax(gate(units[u]), -1)
            mixed.append(torch.bmm(weights.unsqueeze(1), torch.stack(read, 1)).squeeze(1))
        return mixed


class AdaTTLevel(nn.Module):
    """Every unit mixes all experts by its gate, and adds its own by learned weights v."""

    def __init__(self, level: nn.Module, num_tasks: int) -> None:
        super().__init__()
        self.experts, self.gates = by_unit(level), gates_of(level.gates)
        parts = level.native.split(level.experts_per_unit[: level.rows])
        self.native = nn.ParameterList([copied(v) for v in parts])

    def forward(self, units: list[Tensor]) -> list[Tensor]:
        outputs = [
            torch.stack([expert(h) for expert in experts], 1) for experts, h in zip(self.experts, units, strict=True)
        ]
        weights = torch.stack([torch.softmax(gate(h), -1) for gate, h in zip(self.gates, units, strict=False)], 1)
        mixed = torch.bmm(weights, torch.cat(outputs, 1)).unbind(1)
        own = [torch.einsum("e,bed->bd", v, e) for v, e in zip(self.native, outputs, strict=False)]
        return [m + o for m, o in zip(mixed, own, strict=True)]


class STAR(nn.Module):
    """Domain by domain: its rows, its statistics, its weights times the shared ones."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        norm, width = ours.norm, ours.in_features
        options = {"eps": norm.eps, "momentum": norm.momentum, "affine": False, "dtype": norm.weight.dtype}
        self.norms = nn.ModuleList(nn.BatchNorm1d(width, **options) for _ in range(ours.num_domains))
        self.norms.to(norm.weight.device)
        tables = [(norm.weight, norm.bias, norm.domain_weight, norm.domain_bias)]
        tables += [(layer.weight, layer.bias, layer.domain_weight, layer.domain_bias) for layer in ours.layers]
        self.weights, self.biases = (nn.ParameterList([copied(t[k]) for t in tables]) for k in (0, 1))
        self.own_weights, self.own_biases = (
            nn.ModuleList(nn.ParameterList([copied(own) for own in t[k]]) for t in tables) for k in (2, 3)
        )
        self.domains = copy.deepcopy(ours.domains)
        layers = [layer for part in ours.auxiliary for layer in (copy.deepcopy(part), nn.ReLU())]
        self.auxiliary = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor, domain: Tensor) -> Tensor:
        logit = self.auxiliary(self.domains(domain)).squeeze(1)
        for p, norm in enumerate(self.norms):
            rows = (domain == p).nonzero().squeeze(1)
            products = [w * own[p] for w, own in zip(self.weights, self.own_weights, strict=True)]
            sums = [b + own[p] for b, own in zip(self.biases, self.own_biases, strict=True)]
            h = norm(x.index_select(0, rows)) * products[0] + sums[0]
            for weight, bias in zip(products[1:-1], sums[1:-1], strict=True):
                h = torch.relu(F.linear(h, weight, bias))
            logit = logit.index_add(0, rows, F.linear(h, products[-1], sums[-1]).squeeze(1))
        return logit


class Stitched(nn.Module):
    """Cross-stitch networks; with subspaces and a mix of all levels' outputs, sluice networks."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.networks = nn.ModuleList(level.to_modules() for level in ours.experts)
        self.alphas = nn.ParameterList([copied(stitch.weight) for stitch in ours.stitches])
        self.beta = copied(ours.beta) if hasattr(ours, "beta") else None

    def forward(self, x: Tensor) -> Tensor:
        inputs, outputs = [x] * len(self.networks[0]), []
        for networks, alpha in zip(self.networks, self.alphas, strict=True):
            h = torch.stack([network(x) for network, x in zip(networks, inputs, strict=True)], 1)
            blocks = h.view(h.shape[0], alpha.shape[0], -1)
            outputs.append(torch.einsum("ij,bjd->bid", alpha, blocks).reshape(h.shape))
            inputs = outputs[-1].unbind(1)
        return outputs[-1] if self.beta is None else torch.einsum("tl,btld->btd", self.beta, torch.stack(outputs, 2))


class MTAN(nn.Module):
    """A trunk, and for each task its masks; F sees all tasks' rows together."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        names = ("early", "late", "carry", "inner", "mask")
        banks = [{name: getattr(block, name) for name in names} for block in ours.blocks]
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: bank.to_modules() for name, bank in block.items() if bank is not None})
            for block in banks
        )

    def forward(self, x: Tensor) -> Tensor:
        late, masked = x, []
        for block in self.blocks:
            early = block["early"][0](late)
            late = block["late"][0](early)
            inputs = [early] * len(block["inner"])
            if masked:
                carried = block["carry"][0](torch.cat(masked)).chunk(len(masked))
                inputs = [torch.cat([early, c], 1) for c in carried]
            attention = [inner(h) for inner, h in zip(block["inner"], inputs, strict=True)]
            masked = [mask(h) * late for mask, h in zip(block["mask"], attention, strict=True)]
        return torch.stack(masked, 1)


class ESMM(nn.Module):
    """Two towers, and the two losses in probabilities."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.ctr, self.cvr = towers(ours.hidden, ours.last)

    def forward(self, x: Tensor, click: Tensor, conversion: Tensor) -> Tensor:
        ctr, cvr = (torch.sigmoid(wide(tower(x).squeeze(1))) for tower in (self.ctr, self.cvr))
        click, conversion = click.to(ctr.dtype), conversion.to(ctr.dtype)
        return F.binary_cross_entropy(ctr, click) + F.binary_cross_entropy(ctr * cvr, click * conversion)


class UberNet(nn.Module):
    """A trunk; a linear layer a task and depth, and one that fuses a task's scores."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.trunk = nn.ModuleList(layer.to_modules()[0] for layer in ours.trunk)
        self.norms = copy.deepcopy(ours.norms)
        split = ours.skip_features
        self.skips = nn.ModuleList(
            nn.ModuleList(linear(w, b) for w, b in zip(s.weight[0].split(split), s.bias[0].split(split), strict=True))
            for s in ours.skips
        )
        biases = ours.fusion.bias.view(ours.fusion.weight.shape[:2])
        self.fusions = nn.ModuleList(linear(w, b) for w, b in zip(ours.fusion.weight, biases, strict=True))

    def forward(self, h: Tensor) -> Tensor:
        scores: list[list[Tensor]] = [[] for _ in self.fusions]
        for layer, norm, skips in zip(self.trunk, self.norms, self.skips, strict=True):
            h = layer(h)
            normed = norm(h)
            for own, skip in zip(scores, skips, strict=True):
                own.append(skip(normed))
        return torch.cat([fuse(torch.cat(own, 1)) for fuse, own in zip(self.fusions, scores, strict=True)], 1)
