"""Metrics against their definitions and against scikit-learn."""

import math

import numpy as np
import pytest
import torch

from python_models.metrics import auc, calibration, gauc, log_loss, mean_squared_error, normalized_entropy

INF, NAN = math.inf, math.nan


def pair_auc(scores, labels, weights):
    """The definition: every pair of a positive and a negative."""
    won = total = 0.0
    for s, y, w in zip(scores, labels, weights, strict=True):
        for t, z, v in zip(scores, labels, weights, strict=True):
            if y == 1 and z == 0:
                won += w * v * (1.0 if s > t else 0.5 if s == t else 0.0)
                total += w * v
    return won / total


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("levels", [3, 10, 10_000])
def test_auc_counts_pairs_with_ties_and_weights(levels, weighted):
    rng = np.random.default_rng(levels)
    scores, labels = rng.integers(0, levels, 80) / 7, rng.integers(0, 2, 80)
    weights = rng.random(80) * (rng.random(80) > 0.2) if weighted else np.ones(80)
    expected = pair_auc(scores, labels, weights)
    assert auc(scores, labels, weights) == pytest.approx(expected, abs=1e-14)
    if not weighted:
        assert auc(torch.tensor(scores), torch.tensor(labels)) == pytest.approx(expected, abs=1e-14)


