"""The tiles that the tuner tries: pure functions of what the pick functions of mtlkernels.triton.config are given."""

import math
from itertools import product
from typing import Any, NamedTuple

from mtlkernels.triton.config import GemmConfig, MixConfig, pick_gemm, pick_mix, power_of_two

_REGISTERS = 255  # of a thread: the accumulator alone must not take more
_SHARED = {8: 163, 9: 227, 10: 227}  # KiB of a block, by the major compute capability of data-centre chips
_SHARED_ELSEWHERE = 99


def mix_candidates(num_rows: int, num_experts: int, width: int, itemsize: int) -> list[MixConfig]:
    """Tiles for the arguments of pick_mix: its own first, then the others, the nearest before the farthest."""
    usual = pick_mix(num_rows, num_experts, width, itemsize)
    tasks, widest = power_of_two(num_rows), power_of_two(width)
    found = []
    for rows, columns, unroll, warps in product(_powers(1, 32), _powers(16, 1024), (1, 2, 4), (1, 2, 4, 8)):
        if columns > max(widest, 16) or not 32 * warps <= rows * columns * tasks <= 64 * 32 * warps:
            continue
        experts = max(1, min(power_of_two(num_experts), 2048 // (rows * tasks)))
        found.append(MixConfig(rows, experts, columns, unroll, warps))
    return _nearest_first(found, usual)


def gemm_candidates(
    m: int | None, n: int | None, k: int | None, itemsize: int, tensor_cores: bool, arch: int, **options: Any
) -> list[GemmConfig]:
    """Tiles for the arguments of pick_gemm, likewise. What cannot fit into shared memory or registers is left out."""
    usual = pick_gemm(m, n, k, itemsize, tensor_cores, arch, **options)
    shared = _SHARED.get(arch // 10, _SHARED_ELSEWHERE) if arch % 10 == 0 else _SHARED_ELSEWHERE
    most = 256 if tensor_cores else 128
    found = []
    for rows, columns, depth, warps, stages in product(
        _powers(16, _most(m, most)), _powers(16, _most(n, most)), _powers(16, 128), (4, 8), (2, 3, 4, 5)
    ):
        fits = (rows + columns) * depth * itemsize * stages <= shared << 10
        if (
            fits
            and 32 * warps <= rows * columns <= _REGISTERS * 32 * warps
            and depth <= max(16, power_of_two(k or 128))
        ):
            found.append(GemmConfig(rows, columns, depth, warps, stages))
    return _nearest_first(found, usual)


def _most(size: int | None, most: int) -> int:
    return most if size is None else min(most, max(16, power_of_two(size)))


def _powers(least: int, most: int) -> list[int]:
    return [1 << i for i in range(least.bit_length() - 1, most.bit_length())]


def _nearest_first(found: list[Any], usual: NamedTuple) -> list[Any]:
    """By how often one has to double or halve something to get there from `usual`, which comes first in any case."""

    def distance(tile: NamedTuple) -> float:
        return sum(abs(math.log2(a / b)) for a, b in zip(tile, usual, strict=True))

    return [usual, *sorted((tile for tile in set(found) if tile != usual), key=lambda tile: (distance(tile), tile))]
