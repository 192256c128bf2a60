"""Batches: every row once an epoch, an epoch from any batch on, ahead of the device or not."""

import threading

import pytest
import torch

from python_models.data import TaskData
from python_models.train.loader import Batches

CPU = torch.device("cpu")


def rows(n: int) -> TaskData:
    """Every column holds the row's number."""
    at = torch.arange(n)
    numbers = at.float().unsqueeze(1)
    half = (at % 2).float().unsqueeze(1)
    return TaskData(numbers, at[:, None], half, (max(n, 1),), ("a",), weights=numbers + 1, domain=at, num_domains=n)


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize(("n", "size"), [(10, 4), (8, 4), (1, 4), (0, 4), (5, 1)])
def test_every_row_once(n, size, prefetch):
    batches = Batches(rows(n), size, CPU, 3, prefetch)
    found = list(batches.epoch(2))
    assert len(found) == len(batches) == -(-n // size) and [len(b) for b in found[:-1]] == [size] * max(
        0, len(found) - 1
    )
    for batch in found:
        at = batch.domain
        assert torch.equal(batch.numeric, at.float().unsqueeze(1)) and torch.equal(batch.categorical, at.unsqueeze(1))
        assert torch.equal(batch.labels[:, 0], (at % 2).float()) and torch.equal(batch.weights, batch.numeric + 1)
    assert sorted(int(i) for batch in found for i in batch.domain) == list(range(n))
    assert torch.equal(batches.order(2), torch.cat([b.domain for b in found]) if found else batches.order(2))


@pytest.mark.parametrize("prefetch", [0, 2])
def test_orders(prefetch):
    batches = Batches(rows(50), 7, CPU, 3, prefetch)
    whole = [batch.domain for batch in batches.epoch(1)]
    rest = [batch.domain for batch in batches.epoch(1, 3)]
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], rest, strict=True))
    orders = [batches.order(0), batches.order(1), Batches(rows(50), 7, CPU, 4).order(1)]
    assert not any(torch.equal(a, b) for i, a in enumerate(orders) for b in orders[:i])


def test_the_thread_leaves_and_tells():
    batches = Batches(rows(50), 5, CPU, 0, 2)
    feed = batches.epoch(0)
    next(feed)
    feed.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "batches"]
    batches.columns[0] = batches.columns[0][:10]  # rows that are not there
    with pytest.raises((IndexError, RuntimeError)):
        list(batches.epoch(0))
