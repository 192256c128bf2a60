"""Choices drawn while a structure is searched for: relaxed one-hot samples, their temperature and its schedules."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mtlkernels.arguments import count


def relaxed_choice(logits: Tensor, temperature: Tensor | float, hard: bool) -> Tensor:
    """``d = softmax((log softmax(logits) + g) / temperature)`` over the last axis, ``g = -log(-log U)`` (Gumbel).

    Jang et al. and Maddison et al., ICLR 2017. U is one ``torch.rand`` of logits' shape. `hard` gives the one-hot of
    d's largest entry, with d's gradient (straight-through). logits in float32 or float64.
    """
    uniform = torch.rand_like(logits).clamp_min(torch.finfo(logits.dtype).tiny)
    soft = ((logits.log_softmax(-1) - (-uniform.log()).log()) / temperature).softmax(-1)
    return one_hot(soft) + (soft - soft.detach()) if hard else soft


def one_hot(scores: Tensor) -> Tensor:
    """1 at the largest entry of the last axis, the first of equal ones; 0 elsewhere."""
    return torch.zeros_like(scores).scatter(-1, scores.argmax(-1, keepdim=True), 1.0)


def wide(logits: Tensor) -> Tensor:
    """Static weights are computed in float32 at least."""
    return logits if logits.dtype == torch.float64 else logits.float()


class Temperature(nn.Module):
    """A temperature that changes between steps: a tensor, so that torch.compile does not make a graph a value.

    It moves with its module and stays float64. It is not in the state_dict: its schedule says what it is.
    """

    def __init__(self, value: float, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.register_buffer("tensor", torch.empty((), dtype=torch.float64, device=device), persistent=False)
        self.set(value)

    def set(self, value: float) -> None:
        """ValueError unless value is above 0; ``math.inf`` is legal."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"temperature must be a number; got {value!r}")
        if not value > 0:
            raise ValueError(f"temperature must be above 0; got {value}")
        self.value = float(value)
        with torch.no_grad():
            self.tensor.fill_(self.value)

    def _apply(self, fn: Callable, recurse: bool = True) -> "Temperature":
        super()._apply(fn, recurse)
        # Neither to_empty nor a 16-bit dtype leaves the number in it.
        self.tensor = torch.full((), self.value, dtype=torch.float64, device=self.tensor.device)
        return self

    def extra_repr(self) -> str:
        return str(self.value)


@dataclass(frozen=True)
class InverseRootTemperature:
    """``(epochs/20) / sqrt(epoch + 1)``, infinite in the first `warm_up` of all epochs: LibMTL's for learned branching.

    Call it with the epoch, counted from 0.
    """

    epochs: int
    warm_up: float = 0.01
    scale: float = 1 / 20

    def __post_init__(self) -> None:
        count("epochs", self.epochs, 1)
        if not 0 <= self.warm_up <= 1:
            raise ValueError(f"warm_up must be a share of the epochs, in [0, 1]; got {self.warm_up}")
        if not self.scale > 0:
            raise ValueError(f"scale must be above 0; got {self.scale}")

    def __call__(self, epoch: int) -> float:
        if count("epoch", epoch, 0) < self.epochs * self.warm_up:
            return math.inf
        return self.epochs * self.scale / math.sqrt(epoch + 1)


@dataclass(frozen=True)
class ExponentialTemperature:
    """``start * rate**round``: AdaShare's, one factor after every policy round. Call it with the round, from 0."""

    start: float = 5.0
    rate: float = 0.965

    def __post_init__(self) -> None:
        if not (self.start > 0 and 0 < self.rate <= 1):
            raise ValueError(f"start must be above 0 and rate in (0, 1]; got start={self.start}, rate={self.rate}")

    def __call__(self, round: int) -> float:
        return self.start * self.rate ** count("round", round, 0)
