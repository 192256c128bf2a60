"""Dissimilarities, rank correlation and the search, against definitions and brute force."""

import itertools

import numpy as np
import pytest
import torch

from python_models import BranchedMTL, affinity


def plain_ranks(values):
    return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])


def plain_affinity(a, b):
    """Steps 2 and 3 of the definition, pair by pair."""
    triangles = []
    for features in (a, b):
        rows = features.reshape(len(features), -1)
        pairs = itertools.combinations(range(len(rows)), 2)
        triangles.append(plain_ranks(np.array([1 - np.corrcoef(rows[i], rows[j])[0, 1] for i, j in pairs])))
    return np.corrcoef(*triangles)[0, 1]


def test_affinities():
    rng = np.random.default_rng(0)
    features = [rng.normal(size=(7, 3, 5)), rng.normal(size=(7, 3, 2, 4)) * 1e200]
    found = affinity.affinities([torch.from_numpy(features[0]), features[1]])
    assert found.shape == (2, 3, 3) and found.dtype == np.float64
    for d, i, j in itertools.product(range(2), range(3), range(3)):
        scaled = features[d] / abs(features[d]).max()
        expected = plain_affinity(scaled[:, i], scaled[:, j])
        assert abs(found[d, i, j] - expected) < 1e-12


def test_affinity_of_equal_and_of_opposed_tasks():
    base = np.random.default_rng(0).normal(size=(6, 1, 4))
    found = affinity.affinities([np.concatenate((base, base * 3 + 1), 1)])
    np.testing.assert_allclose(found[0], 1, atol=1e-12)


def test_dissimilarities_are_one_minus_the_correlation():
    rows = np.array([[1.0, 2, 3], [2, 4, 6], [3, 2, 1]])
    np.testing.assert_allclose(affinity.dissimilarities(rows), [[0, 0, 2], [0, 0, 2], [2, 2, 0]], atol=1e-15)


def test_ranks_of_ties():
    values = np.array([3.0, 1, 3, 2, 3, 1])
    assert affinity.average_ranks(values).tolist() == [5, 1.5, 5, 3, 5, 1.5] == plain_ranks(values).tolist()
    # 1 - 6 sum d^2 / (n (n^2 - 1)) is right without ties, on ranks and not on values.
    a, b = np.array([10.0, 200, 3000, 4]), np.array([1.0, 3, 2, 4])
    d = affinity.average_ranks(a) - affinity.average_ranks(b)
    assert affinity.spearman(a, b) == pytest.approx(1 - 6 * (d @ d) / (4 * 15), abs=1e-15)


def test_constant_features():
    features = np.random.default_rng(0).normal(size=(5, 2, 4))
    features[:, 1] = 0.1
    with pytest.warns(UserWarning, match="constant"), pytest.warns(UserWarning, match=r"do not vary .* depths \[0\]"):
        found = affinity.affinities([features])
    assert found[0].tolist() == [[1, 0], [0, 1]]
    with pytest.warns(UserWarning, match="features of 1 samples are constant"):
        rdm = affinity.dissimilarities(np.array([[0.1, 0.1, 0.1], [1, 2, 3], [1, 2, 4]]))
    assert rdm[0].tolist() == [0, 1, 1] and rdm[1, 2] < 0.1


def test_reads_what_the_tree_gives():
    model = BranchedMTL(6, 3, [[5], [4]], [[[0], [1], [2]]] * 2, activation="tanh")
    found = affinity.affinities(model.features(torch.randn(8, 6)))
    assert found.shape == (2, 3, 3) and np.isfinite(found).all()


def random_affinity(depths, tasks, seed):
    a = np.random.default_rng(seed).uniform(-1, 1, size=(depths, tasks, tasks))
    a = (a + a.transpose(0, 2, 1)) / 2
    a[:, range(tasks), range(tasks)] = 1
    return a


def every_partition(items):
    if not items:
        yield []
        return
    for rest in every_partition(items[1:]):
        yield [[items[0]], *rest]
        for i in range(len(rest)):
            yield [*rest[:i], [items[0], *rest[i]], *rest[i + 1 :]]


def every_tree(tasks, depths):
    """All chains of refinements, by trying all tuples of partitions."""
    for levels in itertools.product(list(every_partition(list(range(tasks)))), repeat=depths):
        pairs = zip(levels, levels[1:], strict=False)
        if all(any(set(c) <= set(p) for p in above) for above, below in pairs for c in below):
            yield levels


def plain_cost(a, levels):
    total = 0.0
    for d, clusters in enumerate(levels):
        worst = [max((1 - a[d, i, j] for i in c for j in c if i != j), default=0.0) for c in clusters]
        total += sum(worst) / len(worst)
    return total


