"""Soft sharing: separate networks, and the penalties that tie them."""

import numpy as np
import pytest
import torch
from numpy_layers import inputs, mlp, units

from python_models import CrossStitch, SoftSharing


@pytest.mark.parametrize("per_unit", [False, True], ids=["shared x", "per-unit x"])
@pytest.mark.parametrize("tasks", [1, 3])
def test_equals_numpy(plain, tasks, per_unit):
    torch.manual_seed(3)
    model = SoftSharing(6, tasks, [5, 4], dtype=torch.float64)
    x = torch.randn((7, tasks, 6) if per_unit else (7, 6), dtype=torch.float64)
    tensors = inputs(model, x)

    def oracle(a):
        return np.stack([mlp(a, "experts", t, h) for t, h in enumerate(units(a["x"], tasks))], 1)

    plain.numpy(model(x), tensors, oracle)
    assert sum(p.numel() for p in model.parameters()) == tasks * (6 * 5 + 5 + 5 * 4 + 4)


@pytest.mark.parametrize("kind", ["l2", "trace"])
@pytest.mark.parametrize(("tasks", "dims"), [(1, [3]), (3, [5, 4]), (4, [1, 2])])
def test_penalty_equals_numpy(plain, kind, tasks, dims):
    torch.manual_seed(3)
    model = SoftSharing(3, tasks, dims, kind=kind, dtype=torch.float64)
    weights = {name: p for name, p in model.named_parameters() if name.endswith("weight")}

    def oracle(a):
        total = 0.0
        for weight in a.values():
            rows = weight.reshape(tasks, -1)
            if kind == "l2":
                total += sum(np.square(row - rows.mean(0)).sum() for row in rows)
            else:
                gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows  # the one of full rank
                total += np.sqrt(np.linalg.eigvalsh(gram)).sum()
        return np.asarray(total)

    plain.numpy(model.penalty(), weights, oracle)


@pytest.mark.parametrize("kind", ["l2", "trace"])
def test_alike_networks(kind):
    """l2 has its minimum there, 0; the trace norm is sqrt(T) times one network's, and its gradient is finite."""
    model = SoftSharing(3, 4, [5], kind=kind, dtype=torch.float64)
    weight = model.experts.linears[0].weight
    with torch.no_grad():
        weight.copy_(weight[:1].expand_as(weight).clone())
    model.penalty().backward()
    expected = 0.0 if kind == "l2" else 2 * weight[0].norm().item()
    assert model.penalty().item() == pytest.approx(expected, abs=1e-13)
    assert weight.grad.isfinite().all()
    assert kind == "trace" or weight.grad.abs().max() < 1e-14


def test_training_by_the_penalty_brings_the_networks_together():
    torch.manual_seed(0)
    model = SoftSharing(3, 4, [5, 2])
    mean, before = model.experts.linears[0].weight.mean(0).detach().clone(), model.penalty().item()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(20):
        optimizer.zero_grad()
        model.penalty().backward()
        optimizer.step()
    assert model.penalty() < 1e-3 * before
    torch.testing.assert_close(model.experts.linears[0].weight.mean(0), mean)


def test_is_cross_stitch_without_stitches():
    soft, stitch = SoftSharing(6, 2, [5, 4]), CrossStitch(6, 2, [[5, 4]], same_task=1.0)
    stitch.experts[0].load_state_dict(soft.experts.state_dict())
    x = torch.randn(7, 6)
    torch.testing.assert_close(soft(x), stitch(x))


@pytest.mark.parametrize("kind", ["l2", "trace"])
def test_copies_and_compiles(plain, kind):
    def make():
        return SoftSharing(6, 3, [5, 4], kind=kind)

    model, x = make(), torch.randn(7, 6)
    for twin in plain.copies(model, make):
        assert torch.equal(twin(x), model(x)) and torch.equal(twin.penalty(), model.penalty())
    plain.compiles(model, (x,), (torch.randn(5, 6),))
    found = torch.compile(model.penalty, fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(found, model.penalty())
    expected = model.penalty()
    assert model.to(torch.bfloat16).penalty().dtype == torch.float32
    torch.testing.assert_close(model.penalty(), expected, rtol=0.03, atol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(kind="l1"), "kind must be 'l2' or 'trace'; got 'l1'"),
        (dict(dims=[]), "dims must name at least one layer"),
        (dict(num_tasks=0), "num_tasks must be at least 1; got 0"),
    ],
)
def test_bad_arguments(change, words):
    with pytest.raises(ValueError, match=words):
        SoftSharing(**(dict(in_features=6, num_tasks=2, dims=[4]) | change))
