"""Plain torch to compare the networks with: one linear layer an expert, Python loops, softmax, einsum."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F


def _experts(params, prefix, inputs, activation=torch.relu):
    """Every expert by itself: inputs is one [B,K] an expert; gives a list of [B,D]."""
    outputs = []
    for e, h in enumerate(inputs):
        k = 0
        while f"{prefix}.linears.{k}.weight" in params:
            bias = params.get(f"{prefix}.linears.{k}.bias")
            h = activation(F.linear(h, params[f"{prefix}.linears.{k}.weight"][e], None if bias is None else bias[e]))
            k += 1
        outputs.append(h)
    return outputs


def _gates(params, prefix, inputs, routes, activation=torch.relu):
    """Softmax weights, one [B,routes[t]] a row, from one [B,K] a row."""
    if f"{prefix}.hidden.linears.0.weight" in params:
        inputs = _experts(params, f"{prefix}.hidden", inputs, activation)
    weight, bias = params[f"{prefix}.logits.weight"], params.get(f"{prefix}.logits.bias")
    weight, begin, weights = weight.flatten(0, 1), 0, []
    for h, n in zip(inputs, routes, strict=True):
        rows = slice(begin, begin + n)
        weights.append(F.linear(h, weight[rows], None if bias is None else bias.flatten()[rows]).softmax(-1))
        begin += n
    assert begin == len(weight)
    return weights


def _mix(weights, experts):
    """[B,n] weights of n [B,D] experts."""
    return torch.einsum("bn,bnd->bd", weights, torch.stack(experts, 1))


def _compare(model, forward, x, tolerance):
    """Output and every gradient of model(x) equal those of forward(params, x), relative to the largest entry."""
    params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    a, b = x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    found, expected = model(a), forward(params, b)
    grad = torch.randn_like(expected)
    model.zero_grad()
    found.backward(grad)
    expected.backward(grad)
    pairs = {"output": (found, expected), "x": (a.grad, b.grad)}
    pairs |= {name: (p.grad, params[name].grad) for name, p in model.named_parameters()}
    for name, (left, right) in pairs.items():
        assert left is not None and right is not None, f"{name} has no gradient"
        assert left.shape == right.shape, name
        error = (left - right).abs().max().item() / max(1.0, right.abs().max().item())
        assert error <= tolerance, f"{name}: {error}"


@pytest.fixture
def plain():
    return SimpleNamespace(experts=_experts, gates=_gates, mix=_mix, compare=_compare)


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def precision(request):
    """A dtype, and how far two right answers in it may lie apart."""
    torch.manual_seed(3)
    return request.param, {torch.float64: 1e-12, torch.float32: 1e-5}[request.param]
