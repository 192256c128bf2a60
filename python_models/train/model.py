"""A whole model: features, network, towers, and what training needs to know of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import python_models as models
from python_models.adashare import Curriculum
from python_models.balancing import AuxiliaryHeads, TaskBiasEmbedding
from python_models.data import TableFeatures
from python_models.sampling import ExponentialTemperature, InverseRootTemperature

# A network's own penalty and its weight: the authors' where they say one.
PENALTIES: dict[str, tuple[Callable[[Any], Tensor], float]] = {
    "MRN": (lambda network: network.penalty(), 1.0),
    "Sluice": (lambda network: network.penalty(), 0.1),
    "SoftSharing": (lambda network: network.penalty(), 1e-4),
    "SNRTrans": (lambda network: network.l0_penalty(), 1e-4),
    "SNRAver": (lambda network: network.l0_penalty(), 1e-4),
    "AdaShare": (lambda network: network.policy_loss(), 1.0),
}


class TaskModel(nn.Module):
    """Rows to the tasks' outputs, and what training needs to know of the network.

    ``(numeric, categorical, domain) -> [B,T]``, or ``{task: [B,n]}`` where a task has several outputs.

    Attributes:
        name: of the architecture.
        features, network: the two parts.
        penalty_weight: of the network's own penalty.
        bias: the tasks' own biases of categorical columns, added to the outputs; or None.
        auxiliary: second heads, which training alone asks for; or None.
    """

    def __init__(
        self,
        name: str,
        features: TableFeatures,
        network: nn.Module,
        penalty_weight: float = 0.0,
        bias: TaskBiasEmbedding | None = None,
        auxiliary: AuxiliaryHeads | None = None,
    ) -> None:
        super().__init__()
        self.name, self.features, self.network, self.penalty_weight = name, features, network, penalty_weight
        self.bias, self.auxiliary = bias, auxiliary
        self._representation: list[Tensor] = []
        if auxiliary is not None:
            self._noting = self.core.register_forward_hook(self._note)

    @property
    def core(self) -> nn.Module:
        """The architecture itself, without the towers on it."""
        return self.network.fusion if isinstance(self.network, models.MultiTaskModel) else self.network

    def forward(self, numeric: Tensor, categorical: Tensor, domain: Tensor | None = None, **more: Any) -> Any:
        x = self.features(numeric, categorical)
        if self.name == "STAR":
            outputs = self.network(x, domain).unsqueeze(1)
        else:
            outputs = self.network(x, **more)
        if self.name == "ESMM":
            # The second task is seen on all rows: click and conversion. pCVR itself has no loss.
            return torch.stack((outputs["pCTR"], outputs["pCTCVR"]), 1)
        if self.bias is None:
            return outputs
        bias = self.bias(categorical)
        if isinstance(outputs, tuple):  # with the gates
            return (outputs[0] + bias, *outputs[1:])
        return outputs + bias

    def _note(self, _core: nn.Module, _inputs: Any, output: Any) -> None:
        if self.training:
            self._representation[:] = [output]

    def helped(self, losses: list[Tensor], loss: Callable[[Any], list[Tensor]]) -> list[Tensor]:
        """The tasks' losses with those of the auxiliary heads, on what the last call left; `loss` is of outputs."""
        if self.auxiliary is None:
            return losses
        return self.auxiliary.losses(losses, self._representation.pop(), loss)

    def for_serving(self) -> TaskModel:
        """What is deployed, a copy in evaluation mode: the network's own form for serving, and no auxiliary heads."""
        served = copy.deepcopy(self)
        if served.auxiliary is not None:
            served._noting.remove()
            served.auxiliary = None
        if hasattr(served.network, "for_serving"):
            served.network, served.penalty_weight = served.network.for_serving(), 0.0
        return served.eval()

    def conversion_logits(self, numeric: Tensor, categorical: Tensor) -> Tensor:
        """ESMM's pCVR [B], of a conversion after a click."""
        return self.network(self.features(numeric, categorical))["pCVR"]

    def penalty(self) -> Tensor | None:
        """The network's own penalty, weighted; None where it has none."""
        if self.name not in PENALTIES or not self.penalty_weight:
            return None
        return self.penalty_weight * PENALTIES[self.name][0](self.core)

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Schedules that depend on the epoch alone, so that a run that goes on finds them."""
        if self.name == "LearnedBranching":
            self.core.temperature = InverseRootTemperature(max(epochs, 1))(epoch)
        elif self.name == "AdaShare":
            self.core.temperature = ExponentialTemperature()(epoch)
            self.core.live_blocks = Curriculum(len(self.core.blocks), speed=1)(epoch)

    def after_step(self, step: int) -> None:
        """MRN's covariances, every 100 steps."""
        if self.name == "MRN" and step % 100 == 0:
            self.core.update_covariances()

    def task_parameters(self) -> Iterator[nn.Parameter]:
        """Those that no two tasks share: the towers, UberNet's heads, all of ESMM but its features."""
        yield from (p for own in (self.bias, self.auxiliary) if own is not None for p in own.parameters())
        yield from self._network_parameters()

    def _network_parameters(self) -> Iterator[nn.Parameter]:
        if self.name == "ESMM":
            return self.network.parameters()
        if self.name == "UberNet":
            shared = {id(p) for p in self.core.parameter_sets()[0]}
            return (p for p in self.core.parameters() if id(p) not in shared)
        return self.network.towers.parameters() if hasattr(self.network, "towers") else iter(())
