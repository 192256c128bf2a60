"""Fixed and scheduled weights, and the dynamic weight average, against their formulas."""

import math

import numpy as np
import pytest
import torch

from python_models.balancing import DynamicWeightAverage, FixedWeights, ScheduledWeights


def leaves(values):
    return [torch.tensor(float(v), dtype=torch.float64, requires_grad=True) for v in values]


def train_epoch(balancer, rows):
    for row in rows:
        losses = leaves(row)
        balancer.backward(losses)
    return [float(loss.grad) for loss in losses]


@pytest.mark.parametrize("weights", [2.0, 3, [1, 0.5, 0.0], torch.tensor([1.0, 0.5, 0.0])])
def test_fixed(weights):
    expected = np.broadcast_to(np.asarray(weights, dtype=np.float64), 3)
    assert train_epoch(FixedWeights(3, weights), [(1, 2, 3)]) == expected.tolist()


def test_scheduled_is_the_geometric_formula_without_drift():
    w, gamma = [1.0, 2.0, 0.5], [0.5, 0.99, 1.01]
    balancer = ScheduledWeights(3, w, gamma)
    for epoch in range(301):
        exact = np.float32(w).astype(float) * np.float32(gamma).astype(float) ** epoch
        if epoch in (0, 1, 2, 300):
            assert balancer.weights.tolist() == np.float32(exact).tolist()
        balancer.end_epoch()
    assert balancer.epoch == 301


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("temperature", [2.0, 0.3])
def test_dynamic_weight_average(temperature, given):
    """T softmax(r / tau) with the ratio of the last two epochs' means; 1 in the first two epochs."""
    epochs = np.random.default_rng(0).uniform(0.1, 3, (5, 4, 3))
    balancer, means = DynamicWeightAverage(3, temperature), []
    for epoch, rows in enumerate(epochs):
        expected = np.ones(3)
        if epoch >= 2:
            powers = np.exp(means[-1] / means[-2] / temperature)
            expected = 3 * powers / powers.sum()
        np.testing.assert_allclose(train_epoch(balancer, rows), expected, rtol=1e-6 if epoch >= 2 else 0)
        # Given means take the place of those of the steps.
        means.append(rows.mean(0) * (epoch + 2 if given else 1))
        balancer.end_epoch(leaves(means[-1]) if given else None)
    assert math.isclose(float(balancer.weights.sum()), 3, rel_tol=1e-6)


def test_dynamic_weight_average_over_missing_and_infinite_losses():
    balancer = DynamicWeightAverage(3)
    active = torch.tensor([True, True, False])
    balancer.backward(leaves((4, 2, 9)))
    balancer.backward(leaves((2, math.inf, 9)), active=active)  # means 3, 2, 9
    balancer.end_epoch()
    balancer.backward(leaves((6, 1, 9)), active=active)  # means 6, 1, none
    balancer.end_epoch()
    powers = np.exp(np.array([6 / 3, 1 / 2, 1]) / 2)
    np.testing.assert_allclose(balancer.weights.numpy(), 3 * powers / powers.sum(), rtol=1e-6)
    balancer.backward(leaves((3, 1, 18)))
    balancer.end_epoch()
    powers = np.exp(np.array([3 / 6, 1 / 1, 18 / 9]) / 2)
    np.testing.assert_allclose(balancer.weights.numpy(), 3 * powers / powers.sum(), rtol=1e-6)
    kept = balancer.weights.clone()
    balancer.end_epoch([torch.tensor(math.nan)] * 3)
    assert torch.equal(balancer.weights, kept)


def test_dynamic_weight_average_of_a_task_that_is_done():
    """A loss of 0 has no ratio: it counts as one that stays."""
    balancer = DynamicWeightAverage(2)
    for losses in ((0.0, 4.0), (0.0, 2.0), (0.0, 2.0)):
        balancer.end_epoch(leaves(losses))
        assert torch.isfinite(balancer.weights).all()
    np.testing.assert_allclose(balancer.weights.numpy(), [1, 1], rtol=1e-6)


def test_bad_arguments():
    for error, message, make in (
        (ValueError, "weights must be 3 finite numbers", lambda: FixedWeights(3, [1.0, 2.0])),
        (ValueError, "weights must be 3 finite numbers", lambda: FixedWeights(3, -1.0)),
        (ValueError, "weights must be 3 finite numbers", lambda: FixedWeights(3, [1, 2, math.nan])),
        (TypeError, "weights must be a number", lambda: FixedWeights(3, "abc")),
        (TypeError, "weights must be a number", lambda: FixedWeights(3, [1, True, 2])),
        (ValueError, "gamma must be 3 finite numbers", lambda: ScheduledWeights(3, 1.0, math.inf)),
        (ValueError, "temperature must be positive", lambda: DynamicWeightAverage(3, 0)),
        (ValueError, "temperature must be positive", lambda: DynamicWeightAverage(3, math.inf)),
        (ValueError, "losses must be", lambda: DynamicWeightAverage(3).end_epoch(leaves((1, 2)))),
    ):
        with pytest.raises(error, match=message):
            make()
