"""Branched network: a tree whose blocks are shared by fewer and fewer tasks."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mtlkernels.arguments import count, counts

from .layers import Blocks, Pick, check_input, check_levels

Partition = list[list[int]]


class BranchedMTL(nn.Module):
    """A tree of blocks: [B,K] -> [B,T,D] (Vandenhende et al., BMVC 2020).

    At depth d the tasks of one cluster share a block, which reads the block of the cluster it was split from.
    :func:`python_models.affinity.search_tree` finds the clusters; one cluster everywhere is a shared bottom, one a task
    everywhere are T networks of their own. All blocks of a depth are one bank.

    Args:
        in_features: K.
        num_tasks: T.
        expert_dims: one list of widths a depth, those of its blocks.
        partitions: one partition of the tasks a depth, a list of clusters, each within a cluster of the depth before:
            ``[[[0, 1, 2]], [[0], [1, 2]]]``.
        **blocks: activation, dropout, norm, expert, device, dtype of :class:`python_models.layers.Blocks`.

    ``partitions`` holds the clusters in the order of the banks: children behind one another. x may be per unit,
    [B,U,K], one for each cluster of the first depth in that order.

    Raises:
        TypeError, ValueError: naming the argument, at construction, or for an x of another shape.
    """

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        expert_dims: Sequence[Sequence[int]],
        partitions: Sequence[Sequence[Sequence[int]]],
        **blocks: Any,
    ) -> None:
        super().__init__()
        dims = check_levels(expert_dims)
        self.in_features, self.num_tasks = count("in_features", in_features, 0), count("num_tasks", num_tasks, 1)
        self.partitions = check_partitions(partitions, num_tasks)
        if len(dims) != len(self.partitions):
            raise ValueError(f"partitions has {len(self.partitions)} depths, expert_dims {len(dims)}: they must agree")
        build = Blocks(**blocks).without_gates()
        self.num_units, self.out_features = len(self.partitions[0]), dims[-1][-1]
        self.levels, self.tasks, width = nn.ModuleList(), nn.ModuleList(), in_features
        for i, (clusters, level) in enumerate(zip(self.partitions, dims, strict=True)):
            parents = self.partitions[i - 1] if i else clusters
            children = [sum(cluster[0] in parent for cluster in clusters) for parent in parents]
            self.levels.append(build.experts(width, level, children))
            cluster_of = {task: c for c, cluster in enumerate(clusters) for task in cluster}
            self.tasks.append(Pick(len(clusters), [cluster_of[t] for t in range(num_tasks)], build.device))
            width = level[-1]

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.num_units, self.in_features)
        for level in self.levels:
            x = level(x)
        return self.tasks[-1](x)

    def features(self, x: Tensor) -> list[Tensor]:
        """Every task's features at every depth, [B,T,N] each: what :func:`python_models.affinity.affinities` reads."""
        check_input(x, self.num_units, self.in_features)
        found = []
        for level, tasks in zip(self.levels, self.tasks, strict=True):
            x = level(x)
            found.append(tasks(x))
        return found

    def extra_repr(self) -> str:
        return f"partitions={self.partitions}"


def check_partitions(partitions: Sequence[Sequence[Sequence[int]]], num_tasks: int) -> list[Partition]:
    """Partitions of range(num_tasks), each a refinement of the one before, children behind one another.

    Clusters are sorted, and by their first task within their parent. Raises TypeError or ValueError naming the depth.
    """
    if isinstance(partitions, str) or not isinstance(partitions, Sequence):
        raise TypeError(f"partitions must be one partition of the tasks a depth; got {partitions!r}")
    if not partitions:
        raise ValueError("partitions must have at least one depth; got an empty sequence")
    found, above = [], [list(range(num_tasks))]
    for d, partition in enumerate(partitions):
        if isinstance(partition, str) or not isinstance(partition, Sequence):
            raise TypeError(f"partitions[{d}] must be a list of clusters of tasks; got {partition!r}")
        clusters = [sorted(counts(f"partitions[{d}][{c}]", cluster, 0)) for c, cluster in enumerate(partition)]
        if sorted(task for cluster in clusters for task in cluster) != list(range(num_tasks)) or [] in clusters:
            raise ValueError(
                f"partitions[{d}] must name each of the {num_tasks} tasks once, in clusters; got {partition}"
            )
        for cluster in clusters:
            if not any(set(cluster) <= set(parent) for parent in above):
                expected = f"partitions[{d}] must split the clusters of the depth before, {above}"
                raise ValueError(f"{expected}; got the cluster {cluster}")
        above = [cluster for parent in above for cluster in sorted(clusters) if cluster[0] in parent]
        found.append(above)
    return found
