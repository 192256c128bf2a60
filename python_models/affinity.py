"""Which tasks to share for how long: the affinity of single-task networks' features, and the tree it suggests."""

import warnings
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from mtlkernels.arguments import count

from .branched import Partition, check_partitions

Clusters = tuple[tuple[int, ...], ...]
EXHAUSTIVE_TASKS = 6


def dissimilarities(features: np.ndarray | torch.Tensor) -> np.ndarray:
    """``RDM[a,b] = 1 - Pearson(features[a], features[b])`` of samples a, b: [S,...] -> float64 [S,S].

    A sample with equal features has no correlation; its entries are 1 (0 on the diagonal), with a warning.
    """
    flat = _array(features).reshape(len(features), -1)
    constant = flat.max(1, initial=-np.inf) <= flat.min(1, initial=np.inf)
    if constant.any():
        warnings.warn(f"features of {constant.sum()} samples are constant: their dissimilarity is 1", stacklevel=2)
    centred = np.where(constant[:, None], 0, flat - (flat.mean(1, keepdims=True) if flat.size else 0))
    # The largest first: squares of features of any size stay in range.
    centred /= np.where(constant, 1, np.abs(centred).max(1, initial=0))[:, None]
    centred /= np.where(constant, 1, np.sqrt((centred**2).sum(1)))[:, None]
    found = 1 - centred @ centred.T
    np.fill_diagonal(found, 0)
    return found


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 of a [n] array; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[place]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two [n] arrays, ties averaged; NaN where one of them is constant."""
    a, b = (ranks - ranks.mean() for ranks in (average_ranks(a), average_ranks(b)))
    length = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / length) if length else float("nan")


def affinities(features: Sequence[np.ndarray | torch.Tensor]) -> np.ndarray:
    """Affinity of every two tasks at every depth: one [S,T,...] a depth -> float64 [D,T,T].

    ``A[d,i,j]`` is Spearman's correlation of the upper triangles of both tasks' :func:`dissimilarities` (Vandenhende
    et al., BMVC 2020, section 3). The features are those of T single-task networks on S held-out samples, as
    :meth:`python_models.BranchedMTL.features` gives them for one cluster a task. Tasks whose dissimilarities are all
    equal have affinity 0 to the others, with a warning.

    Raises:
        TypeError, ValueError: features is not of this form, has fewer than 3 samples, or is not finite.
    """
    if not features:
        raise ValueError("features must have at least one depth; got none")
    arrays = [_array(entry) for entry in features]
    for d, array in enumerate(arrays):
        if array.ndim < 2 or array.shape[1] != arrays[0].shape[1] or array.shape[1] == 0:
            raise ValueError(f"features[{d}] must be [S,T,...] with the T of features[0]; got shape {array.shape}")
        if len(array) < 3:
            raise ValueError(f"features[{d}] must have at least 3 samples; got {len(array)}")
        if not np.isfinite(array).all():
            raise ValueError(f"features[{d}] must be finite")
    num_tasks = arrays[0].shape[1]
    found = np.ones((len(arrays), num_tasks, num_tasks))
    for d, array in enumerate(arrays):
        upper = np.triu_indices(len(array), 1)
        triangles = [dissimilarities(array[:, t])[upper] for t in range(num_tasks)]
        for i, j in zip(*np.triu_indices(num_tasks, 1), strict=True):
            found[d, i, j] = found[d, j, i] = spearman(triangles[i], triangles[j])
    undefined = np.isnan(found)
    if undefined.any():
        depths = np.unique(undefined.nonzero()[0]).tolist()
        warnings.warn(f"tasks whose dissimilarities do not vary have affinity 0, at depths {depths}", stacklevel=2)
    return np.where(undefined, 0, found)


def tree_cost(affinity: np.ndarray, partitions: Sequence[Sequence[Sequence[int]]]) -> float:
    """``sum_d mean over clusters of max over pairs within (1 - A[d,i,j])``; a cluster of one task costs 0."""
    affinity = _check_affinity(affinity)
    if len(partitions) != len(affinity):
        raise ValueError(f"partitions has {len(partitions)} depths, affinity {len(affinity)}: they must agree")
    levels = check_partitions(partitions, affinity.shape[1])
    return sum(_cost(1 - a, clusters) for a, clusters in zip(affinity, levels, strict=True))


def search_tree(
    affinity: np.ndarray, block_costs: Sequence[float], budget: float, *, beam_width: int = 10
) -> list[Partition]:
    """The tree of least :func:`tree_cost` within a budget, as :class:`python_models.BranchedMTL` takes it.

    Exact for up to 6 tasks: every chain of refinements is considered. With more it is a beam search from the deepest
    depth upwards, which merges clusters by complete linkage and keeps, for each number of clusters, the `beam_width`
    best. Of equally good trees the cheaper one is taken.

    Args:
        affinity: [D,T,T], from :func:`affinities`.
        block_costs: what one block of each depth costs: parameters, or operations.
        budget: what all blocks may cost; one block a depth has to fit.
        beam_width: at least 1.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    affinity = _check_affinity(affinity)
    prices = [float(price) for price in block_costs]
    if len(prices) != len(affinity) or not all(0 <= price < np.inf for price in prices):
        raise ValueError(f"block_costs must be {len(affinity)} finite numbers of at least 0, one a depth; got {prices}")
    if not budget >= sum(prices):
        raise ValueError(f"budget must be at least {sum(prices)}, one block a depth; got {budget}")
    count("beam_width", beam_width, 1)
    tasks = range(affinity.shape[1])
    exact = len(tasks) <= EXHAUSTIVE_TASKS
    # From the deepest depth upwards: a state is (cost, spent, its partitions from the top).
    states, proposals = [(0.0, 0.0, (tuple((t,) for t in tasks),))], {}
    for d in reversed(range(len(prices))):
        distance, following = 1 - affinity[d], []
        for cost, spent, levels in states:
            key = (d, levels[0])
            if key not in proposals:
                found = _coarser(levels[0]) if exact else _merged(levels[0], distance, beam_width)
                proposals[key] = [(_cost(distance, p), p) for p in found]
            for extra, partition in proposals[key]:
                total = spent + prices[d] * len(partition)
                if total + sum(prices[:d]) <= budget * (1 + 1e-12):
                    following.append((cost + extra, total, (partition, *levels)))
        states = _undominated(following) if exact else _best(following, beam_width)
    return check_partitions(min(states)[2][:-1], len(tasks))


