"""Every network under TorchJD's mtl_backward, with the batched Jacobians that it takes by default."""

import pytest
import torch
from torch import nn

from bench.papers import ARCHITECTURES, TINY
from python_models import balancing

autojac = pytest.importorskip("torchjd.autojac")
aggregation = pytest.importorskip("torchjd.aggregation")
# ESMM is a loss of two tasks by itself, without a representation between.
NETWORKS = [name for name in ARCHITECTURES if name != "ESMM"]


@pytest.mark.parametrize("name", NETWORKS)
def test_jacobians_are_the_tasks_gradients(name):
    found = ARCHITECTURES[name]
    torch.manual_seed(0)
    network = found.make(TINY).double()
    x, extras = torch.randn(TINY.B, TINY.K, dtype=torch.float64), found.extras(TINY)
    run = found.run or (lambda net, x, *more: net(x, *more))

    def forward():
        torch.manual_seed(1)  # of those that draw
        out = run(network, x, *extras)
        return out.reshape(len(out), -1)

    features = forward()
    heads = nn.ModuleList(nn.Linear(features.shape[1], 1) for _ in range(TINY.T)).double()
    losses = [head(features).tanh().sum() for head in heads]
    shared = [p for p in network.parameters() if p.requires_grad]
    rows = [torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True) for loss in losses]
    autojac.mtl_backward(losses, features=features)
    for i, p in enumerate(shared):
        if rows[0][i] is None:
            continue
        wanted = torch.stack([row[i] for row in rows])
        torch.testing.assert_close(p.jac, wanted, rtol=1e-9, atol=1e-11)
    used = [p for p in shared if getattr(p, "jac", None) is not None]
    autojac.jac_to_grad(used, aggregation.PCGrad())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in used)


@pytest.mark.parametrize("name", ["PCGrad", "MGDA"])
def test_a_step_is_torchjds(name):
    """.grad of a whole network after ours, and after mtl_backward and jac_to_grad. Both shuffle by randperm(T)."""
    torch.manual_seed(0)
    network = ARCHITECTURES["MMoE"].make(TINY).double()
    heads = nn.ModuleList(nn.Linear(network.out_features, 1) for _ in range(TINY.T)).double()
    x = torch.randn(TINY.B, TINY.K, dtype=torch.float64)
    model, shared = nn.ModuleList([network, heads]), list(network.parameters())

    def losses():
        h = network(x)
        return [((-1) ** t * head(h[:, t])).exp().mean() for t, head in enumerate(heads)], h

    if name == "PCGrad":
        ours, theirs = balancing.PCGrad(TINY.T, seed=5), aggregation.PCGrad()
    else:  # its Frank-Wolfe is left to go on, and comes near
        ours, theirs = balancing.MGDA(TINY.T), aggregation.MGDA(epsilon=1e-9, max_iters=20_000)
    ours.backward(losses()[0], shared=shared)
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    torch.manual_seed(5)
    values, h = losses()
    autojac.mtl_backward(values, features=h)
    autojac.jac_to_grad(shared, theirs)
    near = 1e-10 if name == "PCGrad" else 1e-4
    for mine, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=near, atol=near)
