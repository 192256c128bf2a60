"""Networks of other libraries in plain modules, with those libraries' state_dict keys; for the interop tests.

facebookresearch/AdaTT's (``mtl_lib.py``) and TorchEasyRec's, from the description of what they compute.
"""

import torch
from torch import nn


class MLP(nn.Module):
    def __init__(self, width, dims):
        super().__init__()
        parts = []
        for dim in dims:
            parts += [nn.Linear(width, dim), nn.ReLU()]
            width = dim
        self.mlp_net = nn.Sequential(*parts)

    def forward(self, x):
        return self.mlp_net(x)


def gate(width, routes):
    return nn.Sequential(nn.Linear(width, routes), nn.Softmax(-1))


def widths(width, dims):
    return [width, *(level[-1] for level in dims[:-1])]


class Fusion(nn.Module):
    """AdaTTSp, AdaTTWSharedExps and PLE: own experts, then the shared unit's, gates a unit, v where it is learned."""

    def __init__(self, kind, width, dims, own, shared=0):
        super().__init__()
        self.kind, self.counts, self.tasks = kind, [*own, shared] if shared else list(own), len(own)
        self.experts, self.gate_weights = nn.ModuleList(), nn.ModuleList()
        levels, total = len(dims), sum(self.counts)
        for i, (k, level) in enumerate(zip(widths(width, dims), dims, strict=True)):
            rows = self.tasks + (shared > 0 and i + 1 < levels)
            self.experts.append(nn.ModuleList(MLP(k, level) for _ in range(total)))
            routes = [own[u] + shared if kind == "ple" and u < self.tasks else total for u in range(rows)]
            self.gate_weights.append(nn.ModuleList(gate(k, n) for n in routes))
        learned = kind != "ple" and any(n != 1 for n in self.counts)
        if kind == "att_sp" and learned:
            self.self_exp_weights = nn.ParameterList(torch.randn(self.tasks, own[0]) for _ in dims)
        if kind == "att_g" and learned:
            self.self_exp_weights = nn.ParameterList(
                torch.randn(levels - (u == self.tasks), n) for u, n in enumerate(self.counts)
            )

    def native(self, i, u):
        if not hasattr(self, "self_exp_weights"):
            return torch.ones(1)
        return self.self_exp_weights[i][u] if self.kind == "att_sp" else self.self_exp_weights[u][i]

    def forward(self, x):
        units = [x] * len(self.counts)
        begin = [sum(self.counts[:u]) for u in range(len(self.counts) + 1)]
        for i, (experts, gates) in enumerate(zip(self.experts, self.gate_weights, strict=True)):
            reads = [u for u, n in enumerate(self.counts) for _ in range(n)]
            outputs = [expert(units[u]) for expert, u in zip(experts, reads, strict=True)]
            mixed = []
            for u, weigh in enumerate(gates):
                mine = outputs[begin[u] : begin[u + 1]]
                used = outputs if self.kind != "ple" or u == self.tasks else mine + outputs[begin[self.tasks] :]
                out = torch.einsum("be,bed->bd", weigh(units[u]), torch.stack(used, 1))
                if self.kind != "ple":
                    out = out + torch.einsum("e,bed->bd", self.native(i, u).to(out), torch.stack(mine, 1))
                mixed.append(out)
            units = mixed
        return torch.stack(units, 1)


class MLMMoE(nn.Module):
    def __init__(self, width, dims, gate_dims, tasks, num_experts):
        super().__init__()
        self.experts, self.gates = nn.ModuleList(), nn.ModuleList()
        last = gate_dims[-1] if gate_dims else width
        for i, (k, level) in enumerate(zip(widths(width, dims), dims, strict=True)):
            rows = num_experts if i + 1 < len(dims) else tasks
            self.experts.append(nn.ModuleList(MLP(k, level) for _ in range(num_experts)))
            self.gates.append(
                nn.ModuleList(nn.Sequential(MLP(width, gate_dims), *gate(last, num_experts)) for _ in range(rows))
            )

    def forward(self, x):
        units = [x] * len(self.experts[0])
        for experts, gates in zip(self.experts, self.gates, strict=True):
            outputs = torch.stack([expert(h) for expert, h in zip(experts, units, strict=True)], 1)
            units = [torch.einsum("be,bed->bd", weigh(x), outputs) for weigh in gates]
        return torch.stack(units, 1)


class CrossStitch(nn.Module):
    def __init__(self, width, dims, tasks):
        super().__init__()
        self.experts, self.stitchs = nn.ModuleList(), nn.ModuleList()
        for widths in dims:
            self.experts.append(nn.ModuleList(MLP(width, widths) for _ in range(tasks)))
            self.stitchs.append(nn.Linear(tasks, tasks, bias=False))
            width = widths[-1]

    def forward(self, x):
        x = torch.stack([x] * len(self.experts[0]), 1)
        for experts, stitch in zip(self.experts, self.stitchs, strict=True):
            outputs = torch.stack([expert(h) for expert, h in zip(experts, x.unbind(1), strict=True)], 1)
            x = stitch(outputs.transpose(1, 2)).transpose(1, 2)
        return x


