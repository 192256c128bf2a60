"""Metrics in float64. Binary tasks: AUC, GAUC, log loss, normalised entropy, calibration; regression: squared error."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

Vector = Tensor | np.ndarray


def auc(scores: Vector, labels: Vector, weights: Vector | None = None) -> float:
    """Area under the ROC curve: the weighted share of (positive, negative) pairs in the right order, ties count half.

    scores [N]: logits or any increasing function of them (logits are better: probabilities round to ties near 0 and 1);
    labels [N], 0 or 1; weights [N], at least 0. NaN when a class is missing or a score is NaN. Raises ValueError.
    """
    scores, labels, weights = _vectors(scores, labels, weights)
    _check_classes(labels)
    if scores.isnan().any():
        return math.nan
    _, group = torch.unique(scores, return_inverse=True)
    groups = int(group.max()) + 1 if len(group) else 0
    positive, negative = _sums(group, groups, weights * labels), _sums(group, groups, weights * (1 - labels))
    pairs = float(positive.sum() * negative.sum())
    if pairs == 0:
        return math.nan
    below = negative.cumsum(0) - 0.5 * negative
    return float((positive * below).sum()) / pairs


def gauc(scores: Vector, labels: Vector, groups: Vector, weights: Vector | None = None) -> float:
    """AUC inside every group (a user, a session), their mean by the groups' weight (Zhou et al., KDD 2018, section 5).

    As :func:`auc`, with groups [N], any numbers. A group counts as many times as the weights of its rows, or its rows,
    say; one in which a class is missing has no AUC and is left out. NaN where that leaves nothing, or a score is NaN.
    Raises ValueError.
    """
    scores, labels, weights = _vectors(scores, labels, weights)
    _check_classes(labels)
    groups = torch.as_tensor(groups).detach().cpu()
    if groups.shape != scores.shape:
        raise ValueError(f"groups: got shape {list(groups.shape)}, expected {list(scores.shape)}, one a score")
    if scores.isnan().any():
        return math.nan
    names, group = torch.unique(groups, return_inverse=True)
    order = scores.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    group, scores, labels, weights = group[order], scores[order], labels[order], weights[order]
    first = torch.ones(len(scores), dtype=torch.bool)  # of the rows of one group and one score
    first[1:] = (group[1:] != group[:-1]) | (scores[1:] != scores[:-1])
    tie, owner = first.cumsum(0) - 1, group[first]
    positive, negative = _sums(tie, len(owner), weights * labels), _sums(tie, len(owner), weights * (1 - labels))
    all_negative = _sums(owner, len(names), negative)
    before = all_negative.cumsum(0) - all_negative
    below = negative.cumsum(0) - 0.5 * negative - before[owner]
    pairs = _sums(owner, len(names), positive) * all_negative
    won, size = _sums(owner, len(names), positive * below), _sums(group, len(names), weights)
    kept = pairs > 0
    return _mean(won[kept] / pairs[kept], size[kept])


def log_loss(logits: Vector, labels: Vector, weights: Vector | None = None) -> float:
    """Weighted mean cross-entropy in nats, from logits [N] and labels [N] in [0, 1]; NaN over no weight."""
    logits, labels, weights = _vectors(logits, labels, weights)
    _check_soft(labels)
    zero = torch.zeros((), dtype=torch.float64)
    # From two softplus, so that nothing cancels; selected, so that an infinite logit on the right side costs 0.
    as_positive = torch.where(labels > 0, labels * torch.logaddexp(-logits, zero), zero)
    as_negative = torch.where(labels < 1, (1 - labels) * torch.logaddexp(logits, zero), zero)
    loss = torch.where(logits.isnan(), logits, as_positive + as_negative)
    return _mean(loss, weights)


def normalized_entropy(logits: Vector, labels: Vector, weights: Vector | None = None) -> float:
    """Log loss over the entropy of the mean label of the same rows (He et al. 2014): below 1 beats the base rate.

    NaN where every label is 0 or every label is 1.
    """
    loss = log_loss(logits, labels, weights)
    _, labels, weights = _vectors(logits, labels, weights)
    rate = _mean(labels, weights)
    if not 0 < rate < 1:
        return math.nan
    return loss / -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate))


def calibration(logits: Vector, labels: Vector, weights: Vector | None = None) -> float:
    """Weighted mean of the predicted chances over that of the labels, from logits [N] and labels [N] in [0, 1].

    1 is calibrated on the whole, above 1 is too sure of the positives (He et al. 2014). NaN where no label is positive.
    """
    logits, labels, weights = _vectors(logits, labels, weights)
    _check_soft(labels)
    rate = _mean(labels, weights)
    return _mean(logits.sigmoid(), weights) / rate if rate > 0 else math.nan


def mean_squared_error(predictions: Vector, labels: Vector, weights: Vector | None = None) -> float:
    """Weighted mean of ``(prediction - label)^2``; NaN over no weight."""
    predictions, labels, weights = _vectors(predictions, labels, weights)
    return _mean((predictions - labels) ** 2, weights)


def _check_classes(labels: Tensor) -> None:
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError("labels: got a value other than 0 and 1")


def _check_soft(labels: Tensor) -> None:
    if not ((labels >= 0) & (labels <= 1)).all():
        raise ValueError("labels: got a value outside [0, 1]")


def _sums(index: Tensor, count: int, values: Tensor) -> Tensor:
    """The sums of the values that share an index, float64 [count]."""
    return torch.zeros(count, dtype=torch.float64).index_add_(0, index, values)


def _mean(values: Tensor, weights: Tensor) -> float:
    total = float(weights.sum())
    # A row of weight 0 is out, whatever it holds.
    kept = torch.where(weights > 0, weights * values, torch.zeros((), dtype=torch.float64))
    return float(kept.sum()) / total if total > 0 else math.nan


def _vectors(scores: Vector, labels: Vector, weights: Vector | None) -> tuple[Tensor, Tensor, Tensor]:
    """All three as float64 vectors [N] on the CPU."""
    scores = torch.as_tensor(scores).detach().to("cpu", torch.float64)
    labels = torch.as_tensor(labels).detach().to("cpu", torch.float64)
    weights = torch.ones_like(labels) if weights is None else torch.as_tensor(weights).detach().to("cpu", torch.float64)
    if scores.dim() != 1:
        raise ValueError(f"scores: got shape {list(scores.shape)}, expected [N]")
    for name, vector in (("labels", labels), ("weights", weights)):
        if vector.shape != scores.shape:
            raise ValueError(f"{name}: got shape {list(vector.shape)}, expected {list(scores.shape)}, one a score")
    if not (weights >= 0).all():
        raise ValueError("weights: got a negative number or a NaN")
    return scores, labels, weights
