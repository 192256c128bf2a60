"""Training on several ranks: the losses of one process, a checkpoint read by another number of ranks, a death."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from python_models import checkpoint

from .test_parallel import build, close
from .world import Raised, run

ROOT = Path(__file__).parents[2]
STEPS = 50
SLOW = pytest.mark.slow


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines(mesh):
    """This rank's part of the rows, and of how many."""
    for axis in ("data", "fsdp"):
        if axis in mesh.mesh_dim_names:
            return mesh[axis].get_local_rank(), mesh[axis].size()
    return 0, 1


def start(name, shape, plan):
    """A network with Adam; spread over the ranks where there is a plan."""
    from python_models.parallel import parallelize

    model, part, parts = build(name), 0, 1
    if plan:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=plan)
        part, parts = lines(mesh)
        model = parallelize(model, mesh, plan)
    return model, torch.optim.Adam(model.parameters(), lr=1e-2), part, parts


def steps(model, optimizer, part, parts, begin, end):
    losses = []
    for step in range(begin, end):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
        y = torch.stack([x[:, 0] - x[:, 1], x[:, 2].sin(), x.sum(1)], 1)
        mine = slice(part * 16 // parts, (part + 1) * 16 // parts)
        optimizer.zero_grad()
        loss = (model(x[mine]) - y[mine]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def curve(rank, name, shape, plan):
    model, optimizer, part, parts = start(name, shape, plan)
    losses = steps(model, optimizer, part, parts, 0, STEPS)
    if parts > 1:
        torch.distributed.all_reduce(losses)
        losses /= parts * (torch.distributed.get_world_size() // parts)
    return losses.tolist()


@pytest.mark.parametrize(
    "ranks, name, plan",
    [
        (2, "mmoe", ("experts",)),
        pytest.param(4, "ple", ("experts",), marks=SLOW),
        (4, "adatt", ("fsdp", "experts")),
        pytest.param(2, "star", ("features",), marks=SLOW),
        pytest.param(2, "ple", ("data",), marks=SLOW),
    ],
)
def test_fifty_losses(ranks, name, plan):
    shape = (ranks,) if len(plan) == 1 else (2, ranks // 2)
    expected = curve(0, name, None, None)
    for found in run(ranks, curve, name, shape, plan):
        assert found == pytest.approx(expected, rel=1e-9)


def write(rank, name, shape, plan, folder):
    model, optimizer, part, parts = start(name, shape, plan)
    steps(model, optimizer, part, parts, 0, 5)
    checkpoint.save(folder, 5, model, optimizer)


def read(rank, name, shape, plan, folder):
    """Goes on from step 5; a few values would be wrong if moments or parameters had gone to other experts."""
    model, optimizer, part, parts = start(name, shape, plan)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert checkpoint.resume(folder, model, optimizer) == 5
    steps(model, optimizer, part, parts, 5, 10)
    expected, other, *_ = start(name, None, None)
    steps(expected, other, 0, 1, 0, 10)
    theirs = dict(expected.named_parameters())
    for key, p in model.named_parameters():
        close(p, theirs.pop(key), key)
    assert not theirs


EXPERTS, BOTH, ONE = ((4,), ("experts",)), ((2, 2), ("fsdp", "experts")), (None, None)


@pytest.mark.parametrize(
    "name, writer, reader",
    [
        ("ple", EXPERTS, ((2,), ("experts",))),
        pytest.param("adatt", BOTH, ((3,), ("experts",)), marks=SLOW),
        pytest.param("mmoe", ((3,), ("experts",)), BOTH, marks=SLOW),
        ("ple", EXPERTS, ONE),
        pytest.param("shared bottom", ((4,), ("features",)), ((2,), ("features",)), marks=SLOW),
        pytest.param("ple", ONE, ((2,), ("fsdp",)), marks=SLOW),
    ],
    ids=["4 to 2", "4 to 3", "3 to 4", "4 to 1", "4 to 2, features", "1 to 2"],
)
def test_saved_on_some_ranks_loaded_on_others(name, writer, reader, tmp_path):
    for function, (shape, plan) in ((write, writer), (read, reader)):
        if shape is None:
            function(0, name, shape, plan, str(tmp_path))
        else:
            run(torch.Size(shape).numel(), function, name, shape, plan, str(tmp_path))


def train(rank, plan, shape, folder, dies_at=None):
    def after_step(step, loss):
        if rank == 1 and step == dies_at:
            os._exit(1)

    return example("train_ple").train(plan, shape, steps=30, every=10, rows=16, folder=folder, after_step=after_step)


@pytest.mark.parametrize(
    "plan, shape",
    [pytest.param(["experts"], [4], id="1-D"), pytest.param(["data", "experts"], [2, 2], id="2-D", marks=SLOW)],
)
def test_a_rank_that_dies(plan, shape, tmp_path):
    """The others end with an error, in time; the run goes on from the last checkpoint as if nothing had been."""
    answers = run(4, train, plan, shape, str(tmp_path), 27, dies=True, timeout=30)
    assert answers[1] is None
    assert all(isinstance(answers[rank], Raised) for rank in (0, 2, 3)), answers
    assert checkpoint.last_step(tmp_path) == 20
    (tmp_path / "step_00000030").mkdir()  # what a death in the middle of writing leaves
    again = run(4, train, plan, shape, str(tmp_path))
    whole = run(2, train, ["experts"], [2], None)[0]
    for losses in again:
        assert losses == pytest.approx(whole[20:], rel=1e-4)


@SLOW
def test_the_command_of_the_page(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", "docs/train_ple.py"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for steps in ("20", "40"):
        arguments = ["--steps", steps, "--every", "20", "--folder", str(tmp_path)]
        done = subprocess.run([*command, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=110)
        assert done.returncode == 0, done.stderr
        assert f"step {steps}  loss" in done.stdout
    assert "step 20  loss" not in done.stdout


def tables(rank, plan):
    return example("train_tables").train(plan, steps=20, rows=24)


def test_embedding_tables_spread_over_ranks():
    (expected,) = run(1, tables, "experts")
    for ranks, plan in ((2, "experts"), (4, "fsdp")):
        for losses in run(ranks, tables, plan):
            assert losses == pytest.approx(expected, rel=1e-4), (ranks, plan)
