"""What networks share that mix their tasks' streams by learned weights which no input rules."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

import mtlkernels as mtl


class Stitch(nn.Module):
    """``O_i = sum_j weight[i,j] H_j``: streams [B,R,D] -> [B,R,D].

    Args:
        rows: R.
        start: ``start(weight)`` fills the weight in place, of every channel alike or not.
        channels: D for a weight a channel, [R,R,D]; None for one a pair of streams, [R,R].
    """

    def __init__(
        self,
        rows: int,
        start: Callable[[Tensor], object],
        channels: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = (rows, rows) if channels is None else (rows, rows, channels)
        self.start = start
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """What `start` makes of the weight."""
        with torch.no_grad():
            self.start(self.weight)

    def forward(self, streams: Tensor) -> Tensor:
        return mtl.linear_mix(streams, self.weight)

    def extra_repr(self) -> str:
        return str(tuple(self.weight.shape))


def mostly_own(weight: Tensor, same: float) -> None:
    """The diagonal is `same`, and the rest of a row shares 1 - same; a row of one is 1."""
    rows = weight.shape[0]
    weight.fill_((1 - same) / max(rows - 1, 1))
    weight.diagonal().fill_(same if rows > 1 else 1.0)


def equal(weight: Tensor) -> None:
    """1/R everywhere."""
    weight.fill_(1 / weight.shape[0])


def like_linear(weight: Tensor) -> None:
    """U(-1/sqrt(R), 1/sqrt(R)): ``torch.nn.Linear(R, R)``'s start."""
    bound = 1 / math.sqrt(weight.shape[0])
    weight.uniform_(-bound, bound)


def for_every_stream(bank: nn.Module, streams: Tensor) -> Tensor:
    """A bank [B,K] -> [B,E,N] on each of R streams [B,R,K], which share its weights: [B,R,E,N]."""
    return bank(streams.flatten(0, 1)).unflatten(0, streams.shape[:2])


def check_share(name: str, value: float) -> float:
    """value, a number in [0, 1]; ValueError otherwise, naming the argument."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number in [0, 1]; got {value!r}")
    return float(value)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    """value, one of `choices`; ValueError otherwise, naming the argument."""
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}; got {value!r}")
    return value
