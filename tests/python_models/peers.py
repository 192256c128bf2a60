"""TorchEasyRec's networks in plain modules with its state_dict keys, from the description of what they compute.

For the interop tests; those of facebookresearch/AdaTT are in `bench.adatt_repo`.
"""

import torch
from torch import nn

from bench.adatt_repo import widths


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