class SharedBottom(nn.Module):
    def __init__(self, width, dims, tasks):
        super().__init__()
        self.bottom_projection, self.tasks = MLP(width, dims), tasks

    def forward(self, x):
        return torch.stack([self.bottom_projection(x)] * self.tasks, 1)


class CentralTaskArch(nn.Module):
    def __init__(self, fusion, width, tasks, dims):
        super().__init__()
        self.mtl_arch = fusion
        last = dims[-1] if dims else width
        self.task_modules = nn.ModuleList(nn.Sequential(MLP(width, dims), nn.Linear(last, 1)) for _ in range(tasks))

    def forward(self, x):
        return torch.cat([tower(h) for tower, h in zip(self.task_modules, self.mtl_arch(x).unbind(1), strict=True)], 1)


class Perceptron(nn.Module):
    def __init__(self, width, dim, norm):
        super().__init__()
        parts = [nn.Linear(width, dim, bias=norm != "batch")]
        if norm:
            parts.append({"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}[norm](dim))
        self.perceptron = nn.Sequential(*parts, nn.ReLU())

    def forward(self, x):
        return self.perceptron(x)


class EasyMLP(nn.Module):
    def __init__(self, width, dims, norm=None):
        super().__init__()
        self.mlp = nn.ModuleList(Perceptron(k, n, norm) for k, n in zip([width, *dims], dims, strict=False))

    def forward(self, x):
        for layer in self.mlp:
            x = layer(x)
        return x


class EasyMMoE(nn.Module):
    def __init__(self, width, dims, num_experts, tasks, gate_dims=(), norm=None):
        super().__init__()
        self.expert_mlps = nn.ModuleList(EasyMLP(width, dims, norm) for _ in range(num_experts))
        if gate_dims:
            self.gate_mlps = nn.ModuleList(EasyMLP(width, gate_dims) for _ in range(tasks))
        last = gate_dims[-1] if gate_dims else width
        self.gate_finals = nn.ModuleList(nn.Linear(last, num_experts) for _ in range(tasks))

    def forward(self, x):
        outputs = torch.stack([expert(x) for expert in self.expert_mlps], 1)
        hidden = [mlp(x) for mlp in self.gate_mlps] if hasattr(self, "gate_mlps") else [x] * len(self.gate_finals)
        weights = [final(h).softmax(-1) for final, h in zip(self.gate_finals, hidden, strict=True)]
        return torch.stack([torch.einsum("be,bed->bd", w, outputs) for w in weights], 1)


class ExtractionNet(nn.Module):
    """One level; per-unit inputs, the tasks' then the shared one."""

    def __init__(self, width, dims, own, shared, tasks, last, norm=None):
        super().__init__()
        self._shared_layers = nn.ModuleList(EasyMLP(width, dims, norm) for _ in range(shared))
        self._shared_gate = None if last else nn.Linear(width, own * tasks + shared)
        self._task_layers = nn.ModuleList(
            nn.ModuleList(EasyMLP(width, dims, norm) for _ in range(own)) for _ in range(tasks)
        )
        self._task_gates = nn.ModuleList(nn.Linear(width, own + shared) for _ in range(tasks))

    def forward(self, units):
        shared = [expert(units[-1]) for expert in self._shared_layers]
        own = [[expert(h) for expert in experts] for experts, h in zip(self._task_layers, units, strict=False)]
        jobs = list(zip(self._task_gates, units, [mine + shared for mine in own], strict=False))
        if self._shared_gate is not None:
            jobs.append((self._shared_gate, units[-1], sum(own, []) + shared))
        return [torch.einsum("be,bed->bd", weigh(h).softmax(-1), torch.stack(used, 1)) for weigh, h, used in jobs]


class TaskTower(nn.Module):
    def __init__(self, width, dims):
        super().__init__()
        self.tower_mlp = EasyMLP(width, dims) if dims else None
        self.linear = nn.Linear(dims[-1] if dims else width, 1)

    def forward(self, x):
        return self.linear(x if self.tower_mlp is None else self.tower_mlp(x))


class EasyPLE(nn.Module):
    def __init__(self, width, dims, own, shared, tasks, tower, norm=None):
        super().__init__()
        levels = zip(widths(width, dims), dims, own, shared, strict=True)
        self.units = tasks + 1
        self._extraction_nets = nn.ModuleList(
            ExtractionNet(k, level, m, s, tasks, i + 1 == len(dims), norm) for i, (k, level, m, s) in enumerate(levels)
        )
        self._task_tower = nn.ModuleList(TaskTower(dims[-1][-1], tower) for _ in range(tasks))

    def forward(self, x):
        units = [x] * self.units
        for net in self._extraction_nets:
            units = net(units)
        return torch.cat([tower(h) for tower, h in zip(self._task_tower, units, strict=True)], 1)
