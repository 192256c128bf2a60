"""Shared bottom against a plain MLP, in torch and in numpy, and its place among the others."""

import numpy as np
import pytest
import torch
from numpy_layers import moved

from python_models import MMoE, SharedBottom


def test_equals_plain(plain, precision):
    dtype, tolerance = precision
    model = SharedBottom(6, 3, [5, 4], activation="tanh", dtype=dtype)

    def forward(params, x):
        return torch.stack(plain.experts(params, "bottom", [x], torch.tanh) * 3, 1)

    plain.compare(model, forward, torch.randn(7, 6, dtype=dtype), tolerance)
    assert model.out_features == 4
    assert sum(p.numel() for p in model.parameters()) == 6 * 5 + 5 + 5 * 4 + 4


@pytest.mark.parametrize("dims", [[5, 4], [1], [3, 7, 2]])
@pytest.mark.parametrize("tasks", [1, 3])
def test_equals_numpy(numeric, dims, tasks):
    """A1: h = f(x), every task reads it."""
    torch.manual_seed(5)
    model = moved(SharedBottom(6, tasks, dims, activation="tanh", dtype=torch.float64))
    x = torch.randn(4, 6, dtype=torch.float64)
    numeric.compare(model, lambda params, x: np.stack([numeric.expert(params, "bottom", 0, x)] * tasks, 1), x)


def test_is_mmoe_with_one_expert():
    torch.manual_seed(0)
    bottom, mmoe = SharedBottom(6, 3, [5, 4]).double(), MMoE(6, 3, 1, [[5, 4]]).double()
    bottom.bottom.load_state_dict(mmoe.experts[0].state_dict())
    for x in (torch.randn(7, 6).double(), torch.randn(7, 4, 6).double()):
        assert torch.equal(bottom(x), mmoe(x))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: SharedBottom(6, 0, [5]), ValueError, "num_tasks must be at least 1; got 0"),
        (lambda: SharedBottom(6, 2, []), ValueError, "dims must name at least one layer"),
        (lambda: SharedBottom(6, 2, [5], activation="elu"), ValueError, "activation .* got 'elu'"),
        (lambda: SharedBottom(6, 2, [5])(torch.zeros(3, 5)), ValueError, r"x must be \[B,6\] .* got \(3, 5\)"),
    ],
)
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make()
