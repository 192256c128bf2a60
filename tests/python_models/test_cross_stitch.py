"""Cross-stitch networks against numpy, their identities and starts."""

import numpy as np
import pytest
import torch
from numpy_layers import inputs, mlp, units
from torch import nn

from mtlkernels.nn import ExpertMLP
from python_models import CrossStitch

CASES = {
    "levels": dict(num_tasks=2, expert_dims=[[5], [4, 3]]),
    "three tasks": dict(num_tasks=3, expert_dims=[[5], [1]], init="reference"),
    "channels": dict(num_tasks=2, expert_dims=[[5], [3]], channelwise=True, init="reference"),
    "one level": dict(num_tasks=3, expert_dims=[[3]], activation="tanh"),
    "one task": dict(num_tasks=1, expert_dims=[[5], [4]], channelwise=True),
    "layer norm": dict(num_tasks=2, expert_dims=[[5], [3]], norm="layer", activation="tanh"),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def numpy_cross_stitch(case):
    """Misra et al., eq. 1."""
    tasks, activation, norm = case["num_tasks"], case.get("activation", "relu"), case.get("norm")

    def oracle(a):
        streams = units(a["x"], tasks)
        for i in range(len(case["expert_dims"])):
            h = [mlp(a, f"experts.{i}", t, streams[t], activation, norm) for t in range(tasks)]
            alpha = a[f"stitches.{i}.weight"]
            streams = [sum(alpha[t, j] * h[j] for j in range(tasks)) for t in range(tasks)]
        return np.stack(streams, 1)

    return oracle


@pytest.mark.parametrize("per_unit", [False, True], ids=["shared x", "per-unit x"])
@every_case
def test_equals_numpy(plain, case, per_unit):
    torch.manual_seed(3)
    model = CrossStitch(6, dtype=torch.float64, **case)
    x = torch.randn((7, case["num_tasks"], 6) if per_unit else (7, 6), dtype=torch.float64)
    tensors = inputs(model, x)
    plain.numpy(model(x), tensors, numpy_cross_stitch(case))
    assert model(x).shape == (7, case["num_tasks"], model.out_features)


@every_case
def test_float32_equals_float64(case):
    torch.manual_seed(3)
    model, x = CrossStitch(6, **case), torch.randn(7, 6)
    torch.testing.assert_close(model(x).double(), model.double()(x.double()), rtol=1e-5, atol=1e-5)


@every_case
def test_parameter_count(case):
    tasks, width, expected = case["num_tasks"], 6, 0
    for dims in case["expert_dims"]:
        expected += tasks * sum(
            k * n + n + 2 * n * (case.get("norm") is not None) for k, n in zip([width, *dims], dims, strict=False)
        )
        width = dims[-1]
        expected += tasks * tasks * (width if case.get("channelwise") else 1)
    assert sum(p.numel() for p in CrossStitch(6, **case).parameters()) == expected


@pytest.mark.parametrize("channelwise", [False, True])
def test_the_identity_gives_separate_networks(channelwise):
    torch.manual_seed(0)
    model = CrossStitch(6, 3, [[5], [4]], channelwise=channelwise, same_task=1.0)
    x = torch.randn(7, 6)
    for t in range(3):
        h = x
        for level in model.experts:
            h = level.to_modules()[t](h)
        torch.testing.assert_close(model(x)[:, t], h, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("channelwise", [False, True])
def test_starts(channelwise):
    def alpha(tasks, **options):
        return CrossStitch(6, tasks, [[5]], channelwise=channelwise, dtype=torch.float64, **options).stitches[0].weight

    for found, diagonal, rest in ((alpha(3), 0.9, 0.05), (alpha(2, same_task=0.7), 0.7, 0.3), (alpha(1), 1.0, 0.0)):
        expected = torch.full(found.shape[:2], rest, dtype=torch.float64).fill_diagonal_(diagonal)
        expected = expected[..., None].expand_as(found) if channelwise else expected
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)
    reference = CrossStitch(6, 16, [[5]], channelwise=channelwise, init="reference").stitches[0].weight
    assert 0.2 < reference.abs().max() <= 0.25 and reference.min() < -0.2 and reference.max() > 0.2
    assert len(reference.unique()) > 200


def test_starts_from_networks_trained_alone():
    alone = [nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU()) for _ in range(2)]
    model, x = CrossStitch(6, 2, [[5], [4]], same_task=1.0), torch.randn(7, 6)
    for level, part in enumerate((slice(0, 2), slice(2, 4))):
        bank = ExpertMLP.from_modules([network[part] for network in alone])
        model.experts[level].load_state_dict(bank.state_dict())
    torch.testing.assert_close(model(x), torch.stack([network(x) for network in alone], 1))


def test_own_experts():
    made = []

    def expert(k, dims):
        made.append(nn.Sequential(nn.Linear(k, dims[-1]), nn.Softplus()))
        return made[-1]

    model, x = CrossStitch(6, 2, [[5]], expert=expert), torch.randn(7, 6)
    a, b = (network(x) for network in made)
    torch.testing.assert_close(model(x), torch.stack([0.9 * a + 0.1 * b, 0.1 * a + 0.9 * b], 1))


def test_mixing_parameters_are_the_stitches():
    model = CrossStitch(6, 2, [[5], [4]])
    names = [name for name, p in model.named_parameters() if any(p is q for q in model.mixing_parameters())]
    assert names == ["stitches.0.weight", "stitches.1.weight"]


@pytest.mark.parametrize("channelwise", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_copies_and_compiles(plain, channelwise):
    def make():
        return CrossStitch(6, 3, [[5], [4]], channelwise=channelwise)

    model, x = make(), torch.randn(7, 6)
    for twin in plain.copies(model, make):
        assert torch.equal(twin(x), model(x))
    plain.compiles(model, (x,), (torch.randn(5, 6),), (torch.randn(12, 6),))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(expert_dims=[5, 4]), ValueError, r"\[\[5, 4\]\] for one level .* \[\[5\], \[4\]\] for 2 levels"),
        (dict(num_tasks=0), ValueError, "num_tasks must be at least 1; got 0"),
        (dict(same_task=1.5), ValueError, r"same_task must be a number in \[0, 1\]; got 1.5"),
        (dict(init="ones"), ValueError, "init must be 'convex' or 'reference'; got 'ones'"),
        (dict(gate_bias=False), ValueError, "gate_bias is for networks with gates"),
        (dict(colour="red"), TypeError, "unexpected keyword argument 'colour'"),
    ],
)
def test_bad_arguments(change, error, words):
    with pytest.raises(error, match=words):
        CrossStitch(**(dict(in_features=6, num_tasks=2, expert_dims=[[5]]) | change))


def test_bad_x():
    with pytest.raises(ValueError, match=r"x must be \[B,6\] or \[B,2,6\] \(per unit\); got \(4, 3, 6\)"):
        CrossStitch(6, 2, [[5]])(torch.zeros(4, 3, 6))
