"""Asynchronous updates against a loop over rows that does what the paper says."""

from functools import partial

import numpy as np
import pytest
import torch

from python_models import UberNet
from python_models.accumulator import AsyncTaskAccumulator


def row_loss(model, x, labels, labelled):
    return ((model(x) - labels).square() * labelled).sum()


def make():
    torch.manual_seed(0)
    return UberNet(6, 3, [5, 4], skip_features=2, skip_norm=None, activation="tanh", dtype=torch.float64)


def data(rows=60):
    torch.manual_seed(1)
    labelled = torch.rand(rows, 3) < torch.tensor([0.8, 0.3, 0.0])
    return torch.randn(rows, 6).double(), torch.randn(rows, 3).double(), labelled


def by_the_row(model, rate, limits):
    """Row by row: add up the gradients of the sets the row has labels for, count, and step where it is time."""
    shared, tasks = model.parameter_sets()
    sets = [*tasks, [(p, 0, p.numel()) for p in shared]]
    sums = [[np.zeros(end - begin) for _, begin, end in own] for own in sets]
    counts, steps = [0] * 4, [0] * 4
    for x, labels, labelled in zip(*data(), strict=True):
        model.zero_grad()
        row_loss(model, x[None], labels[None], labelled[None]).backward()
        for i, present in enumerate([*labelled.tolist(), bool(labelled.any())]):
            if not present:
                continue
            counts[i] += 1
            for total, (p, begin, end) in zip(sums[i], sets[i], strict=True):
                total += p.grad.flatten()[begin:end].numpy()
        for i, limit in enumerate(limits):
            if counts[i] >= limit:
                for total, (p, begin, end) in zip(sums[i], sets[i], strict=True):
                    p.data.view(-1)[begin:end] -= rate * torch.from_numpy(total / counts[i])
                    total[:] = 0
                counts[i], steps[i] = 0, steps[i] + 1
    return counts, steps


def test_equals_the_algorithm_row_by_row():
    limits = [4, 5, 2, 7]
    expected, model = make(), make()
    counts, steps = by_the_row(expected, 0.1, limits)
    assert steps[0] > 5 and steps[1] > 1 and steps[2] == 0 and steps[3] > 3
    before = [p.detach().clone() for p in model.parameters()]
    accumulator = AsyncTaskAccumulator(*model.parameter_sets(), limits[:3], limits[3], partial(torch.optim.SGD, lr=0.1))
    taken = []
    for x, labels, labelled in zip(*data(), strict=True):
        row_loss(model, x[None], labels[None], labelled[None]).backward()
        taken += accumulator.step(labelled[None])
    assert accumulator.counts == counts and [taken.count(i) for i in range(4)] == steps
    for p, q, old in zip(model.parameters(), expected.parameters(), before, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-13)
        assert not torch.equal(p, old)
    # The third task has no label at all: nothing of it has moved.
    for (p, begin, end), (q, _, _) in zip(model.parameter_sets()[1][2], make().parameter_sets()[1][2], strict=True):
        assert torch.equal(p.flatten()[begin:end], q.flatten()[begin:end])


def test_batches_count_their_rows():
    model, (x, labels, labelled) = make(), data(10)
    limits, rows = [2, 9, 1], labelled.sum(0).tolist()
    assert rows[0] > limits[0] and 0 < rows[1] < limits[1] and rows[2] == 0
    accumulator = AsyncTaskAccumulator(*model.parameter_sets(), limits, 1000, partial(torch.optim.SGD, lr=0.1))
    row_loss(model, x, labels, labelled).backward()
    due = [t for t in range(3) if rows[t] >= limits[t]]
    before = [[p.detach().flatten()[a:b].clone() for p, a, b in own] for own in model.parameter_sets()[1]]
    waiting = {t: [p.grad.flatten()[a:b].clone() for p, a, b in own] for t, own in enumerate(model.parameter_sets()[1])}
    assert accumulator.step(labelled) == due
    assert accumulator.counts == [0 if t in due else rows[t] for t in range(3)] + [int(labelled.any(1).sum())]
    for t, own in enumerate(model.parameter_sets()[1]):
        for (p, begin, end), grad, old in zip(own, waiting[t], before[t], strict=True):
            step = 0.1 * grad / rows[t] if t in due else 0
            torch.testing.assert_close(p.flatten()[begin:end], old - step, rtol=0, atol=1e-14)
            assert torch.equal(p.grad.flatten()[begin:end], torch.zeros_like(grad) if t in due else grad)


def test_sets_have_momentum_of_their_own():
    """A set that waits is not moved by what Adam remembers of it."""
    model, (x, labels, _) = make(), data(4)
    accumulator = AsyncTaskAccumulator(*model.parameter_sets(), [4, 8, 8], 4, partial(torch.optim.Adam, lr=0.1))
    everyone, first = torch.ones(4, 3).bool(), torch.tensor([True, False, False]).expand(4, 3)
    for labelled in (everyone, everyone):
        row_loss(model, x, labels, labelled).backward()
        accumulator.step(labelled)
    kept = [p.detach().flatten()[a:b].clone() for p, a, b in model.parameter_sets()[1][1]]
    row_loss(model, x, labels, first).backward()
    assert accumulator.step(first) == [0, 3]
    for (p, begin, end), old in zip(model.parameter_sets()[1][1], kept, strict=True):
        assert torch.equal(p.flatten()[begin:end], old)


def test_a_set_without_parameters_or_gradients():
    w = torch.nn.Parameter(torch.ones(2))
    accumulator = AsyncTaskAccumulator([], [[w]], [1], 1, partial(torch.optim.SGD, lr=0.1))
    assert accumulator.step(torch.ones(3, 1).bool()) == [0, 1] and torch.equal(w, torch.ones(2))
    assert accumulator.step(torch.ones(0, 1).bool()) == [] and accumulator.counts == [0, 0]


W = torch.nn.Parameter(torch.ones(2, 3))
SGD = partial(torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: AsyncTaskAccumulator([W], [[]], [1, 2], 1, SGD),
            ValueError,
            "has 2 entries for 1 tasks",
        ),
        (lambda: AsyncTaskAccumulator([W], [[]], [0], 1, SGD), ValueError, r"effective_batch\[0\] must be at least 1"),
        (lambda: AsyncTaskAccumulator([W], [[]], [1], 0, SGD), ValueError, "shared_batch must be at least 1"),
        (lambda: AsyncTaskAccumulator([], [[(W, 2, 7)]], [1], 1, SGD), ValueError, r"tasks\[0\] .* got 2:7 of 6"),
        (
            lambda: AsyncTaskAccumulator([W.t()], [[]], [1], 1, SGD),
            ValueError,
            "shared must hold contiguous",
        ),
        (
            lambda: AsyncTaskAccumulator([W], [[]], [1], 1, SGD).step(torch.ones(3, 1)),
            TypeError,
            "labelled must be",
        ),
        (lambda: AsyncTaskAccumulator([W], [[]], [1], 1, SGD).step(torch.ones(3).bool()), ValueError, r"\[B,1\]; got"),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()
