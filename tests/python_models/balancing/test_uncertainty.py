"""Uncertainty weighting: formula, gradients, stationary points."""

import numpy as np
import pytest
import torch

from python_models.balancing import UncertaintyWeighting, param_groups

KINDS = ["regression", "classification", "binary", "multiclass", "watch_time", "huber"]
C = np.array([0.5, 1, 1, 1, 1, 1])
LOSSES = np.array([0.7, 1e-3, 2.5, 40.0, 1.0, 0.3])


def balancer(values):
    made = UncertaintyWeighting(KINDS).double()
    made.log_variance.data.copy_(torch.as_tensor(values))
    return made


def test_value_and_both_gradients():
    s = np.array([0.0, -3.0, 2.0, 0.5, -0.5, 30.0])
    made = balancer(s)
    losses = torch.tensor(LOSSES, requires_grad=True)
    total = made.backward(losses)
    np.testing.assert_allclose(total.numpy(), (C * np.exp(-s) * LOSSES + s / 2).sum(), rtol=1e-13)
    np.testing.assert_allclose(losses.grad.numpy(), C * np.exp(-s), rtol=1e-13)
    np.testing.assert_allclose(made.log_variance.grad.numpy(), 0.5 - C * np.exp(-s) * LOSSES, rtol=1e-12, atol=1e-15)


def test_stationary_points():
    """exp(s) = L for a squared error, 2 L for a cross entropy: no gradient there, and descent ends there."""
    rest = np.log(LOSSES * 2 * C)
    made = balancer(rest)
    made.backward(torch.tensor(LOSSES, requires_grad=True))
    np.testing.assert_allclose(made.log_variance.grad.numpy(), 0, atol=1e-14)
    made = balancer(np.zeros(len(KINDS)))
    optimizer = torch.optim.SGD(made.parameters(), 0.2)
    for _ in range(400):
        optimizer.zero_grad()
        made.backward(torch.tensor(LOSSES, requires_grad=True))
        optimizer.step()
    np.testing.assert_allclose(made.log_variance.detach().numpy(), rest, atol=1e-6)
    assert made.backward(torch.tensor(LOSSES * 1e-9)) < 30  # a total below 0 is no error


def test_a_task_with_no_label_keeps_its_variance():
    made = balancer(np.full(len(KINDS), 1.5))
    active = torch.tensor([False, True] * 3)
    total = made.backward(torch.tensor(LOSSES, requires_grad=True), active=active)
    picked = (C * np.exp(-1.5) * LOSSES + 0.75)[1::2].sum()
    np.testing.assert_allclose(total.numpy(), picked, rtol=1e-13)
    assert (made.log_variance.grad[::2] == 0).all() and (made.log_variance.grad[1::2] != 0).all()


def test_the_variance_has_no_weight_decay():
    made = UncertaintyWeighting(["binary"], 0.25)
    assert made.log_variance.tolist() == [0.25]
    (group,) = param_groups(made, 0.1)
    assert group == {"params": [made.log_variance], "lr": 0.1, "name": "loss_weights", "weight_decay": 0.0}


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"kinds\[1\] must be one of regression, .*; got 'ordinal'"):
        UncertaintyWeighting(["binary", "ordinal"])
    with pytest.raises(TypeError, match="kinds must be a sequence of words"):
        UncertaintyWeighting("binary")
    with pytest.raises(ValueError, match="num_tasks must be at least 1"):
        UncertaintyWeighting([])
