"""Soft layer ordering against numpy and its identities."""

import numpy as np
import pytest
import torch
from numpy_layers import inputs, linear, mlp, softmax, units

from python_models import SoftOrdering

CASES = {
    "task encoders": dict(num_tasks=3, width=4, num_modules=2),
    "deep": dict(num_tasks=2, width=3, num_modules=2, depth=4, encoder="shared", activation="tanh"),
    "no encoder": dict(num_tasks=2, width=6, num_modules=3, depth=2, encoder="none"),
    "one module": dict(num_tasks=2, width=4, num_modules=1, depth=3),
    "one depth": dict(num_tasks=2, width=1, num_modules=3, depth=1, encoder="shared"),
    "one task": dict(num_tasks=1, width=4, num_modules=2),
    "layer norm": dict(num_tasks=2, width=4, num_modules=2, norm="layer", activation="tanh"),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def build(case, dtype=torch.float64):
    torch.manual_seed(3)
    model = SoftOrdering(6, dtype=dtype, **case)
    for p in model.mixing_parameters():
        torch.nn.init.normal_(p)
    return model


def numpy_soft_ordering(case):
    tasks, modules, encoder = case["num_tasks"], case["num_modules"], case.get("encoder", "task")
    activation, norm = case.get("activation", "relu"), case.get("norm")

    def oracle(a):
        outputs = []
        for t, y in enumerate(units(a["x"], tasks)):
            if encoder != "none":
                y = linear(a, "encoder", t if encoder == "task" else 0, y)
            for k in range(case.get("depth", modules)):
                s = softmax(a["logits"][k, t]) if modules > 1 else np.ones(1)
                y = sum(s[j] * mlp(a, "bank", j, y, activation, norm) for j in range(modules))
            outputs.append(y)
        return np.stack(outputs, 1)

    return oracle


@pytest.mark.parametrize("per_unit", [False, True], ids=["shared x", "per-unit x"])
@every_case
def test_equals_numpy(plain, case, per_unit):
    model = build(case)
    x = torch.randn((5, case["num_tasks"], 6) if per_unit else (5, 6), dtype=torch.float64)
    tensors = inputs(model, x)
    plain.numpy(model(x), tensors, numpy_soft_ordering(case))


@every_case
def test_float32_equals_float64(case):
    model, x = build(case, torch.float32), torch.randn(7, 6)
    torch.testing.assert_close(model(x).double(), model.double()(x.double()), rtol=1e-5, atol=1e-5)


@every_case
def test_parameter_count(case):
    tasks, n, modules = case["num_tasks"], case["width"], case["num_modules"]
    encoders = {"task": tasks, "shared": 1, "none": 0}[case.get("encoder", "task")]
    expected = encoders * (6 * n + n) + modules * (n * n + n + 2 * n * ("norm" in case))
    expected += tasks * modules * case.get("depth", modules) * (modules > 1)
    assert sum(p.numel() for p in SoftOrdering(6, **case).parameters()) == expected


def plain_ordering(model, x, orders):
    """Each task through the modules of its order, one after the other."""
    modules, outputs = model.bank.to_modules(), []
    for t, order in enumerate(orders):
        y = x @ model.encoder.weight[t].T + model.encoder.bias[t]
        for j in order:
            y = modules[j](y)
        outputs.append(y)
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("shut", [-torch.inf, -1e4])
def test_one_hot_is_a_fixed_order(shut):
    model, x = build(CASES["task encoders"] | dict(depth=3)), torch.randn(5, 6).double()
    orders = [(0, 1, 0), (1, 1, 0), (0, 0, 1)]
    with torch.no_grad():
        model.logits.fill_(shut)
        for t, order in enumerate(orders):
            for k, j in enumerate(order):
                model.logits[k, t, j] = 0.3
    torch.testing.assert_close(model(x), plain_ordering(model, x, orders), rtol=0, atol=1e-14)
    model(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_starts_with_all_modules_alike():
    model = SoftOrdering(6, 2, 4, 5, 3)
    assert model.logits.shape == (3, 2, 5) and not model.logits.any()
    torch.testing.assert_close(model.ordering(), torch.full((3, 2, 5), 0.2))
    assert SoftOrdering(6, 2, 4, 5).depth == 5 and model.out_features == 4


def test_one_module_is_the_same_layer_again_and_again():
    model, x = build(CASES["one module"]), torch.randn(5, 6).double()
    assert model.mixing_parameters() == [] and model.ordering().eq(1).all()
    torch.testing.assert_close(model(x), plain_ordering(model, x, [(0, 0, 0)] * 2), rtol=0, atol=1e-14)


def test_the_ordering_keeps_its_precision():
    model = SoftOrdering(6, 2, 4, 3, dtype=torch.bfloat16)
    assert model.ordering().dtype == torch.float32 and model(torch.zeros(2, 6).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("encoder", ["shared", pytest.param("task", marks=pytest.mark.slow)])
def test_copies_and_compiles(plain, encoder):
    def make():
        return SoftOrdering(6, 3, 4, 2, encoder=encoder)

    model, x = build(dict(num_tasks=3, width=4, num_modules=2, encoder=encoder), torch.float32), torch.randn(7, 6)
    for twin in plain.copies(model, make):
        assert torch.equal(twin(x), model(x))
    plain.compiles(model, (x,), (torch.randn(5, 6),), (torch.randn(12, 6),))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(num_modules=0), "num_modules must be at least 1; got 0"),
        (dict(depth=0), "depth must be at least 1; got 0"),
        (dict(width=0), "width must be at least 1; got 0"),
        (dict(encoder="mine"), "encoder must be 'task' or 'shared' or 'none'; got 'mine'"),
        (dict(encoder="none"), "encoder='none' needs in_features equal to width=4; got 6"),
    ],
)
def test_bad_arguments(change, words):
    with pytest.raises(ValueError, match=words):
        SoftOrdering(**(dict(in_features=6, num_tasks=2, width=4, num_modules=2) | change))
