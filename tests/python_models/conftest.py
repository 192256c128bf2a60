"""Plain torch to compare the networks with: one linear layer an expert, Python loops, softmax, einsum.

And numpy in float64, whose gradients are central differences.
"""

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy_layers import softmax


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


def _sum(weights, experts):
    """[n] weights, the same for all rows, of n [B,D] experts."""
    return sum(weights[i] * expert for i, expert in enumerate(experts))


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
        differences = _slopes(lambda: (oracle(arrays) * grad).sum(), array, 1e-5)
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


def _expert(params, prefix, e, h, activation=np.tanh, last=True):
    """Expert e of a bank in numpy: [B,K] -> [B,D]; `last`: the activation follows the last layer too."""
    k = 0
    while f"{prefix}.linears.{k}.weight" in params:
        h = h @ params[f"{prefix}.linears.{k}.weight"][e].T + params[f"{prefix}.linears.{k}.bias"][e]
        k += 1
        if last or f"{prefix}.linears.{k}.weight" in params:
            h = activation(h)
    return h


def _bank(params, prefix, inputs, activation=np.tanh):
    """As `_experts`, in numpy."""
    return [_expert(params, prefix, e, h, activation) for e, h in enumerate(inputs)]


def _weights(params, prefix, inputs, routes, activation=np.tanh):
    """As `_gates`, in numpy."""
    if f"{prefix}.hidden.linears.0.weight" in params:
        inputs = _bank(params, f"{prefix}.hidden", inputs, activation)
    weight = params[f"{prefix}.logits.weight"]
    weight = weight.reshape(-1, weight.shape[-1])
    bias = params[f"{prefix}.logits.bias"].ravel() if f"{prefix}.logits.bias" in params else np.zeros(len(weight))
    ends = np.cumsum(routes)
    assert ends[-1] == len(weight)
    return [softmax(h @ weight[e - n : e].T + bias[e - n : e]) for h, n, e in zip(inputs, routes, ends, strict=True)]


def _weighted(weights, experts):
    """As `_mix`, in numpy."""
    return sum(weights[:, i : i + 1] * expert for i, expert in enumerate(experts))


def _arrays(model):
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def _slopes(value, array, step=1e-6):
    """Central differences of value() by every entry of `array`, which is changed in place and put back."""
    found = np.zeros_like(array)
    for index in np.ndindex(array.shape):
        kept = array[index]
        array[index] = kept + step
        above = value()
        array[index] = kept - step
        found[index] = (above - value()) / (2 * step)
        array[index] = kept
    return found


def _differ(model, forward, x, run=None):
    """model(x), float64, equals forward(arrays, x) in numpy, and every gradient its central differences.

    Parameters whose gradient stays None must have no influence. `run` takes model's place in the call.
    """
    arrays, entry = _arrays(model), x.detach().numpy().copy()
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    out = (run or model)(x)
    expected = forward(arrays, entry)
    np.testing.assert_allclose(out.detach().numpy(), expected, rtol=0, atol=1e-12 * max(1, abs(expected).max()))
    grad = torch.randn_like(out)
    out.backward(grad)

    def value():
        return (forward(arrays, entry) * grad.numpy()).sum()

    for name, p, array in [(n, p, arrays[n]) for n, p in model.named_parameters()] + [("x", x, entry)]:
        slope = _slopes(value, array)
        found = np.zeros_like(array) if p.grad is None else p.grad.numpy()
        np.testing.assert_allclose(found, slope, rtol=0, atol=2e-8 * max(1, abs(slope).max()), err_msg=name)


@pytest.fixture
def plain():
    return SimpleNamespace(
        experts=_experts,
        gates=_gates,
        mix=_mix,
        sum=_sum,
        stack=lambda units: torch.stack(units, 1),
        compare=_compare,
        numpy=_numpy,
        copies=_copies,
        compiles=_compiles,
    )


@pytest.fixture
def numeric():
    """`compare`, and for an equation of `plain` the same words in numpy."""
    words = {"experts": _bank, "gates": _weights, "mix": _weighted, "sum": _sum, "stack": lambda u: np.stack(u, 1)}
    return SimpleNamespace(expert=_expert, arrays=_arrays, slopes=_slopes, compare=_differ, **words)


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def precision(request):
    """A dtype, and how far two right answers in it may lie apart."""
    torch.manual_seed(3)
    return request.param, {torch.float64: 1e-12, torch.float32: 1e-5}[request.param]
