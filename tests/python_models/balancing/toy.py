"""A small network of several tasks, its batches and losses."""

import torch
from torch import nn


class Toy(nn.Module):
    """Two layers that tasks share, and a linear head each: [B,5] -> T of [B]."""

    def __init__(self, tasks=3, dtype=torch.float64, seed=0):
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.first, self.last = nn.Linear(5, 7, dtype=dtype), nn.Linear(7, 4, dtype=dtype)
            self.heads = nn.ModuleList(nn.Linear(4, 1, dtype=dtype) for _ in range(tasks))

    def shared_parameters(self):
        return [*self.first.parameters(), *self.last.parameters()]

    def forward(self, x):
        z = torch.tanh(self.last(torch.tanh(self.first(x))))
        return [head(z).squeeze(1) for head in self.heads]

    def losses(self, batch):
        x, y = batch
        return [(t + 1) * (out - y[:, t]).square().mean() for t, out in enumerate(self(x))]


def batch(step=0, tasks=3, rows=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 + step)
    draw = torch.randn(rows, 5 + tasks, generator=generator, dtype=torch.float64).to(dtype)
    return draw[:, :5], draw[:, 5:]


def gradients(module):
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def weighted_gradients(model, rows, weights):
    """.grad of ``sum_t w_t L_t``, by autograd."""
    model.zero_grad()
    sum(w * loss for w, loss in zip(weights, model.losses(rows), strict=True)).backward()
    found = gradients(model)
    model.zero_grad()
    return found


def same(left, right, tolerance=0.0):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=tolerance, atol=tolerance, msg=name)
