"""Networks as a user writes them, of plain torch.nn modules."""

import torch
from torch import nn


def mlp(features, width, *more):
    return nn.Sequential(nn.Linear(features, 2 * width), nn.ReLU(), nn.Linear(2 * width, width), nn.ReLU(), *more)


class MMoE(nn.Module):
    """A bottom, a loop over experts, a gate and a tower a task."""

    def __init__(self, features=12, experts=5, tasks=3, width=8):
        super().__init__()
        self.bottom = nn.Linear(features, features)
        self.experts = nn.ModuleList(mlp(features, width, nn.Dropout(0.1)) for _ in range(experts))
        self.gates = nn.ModuleList(nn.Linear(features, experts) for _ in range(tasks))
        self.towers = nn.ModuleList(nn.Linear(width, 1) for _ in range(tasks))

    def forward(self, x):
        x = torch.relu(self.bottom(x))
        h = torch.stack([expert(x) for expert in self.experts], 1)
        mixed = [(torch.softmax(gate(x), -1).unsqueeze(-1) * h).sum(1) for gate in self.gates]
        return {t: tower(z) for t, (tower, z) in enumerate(zip(self.towers, mixed, strict=True))}


class SoftmaxGates(nn.Module):
    """Gates that end in their softmax, and experts that are no list."""

    def __init__(self, features=12, width=8):
        super().__init__()
        self.expert_a, self.expert_b = mlp(features, width), mlp(features, width)
        gate = lambda: nn.Sequential(nn.Linear(features, 2), nn.Softmax(-1))  # noqa: E731
        self.mixture = nn.ModuleDict({"gates": nn.ModuleList(gate() for _ in range(3))})

    def forward(self, x):
        h = torch.stack([self.expert_a(x), self.expert_b(x)], 2)
        return torch.cat([h @ gate(x).unsqueeze(2) for gate in self.mixture["gates"]], 2)


class PerTask(nn.Module):
    """Two experts a task, on the task's own features."""

    def __init__(self, features=12, tasks=3, width=8):
        super().__init__()
        self.experts = nn.ModuleList(mlp(features, width) for _ in range(2 * tasks))

    def forward(self, x):
        return torch.stack([expert(x[:, i // 2]) for i, expert in enumerate(self.experts)], 1)


class Deep(nn.Module):
    """Equal layers one after another: no experts."""

    def __init__(self, width=12):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class NotAMixture(MMoE):
    """Gates of the same shapes whose weights are used otherwise."""

    def forward(self, x):
        h = torch.stack([expert(x) for expert in self.experts], 1)
        return [(torch.sigmoid(gate(x)).unsqueeze(-1) * h).sum(1) for gate in self.gates]


def embedded(rows=50):
    """Whole numbers in: only parameters want gradients."""
    return nn.Sequential(nn.Embedding(rows, 6), nn.Flatten(), nn.Linear(24, 3))
