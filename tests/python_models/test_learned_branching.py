"""Learned branching against numpy: its draws, its gradients, and the tree that comes out."""

import math

import numpy as np
import pytest
import torch

from python_models import BranchedMTL, LearnedBranching
from python_models.serving import flops

CASES = {
    "two levels": dict(num_tasks=3, num_experts=[4, 2], expert_dims=[[5, 3], [4]]),
    "one level": dict(num_tasks=2, num_experts=3, expert_dims=[[4]]),
    "one parent": dict(num_tasks=3, num_experts=[1, 3, 1], expert_dims=[[5], [4], [3]]),
    "one task": dict(num_tasks=1, num_experts=2, expert_dims=[[5], [4]]),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def make(case, **options):
    torch.manual_seed(0)
    model = LearnedBranching(6, activation="tanh", dtype=torch.float64, **case, **options)
    with torch.no_grad():
        for theta in model.search_parameters():
            theta.normal_()
    return model


def sizes_of(case):
    n, levels = case["num_experts"], len(case["expert_dims"])
    return [n] * levels if isinstance(n, int) else n


def mixed(numeric, params, x, case, weights):
    """v_j = sum_i d_ji y_i, child by child, with the weights [J,I] of each level."""
    sizes = sizes_of(case)
    inputs = [x if x.ndim == 2 else x[:, u] for u in range(sizes[0])]
    for i, d in enumerate(weights):
        y = [numeric.expert(params, f"levels.{i}", e, inputs[e]) for e in range(sizes[i])]
        inputs = [sum(d[j, e] * y[e] for e in range(sizes[i])) for j in range(len(d))]
    return np.stack(inputs, 1)


def children_of(case):
    return [*sizes_of(case)[1:], case["num_tasks"]]


def draws(params, case, temperature, uniform):
    """d = softmax((log softmax(theta) + g) / tau) of every level."""
    found = []
    for i, (parents, children) in enumerate(zip(sizes_of(case), children_of(case), strict=True)):
        if parents == 1:
            found.append(np.ones((children, 1)))
            continue
        theta = params[f"choices.{i}.theta"]
        p = np.exp(theta) / np.exp(theta).sum(1, keepdims=True)
        d = np.exp((np.log(p) - np.log(-np.log(uniform[i]))) / temperature)
        found.append(d / d.sum(1, keepdims=True))
    return found


def uniforms(case, seed):
    torch.manual_seed(seed)
    shapes = zip(sizes_of(case), children_of(case), strict=True)
    return [torch.rand(j, i, dtype=torch.float64).numpy() if i > 1 else None for i, j in shapes]


def seeded(model, seed):
    def run(x):
        torch.manual_seed(seed)
        return model(x)

    return run


@every_case
@pytest.mark.parametrize("per_unit", [False, True], ids=["shared x", "per-unit x"])
def test_soft_draws_equal_numpy(numeric, case, per_unit):
    model, uniform = make(case, hard=False, temperature=0.8), uniforms(case, 7)
    x = torch.randn((5, sizes_of(case)[0], 6) if per_unit else (5, 6), dtype=torch.float64)

    def forward(params, x):
        return mixed(numeric, params, x, case, draws(params, case, 0.8, uniform))

    numeric.compare(model, forward, x, seeded(model, 7))


@every_case
def test_hard_draws_equal_numpy(numeric, case):
    """One parent each; theta's gradient is the softmax's, times the slope of the loss by each weight."""
    model, uniform, x = make(case, temperature=0.8), uniforms(case, 7), torch.randn(5, 6, dtype=torch.float64)
    params = numeric.arrays(model)
    soft = draws(params, case, 0.8, uniform)
    hard = [np.eye(d.shape[1])[d.argmax(1)] for d in soft]
    out = seeded(model, 7)(x)
    np.testing.assert_allclose(out.detach(), mixed(numeric, params, x.numpy(), case, hard), rtol=0, atol=1e-13)
    grad = torch.randn_like(out)
    out.backward(grad)
    for i, choice in enumerate(model.choices):
        if choice.theta is None:
            continue
        slope = numeric.slopes(lambda: (mixed(numeric, params, x.numpy(), case, hard) * grad.numpy()).sum(), hard[i])
        theta = params[f"choices.{i}.theta"]
        expected = numeric.slopes(lambda: (draws(params, case, 0.8, uniform)[i] * slope).sum(), theta)  # noqa: B023
        np.testing.assert_allclose(choice.theta.grad, expected, rtol=0, atol=1e-7)


@every_case
@pytest.mark.parametrize("hard", [True, False])
def test_warm_up_is_the_mean(numeric, case, hard):
    model = make(case, hard=hard, temperature=math.inf)
    mean = [np.full((j, i), 1 / i) for i, j in zip(sizes_of(case), children_of(case), strict=True)]
    numeric.compare(model, lambda params, x: mixed(numeric, params, x, case, mean), torch.randn(5, 6).double())
    for theta in model.search_parameters():
        assert not theta.grad.any()


@every_case
def test_evaluation_takes_the_likeliest(numeric, case):
    model = make(case).eval()
    shapes = zip(sizes_of(case), children_of(case), model.choices, strict=True)
    best = [np.eye(i)[c.theta.detach().argmax(1).numpy()] if i > 1 else np.ones((j, 1)) for i, j, c in shapes]
    numeric.compare(model, lambda params, x: mixed(numeric, params, x, case, best), torch.randn(5, 6).double())


def test_every_parameter_gets_a_gradient():
    for hard in (False, True):
        model = make(CASES["two levels"], hard=hard)
        for _ in range(50):  # one draw leaves blocks out
            model(torch.randn(9, 6).double()).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@every_case
def test_parameter_count(case):
    width, expected = 6, 0
    for parents, children, dims in zip(sizes_of(case), children_of(case), case["expert_dims"], strict=True):
        chain = [width, *dims]
        expected += parents * sum(k * n + n for k, n in zip(chain, dims, strict=False))
        expected += parents * children if parents > 1 else 0
        width = dims[-1]
    assert sum(p.numel() for p in make(case).parameters()) == expected


def test_starts_undecided():
    model = LearnedBranching(6, 3, 4, [[5], [4]])
    assert all(not theta.any() for theta in model.search_parameters())
    assert model.paths() == [[0, 0, 0], [0, 0, 0]]
    assert {id(p) for p in model.search_parameters()} == {id(c.theta) for c in model.choices}


def served_case(**options):
    """Tasks 0 and 2 through block 3 of the second level, task 1 through block 0; these through 2 and 1 of the first."""
    torch.manual_seed(0)
    model = LearnedBranching(6, 3, [3, 4], [[5], [4]], **options).to(torch.float64)
    with torch.no_grad():
        model.choices[1].theta[[0, 1, 2], [3, 0, 3]] = 1
        model.choices[0].theta[[0, 1, 2, 3], [1, 0, 0, 2]] = 1
    return model


def own_block(k, dims):
    return torch.nn.Sequential(torch.nn.Linear(k, dims[-1]), torch.nn.Tanh())


@pytest.mark.parametrize(
    "options", [{}, dict(norm="batch", dropout=0.5), dict(expert=own_block)], ids=["plain", "norm", "own"]
)
def test_serving(options):
    model = served_case(**options)
    for _ in range(3):
        model(torch.randn(20, 6).double())  # running statistics
    assert model.paths() == [[2, 1, 2], [3, 0, 3]] and model.blocks_in_use() == [[2, 1], [3, 0]]
    served, x = model.for_serving(), torch.randn(9, 6).double()
    assert isinstance(served, BranchedMTL) and not served.training and model.training
    assert served.partitions == model.partitions() == [[[0, 2], [1]], [[0, 2], [1]]]
    model.eval()
    torch.testing.assert_close(served(x), model(x), rtol=0, atol=1e-14)
    apart = torch.randn(9, 3, 6).double()
    torch.testing.assert_close(served(apart[:, [2, 1]]), model(apart), rtol=0, atol=1e-14)
    assert sum(p.numel() for p in served.parameters()) < sum(p.numel() for p in model.levels.parameters())
    with torch.no_grad():
        expected = served(x)
        for p in model.parameters():
            p.zero_()
    assert torch.equal(served(x), expected)


def test_serving_costs_less():
    model, x = served_case().eval(), torch.randn(9, 6).double()
    found = [flops(network, x) for network in (model, model.for_serving())]
    # Two blocks a level, and one more pass to hand task 0's to task 2.
    assert found[1] == 9 * (2 * 2 * (6 * 5 + 5 * 4) + 2 * 3 * 4)
    assert found[0] > 9 * 2 * (3 * 6 * 5 + 4 * 5 * 4)


def test_is_the_tree_one_builds_by_hand():
    """One-hot thetas, and the draws at a low temperature with them: the hand-built tree."""
    model = served_case()
    tree = BranchedMTL(6, 3, [[5], [4]], [[[0, 2], [1]], [[0, 2], [1]]], dtype=torch.float64)
    with torch.no_grad():
        for theta in model.search_parameters():
            theta.mul_(500)
        for level, mine, order in zip(tree.levels, model.levels, ([2, 1], [3, 0]), strict=True):
            for a, b in zip(level.parameters(), mine.parameters(), strict=True):
                a.copy_(b[order])
    x = torch.randn(9, 6).double()
    for network in (model, model.eval()):
        torch.testing.assert_close(network(x), tree(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(num_experts=0), ValueError, "num_experts must be at least 1; got 0"),
        (dict(num_experts=[2, 2]), ValueError, "num_experts has 2 entries for 1 levels"),
        (dict(expert_dims=[5]), ValueError, r"\[\[5\]\] for one level"),
        (dict(temperature=-1), ValueError, "temperature must be above 0"),
        (dict(gate_bias=False), ValueError, "gate_bias is for networks with gates"),
        (dict(activation="elu"), ValueError, "activation .* got 'elu'"),
    ],
)
def test_bad_arguments(change, error, words):
    with pytest.raises(error, match=words):
        LearnedBranching(**(dict(in_features=6, num_tasks=2, num_experts=2, expert_dims=[[5]]) | change))


def test_bad_input():
    model = LearnedBranching(6, 2, 3, [[5]])
    with pytest.raises(ValueError, match=r"x must be \[B,6\] or \[B,3,6\] .* got \(4, 2, 6\)"):
        model(torch.zeros(4, 2, 6))
    with pytest.raises(ValueError, match="temperature must be above 0; got 0"):
        model.temperature = 0
