"""Synthetic tasks whose relatedness is a number one chooses (MMoE, Ma et al. 2018, section 3.2).

``y_t = w_t.x + sum_i sin(alpha_i w_t.x + beta_i) + noise``, ``x ~ N(0, I)``, ``|w_t| = c``, the cosine of ``w_s`` and
``w_t`` is the task correlation. The paper has two tasks; any correlation matrix gives any number of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from python_models.data.task_data import Splits, TaskData

# Each random part has a stream of its own: more rows or more tasks leave everything else as it was.
_DIRECTIONS, _SINES, _INPUTS, _NOISE, _LABELS = range(5)


@dataclass(frozen=True)
class SyntheticTasks:
    """One draw of the tasks: weights [T, d], alpha [m], beta [m], all float64; rows come from :meth:`sample`."""

    weights: np.ndarray
    alpha: np.ndarray
    beta: np.ndarray
    noise: float
    seed: int

    @classmethod
    def draw(
        cls,
        in_features: int = 100,
        correlation: float | Sequence[Sequence[float]] | np.ndarray = 0.8,
        *,
        scale: float = 0.3,
        num_sines: int = 5,
        noise: float = 0.1,
        seed: int = 0,
    ) -> SyntheticTasks:
        """Draw tasks. correlation: a number p (two tasks) or a matrix [T, T], symmetric, positive semi-definite, unit
        diagonal. scale is the paper's c, noise the standard deviation. Raises ValueError where these do not fit.
        """
        factor = _factor(correlation)
        live = np.flatnonzero((factor != 0).any(0))
        if in_features < len(live):
            raise ValueError(f"in_features: got {in_features}, expected at least the correlation's rank, {len(live)}")
        # Rows of the Gaussian matrix become the directions one after the other, so that a further one changes none.
        columns = _stream(seed, _DIRECTIONS).standard_normal((len(live), in_features)).T
        q, r = np.linalg.qr(columns)
        directions = q * np.where(np.diag(r) < 0, -1.0, 1.0)
        sines = _stream(seed, _SINES).standard_normal((num_sines, 2))
        return cls(scale * factor[:, live] @ directions.T, sines[:, 0].copy(), sines[:, 1].copy(), float(noise), seed)

    def sample(self, rows: int, part: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """x [rows, d] and y [rows, T], float64. Parts (training, validation, ...) are independent of each other."""
        x = _stream(self.seed, _INPUTS, part).standard_normal((rows, self.weights.shape[1]))
        y = x @ self.weights.T
        signal = y + sum(np.sin(a * y + b) for a, b in zip(self.alpha, self.beta, strict=True))
        noise = [_stream(self.seed, _NOISE, part, t).standard_normal(rows) for t in range(len(self.weights))]
        return x, signal + self.noise * np.stack(noise, 1)

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """The exact mean [T] and covariance [T, T] of the labels."""
        tasks = len(self.weights)
        gram = self.weights @ self.weights.T
        var = np.diag(gram)  # c squared, up to rounding
        a, b = self.alpha, self.beta
        mean = np.array([np.sum(np.exp(-0.5 * a * a * v) * np.sin(b)) for v in var])
        cov = np.empty((tasks, tasks))
        for s in range(tasks):
            for t in range(tasks):
                linear_sine = sum(np.sum(a * np.exp(-0.5 * a * a * v) * np.cos(b)) for v in (var[s], var[t]))
                base = a[:, None] ** 2 * var[s] + a[None, :] ** 2 * var[t]
                cross = 2 * np.outer(a, a) * gram[s, t]
                minus = np.exp(-0.5 * (base - cross)) * np.cos(b[:, None] - b[None, :])
                plus = np.exp(-0.5 * (base + cross)) * np.cos(b[:, None] + b[None, :])
                sines = 0.5 * np.sum(minus - plus) - mean[s] * mean[t]
                cov[s, t] = gram[s, t] * (1 + linear_sine) + sines
        return mean, cov + self.noise**2 * np.eye(tasks)


def make_synthetic(
    rows: Sequence[int] = (10_000, 1_000, 1_000),
    in_features: int = 100,
    correlation: float | Sequence[Sequence[float]] | np.ndarray = 0.8,
    *,
    scale: float = 0.3,
    num_sines: int = 5,
    noise: float = 0.1,
    seed: int = 0,
    binary: str | None = None,
    sharpness: float = 1.0,
) -> Splits:
    """Training, validation and test rows of freshly drawn tasks; arguments as in :meth:`SyntheticTasks.draw`.

    binary: None keeps the numbers; "median" labels a row by ``y > the training rows' median of its task``;
    "bernoulli" draws the label with probability ``sigmoid(sharpness * y)``.
    """
    if len(rows) != 3 or min(rows) < 0:
        raise ValueError(f"rows: got {tuple(rows)}, expected three counts: training, validation, test")
    if binary not in (None, "median", "bernoulli"):
        raise ValueError(f"binary: got {binary!r}, expected None, 'median' or 'bernoulli'")
    tasks = SyntheticTasks.draw(in_features, correlation, scale=scale, num_sines=num_sines, noise=noise, seed=seed)
    samples = [tasks.sample(n, part) for part, n in enumerate(rows)]
    threshold = np.median(samples[0][1], axis=0) if binary == "median" and rows[0] else 0.0
    parts = []
    for part, (x, y) in enumerate(samples):
        if binary == "median":
            y = y > threshold
        elif binary == "bernoulli":
            chance = 0.5 * (1 + np.tanh(0.5 * sharpness * y))
            y = _stream(seed, _LABELS, part).random(y.shape) < chance
        parts.append(
            TaskData(
                numeric=torch.from_numpy(x.astype(np.float32)),
                categorical=torch.empty(len(x), 0, dtype=torch.int64),
                labels=torch.from_numpy(y.astype(np.float32)),
                vocab_sizes=(),
                task_names=tuple(f"task_{t + 1}" for t in range(y.shape[1])),
                numeric_names=tuple(f"x{i}" for i in range(in_features)),
                kind="regression" if binary is None else "binary",
            )
        )
    return Splits(*parts)


def _stream(seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def _factor(correlation: float | Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
    """Lower-triangular factor of a correlation matrix that may be singular (Cholesky, empty pivots left out)."""
    matrix = np.asarray(correlation, np.float64)
    if matrix.ndim == 0:
        matrix = np.array([[1.0, matrix], [matrix, 1.0]])
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] and len(matrix) > 0
    if not (
        square
        and np.isfinite(matrix).all()
        and np.allclose(matrix, matrix.T, rtol=0, atol=1e-12)
        and np.allclose(np.diag(matrix), 1, rtol=0, atol=1e-12)
        and np.linalg.eigvalsh(matrix).min() > -1e-10
    ):
        raise ValueError(
            f"correlation: got {correlation}, expected a number in [-1, 1] or a symmetric positive semi-definite "
            "matrix with ones on its diagonal"
        )
    factor = np.zeros_like(matrix)
    rest = matrix.copy()
    for j in range(len(matrix)):
        if rest[j, j] > 1e-12:
            factor[j:, j] = rest[j:, j] / np.sqrt(rest[j, j])
            rest -= np.outer(factor[:, j], factor[:, j])
    return factor
