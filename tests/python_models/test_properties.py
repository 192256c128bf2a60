"""What holds of every network, whatever its numbers: the order of rows and of experts, sums of slopes, their signs."""

import copy

import pytest
import torch
from numpy_layers import moved

import mtlkernels as mtl
from bench.papers import ARCHITECTURES, TINY
from python_models import PLE, AdaTT, MMoE


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_in_another_order_come_out_in_that_order(name, training):
    about = ARCHITECTURES[name]
    torch.manual_seed(0)
    network = moved(about.make(TINY)).double().train(training)
    x, extras = torch.randn(TINY.B, TINY.K, dtype=torch.float64), about.extras(TINY)
    order, run = torch.randperm(TINY.B), about.run or torch.nn.Module.__call__
    found = []
    for rows in (torch.arange(TINY.B), order):
        torch.manual_seed(1)  # of what a step draws
        found.append(run(copy.deepcopy(network), x[rows], *(t[rows] for t in extras)))
    wanted = found[0][order] if found[0].dim() else found[0]
    assert found[0].dim() == 0 or not torch.equal(found[0], found[1])
    torch.testing.assert_close(found[1], wanted, rtol=1e-12, atol=1e-12)


def reorder(level, order):
    """A level's experts in another order, with the gates' columns and the residual weights that are theirs."""
    for linear in level.experts.linears:
        for tensor in (linear.weight, linear.bias):
            tensor.copy_(tensor[order])
    logits = level.gates.logits
    if level.mix is None:
        logits.weight.copy_(logits.weight[:, order])
        logits.bias.copy_(logits.bias[:, order])
        return
    columns = level.mix.routes.columns  # [T,E]: the logit of expert e for row t, or -1
    moves = torch.empty(len(logits.weight), dtype=torch.int64)
    moves[columns[columns >= 0].long()] = columns[:, order][columns >= 0].long()
    for tensor in (logits.weight, logits.bias):
        tensor.copy_(tensor[moves])


class Level:
    """MMoE's and AdaTT's parts by the names of PLE's level."""

    mix = None

    def __init__(self, experts, gates):
        self.experts, self.gates = experts, gates


@pytest.mark.parametrize("name", ["MMoE", "PLE", "AdaTT"])
@torch.no_grad()
def test_experts_of_a_unit_in_another_order_change_nothing(name):
    torch.manual_seed(0)
    make = {
        "MMoE": lambda: MMoE(6, 2, 5, [[4, 3]]),
        "PLE": lambda: PLE(6, 2, [2, 3], 2, [[5], [3]]),
        "AdaTT": lambda: AdaTT(6, 2, [2, 3], 2, [[5], [3]]),
    }[name]
    network = moved(make()).double()
    other, x = copy.deepcopy(network), torch.randn(9, 6, dtype=torch.float64)
    if name == "MMoE":
        reorder(Level(other.experts[0], other.gates[0]), [3, 0, 4, 1, 2])
    order = [1, 0, 4, 2, 3, 6, 5]  # within the units: 2, 3 and 2 experts
    for level in getattr(other, "levels", []):
        reorder(level if name == "PLE" else Level(level.experts, level.gates), order)
        if name == "AdaTT":
            level.native.copy_(level.native[order[: len(level.native)]])
    assert not torch.equal(next(network.parameters()), next(other.parameters()))
    torch.testing.assert_close(other(x), network(x), rtol=1e-12, atol=1e-12)


ALIKE = {
    "MMoE": lambda **k: MMoE(6, 2, 3, [[5], [4]], **k),
    "PLE": lambda **k: PLE(6, 2, [1, 2], 2, [[5], [4]], **k),
    "AdaTT": lambda **k: AdaTT(6, 2, [1, 2], 1, [[5], [4]], residual=False, **k),
}


@pytest.mark.parametrize("make", ALIKE.values(), ids=ALIKE.keys())
def test_a_gate_over_equal_experts_gives_that_expert_and_has_no_slope(make):
    """Weights that sum to 1, whatever the logits."""
    torch.manual_seed(0)
    network, x = moved(make()).double(), torch.randn(7, 6, dtype=torch.float64)
    banks = [module for name, module in network.named_modules() if name.endswith("experts") or "experts." in name]
    banks = [module for module in banks if hasattr(module, "linears")]
    assert len(banks) == 2
    h = x
    with torch.no_grad():
        for bank in banks:
            for linear in bank.linears:
                linear.weight.copy_(linear.weight[:1].expand_as(linear.weight))
                linear.bias.copy_(linear.bias[:1].expand_as(linear.bias))
                h = torch.relu(h @ linear.weight[0].T + linear.bias[0])
    out = network(x)
    torch.testing.assert_close(out, h[:, None].expand(-1, 2, -1), rtol=0, atol=1e-13)
    (out * torch.randn_like(out)).sum().backward()
    for name, p in network.named_parameters():
        assert (p.grad.abs().max() < 1e-13) == ("gates" in name), name


@pytest.mark.parametrize("make", ALIKE.values(), ids=ALIKE.keys())
def test_equal_logits_give_the_mean(make):
    network, x = make(gate_init="zero").double(), torch.randn(7, 6, dtype=torch.float64)
    for weights in network(x, return_gates=True)[1]:
        read = (weights > 0).sum(-1, keepdim=True)
        torch.testing.assert_close(weights, (weights > 0) / read.double(), rtol=0, atol=1e-15)


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_slopes_of_a_gate_sum_to_zero(scale):
    """A softmax does not see a constant added to its logits, whatever is added to it afterwards."""
    torch.manual_seed(0)
    experts = torch.randn(7, 5, 3, dtype=torch.float64)
    routes = mtl.Routes.by_unit([2, 3], [[0, 1], [1]])
    forms = {
        (7, 4, 5): lambda logits: mtl.gated_mix(experts, logits),
        (7, 2, 5): lambda logits: mtl.adatt_mix(experts, logits, torch.randn(5).double(), experts_per_unit=[2, 3]),
        (7, 8): lambda logits: mtl.mix(experts, logits, routes=routes),
    }
    for shape, form in forms.items():
        logits = (torch.randn(shape, dtype=torch.float64) * scale).requires_grad_()
        out = form(logits)
        (slope,) = torch.autograd.grad(out, logits, torch.randn_like(out))
        parts = slope.split((5, 3), 1) if len(shape) == 2 else (slope,)
        for part in parts:
            torch.testing.assert_close(part.sum(-1), torch.zeros(part.shape[:-1]).double(), rtol=0, atol=1e-13)
        assert slope.abs().max() > 1e-3


def test_signs_of_esmms_slopes():
    """Both rise where there was a conversion, both fall without a click; a click alone lowers the conversion."""
    logits = torch.tensor([-9.0, -1.0, 0.0, 2.0, 9.0], dtype=torch.float64)
    ctr, cvr = (t.flatten().requires_grad_() for t in torch.meshgrid(logits, logits, indexing="ij"))
    for click, conversion, signs in ((1, 1, (-1, -1)), (0, 0, (1, 1)), (1, 0, (None, 1))):
        labels = torch.full_like(ctr, click), torch.full_like(ctr, conversion)
        slopes = torch.autograd.grad(mtl.esmm_loss(ctr, cvr, *labels), (ctr, cvr))
        for slope, sign in zip(slopes, signs, strict=True):
            assert sign is None or (slope.sign() == sign).all()
