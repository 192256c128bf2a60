"""Relaxed choices against numpy, their frequencies, the temperature and its schedules."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch

from python_models.sampling import (
    ExponentialTemperature,
    InverseRootTemperature,
    Temperature,
    one_hot,
    relaxed_choice,
)


def plain_choice(logits, uniform, temperature):
    """d = softmax((log p + g) / tau), g = -log(-log U)."""
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    d = np.exp((np.log(p) - np.log(-np.log(uniform))) / temperature)
    return d / d.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_equals_numpy(numeric, temperature):
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    array = logits.detach().numpy().copy()
    torch.manual_seed(1)
    uniform = torch.rand(4, 3, dtype=torch.float64).numpy()
    torch.manual_seed(1)
    soft = relaxed_choice(logits, temperature, hard=False)
    np.testing.assert_allclose(soft.detach(), plain_choice(array, uniform, temperature), rtol=0, atol=1e-13)
    grad = torch.randn(4, 3, dtype=torch.float64)
    (expected,) = torch.autograd.grad(soft, logits, grad)
    slope = numeric.slopes(lambda: (plain_choice(array, uniform, temperature) * grad.numpy()).sum(), array)
    np.testing.assert_allclose(expected, slope, rtol=0, atol=1e-8)
    torch.manual_seed(1)
    hard = relaxed_choice(logits, temperature, hard=True)
    assert torch.equal(hard, one_hot(soft)) and set(hard.flatten().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(torch.autograd.grad(hard, logits, grad)[0], expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frequencies_are_the_probabilities(dtype):
    torch.manual_seed(0)
    logits, n = torch.tensor([1.0, 0.0, -1.0, -2.0], dtype=dtype), 40000
    found = relaxed_choice(logits.expand(n, 4), 0.7, hard=True).mean(0)
    p = logits.softmax(0)
    assert ((found - p).abs() < 4 * (p * (1 - p) / n).sqrt()).all()


def test_stays_finite():
    logits = torch.tensor([[80.0, -80.0], [0.0, -torch.inf]])
    for temperature in (1e-3, 1.0, math.inf):
        assert relaxed_choice(logits[:1], temperature, hard=False).isfinite().all()
    assert relaxed_choice(logits[1:].expand(500, 2), 1.0, hard=True)[:, 0].all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand_like", torch.zeros_like)
        assert relaxed_choice(logits[:1], 1.0, hard=False).isfinite().all()


def test_temperature_keeps_its_value():
    kept = Temperature(0.965**3)
    for moved in (kept.to(torch.bfloat16), copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert moved.tensor.dtype == torch.float64 and moved.tensor.item() == 0.965**3
    assert Temperature(2.0, "meta").to_empty(device="cpu").tensor.item() == 2.0
    assert not kept.state_dict()


def test_schedules():
    root = InverseRootTemperature(200)
    assert [root(0), root(1)] == [math.inf] * 2
    assert root(2) == 10 / math.sqrt(3) and root(199) == 10 / math.sqrt(200)
    assert InverseRootTemperature(200, warm_up=0)(0) == 10
    decay = ExponentialTemperature()
    assert decay(0) == 5.0 and decay(2) == 5.0 * 0.965**2
    torch.tensor(decay(np.int64(2).item()))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: Temperature(0.0), ValueError, "temperature must be above 0; got 0.0"),
        (lambda: Temperature(math.nan), ValueError, "temperature must be above 0; got nan"),
        (lambda: Temperature("1"), TypeError, "temperature must be a number; got '1'"),
        (lambda: InverseRootTemperature(0), ValueError, "epochs must be at least 1"),
        (lambda: InverseRootTemperature(9, warm_up=2), ValueError, "warm_up must be a share"),
        (lambda: InverseRootTemperature(9, scale=0), ValueError, "scale must be above 0"),
        (lambda: InverseRootTemperature(9)(-1), ValueError, "epoch must be at least 0"),
        (lambda: ExponentialTemperature(rate=1.5), ValueError, "rate in"),
        (lambda: ExponentialTemperature()(0.5), TypeError, "round must be an int"),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()
