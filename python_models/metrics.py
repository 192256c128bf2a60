"""Metrics of binary tasks, in float64: AUC, log loss, normalised entropy; and the squared error of regression."""

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
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError("labels: got a value other than 0 and 1")
    if scores.isnan().any():
        return math.nan
    _, group = torch.unique(scores, return_inverse=True)
    groups = int(group.max()) + 1 if len(group) else 0
    positive = torch.zeros(groups, dtype=torch.float64).index_add_(0, group, weights * labels)
    negative = torch.zeros(groups, dtype=torch.float64).index_add_(0, group, weights * (1 - labels))
    pairs = float(positive.sum() * negative.sum())
    if pairs == 0:
        return math.nan
    below = negative.cumsum(0) - 0.5 * negative
    return float((positive * below).sum()) / pairs


def log_loss(logits: Vector, labels: Vector, weights: Vector | None = None) -> float:
    """Weighted mean cross-entropy in nats, from logits [N] and labels [N] in [0, 1]; NaN over no weight."""
    logits, labels, weights = _vectors(logits, labels, weights)
    if not ((labels >= 0) & (labels <= 1)).all():
        raise ValueError("labels: got a value outside [0, 1]")
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
    if not ((labels >= 0) & (labels <= 1)).all():
        raise ValueError("labels: got a value outside [0, 1]")
    rate = _mean(labels, weights)
    return _mean(logits.sigmoid(), weights) / rate if rate > 0 else math.nan


def mean_squared_error(predictions: Vector, labels: Vector, weights: Vector | None = None) -> float:
    """Weighted mean of ``(prediction - label)^2``; NaN over no weight."""
    predictions, labels, weights = _vectors(predictions, labels, weights)
    return _mean((predictions - labels) ** 2, weights)


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
