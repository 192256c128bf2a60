"""The calls that partitioned_norm is tested on."""

from typing import NamedTuple

import torch
from torch import Tensor

import mtlkernels as mtl


def accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Norm(NamedTuple):
    """A batch of rows of several domains, in float64, and its running statistics, which every dtype can hold."""

    x: Tensor
    domain: Tensor
    weight: Tensor
    bias: Tensor
    domain_weight: Tensor
    domain_bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    training: bool = True

    def tensors(self, dtype: torch.dtype = torch.float64, parameters: torch.dtype | None = None) -> list[Tensor]:
        """x in dtype; the four parameters in `parameters`, or in dtype too."""
        return [self.x.to(dtype, copy=True), *(t.to(parameters or dtype, copy=True) for t in self[2:6])]

    def running(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        return [t.to(dtype, copy=True) for t in self[6:8]]

    def __call__(self, x, weight, bias, domain_weight, domain_bias, *, backend=None, running=None, **options) -> Tensor:
        running = running or self.running(accumulate(x.dtype))
        options = {"training": self.training, "backend": backend, **options}
        return mtl.partitioned_norm(x, self.domain, weight, bias, domain_weight, domain_bias, *running, **options)


def make(batch: int, width: int, domains: int, training: bool = True, ids: Tensor | None = None) -> Norm:
    gen = torch.Generator().manual_seed(batch + 7 * width + 31 * domains)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64)

    if ids is None:
        ids = torch.randint(domains, (batch,), generator=gen)
    x = 2 * normal(batch, width) + 3 * normal(1, width)
    running_mean = normal(domains, width).bfloat16().double()
    running_var = (normal(domains, width).abs() + 0.5).bfloat16().double()
    shared, own = (normal(width), normal(width)), (normal(domains, width), normal(domains, width))
    return Norm(x, ids, *shared, *own, running_mean, running_var, training)


# The CPU kernel: 128 rows of a domain a chunk, 256 columns a block, four rows a step.
SHAPES = {
    "one": (1, 1, 1),
    "odd": (13, 7, 3),
    "one domain": (9, 20, 1),
    "whole vectors": (32, 64, 2),
    "over a chunk": (300, 33, 2),
    "over many chunks": (1500, 5, 3),
    "over a block": (40, 300, 3),
    "over two blocks": (24, 600, 2),
    "many domains": (50, 9, 400),
    "no rows": (0, 5, 3),
    "no columns": (4, 0, 2),
}
MODES = {"train": True, "eval": False}
CASES = {f"{name}, {m}": make(*shape, mode) for name, shape in SHAPES.items() for m, mode in MODES.items()}
# None, one, two and three rows of a domain, in mixed order.
FEW = make(6, 10, 4, ids=torch.tensor([3, 1, 2, 3, 2, 3]))