@pytest.mark.parametrize(("tasks", "depths"), [(1, 2), (2, 3), (3, 3), (4, 2), (4, 3)])
def test_search_is_exact_for_few_tasks(tasks, depths):
    prices = [3, 2, 5][:depths]
    trees = list(every_tree(tasks, depths))
    for seed in range(3):
        a = random_affinity(depths, tasks, seed)
        costs = [plain_cost(a, levels) for levels in trees]
        spent = [sum(p * len(c) for p, c in zip(prices, levels, strict=True)) for levels in trees]
        for budget in range(sum(prices), tasks * sum(prices) + 1, 3):
            best = min(c for c, s in zip(costs, spent, strict=True) if s <= budget)
            found = affinity.search_tree(a, prices, budget)
            assert plain_cost(a, found) == pytest.approx(best, abs=1e-12)
            assert affinity.tree_cost(a, found) == pytest.approx(best, abs=1e-12)
            assert sum(p * len(c) for p, c in zip(prices, found, strict=True)) <= budget
            BranchedMTL(3, tasks, [[2]] * depths, found)


def test_of_equal_trees_the_cheaper():
    a = np.ones((2, 3, 3))
    assert affinity.search_tree(a, [1, 1], 6) == [[[0, 1, 2]], [[0, 1, 2]]]


@pytest.mark.parametrize("tasks", [6, 9])
def test_search_finds_groups(tasks, monkeypatch):
    """Two groups that part at depth 1, and pairs of tasks that part at depth 2: seen by the beam too."""
    monkeypatch.setattr(affinity, "EXHAUSTIVE_TASKS", 0)
    a = np.full((3, tasks, tasks), 0.9)
    first = np.arange(tasks) < tasks // 2
    a[1][first[:, None] != first] = -0.5
    a[2] = np.where(np.arange(tasks)[:, None] // 2 == np.arange(tasks) // 2, 0.9, -0.8)
    a[2][first[:, None] != first] = -0.9
    groups = [first.nonzero()[0].tolist(), (~first).nonzero()[0].tolist()]
    pairs = [
        [t for t in group if t // 2 == k] for group in groups for k in range(tasks) if any(t // 2 == k for t in group)
    ]
    found = affinity.search_tree(a, [1, 1, 1], 1 + 2 + len(pairs))
    assert found == [[list(range(tasks))], groups, pairs]


def test_beam_is_close_and_within_budget(monkeypatch):
    gaps = []
    for seed in range(4):
        a = random_affinity(3, 5, seed)
        for budget in (6, 9, 12):
            exact = affinity.tree_cost(a, affinity.search_tree(a, [2, 1, 1], budget))
            with monkeypatch.context() as patch:
                patch.setattr(affinity, "EXHAUSTIVE_TASKS", 0)
                found = affinity.search_tree(a, [2, 1, 1], budget)
            assert sum(p * len(c) for p, c in zip([2, 1, 1], found, strict=True)) <= budget
            gaps.append(affinity.tree_cost(a, found) - exact)
    assert min(gaps) > -1e-12 and np.mean(gaps) < 0.1 * affinity.tree_cost(a, [[list(range(5))]] * 3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: affinity.affinities([]), ValueError, "features must have at least one depth"),
        (
            lambda: affinity.affinities([np.zeros((2, 3, 4))]),
            ValueError,
            r"features\[0\] must have at least 3 samples; got 2",
        ),
        (lambda: affinity.affinities([np.zeros((4, 3, 4)), np.zeros((4, 2, 4))]), ValueError, r"features\[1\] must be"),
        (lambda: affinity.affinities([np.full((4, 3, 4), np.nan)]), ValueError, r"features\[0\] must be finite"),
        (lambda: affinity.tree_cost(np.ones((2, 3)), []), ValueError, r"affinity must be \[D,T,T\]"),
        (
            lambda: affinity.tree_cost(np.ones((2, 3, 3)), [[[0, 1, 2]]]),
            ValueError,
            "partitions has 1 depths, affinity 2",
        ),
        (
            lambda: affinity.search_tree(np.triu(np.ones((1, 2, 2))), [1], 1),
            ValueError,
            "affinity must be .* symmetric",
        ),
        (
            lambda: affinity.search_tree(np.ones((1, 2, 2)), [1, 2], 5),
            ValueError,
            "block_costs must be 1 finite numbers",
        ),
        (lambda: affinity.search_tree(np.ones((1, 2, 2)), [2], 1), ValueError, "budget must be at least 2.0"),
        (
            lambda: affinity.search_tree(np.ones((1, 2, 2)), [2], 3, beam_width=0),
            ValueError,
            "beam_width must be at least 1",
        ),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()
