"""The tree of blocks against numpy, and the networks it is at its ends."""

import numpy as np
import pytest
import torch

from python_models import CGC, BranchedMTL, SharedBottom

TREES = {
    "splits": (3, [[5], [4, 3], [2]], [[[0, 1, 2]], [[0, 1], [2]], [[0], [1], [2]]]),
    "crossed": (4, [[5], [4]], [[[0, 2], [1, 3]], [[2], [1, 3], [0]]]),
    "shared end": (3, [[5], [4]], [[[1, 0, 2]], [[0, 2], [1]]]),
    "apart": (2, [[5], [4]], [[[0], [1]], [[0], [1]]]),
    "one task": (1, [[5], [4]], [[[0]], [[0]]]),
}
every_tree = pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())


def forward_of(numeric, model, tree):
    """Task by task: through the block of the cluster it is in, depth by depth."""
    num_tasks, dims, partitions = tree

    def forward(params, x):
        outputs = []
        for t in range(num_tasks):
            h = x if x.ndim == 2 else x[:, [t in cluster for cluster in model.partitions[0]].index(True)]
            for d in range(len(dims)):
                e = [t in cluster for cluster in model.partitions[d]].index(True)
                h = numeric.expert(params, f"levels.{d}", e, h)
            outputs.append(h)
        return np.stack(outputs, 1)

    return forward


@every_tree
@pytest.mark.parametrize("per_unit", [False, True], ids=["shared x", "per-unit x"])
def test_equals_numpy(numeric, tree, per_unit):
    torch.manual_seed(3)
    model = BranchedMTL(6, *tree, activation="tanh", dtype=torch.float64)
    for given, kept in zip(tree[2], model.partitions, strict=True):
        assert sorted(map(sorted, given)) == sorted(kept)
    units = len(tree[2][0])
    x = torch.randn((5, units, 6) if per_unit else (5, 6), dtype=torch.float64)
    numeric.compare(model, forward_of(numeric, model, tree), x)


@every_tree
def test_parameter_count(tree):
    num_tasks, dims, partitions = tree
    width, expected = 6, 0
    for level, clusters in zip(dims, partitions, strict=True):
        chain = [width, *level]
        expected += len(clusters) * sum(k * n + n for k, n in zip(chain, level, strict=False))
        width = level[-1]
    model = BranchedMTL(6, *tree)
    assert sum(p.numel() for p in model.parameters()) == expected
    model(torch.randn(9, 6)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_one_cluster_is_a_shared_bottom():
    torch.manual_seed(0)
    tree = BranchedMTL(6, 3, [[5], [4]], [[[0, 1, 2]]] * 2, dtype=torch.float64)
    bottom = SharedBottom(6, 3, [5, 4], dtype=torch.float64)
    state = tree.state_dict()
    bottom.load_state_dict({k: state[k.replace(f"bottom.linears.{i}", f"levels.{i}.linears.0")]
                            for i in range(2) for k in bottom.state_dict() if f"linears.{i}" in k})  # fmt: skip
    x = torch.randn(7, 6, dtype=torch.float64)
    assert torch.equal(tree(x), bottom(x))


def test_one_task_a_cluster_is_separate_networks():
    torch.manual_seed(0)
    tree = BranchedMTL(6, 3, [[5, 4]], [[[0], [1], [2]]], dtype=torch.float64)
    cgc = CGC(6, 3, 1, 0, [5, 4], dtype=torch.float64)
    cgc.levels[0].experts.load_state_dict(tree.levels[0].state_dict())
    for x in (torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 3, 6, dtype=torch.float64)):
        torch.testing.assert_close(tree(x), cgc(x), rtol=0, atol=1e-14)


def test_features_of_every_depth():
    torch.manual_seed(0)
    model, x = BranchedMTL(6, *TREES["crossed"]), torch.randn(7, 6)
    first, last = model.features(x)
    assert first.shape == (7, 4, 5) and torch.equal(last, model(x))
    assert model.partitions[0] == [[0, 2], [1, 3]]
    assert torch.equal(first, model.levels[0](x)[:, [0, 1, 0, 1]])


def test_gradient_of_a_shared_block_is_the_same_every_time():
    torch.manual_seed(0)
    model, x = BranchedMTL(6, *TREES["shared end"]), torch.randn(300, 6)
    found = []
    for _ in range(2):
        model.zero_grad()
        model(x).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_own_blocks():
    made = []

    def expert(k, dims):
        made.append((k, dims))
        return torch.nn.Linear(k, dims[-1])

    model = BranchedMTL(6, *TREES["crossed"], expert=expert)
    assert made == [(6, [5])] * 2 + [(5, [4])] * 3
    x = torch.randn(7, 6)
    first = [block(x) for block in model.levels[0].experts]
    expected = [block(first[i]) for block, i in zip(model.levels[1].experts, (0, 0, 1), strict=True)]
    assert model.partitions[1] == [[0], [2], [1, 3]]
    torch.testing.assert_close(model(x), torch.stack([expected[i] for i in (0, 2, 1, 2)], 1))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(num_tasks=0), ValueError, "num_tasks must be at least 1; got 0"),
        (dict(partitions=[]), ValueError, "partitions must have at least one depth"),
        (dict(partitions=3), TypeError, "partitions must be one partition of the tasks a depth; got 3"),
        (dict(partitions=[[[0, 1]], 3]), TypeError, r"partitions\[1\] must be a list of clusters"),
        (dict(partitions=[[[0, 1]]]), ValueError, "partitions has 1 depths, expert_dims 2"),
        (dict(partitions=[[[0, 1]], [[0]]]), ValueError, r"partitions\[1\] must name each of the 2 tasks once"),
        (dict(partitions=[[[0, 1]], [[0, 1], []]]), ValueError, r"partitions\[1\] must name each of the 2 tasks once"),
        (
            dict(partitions=[[[0], [1]], [[0, 1]]]),
            ValueError,
            r"must split .* got the cluster \[0, 1\]",
        ),
        (dict(partitions=[[[0, "1"]], [[0, 1]]]), TypeError, r"partitions\[0\]\[0\]\[1\] must be an int"),
        (dict(expert_dims=[5, 4]), ValueError, r"\[\[5, 4\]\] for one level"),
        (dict(gate_dims=[3]), ValueError, "gate_dims is for networks with gates"),
    ],
)
def test_bad_arguments(change, error, words):
    size = dict(in_features=6, num_tasks=2, expert_dims=[[5], [4]], partitions=[[[0, 1]], [[0], [1]]])
    with pytest.raises(error, match=words):
        BranchedMTL(**(size | change))


def test_bad_input():
    model = BranchedMTL(6, *TREES["apart"])
    with pytest.raises(ValueError, match=r"x must be \[B,6\] or \[B,2,6\] .* got \(3, 3, 6\)"):
        model(torch.zeros(3, 3, 6))
