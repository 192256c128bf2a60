"""The networks whose structure is drawn, searched for or soft, as people write them, with the weights of ours.

As in `bench.plain`. What is drawn is drawn in the order, shape and dtype of ours, so that both agree after one
``torch.manual_seed``; a copy in float64 goes on drawing in the dtype that it was made in.
"""

import torch
from torch import Tensor, nn

from bench.plain import copied, linears, wide
from bench.rivals import linear


class Drawn(nn.Module):
    """A parameter from which a structure is drawn."""

    def __init__(self, parameter: Tensor) -> None:
        super().__init__()
        self.parameter = copied(parameter)
        self.dtype = wide(parameter).dtype  # of the noise, whatever becomes of the parameter

    def uniform(self) -> Tensor:
        noise = torch.rand(self.parameter.shape, dtype=self.dtype, device=self.parameter.device)
        return noise.to(wide(self.parameter).dtype)


class HardConcrete(Drawn):
    """``clip(sigmoid((log u - log(1 - u) + log_alpha) / beta) (zeta - gamma) + gamma, 0, 1)`` (Louizos et al.)."""

    def __init__(self, connections: nn.Module) -> None:
        super().__init__(connections.log_alpha)
        self.beta, self.gamma, self.zeta = connections.beta, connections.gamma, connections.zeta

    def forward(self) -> Tensor:
        noise = self.uniform().clamp(1e-6, 1 - 1e-6)
        s = torch.sigmoid((noise.log() - (1 - noise).log() + wide(self.parameter)) / self.beta)
        return (s * (self.zeta - self.gamma) + self.gamma).clamp(0, 1)


class Gumbel(Drawn):
    """``softmax((log softmax(theta) + g) / temperature)``, or its largest entry with that gradient."""

    def __init__(self, theta: Tensor, temperature: float, hard: bool) -> None:
        super().__init__(theta)
        self.temperature, self.hard = temperature, hard

    def forward(self) -> Tensor:
        uniform = self.uniform().clamp_min(torch.finfo(self.dtype).tiny)
        logits = wide(self.parameter).log_softmax(-1) - (-uniform.log()).log()
        soft = (logits / self.temperature).softmax(-1)
        if not self.hard:
            return soft
        picked = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0)
        return picked + (soft - soft.detach())


class SNR(nn.Module):
    """SNR-Trans and SNR-Aver: sums of the level below along sampled connections."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.first = ours.first.to_modules()
        self.levels = nn.ModuleList(SNRLevel(level) for level in ours.levels)

    def forward(self, x: Tensor) -> Tensor:
        outputs = [network(x) for network in self.first]
        for level in self.levels:
            outputs = level(outputs)
        return torch.stack(outputs, 1)


class SNRLevel(nn.Module):
    """``act(sum_j z_ij W_ij u_j + c_i)``, or ``MLP_i(sum_j z_ij u_j)``, with hard-concrete z."""

    def __init__(self, level: nn.Module) -> None:
        super().__init__()
        self.connections = HardConcrete(level.connections)
        self.parts = self.biases = None
        upper = [nn.Identity()] * level.connections.upper
        self.tails = nn.ModuleList(upper) if level.tail is None else level.tail.to_modules()
        if hasattr(level, "weight"):
            self.parts = nn.ModuleList(nn.ModuleList(linear(w) for w in row) for row in level.weight)
            self.biases = nn.ParameterList([copied(b) for b in level.bias])

    def forward(self, u: list[Tensor]) -> list[Tensor]:
        z = self.connections().to(u[0].dtype)
        if self.parts is None:
            sums = [sum(c * h for c, h in zip(row, u, strict=True)) for row in z]
        else:
            rows = zip(z, self.parts, self.biases, strict=True)
            sums = [
                torch.relu(sum(c * part(h) for c, part, h in zip(row, parts, u, strict=True)) + bias)
                for row, parts, bias in rows
            ]
        return [tail(v) for tail, v in zip(self.tails, sums, strict=True)]


class Branched(nn.Module):
    """A tree: a block a cluster of tasks, which reads its parent's."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(level.to_modules() for level in ours.levels)
        below = [[list(range(ours.num_tasks))], *ours.partitions]
        self.parents = [
            [next(p for p, parent in enumerate(above) if cluster[0] in parent) for cluster in clusters]
            for above, clusters in zip(below, ours.partitions, strict=False)
        ]
        leaves = ours.partitions[-1]
        self.leaf = [next(c for c, leaf in enumerate(leaves) if t in leaf) for t in range(ours.num_tasks)]

    def forward(self, x: Tensor) -> Tensor:
        h = [x]
        for blocks, parents in zip(self.blocks, self.parents, strict=True):
            h = [block(h[p]) for block, p in zip(blocks, parents, strict=True)]
        return torch.stack([h[c] for c in self.leaf], 1)


class LearnedBranching(nn.Module):
    """Every child reads one parent, drawn anew at every step."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(level.to_modules() for level in ours.levels)
        self.choices = nn.ModuleList(Gumbel(choice.theta, ours.temperature, choice.hard) for choice in ours.choices)

    def forward(self, x: Tensor) -> Tensor:
        h = [x] * len(self.blocks[0])
        for blocks, choice in zip(self.blocks, self.choices, strict=True):
            parents = torch.stack([block(v) for block, v in zip(blocks, h, strict=True)], 1)
            h = torch.einsum("ji,bid->bjd", choice().to(parents.dtype), parents).unbind(1)
        return torch.stack(h, 1)


class SoftOrdering(nn.Module):
    """Every task goes through all modules at every depth, and mixes what they give."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.encoders, self.layers, self.logits = linears(ours.encoder), ours.bank.to_modules(), copied(ours.logits)

    def forward(self, x: Tensor) -> Tensor:
        y = [encoder(x) for encoder in self.encoders]
        for weights in self.logits.softmax(-1):
            y = [
                sum(w * f(h) for w, f in zip(row, self.layers, strict=True)) for row, h in zip(weights, y, strict=True)
            ]
        return torch.stack(y, 1)


class AdaShare(nn.Module):
    """The trunk once a task, each block executed and skipped by the task's weights."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block.block.to_modules()[0] for block in ours.blocks)
        self.skips = nn.ModuleList(
            nn.Identity() if block.projection is None else linears(block.projection)[0] for block in ours.blocks
        )
        self.policy = Gumbel(ours.policy_logits, ours.temperature, ours.hard)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for policy in self.policy().to(x.dtype):
            h = x
            for (execute, skip), block, shortcut in zip(policy, self.blocks, self.skips, strict=True):
                skipped = shortcut(h)
                h = execute * torch.relu(skipped + block(h)) + skip * skipped
            outputs.append(h)
        return torch.stack(outputs, 1)
