"""The bytes of real steps equal those of the cost model, exactly."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from bench import wire

from .counted import Counted
from .test_parallel import FUSIONS, build
from .world import run

ROWS = 8


def step(rank, ranks, plan, names, grad_input):
    from python_models.parallel import parallelize

    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=(plan,))
    found = {}
    for name in names:
        model = build(name)
        expected = (
            wire.expert_step(model, ROWS, ranks, grad_input, 8)
            if plan == "experts"
            else wire.row_step([p.shape for p in model.parameters()], ranks, plan, 8)
        )
        expected = list(expected)
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
        expected = list(wire.expert_step(model, ROWS, 2, False, 8))
        model = parallelize(model, mesh["experts"], "experts")
        own = [p.to_local().shape if isinstance(p, DTensor) else p.shape for p in model.parameters()]
        expected += wire.row_step(own, 2, plan[0], 8)
        model = parallelize(build(name), mesh, plan)
        with Counted(2) as counted:
            model(torch.randn(ROWS, 6, dtype=torch.float64)).square().mean().backward()
        calls = sorted((c.kind, c.elements * c.itemsize) for c in expected)
        found[name] = (counted.bytes == wire.sent(expected, 2), sorted(counted.calls), calls)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("plan", [("data", "experts"), ("fsdp", "experts")])
def test_two_dimensions(plan):
    for answers in run(4, both, plan, ["mmoe", "ple", "adatt"]):
        for name, (equal, counted, expected) in answers.items():
            assert counted == expected and equal, name


@pytest.mark.parametrize(
    "ranks, plan",
    [(2, "experts"), (4, "fsdp")]
    + [pytest.param(r, p, marks=pytest.mark.slow) for r, p in ((2, "data"), (2, "fsdp"), (4, "experts"), (4, "data"))],
)
def test_counted_bytes_are_the_models(ranks, plan):
    names = list(FUSIONS) if plan == "experts" else ["mmoe", "ple"]
    for grad_input in (False, True) if plan == "experts" else (False,):
        for answers in run(ranks, step, ranks, plan, names, grad_input):
            for name, (equal, counted, expected) in answers.items():
                assert counted == expected and equal, f"{name} {grad_input}"
