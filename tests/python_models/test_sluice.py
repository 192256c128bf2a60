"""Sluice networks against numpy, their identities, starts and penalty."""

import numpy as np
import pytest
import torch
from numpy_layers import inputs, mlp, units

from python_models import CrossStitch, Sluice

CASES = {
    "levels": dict(num_tasks=2, expert_dims=[[4], [5, 4], [4]]),
    "three subspaces": dict(num_tasks=3, expert_dims=[[3], [3]], num_subspaces=3, alpha_init="balanced"),
    "wide subspaces": dict(num_tasks=2, expert_dims=[[6], [6]], alpha_init="reference", beta_init="balanced"),
    "one subspace": dict(num_tasks=2, expert_dims=[[3], [3]], num_subspaces=1),
    "one level": dict(num_tasks=3, expert_dims=[[4]], activation="sigmoid"),
    "one task": dict(num_tasks=1, expert_dims=[[4], [4]]),
    "layer norm": dict(num_tasks=2, expert_dims=[[4], [4]], norm="layer"),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def build(case, dtype=torch.float64):
    """With alpha and beta of no pattern, so that a wrong order of blocks shows."""
    torch.manual_seed(3)
    model = Sluice(6, dtype=dtype, **case)
    with torch.no_grad():
        for p in model.mixing_parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def numpy_sluice(case):
    """Cut, mix, concatenate, then the sum over levels."""
    tasks, subspaces = case["num_tasks"], case.get("num_subspaces", 2)
    activation, norm = case.get("activation", "tanh"), case.get("norm")

    def oracle(a):
        streams, total = units(a["x"], tasks), [0.0] * tasks
        for i in range(len(case["expert_dims"])):
            alpha, h = a[f"stitches.{i}.weight"], []
            for t in range(tasks):
                h += np.split(mlp(a, f"experts.{i}", t, streams[t], activation, norm), subspaces, axis=1)
            mixed = [sum(alpha[row, j] * h[j] for j in range(len(h))) for row in range(len(h))]
            streams = [np.concatenate(mixed[t * subspaces : (t + 1) * subspaces], 1) for t in range(tasks)]
            total = [total[t] + a["beta"][t, i] * streams[t] for t in range(tasks)]
        return np.stack(total, 1)

    return oracle


@pytest.mark.parametrize("per_unit", [False, True], ids=["shared x", "per-unit x"])
@every_case
def test_equals_numpy(plain, case, per_unit):
    model = build(case)
    x = torch.randn((5, case["num_tasks"], 6) if per_unit else (5, 6), dtype=torch.float64)
    tensors = inputs(model, x)
    plain.numpy(model(x), tensors, numpy_sluice(case))


@every_case
def test_float32_equals_float64(case):
    model, x = build(case, torch.float32), torch.randn(7, 6)
    torch.testing.assert_close(model(x).double(), model.double()(x.double()), rtol=1e-5, atol=1e-5)


@every_case
def test_penalty_equals_numpy(plain, case):
    model, subspaces = build(case), case.get("num_subspaces", 2)
    keys = [f"experts.{i}.linears.{len(dims) - 1}.weight" for i, dims in enumerate(case["expert_dims"])]
    weights = {key: model.get_parameter(key) for key in keys}

    def oracle(a):
        total = 0.0
        for key in keys:
            for weight in a[key]:
                parts = np.split(weight.T, subspaces, axis=1)
                for i in range(subspaces):
                    for j in range(i + 1, subspaces):
                        total += np.linalg.norm(parts[i].T @ parts[j], "fro") ** 2
        return np.asarray(total)

    if subspaces == 1:
        assert model.penalty() == 0 and oracle({k: w.detach().numpy() for k, w in weights.items()}) == 0
    else:
        plain.numpy(model.penalty(), weights, oracle)


def test_penalty_keeps_its_precision():
    model = build(CASES["levels"], torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.penalty(), model.penalty()) and model.penalty().dtype == torch.float32
        under = model.penalty()
    assert torch.equal(under, model.penalty())
    assert model.to(torch.bfloat16).penalty().dtype == torch.float32
    torch.testing.assert_close(model.penalty(), under, rtol=0.03, atol=0)


def test_orthogonal_subspaces_cost_nothing():
    model = Sluice(4, 1, [[4]], dtype=torch.float64)
    with torch.no_grad():
        model.experts[0].linears[0].weight.copy_(torch.eye(4))
    assert model.penalty() == 0


@every_case
def test_parameter_count(case):
    tasks, width, expected = case["num_tasks"], 6, case["num_tasks"] * len(case["expert_dims"])
    for dims in case["expert_dims"]:
        expected += tasks * sum(
            k * n + n + 2 * n * (case.get("norm") is not None) for k, n in zip([width, *dims], dims, strict=False)
        )
        width = dims[-1]
        expected += (tasks * case.get("num_subspaces", 2)) ** 2
    assert sum(p.numel() for p in Sluice(6, **case).parameters()) == expected


def test_identity_alpha_and_last_beta_give_separate_networks():
    torch.manual_seed(0)
    model, x = Sluice(6, 3, [[4], [4]]).double(), torch.randn(7, 6).double()
    with torch.no_grad():
        for stitch in model.stitches:
            stitch.weight.copy_(torch.eye(6))
        model.beta.copy_(torch.tensor([0.0, 1.0]).expand(3, 2))
    for t in range(3):
        h = x
        for level in model.experts:
            h = level.to_modules()[t](h)
        torch.testing.assert_close(model(x)[:, t], h, rtol=0, atol=1e-14)


def test_one_subspace_and_last_beta_are_cross_stitch():
    torch.manual_seed(0)
    sluice, stitch = Sluice(6, 3, [[4], [4]], 1).double(), CrossStitch(6, 3, [[4], [4]], activation="tanh").double()
    stitch.load_state_dict({key: value for key, value in sluice.state_dict().items() if key != "beta"})
    with torch.no_grad():
        sluice.beta.copy_(torch.tensor([0.0, 1.0]).expand(3, 2))
    x = torch.randn(7, 6).double()
    torch.testing.assert_close(sluice(x), stitch(x), rtol=0, atol=1e-14)


def test_starts():
    own = Sluice(6, 3, [[4], [4], [4]], dtype=torch.float64)
    expected = torch.full((6, 6), 0.1 / 5, dtype=torch.float64).fill_diagonal_(0.9)
    torch.testing.assert_close(own.stitches[1].weight.detach(), expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(own.beta.detach(), torch.tensor([0.05, 0.05, 0.9]).double().expand(3, 3))
    balanced = Sluice(6, 3, [[4], [4]], alpha_init="balanced", beta_init="balanced")
    assert balanced.stitches[0].weight.eq(1 / 6).all() and balanced.beta.eq(0.5).all()
    one = Sluice(6, 1, [[4]], 1)
    assert one.beta.eq(1).all() and one.stitches[0].weight.eq(1).all()
    pattern = [[0, 1, 0, 1], [0, 1, 0, 1], [1, 0, 1, 0], [1, 0, 1, 0]]
    found = Sluice(6, 2, [[4]], alpha_init="reference").stitches[0].weight.detach()
    torch.testing.assert_close(found, 0.05 + 0.9 * torch.tensor(pattern).float())
    assert [p.shape for p in Sluice(6, 2).mixing_parameters()] == [(4, 4)] * 3 + [(2, 3)]
    assert Sluice(6, 2).out_features == 100


def test_copies_and_compiles(plain):
    def make():
        return Sluice(6, 3, [[4], [4]])

    model, x = build(dict(num_tasks=3, expert_dims=[[4], [4]]), torch.float32), torch.randn(7, 6)
    for twin in plain.copies(model, make):
        assert torch.equal(twin(x), model(x)) and torch.equal(twin.penalty(), model.penalty())
    plain.compiles(model, (x,), (torch.randn(5, 6),), (torch.randn(12, 6),))
    found = torch.compile(model.penalty, fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(found, model.penalty())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(expert_dims=[5, 4]), r"\[\[5, 4\]\] for one level .* \[\[5\], \[4\]\] for 2 levels"),
        (dict(expert_dims=[[4], [6]]), r"expert_dims must end every level with the same width, .* got \[4, 6\]"),
        (dict(num_subspaces=3), "num_subspaces=3 must divide the width 4 of expert_dims"),
        (dict(num_subspaces=0), "num_subspaces must be at least 1; got 0"),
        (dict(alpha_init="ones"), "alpha_init must be 'own' or 'balanced' or 'reference'; got 'ones'"),
        (
            dict(alpha_init="reference", num_tasks=3),
            "for num_tasks=2 and num_subspaces=2; got num_tasks=3, ",
        ),
        (dict(beta_init="ones"), "beta_init must be 'imbalanced' or 'balanced'; got 'ones'"),
    ],
)
def test_bad_arguments(change, words):
    with pytest.raises(ValueError, match=words):
        Sluice(**(dict(in_features=6, num_tasks=2, expert_dims=[[4]]) | change))
