"""Plain torch to compare the networks with: one linear layer an expert, Python loops, softmax, einsum."""

import copy
import pickle
from types import SimpleNamespace

import numpy as np
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


def _numpy(output, tensors, oracle, tolerance=1e-12, slope=1e-7):
    """A float64 output equals oracle(arrays), and its gradient by every one of `tensors` its central differences."""
    arrays = {name: t.detach().numpy().copy() for name, t in tensors.items()}
    expected = oracle(arrays)
    assert output.shape == expected.shape
    np.testing.assert_allclose(output.detach().numpy(), expected, rtol=tolerance, atol=tolerance)
    grad = np.random.default_rng(5).standard_normal(expected.shape)
    found = torch.autograd.grad(output, list(tensors.values()), torch.from_numpy(np.asarray(grad)))
    for (name, array), gradient in zip(arrays.items(), found, strict=True):
        differences, step = np.zeros_like(array), 1e-5
        for index in np.ndindex(array.shape):
            value, sides = array[index], []
            for moved in (value + step, value - step):
                array[index] = moved
                sides.append((oracle(arrays) * grad).sum())
            array[index] = value
            differences[index] = (sides[0] - sides[1]) / (2 * step)
        scale = max(1.0, np.abs(differences).max(initial=0))
        np.testing.assert_allclose(gradient.numpy(), differences, rtol=0, atol=slope * scale, err_msg=name)


def _copies(model, make):
    """The model through deepcopy, through pickle, and another one with its state_dict."""
    other = make()
    other.load_state_dict(model.state_dict())
    return copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other.train(model.training)


def _compiles(model, *batches):
    """One graph for all batches, which gives what the module gives; in evaluation mode."""
    torch._dynamo.reset()
    model.eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for batch in batches:
            torch.testing.assert_close(compiled(*batch), model(*batch))


@pytest.fixture
def plain():
    return SimpleNamespace(
        experts=_experts, gates=_gates, mix=_mix, compare=_compare, numpy=_numpy, copies=_copies, compiles=_compiles
    )


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def precision(request):
    """A dtype, and how far two right answers in it may lie apart."""
    torch.manual_seed(3)
    return request.param, {torch.float64: 1e-12, torch.float32: 1e-5}[request.param]
