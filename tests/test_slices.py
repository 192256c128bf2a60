"""A step in slices of rows or experts gives what the whole step gives."""

import pytest
import torch
import torch.nn.functional as F

from mtlkernels.nn import ExpertMLP
from mtlkernels.slices import backward_in_slices, forward_in_slices, mix_in_slices
from python_models import MMoE


def exact(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def network_and_data(batch):
    torch.manual_seed(0)
    network = MMoE(7, 2, 5, [[6, 4]], dtype=torch.float64)
    return network, torch.randn(batch, 7).double().requires_grad_(), torch.randn(batch, 2, 4).double()


def gradients(network, x):
    found = {name: p.grad.clone() for name, p in network.named_parameters()} | {"x": x.grad.clone()}
    network.zero_grad()
    x.grad = None
    return found


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("batch, rows", [(13, 5), (13, 1), (13, 13), (13, 100), (12, 4), (1, 1)])
def test_rows_give_the_whole_step(batch, rows, reduction):
    network, x, y = network_and_data(batch)
    loss = lambda x, y: F.mse_loss(network(x), y, reduction=reduction)  # noqa: E731
    whole = loss(x, y)
    whole.backward()
    expected = gradients(network, x)
    found = backward_in_slices(loss, x, y, rows=rows, reduction=reduction)
    exact(found, whole.detach())
    exact(gradients(network, x), expected)
    exact(forward_in_slices(network, x, rows=rows), network(x).detach())


def test_rows_add_to_gradients_and_go_on_below():
    network, x, y = network_and_data(9)
    below = torch.nn.Linear(7, 7, dtype=torch.float64)
    loss = lambda x, y: F.mse_loss(network(x), y)  # noqa: E731
    steps = (lambda: loss(below(x), y).backward(), lambda: backward_in_slices(loss, below(x), y, rows=4))
    found = []
    for step in steps:
        for _ in range(2):
            step()
        found.append([p.grad.clone() for p in below.parameters()] + [gradients(network, x)])
        below.zero_grad()
    exact(found[1], found[0])


def test_an_empty_batch_has_zero_gradients():
    network, x, y = network_and_data(0)
    found = backward_in_slices(lambda x, y: F.mse_loss(network(x), y, reduction="sum"), x, y, rows=4, reduction="sum")
    assert found == 0 and x.grad.shape == (0, 7) and all(not p.grad.any() for p in network.parameters())


@pytest.mark.parametrize("options", [{}, {"norm": "layer"}, {"activation": "silu", "bias": False}])
@pytest.mark.parametrize("experts", [1, 2, 5, 11])
def test_experts_give_the_whole_mix(experts, options):
    torch.manual_seed(1)
    bank = ExpertMLP(5, 7, [6, 4], dtype=torch.float64, **options)
    x, grad = torch.randn(9, 7).double().requires_grad_(), torch.randn(9, 3, 4).double()
    logits = (20 * torch.randn(9, 3, 5).double()).requires_grad_()
    leaves = [x, logits, *bank.parameters()]
    # the equations, and not our mix
    expected = torch.einsum("bte,bed->btd", logits.softmax(-1), torch.stack([e(x) for e in bank.to_modules()], 1))
    mixed = mix_in_slices(bank, x, logits, experts=experts)
    exact(mixed, expected)
    found = torch.autograd.grad(mixed, leaves, grad)
    whole = torch.einsum("bte,bed->btd", logits.softmax(-1), bank(x))
    exact(found, torch.autograd.grad(whole, leaves, grad))


def test_experts_in_slices_keep_one_slice():
    """What is alive between forward and backward does not grow with the number of experts."""
    kept = []
    for slices in (2, 8):
        bank, x = ExpertMLP(4 * slices, 16, [32, 32]), torch.randn(64, 16)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t) or t, lambda t: t):
            mix_in_slices(bank, x, torch.zeros(64, 1, 4 * slices), experts=4)
        own = {p.untyped_storage().data_ptr() for p in bank.parameters()}
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in sizes}
        kept.append(sum(size for place, size in held.items() if place not in own))
    outputs = 64 * 32 * 4 * 4  # the hidden layer of one slice
    assert kept[1] - kept[0] < outputs * 3


def test_dropout_is_drawn_once():
    bank = ExpertMLP(4, 6, [8], dropout=0.5, dtype=torch.float64)
    x, logits = torch.randn(5, 6).double().requires_grad_(), torch.zeros(5, 1, 4).double()
    torch.manual_seed(3)
    mixed = mix_in_slices(bank, x, logits, experts=2)
    (found,) = torch.autograd.grad(mixed.sum(), x)
    torch.manual_seed(3)
    halves = []
    for e in (0, 2):
        weight, bias = bank.linears[0].weight[e : e + 2], bank.linears[0].bias[e : e + 2]
        halves.append(F.dropout(F.relu(torch.einsum("bk,enk->ben", x, weight) + bias).contiguous(), 0.5))
    whole = torch.cat(halves, 1).mean(1, keepdim=True)
    exact(mixed, whole)
    exact(found, torch.autograd.grad(whole.sum(), x)[0])


def test_bad_input():
    network, x, y = network_and_data(4)
    loss = lambda x, y: F.mse_loss(network(x), y)  # noqa: E731
    with pytest.raises(ValueError, match="inputs must hold"):
        backward_in_slices(loss, rows=2)
    with pytest.raises(TypeError, match=r"inputs\[1\] must be a tensor; got list"):
        backward_in_slices(loss, x, [1.0], rows=2)
    with pytest.raises(ValueError, match="same number of rows"):
        backward_in_slices(loss, x, y[:2], rows=2)
    with pytest.raises(ValueError, match="rows must be at least 1; got 0"):
        forward_in_slices(network, x, rows=0)
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum'; got 'none'"):
        backward_in_slices(loss, x, y, rows=2, reduction="none")
    with pytest.raises(ValueError, match=r"loss must give a scalar; got \(2, 2, 4\)"):
        backward_in_slices(lambda x, y: network(x), x, y, rows=2)
    bank, logits = network.experts[0], torch.zeros(4, 2, 5).double()
    with pytest.raises(TypeError, match="bank must be an ExpertMLP; got MMoE"):
        mix_in_slices(network, x, logits, experts=2)
    with pytest.raises(ValueError, match=r"logits must be \[B,T,5\]"):
        mix_in_slices(bank, x, logits[:, :, 1:], experts=2)
    with pytest.raises(ValueError, match="experts must be at least 1"):
        mix_in_slices(bank, x, logits, experts=0)
    with pytest.raises(ValueError, match=r"x must be \[B,K\]"):
        mix_in_slices(bank, x[:, None], logits, experts=2)
    with pytest.raises(ValueError, match="no batch norm"):
        mix_in_slices(ExpertMLP(5, 7, [4], norm="batch"), x, logits, experts=2)