def _undominated(states: list) -> list:
    """For each partition the states that no other one beats in cost and in spending: what an optimum can go through."""
    kept, least = [], {}
    for state in sorted(states):
        if state[1] < least.get(state[2][0], np.inf):
            least[state[2][0]] = state[1]
            kept.append(state)
    return kept


def _best(states: list, width: int) -> list:
    """The best `width` for each number of clusters, each partition once for what it has spent."""
    kept, seen, room = [], set(), {}
    for state in sorted(states):
        size, key = len(state[2][0]), (state[2][0], state[1])
        if key not in seen and room.get(size, 0) < width:
            seen.add(key)
            room[size] = room.get(size, 0) + 1
            kept.append(state)
    return kept


def _coarser(clusters: Clusters) -> Iterable[Clusters]:
    """Every partition that `clusters` refines."""
    if not clusters:
        yield ()
        return
    first, rest = clusters[0], clusters[1:]
    for partition in _coarser(rest):
        yield _ordered((first, *partition))
        for i, cluster in enumerate(partition):
            yield _ordered((*partition[:i], first + cluster, *partition[i + 1 :]))


def _merged(clusters: Clusters, distance: np.ndarray, width: int) -> Iterable[Clusters]:
    """`clusters`, then two by two by complete linkage, down to one cluster: the `width` best of each number."""
    level = [clusters]
    while level:
        yield from level
        options = []
        for partition in level:
            rows = np.stack([distance[list(cluster)].max(0) for cluster in partition])
            between = np.stack([rows[:, list(cluster)].max(1) for cluster in partition])
            own = between.diagonal()
            # Each pair's cost as one cluster, for what both cost now.
            worse = np.maximum(between, np.maximum(own[:, None], own)) - own[:, None] - own
            pairs = zip(*np.triu_indices(len(partition), 1), strict=True)
            options += [(own.sum() + worse[i, j], partition, i, j) for i, j in pairs]
        level = []
        for _, partition, i, j in sorted(options):
            others = (cluster for k, cluster in enumerate(partition) if k not in (i, j))
            joined = _ordered((partition[i] + partition[j], *others))
            if joined not in level:
                level.append(joined)
            if len(level) == width:
                break


def _ordered(clusters: Clusters) -> Clusters:
    return tuple(sorted(tuple(sorted(cluster)) for cluster in clusters))


def _cost(distance: np.ndarray, clusters: Iterable[Sequence[int]]) -> float:
    spread: list[float] = [distance[np.ix_(c, c)].max() if len(c) > 1 else 0.0 for c in map(list, clusters)]
    return float(np.mean(spread))


def _array(values: np.ndarray | torch.Tensor) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().double().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def _check_affinity(affinity: np.ndarray) -> np.ndarray:
    affinity = _array(affinity)
    if affinity.ndim != 3 or affinity.shape[1] != affinity.shape[2] or 0 in affinity.shape:
        raise ValueError(f"affinity must be [D,T,T]; got shape {affinity.shape}")
    if not np.isfinite(affinity).all() or not np.allclose(affinity, affinity.transpose(0, 2, 1)):
        raise ValueError("affinity must be finite and symmetric in its tasks")
    return np.where(np.eye(affinity.shape[1], dtype=bool), 1, affinity)
