"""MTAN against numpy, its identities and starts."""

import numpy as np
import pytest
import torch
from numpy_layers import inputs, mlp
from torch import nn

from python_models import MTAN

CASES = {
    "batch": dict(num_tasks=2, dims=[4, 3], activation="tanh"),
    "layer": dict(num_tasks=2, dims=[4, 3, 2], attention_dims=[2, 5, 3], norm="layer"),
    "no norm": dict(num_tasks=3, dims=[3, 4], attention_dims=2, norm=None),
    "one block": dict(num_tasks=2, dims=[4], norm=None),
    "one task": dict(num_tasks=1, dims=[4, 3], init="torch_default"),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def build(case, dtype=torch.float64):
    """With biases and norms of no pattern."""
    torch.manual_seed(3)
    model = MTAN(6, dtype=dtype, **case)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.add_(0.3 * torch.randn_like(p))
    return model


def numpy_mtan(case):
    tasks, activation, norm = case["num_tasks"], case.get("activation", "relu"), case.get("norm", "batch")

    def oracle(a):
        p, masked = (a["x"] if a["x"].ndim == 2 else a["x"][:, -1]), None
        for j in range(len(case["dims"])):
            u = mlp(a, f"blocks.{j}.early", 0, p, activation)
            p = mlp(a, f"blocks.{j}.late", 0, u, activation)
            if j:
                # F on the rows of all tasks, one task behind the other: order has no part in a batch norm.
                rows = mlp(a, f"blocks.{j}.carry", 0, np.concatenate(masked), "relu", norm)
                reads = [np.concatenate([u, f], 1) for f in np.split(rows, tasks)]
            else:
                reads = [u] * tasks
            inner = [mlp(a, f"blocks.{j}.inner", t, reads[t], "relu", norm) for t in range(tasks)]
            masked = [mlp(a, f"blocks.{j}.mask", t, inner[t], "sigmoid", norm) * p for t in range(tasks)]
        return np.stack(masked, 1)

    return oracle


@pytest.mark.parametrize("per_unit", [False, True], ids=["shared x", "per-unit x"])
@every_case
def test_equals_numpy(plain, case, per_unit):
    model = build(case)
    x = torch.randn((5, case["num_tasks"] + 1, 6) if per_unit else (5, 6), dtype=torch.float64)
    tensors = inputs(model, x)
    plain.numpy(model(x), tensors, numpy_mtan(case))


@every_case
def test_float32_equals_float64(case):
    model, x = build(case, torch.float32), torch.randn(7, 6)
    torch.testing.assert_close(model(x).double(), model.double()(x.double()), rtol=1e-4, atol=1e-5)


@every_case
def test_parameter_count(case):
    tasks, below, expected = case["num_tasks"], 6, 0
    norms = 2 if case.get("norm", "batch") else 0
    inner = case.get("attention_dims", case["dims"])
    inner = [inner] * len(case["dims"]) if isinstance(inner, int) else inner
    for j, (n, r) in enumerate(zip(case["dims"], inner, strict=True)):
        expected += below * n + n + n * n + n  # trunk
        expected += (below * n + n + norms * n) * (j > 0)  # F
        expected += tasks * ((2 * n if j else n) * r + r + norms * r + r * n + n + norms * n)  # G, H
        below = n
    assert sum(p.numel() for p in MTAN(6, **case).parameters()) == expected


def test_masks_of_one_leave_the_trunk():
    model, x = build(CASES["no norm"]), torch.randn(5, 6).double()
    with torch.no_grad():
        for block in model.blocks:
            block.mask.linears[0].weight.zero_()
            block.mask.linears[0].bias.fill_(50.0)
    trunk = x
    for block in model.blocks:
        trunk = block.late.to_modules()[0](block.early.to_modules()[0](trunk))
    torch.testing.assert_close(model(x), trunk[:, None].expand(-1, 3, -1), rtol=0, atol=1e-15)


def test_the_masks_of_a_block_depend_on_the_masks_below():
    model, x = build(CASES["no norm"]), torch.randn(5, 6).double()
    before = model(x)
    with torch.no_grad():
        model.blocks[0].mask.linears[0].bias[1].add_(3.0)
    changed = (model(x) - before).abs().amax((0, 2))
    assert changed[1] > 1e-3 and not changed[0] and not changed[2]


def test_evaluation_uses_running_statistics():
    model, x = build(CASES["batch"]), torch.randn(50, 6).double()
    for _ in range(300):
        model(x)
    trained = model(x)
    model.eval()
    torch.testing.assert_close(model(x), trained, rtol=0.02, atol=0.02)
    assert torch.equal(model(x[:1]), model(x[:1]))
    torch.testing.assert_close(model(x[:1]), model(x)[:1], rtol=0, atol=1e-14)


def test_one_row_has_no_batch_statistics():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        MTAN(6, 2, [4])(torch.randn(1, 6))
    assert MTAN(6, 2, [4], norm="layer")(torch.randn(1, 6)).shape == (1, 2, 4)


def test_starts():
    torch.manual_seed(0)
    model = MTAN(300, 2, [100, 200])
    for block in model.blocks:
        for module in (block.early, block.late, block.inner, block.mask):
            linear = module.linears[0]
            expected = (2 / sum(linear.weight.shape[1:])) ** 0.5
            assert linear.weight.std().item() == pytest.approx(expected, rel=0.03)
            assert linear.weight.abs().max() > 3 * expected and not linear.bias.any()
    assert MTAN(6, 2, [4], init="torch_default").blocks[0].early.linears[0].bias.all()
    assert model.out_features == 200


def test_the_trunk_is_plain_modules():
    """A linear layer a width, as ``torch.nn`` has it."""
    network = nn.ModuleList(m for block in MTAN(6, 2, [5, 4]).blocks for m in (block.early, block.late))
    found = [tuple(m.linears[0].weight.shape) for m in network]
    assert found == [(1, 5, 6), (1, 5, 5), (1, 4, 5), (1, 4, 4)]


@pytest.mark.parametrize("norm", ["batch", pytest.param(None, marks=pytest.mark.slow)])
def test_copies_and_compiles(plain, norm):
    def make():
        return MTAN(6, 3, [5, 4], norm=norm)

    model, x = make(), torch.randn(7, 6)
    model(x)  # moves the running statistics
    model.eval()
    for twin in plain.copies(model, make):
        assert torch.equal(twin(x), model(x))
    plain.compiles(model, (x,), (torch.randn(5, 6),), (torch.randn(12, 6),))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(dims=[]), ValueError, "dims must name at least one block; got an empty sequence"),
        (dict(dims=5), TypeError, "dims must be a sequence of ints; got 5"),
        (dict(dims=[0]), ValueError, r"dims\[0\] must be at least 1; got 0"),
        (dict(attention_dims=[3]), ValueError, "attention_dims has 1 entries for 2 blocks of dims"),
        (dict(attention_dims=0), ValueError, r"attention_dims\[0\] must be at least 1; got 0"),
        (dict(norm="none"), ValueError, "norm must be None, 'batch' or 'layer'; got 'none'"),
        (dict(init="ones"), ValueError, "init must be 'xavier_normal' or 'torch_default'; got 'ones'"),
    ],
)
def test_bad_arguments(change, error, words):
    with pytest.raises(error, match=words):
        MTAN(**(dict(in_features=6, num_tasks=2, dims=[5, 4]) | change))


def test_bad_x():
    with pytest.raises(ValueError, match=r"x must be \[B,6\] or \[B,3,6\] \(per unit\); got \(4, 2, 6\)"):
        MTAN(6, 2, [5])(torch.zeros(4, 2, 6))
