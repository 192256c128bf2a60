"""The synthetic generator: its exact moments, its geometry, its independent random streams."""

import numpy as np
import pytest
import torch

from python_models.data import SyntheticTasks, make_synthetic

THREE = np.array([[1.0, 0.6, -0.3], [0.6, 1.0, 0.2], [-0.3, 0.2, 1.0]])


@pytest.mark.parametrize("correlation", [0.8, 0.0, -0.5, 1.0, -1.0, THREE], ids=str)
def test_labels_have_the_exact_mean_and_covariance(correlation):
    tasks = SyntheticTasks.draw(12, correlation, scale=0.7, seed=3)
    _, y = tasks.sample(200_000)
    mean, covariance = tasks.moments()
    error = y.std(0) / np.sqrt(len(y))
    assert (abs(y.mean(0) - mean) < 5 * error).all()
    centred = y - mean
    for s in range(len(mean)):
        for t in range(len(mean)):
            products = centred[:, s] * centred[:, t]
            assert abs(products.mean() - covariance[s, t]) < 5 * products.std() / np.sqrt(len(y))


def test_two_tasks_follow_the_published_formulas():
    p, c = 0.8, 0.3
    tasks = SyntheticTasks.draw(correlation=p, scale=c, seed=1)
    a, b = tasks.alpha, tasks.beta
    mean = np.sum(np.exp(-0.5 * (a * c) ** 2) * np.sin(b))
    expected = []
    for r in (p, 1.0):
        sines = 0.0
        for i in range(5):
            for j in range(5):
                square, cross = a[i] ** 2 + a[j] ** 2, 2 * r * a[i] * a[j]
                sines += 0.5 * np.exp(-0.5 * c * c * (square - cross)) * np.cos(b[i] - b[j])
                sines -= 0.5 * np.exp(-0.5 * c * c * (square + cross)) * np.cos(b[i] + b[j])
        slope = np.sum(a * np.exp(-0.5 * (a * c) ** 2) * np.cos(b))
        expected.append(r * c * c + 2 * r * c * c * slope + sines - mean**2)
    found_mean, covariance = tasks.moments()
    assert found_mean == pytest.approx([mean, mean], rel=1e-12)
    assert covariance[0, 1] == pytest.approx(expected[0], rel=1e-12)
    assert covariance[0, 0] == pytest.approx(expected[1] + 0.01, rel=1e-12)


@pytest.mark.parametrize("correlation", [0.3, 1.0, -1.0, THREE, np.ones((4, 4))], ids=str)
def test_weights_have_the_asked_cosines_and_length(correlation):
    weights = SyntheticTasks.draw(20, correlation, scale=0.3, seed=5).weights
    matrix = np.atleast_2d(correlation)
    if matrix.shape == (1, 1):
        matrix = np.array([[1, matrix[0, 0]], [matrix[0, 0], 1]])
    assert np.allclose(weights @ weights.T, 0.09 * matrix, rtol=0, atol=1e-15)


def test_equal_and_opposite_tasks_are_exact():
    same, opposite = (SyntheticTasks.draw(7, p).weights for p in (1.0, -1.0))
    assert (same[0] == same[1]).all() and (opposite[0] == -opposite[1]).all()


def test_random_streams_do_not_touch_each_other():
    base = SyntheticTasks.draw(20, 0.3, seed=9)
    more_tasks = SyntheticTasks.draw(20, THREE, seed=9)
    more_sines = SyntheticTasks.draw(20, 0.3, num_sines=8, noise=0.0, seed=9)
    x, y = base.sample(50, 1)
    assert (x == more_tasks.sample(50, 1)[0]).all() and (x == more_sines.sample(50, 1)[0]).all()
    assert np.allclose(base.weights[0], more_tasks.weights[0], rtol=0, atol=1e-16)
    assert (base.alpha == more_tasks.alpha).all() and (base.weights == more_sines.weights).all()
    assert np.allclose(y[:, 0], more_tasks.sample(50, 1)[1][:, 0], rtol=1e-12)
    longer, _ = base.sample(80, 1)
    assert (longer[:50] == x).all()
    assert (base.sample(50, 0)[0] != x).all()
    assert (SyntheticTasks.draw(20, 0.3, seed=10).sample(50, 1)[0] != x).all()


def test_splits_are_reproducible_and_have_their_sizes():
    first, second = (make_synthetic((60, 20, 10), 8, THREE, seed=4) for _ in range(2))
    for name, rows in (("train", 60), ("validation", 20), ("test", 10)):
        one, two = getattr(first, name), getattr(second, name)
        assert one.numeric.shape == (rows, 8) and one.categorical.shape == (rows, 0) and one.labels.shape == (rows, 3)
        assert torch.equal(one.numeric, two.numeric) and torch.equal(one.labels, two.labels)
        assert one.kind == "regression"


def test_binary_labels():
    median = make_synthetic((1001, 500, 500), 8, seed=4, binary="median")
    assert median.train.kind == "binary" and (median.train.labels.sum(0) == 500).all()
    assert 0.4 < median.test.labels.mean() < 0.6
    sharp = make_synthetic((1000, 0, 0), 8, seed=4, binary="bernoulli", sharpness=1e9)
    numbers = make_synthetic((1000, 0, 0), 8, seed=4)
    assert torch.equal(sharp.train.labels, (numbers.train.labels > 0).float())
    flat = make_synthetic((100_000, 0, 0), 2, seed=4, binary="bernoulli", sharpness=0.0)
    assert abs(flat.train.labels.mean() - 0.5) < 0.01


@pytest.mark.parametrize(
    "correlation", [1.5, [[1.0, 0.5]], [[1.0, 0.5], [0.4, 1.0]], np.full((3, 3), -0.9), np.empty((0, 0))], ids=str
)
def test_impossible_correlations_are_refused(correlation):
    matrix = np.array(correlation, float)
    if matrix.shape == (3, 3):
        np.fill_diagonal(matrix, 1)
    with pytest.raises(ValueError, match="correlation"):
        SyntheticTasks.draw(5, matrix)


def test_other_bad_arguments_are_named():
    with pytest.raises(ValueError, match="in_features"):
        SyntheticTasks.draw(2, THREE)
    with pytest.raises(ValueError, match="binary"):
        make_synthetic(binary="mean")
    with pytest.raises(ValueError, match="rows"):
        make_synthetic((1, 2))
