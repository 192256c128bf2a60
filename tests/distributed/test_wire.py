"""The bytes of real steps equal those of the cost model, exactly."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

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


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("plan", ["experts", "data", "fsdp"])
def test_counted_bytes_are_the_models(ranks, plan):
    names = list(FUSIONS) if plan == "experts" else ["mmoe", "ple"]
    for grad_input in (False, True) if plan == "experts" else (False,):
        for answers in run(ranks, step, ranks, plan, names, grad_input):
            for name, (equal, counted, expected) in answers.items():
                assert counted == expected and equal, f"{name} {grad_input}"
