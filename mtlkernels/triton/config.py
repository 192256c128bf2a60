"""What every launcher shares: who can run, tile sizes, small cached maps. Pure Python and torch, no triton."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(device_type: str, dtype: torch.dtype, interpret: bool) -> tuple[bool, str]:
    """Whether the Triton kernels run for these activations, and why not. A pure function.

    Args:
        device_type: "cuda", "cpu", ...
        dtype: of experts or x.
        interpret: True when kernels are run by Triton's interpreter (TRITON_INTERPRET=1).
    """
    if dtype not in DTYPES:
        return False, f"no Triton kernel for {dtype}; float32, bfloat16 and float16 have one"
    if device_type == "cuda":
        return True, "Triton kernel"
    if device_type == "cpu" and interpret:
        return True, "Triton kernel in the interpreter, for tests only"
    return False, f"Triton kernels need a GPU, not device {device_type!r} (for tests: TRITON_INTERPRET=1 on a CPU)"


def cdiv(n: int, size: int) -> int:
    """How many pieces of `size` cover n. Triton's own takes 3 us on the host, and a training step calls it 40 times."""
    return -(-n // size)


@lru_cache
def arch_of(device: torch.device) -> int:
    """Compute capability of a GPU, 90 for an H200; 0 for the CPU, where the interpreter runs."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()


class MixConfig(NamedTuple):
    """Tile of the mix kernels: rows of the batch, experts at a time in the softmax, columns of D, unrolling, warps."""

    rows: int
    experts: int
    width: int
    unroll: int
    warps: int


@lru_cache
def pick_mix(num_rows: int, num_experts: int, width: int, itemsize: int) -> MixConfig:
    """Tiles for T = num_rows tasks, E experts of the given width D, elements of `itemsize` bytes.

    All T rows of the output live in registers, so the tile of H shrinks as T grows: T * rows * width stays at 4096
    floats or less (8192 above 16 tasks, with twice the warps). A warp reads 512 bytes of H at a time; a row of the tile
    that a single warp holds lets the reduction over D stay inside that warp.
    """
    tasks = power_of_two(num_rows)
    full = min(power_of_two(width), 512 // itemsize)
    if tasks > 16:
        columns = min(full, max(16, 8192 // tasks), 128)
        return MixConfig(1, min(power_of_two(num_experts), 16), columns, 1, 8 if columns == 128 else 4)
    columns = min(full, 4096 // tasks)
    rows = max(1, min(2048 // (columns * itemsize), 4096 // (columns * tasks), 16))
    warps = max(1, min(4, rows * columns * itemsize // 512 if tasks <= 4 else rows * columns // 32))
    experts = max(1, min(power_of_two(num_experts), 2048 // (rows * tasks)))
    return MixConfig(rows, experts, columns, 4 if tasks <= 8 else 1, warps)


class GemmConfig(NamedTuple):
    """Tile of a product [M,K] x [K,N]: its three sizes, warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


@lru_cache
def pick_gemm(
    m: int | None, n: int, k: int | None, itemsize: int, tensor_cores: bool, arch: int, through_registers: bool = False
) -> GemmConfig:
    """Tile for a product [m,k] x [k,n]; None stands for the batch, which never decides.

    Args:
        itemsize: bytes of an operand's element.
        tensor_cores: False for exact float32, whose products run on the plain multiply-add units.
        arch: compute capability, such as 80, 89, 90 or 100; 0 in the interpreter.
        through_registers: an operand is computed on load (a gradient through the activation). It then takes registers
            and would spill, so the tile is half as deep and the pipeline one stage longer.
    """
    if not tensor_cores:
        return GemmConfig(_tile(m, 64), _tile(n, 64), 16, 4, 3)
    depth, stages = 128 // itemsize, 3
    if through_registers:
        depth, stages = depth // 2, 4
    if arch % 10 or arch >= 120:
        stages = 2  # not the data centre's chips: 99 KiB of shared memory a block
    tile_m, tile_n = _tile(m, 128), _tile(n, 128)
    return GemmConfig(tile_m, tile_n, depth, 8 if tile_m * tile_n >= 128 * 128 else 4, stages)


class ExpertMixConfig(NamedTuple):
    """Tile of expert_mix: rows, columns of D, depth of a step through K, tasks in registers, warps, stages."""

    m: int
    n: int
    k: int
    tasks: int
    warps: int
    stages: int


@lru_cache
def pick_expert_mix(num_rows: int, width: int, itemsize: int, tensor_cores: bool, arch: int) -> ExpertMixConfig:
    """Tile for T = num_rows tasks and experts of `width` outputs; itemsize, tensor_cores and arch as in pick_gemm.

    Each task in registers is a tile of sums beside the product's own: together 80 to 96 of a thread's 255 registers.
    128 and more spill.
    """
    tasks = min(power_of_two(num_rows), 4)
    if not tensor_cores:
        return ExpertMixConfig(64, _tile(width, 32 if tasks == 4 else 64), 16, tasks, 4 if tasks == 1 else 8, 3)
    stages = 2 if arch % 10 or arch >= 120 else 3
    return ExpertMixConfig(64, _tile(width, 64 if tasks == 4 else 128), 128 // itemsize, tasks, 8, stages)


def _tile(size: int | None, most: int) -> int:
    return most if size is None else min(most, max(16, power_of_two(size)))


@lru_cache(maxsize=256)
def _offsets(counts: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)


def offsets(counts: Sequence[int], device: torch.device) -> Tensor:
    """int32 [len(counts) + 1] prefix sums on the device, copied there once for every (counts, device)."""
    return _offsets(tuple(counts), device)


def on_device(tensor: Tensor):
    """A context in which kernels are launched on the tensor's device; Triton would take the current one."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def rows_contiguous(tensor: Tensor) -> Tensor:
    """The tensor itself if its last dimension is contiguous, else a copy: expanded gradients come with stride 0."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
