"""The bytes of real steps equal those of the cost model, exactly."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from bench import wire

from .counted import Counted
from .test_parallel import ALL, FUSIONS, build
from .world import run

ROWS = 8
SHARED = {"experts": wire.expert_step, "features": wire.feature_step}  # ranks of these read the same rows


def step(rank, ranks, plan, names, grad_input):
    from python_models.parallel import parallelize

    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=(plan,))
    found = {}
    for name in names:
        model = build(name)
        if plan in SHARED:
            expected = list(SHARED[plan](model, ROWS, ranks, grad_input, 8))
        else:
            expected = list(wire.row_step([p.shape for p in model.parameters()], ranks, plan, 8))
        model = parallelize(model, mesh, plan)
        x = torch.randn(ROWS, 6, dtype=torch.float64, requires_grad=grad_input)
        with Counted(ranks) as counted:
            model(x).square().mean().backward()
        calls = sorted((c.kind, c.elements * c.itemsize) for c in expected)
        found[name] = (counted.bytes == wire.sent(expected, ranks), sorted(counted.calls), calls)
    return found


def both(rank, plan, names):
    """A mesh of 2 x 2: all collectives are among two."""
    from python_models.parallel import parallelize

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=plan)
    found = {}
    for name in names:
        model = build(name)
        expected = list(SHARED[plan[1]](model, ROWS, 2, False, 8))
        model = parallelize(model, mesh[plan[1]], plan[1])
        own = [p.to_local().shape if isinstance(p, DTensor) else p.shape for p in model.parameters()]
        expected += wire.row_step(own, 2, plan[0], 8)
        model = parallelize(build(name), mesh, plan)
        with Counted(2) as counted:
            model(torch.randn(ROWS, 6, dtype=torch.float64)).square().mean().backward()
        calls = sorted((c.kind, c.elements * c.itemsize) for c in expected)
        found[name] = (counted.bytes == wire.sent(expected, 2), sorted(counted.calls), calls)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("plan", [("data", "experts"), ("fsdp", "experts"), ("fsdp", "features")])
def test_two_dimensions(plan):
    for answers in run(4, both, plan, ["mmoe", "ple", "adatt"]):
        for name, (equal, counted, expected) in answers.items():
            assert counted == expected and equal, name


@pytest.mark.parametrize(
    "ranks, plan",
    [(2, "experts"), (2, "features"), (4, "fsdp")]
    + [
        pytest.param(r, p, marks=pytest.mark.slow)
        for r, p in ((2, "data"), (2, "fsdp"), (4, "experts"), (4, "features"), (4, "data"))
    ],
)
def test_counted_bytes_are_the_models(ranks, plan):
    names = {"experts": list(FUSIONS), "features": ALL}.get(plan, ["mmoe", "ple"])
    for grad_input in (False, True) if plan in SHARED else (False,):
        for answers in run(ranks, step, ranks, plan, names, grad_input):
            for name, (equal, counted, expected) in answers.items():
                assert counted == expected and equal, f"{name} {grad_input}"