def test_metrics_agree_with_scikit_learn():
    reference = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    logits, labels, weights = rng.normal(size=20_000), rng.integers(0, 2, 20_000), rng.random(20_000)
    logits = np.round(logits, 2)
    chances = 1 / (1 + np.exp(-logits))
    for w in (None, weights):
        assert auc(logits, labels, w) == pytest.approx(
            reference.roc_auc_score(labels, logits, sample_weight=w), abs=1e-12
        )
        loss = reference.log_loss(labels, chances, sample_weight=w)
        assert log_loss(logits, labels, w) == pytest.approx(loss, rel=1e-12)
        rate = np.full(len(labels), np.average(labels, weights=w))
        base = reference.log_loss(labels, rate, sample_weight=w)
        assert normalized_entropy(logits, labels, w) == pytest.approx(loss / base, rel=1e-12)
        squared = reference.mean_squared_error(labels, logits, sample_weight=w)
        assert mean_squared_error(logits, labels, w) == pytest.approx(squared, rel=1e-12)
        ratio = np.average(chances, weights=w) / np.average(labels, weights=w)
        assert calibration(logits, labels, w) == pytest.approx(ratio, rel=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_gauc_is_the_weighted_mean_of_scikit_learns_auc_in_every_group(weighted):
    reference = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(1)
    groups = rng.integers(-3, 40, 3000)
    scores, labels = np.round(rng.normal(size=3000), 1), rng.integers(0, 2, 3000)
    labels[groups == 7], labels[groups == 8] = 0, 1  # no AUC in these two
    weights = rng.random(3000) * (rng.random(3000) > 0.1) if weighted else np.ones(3000)
    found = []
    for name in np.unique(groups):
        rows = groups == name
        if len(np.unique(labels[rows])) == 2:
            area = reference.roc_auc_score(labels[rows], scores[rows], sample_weight=weights[rows])
            found.append((area, weights[rows].sum()))
    areas, sizes = np.array(found).T
    given = (torch.tensor(scores), torch.tensor(labels), torch.tensor(groups))
    assert gauc(*given, weights if weighted else None) == pytest.approx(np.average(areas, weights=sizes), abs=1e-12)


def test_gauc_by_hand_and_of_one_group():
    scores, labels = np.array([1.0, 2.0, 5.0, 4.0, 4.0, 0.0]), np.array([0, 1, 0, 1, 0, 0])
    # Of users 1 (the first two rows) and 2 (the next three) the areas are 1 and 1/4; user 3 has one class.
    users = np.array([1, 1, 2, 2, 2, 3])
    assert gauc(scores, labels, users) == pytest.approx((2 * 1 + 3 * 0.25) / 5, rel=1e-15)
    assert gauc(scores, labels, np.zeros(6)) == pytest.approx(auc(scores, labels), rel=1e-15)
    assert gauc(np.array([-INF, INF]), np.array([0, 1]), users[:2]) == 1


@pytest.mark.parametrize(("scores", "groups"), [([], []), ([1.0, 2.0], [0, 1]), ([NAN, 2.0], [0, 0])])
def test_gauc_is_nan_without_a_group_of_both_classes_or_with_nan_scores(scores, groups):
    assert math.isnan(gauc(np.array(scores, float), np.arange(len(scores)), np.array(groups)))


def test_gauc_names_bad_groups():
    with pytest.raises(ValueError, match=r"groups: got shape \[1\], expected \[2\]"):
        gauc(np.array([1.0, 2.0]), np.array([0, 1]), np.array([1]))


def test_calibration():
    labels = np.array([1.0, 0.0, 0.0, 0.0])
    assert calibration(np.full(4, -math.log(3)), labels) == pytest.approx(1, rel=1e-14)
    assert calibration(np.zeros(4), labels) == 2
    assert calibration(np.array([INF, -INF, 0.0, NAN]), labels, np.array([1.0, 1.0, 2.0, 0.0])) == 2
    assert math.isnan(calibration(np.zeros(2), np.zeros(2))) and math.isnan(calibration(np.zeros(0), np.zeros(0)))


@pytest.mark.parametrize("scores", [[1.0, 2.0, 2.0, 3.0], [-INF, 0.0, 0.0, INF]])
def test_auc_by_hand(scores):
    assert auc(np.array(scores), np.array([0, 0, 1, 1])) == 0.875


def test_auc_keeps_scores_that_one_float32_step_parts():
    scores = torch.tensor([1.0, 1.0 + 2**-23])
    assert auc(scores, torch.tensor([0, 1])) == 1.0


@pytest.mark.parametrize(
    ("scores", "labels"), [([], []), ([1.0, 2.0], [1, 1]), ([1.0, 2.0], [0, 0]), ([NAN, 2.0], [0, 1])]
)
def test_auc_is_nan_without_both_classes_or_with_nan_scores(scores, labels):
    assert math.isnan(auc(np.array(scores, float), np.array(labels, float)))


def test_auc_is_nan_where_a_class_has_no_weight():
    assert math.isnan(auc(np.array([1.0, 2.0]), np.array([0, 1]), np.array([0.0, 1.0])))


def test_log_loss_of_extreme_logits():
    assert log_loss(np.array([800.0, -800.0]), np.array([0, 1])) == 800
    assert log_loss(np.array([INF, -INF]), np.array([1, 0])) == 0
    assert log_loss(np.array([INF]), np.array([0])) == INF
    assert log_loss(np.array([40.0]), np.array([1])) == pytest.approx(math.exp(-40), rel=1e-12)
    assert math.isnan(log_loss(np.array([NAN, 0.0]), np.array([1, 0])))
    assert math.isnan(log_loss(np.array([]), np.array([])))


def test_soft_labels_and_zero_weights():
    x, y = 0.3, 0.25
    p = 1 / (1 + math.exp(-x))
    expected = -(y * math.log(p) + (1 - y) * math.log(1 - p))
    loss = log_loss(np.array([x, NAN]), np.array([y, 1.0]), np.array([2.0, 0.0]))
    assert loss == pytest.approx(expected, rel=1e-14)


def test_normalized_entropy_of_the_base_rate_is_one():
    labels = np.array([1.0] * 3 + [0.0] * 7)
    assert normalized_entropy(np.full(10, math.log(0.3 / 0.7)), labels) == pytest.approx(1, rel=1e-14)
    weights = np.array([2.0] * 3 + [1.0] * 7)
    assert normalized_entropy(np.full(10, math.log(6 / 7)), labels, weights) == pytest.approx(1, rel=1e-14)


@pytest.mark.parametrize("labels", [[0, 0], [1, 1], []])
def test_normalized_entropy_is_nan_without_both_classes(labels):
    assert math.isnan(normalized_entropy(np.zeros(len(labels)), np.array(labels, float)))


def test_mean_squared_error():
    assert mean_squared_error(np.array([1.0, 3.0]), np.array([0.0, 0.0]), np.array([3.0, 1.0])) == 3
    assert math.isnan(mean_squared_error(np.array([]), np.array([])))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1.0]], [1.0]), "scores"),
        (([1.0], [1.0, 0.0]), "labels"),
        (([1.0], [1.0], [1.0, 1.0]), "weights"),
        (([1.0], [1.0], [-1.0]), "weights"),
        (([1.0], [1.0], [NAN]), "weights"),
        (([1.0], [NAN]), "labels"),
        (([1.0], [2.0]), "labels"),
    ],
)
@pytest.mark.parametrize("metric", [auc, log_loss, calibration, lambda s, y, w=None: gauc(s, y, np.zeros(len(s)), w)])
def test_bad_arguments_are_named(metric, arguments, message):
    with pytest.raises(ValueError, match=message):
        metric(*(np.array(a) for a in arguments))


def test_auc_refuses_soft_labels():
    with pytest.raises(ValueError, match="labels"):
        auc(np.array([1.0, 2.0]), np.array([0.5, 1.0]))
