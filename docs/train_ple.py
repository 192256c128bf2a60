"""Trains PLE with its experts spread over processes, and goes on from the last checkpoint where there is one.

torchrun --nproc-per-node 4 docs/train_ple.py
torchrun --nproc-per-node 4 docs/train_ple.py --plan fsdp experts --mesh 2 2 --folder checkpoints
"""

import argparse
import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from python_models import PLE, MultiTaskModel, Towers, checkpoint
from python_models.data.synthetic import SyntheticTasks
from python_models.parallel import parallelize
from python_models.train import squared_loss

TASKS = SyntheticTasks.draw(32, [[1.0, 0.8, 0.2], [0.8, 1.0, 0.2], [0.2, 0.2, 1.0]])


def rows_of(step: int, rows: int, part: int, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of a step, which its number rules, so that a run that goes on reads what it would have read."""
    x, y = TASKS.sample(rows, part=step)
    mine = slice(part * rows // parts, (part + 1) * rows // parts)
    return torch.from_numpy(x[mine]).float(), torch.from_numpy(y[mine]).float()


def train(
    plan: list[str],
    shape: list[int],
    *,
    steps: int = 200,
    every: int = 50,
    rows: int = 256,
    folder: str | None = None,
    after_step: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """The loss of every step from where it went on."""
    gpu = dist.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    mesh = init_device_mesh(device.type, tuple(shape), mesh_dim_names=tuple(plan))
    torch.manual_seed(0)  # the same start on every rank
    model = MultiTaskModel(PLE(32, 3, 2, 3, [[64], [32]], device=device), Towers(32, 3, [16], device=device))
    model = parallelize(model, mesh, plan)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    # The ranks along "experts" read the same rows, those along the others different ones.
    line = next((mesh[name] for name in ("data", "fsdp") if name in plan), None)
    part, parts = (0, 1) if line is None else (line.get_local_rank(), line.size())
    losses, begin = [], checkpoint.resume(folder, model, optimizer) if folder else 0
    for step in range(begin + 1, steps + 1):
        x, y = (t.to(device) for t in rows_of(step, rows, part, parts))
        loss = squared_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach()
        if line is not None:
            dist.all_reduce(mean, group=line.get_group())
        losses.append(mean.item() / parts)
        if folder and step % every == 0:
            checkpoint.save(folder, step, model, optimizer)
        after_step(step, losses[-1])
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", nargs="+", default=["experts"], help="experts, data, fsdp: one a mesh dimension")
    parser.add_argument("--mesh", nargs="+", type=int, help="ranks of each dimension; all in one by default")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=50, help="steps between two checkpoints")
    parser.add_argument("--folder", help="where checkpoints go, and come from; none are written without it")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    if gpu:
        torch.cuda.set_device(dist.get_node_local_rank())
    shape = options.mesh or [dist.get_world_size()]
    if math.prod(shape) != dist.get_world_size() or len(shape) != len(options.plan):
        parser.error(f"--mesh {shape} must have a number for each of --plan {options.plan} and make up all ranks")

    def report(step: int, loss: float) -> None:
        if dist.get_rank() == 0 and (step % 20 == 0 or step == options.steps):
            print(f"step {step}  loss {loss:.4f}", flush=True)

    train(options.plan, shape, steps=options.steps, every=options.every, folder=options.folder, after_step=report)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
