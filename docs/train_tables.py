"""Embedding tables too large for one process, their rows spread over all of them, under a network of ours.

    torchrun --nproc-per-node 4 docs/train_tables.py            experts spread too, all processes read the same rows
    torchrun --nproc-per-node 4 docs/train_tables.py --plan fsdp     every process reads rows of its own

TorchRec's ``EmbeddingBagCollection`` in place of ``SpreadTable`` does the same with kernels of its own and a planner.
"""

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from python_models import MMoE, MultiTaskModel, Towers
from python_models.parallel import parallelize
from python_models.train import binary_loss


class SpreadTable(nn.Module):
    """Ids [B,F] -> embeddings [B,F,D] from a table whose rows lie in equal parts on the ranks of a mesh.

    Every rank looks up the ids that it has the rows of, and zeros for the others; one reduction makes the whole. Ids
    count through all fields: field f's begin behind those of the fields before it.

    Args:
        vocab_sizes: of each field.
        own_rows: each rank has ids of its own, equally many, whose gradients are averaged; else all have the same.
    """

    def __init__(self, vocab_sizes: list[int], width: int, mesh: DeviceMesh, own_rows: bool) -> None:
        super().__init__()
        self.mesh, self.own_rows = mesh, own_rows
        # Small enough here to be drawn whole on every rank; a large one is drawn part by part, or loaded.
        whole = torch.randn(sum(vocab_sizes), width) * width**-0.5
        self.weight = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
        starts = torch.tensor((0, *vocab_sizes[:-1])).cumsum(0)
        self.register_buffer("starts", starts, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        ids = ids + self.starts
        if self.own_rows:
            ids = DTensor.from_local(ids, self.mesh, [Shard(0)]).full_tensor()
        part, rank = self.weight.to_local(), self.mesh.get_local_rank()
        begin = rank * -(-self.weight.shape[0] // self.mesh.size())
        here = (ids >= begin) & (ids < begin + part.shape[0])
        found = F.embedding(torch.where(here, ids - begin, 0), part) * here[..., None]
        if self.own_rows and found.requires_grad:
            found.register_hook(lambda grad: grad / self.mesh.size())
        lies = Shard(0) if self.own_rows else Replicate()
        return DTensor.from_local(found, self.mesh, [Partial()]).redistribute(placements=[lies]).to_local()


SIZES, WIDTH, TASKS = [1000, 50, 7, 300], 8, 3


def rows_of(step: int, rows: int) -> tuple[Tensor, Tensor]:
    """Ids [rows,F] and labels [rows,T]: a click more likely for some ids than for others."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.stack([torch.randint(n, (rows,), generator=generator) for n in SIZES], 1)
    liked = torch.stack([(ids[:, t] * 7919 + ids[:, t + 1] * 104729) % 11 < 4 for t in range(TASKS)], 1)
    return ids, liked.float()


def train(plan: str, steps: int = 100, rows: int = 256) -> list[float]:
    """The loss of every step."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(plan,))
    own_rows = plan != "experts"
    torch.manual_seed(0)
    table = SpreadTable(SIZES, WIDTH, mesh, own_rows)
    model = MultiTaskModel(MMoE(len(SIZES) * WIDTH, TASKS, 6, [[32, 16]]), Towers(16, TASKS, [8]))
    model = parallelize(model, mesh, plan)
    optimizers = [torch.optim.Adagrad(table.parameters(), lr=0.1), torch.optim.Adam(model.parameters(), lr=1e-3)]
    part, parts = (mesh.get_local_rank(), mesh.size()) if own_rows else (0, 1)
    losses = []
    for step in range(steps):
        ids, labels = (t[part * rows // parts : (part + 1) * rows // parts] for t in rows_of(step, rows))
        loss = binary_loss(model(table(ids).flatten(1)), labels)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        mean = loss.detach()
        if own_rows:
            dist.all_reduce(mean)
        losses.append(mean.item() / parts)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=["experts", "data", "fsdp"], default="experts")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    losses = train(options.plan, options.steps)
    if dist.get_rank() == 0:
        print("\n".join(f"step {i + 1}  loss {losses[i]:.4f}" for i in range(9, len(losses), 10)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
