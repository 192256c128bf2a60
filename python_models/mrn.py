"""MRN: a shared trunk, and task layers under a tensor-normal prior that learns how the tasks relate."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtlkernels.arguments import count
from mtlkernels.nn import Towers

from .layers import check_input
from .shared_bottom import SharedBottom
from .tensor_normal import TensorNormal


class MRN(nn.Module):
    """Multilinear relationship network: [B,K] -> [B,T] logits, or ``{name: [B,n]}`` (Long et al., NeurIPS 2017).

    A shared bottom and :class:`mtlkernels.nn.Towers`, every layer of which has a :class:`TensorNormal` prior. Train
    with ``task losses + rho * network.penalty()`` (the authors: rho 1, the towers at 10 times the rate of the bottom),
    and update the covariances in closed form every 100 steps::

        optimizer.register_step_post_hook(FlipFlop(network, every=100))

    Args:
        in_features: K.
        num_tasks: T.
        dims: widths of the shared bottom.
        head_dims: widths of the towers' hidden layers; () is a linear tower.
        out_features, task_names: as in :class:`mtlkernels.nn.Towers`. Where outputs differ the last layers cannot be
            stacked, and the prior is over the hidden ones, of which there must be some.
        learn: the covariances that are learned, of "task", "class" (a layer's outputs) and "feature" (its inputs),
            "task" among them. The others stay the identity, and cost nothing.
        eps: added to the diagonal of an updated covariance.
        activation, dropout, norm: of the bottom and the towers' hidden layers, as in :class:`mtlkernels.nn.ExpertMLP`.

    An x [B,T+1,K], as the other networks take, has the bottom's input last.

    Raises:
        TypeError, ValueError: naming the argument, at construction, or for an x of another shape.
    """

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        dims: Sequence[int],
        head_dims: Sequence[int] = (),
        out_features: int | Sequence[int] = 1,
        task_names: Sequence[str] | None = None,
        *,
        learn: Sequence[str] = ("task",),
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **layers: Any,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.in_features = count("in_features", in_features, 0)
        self.bottom = SharedBottom(in_features, num_tasks, dims, **layers, **factory)
        self.num_tasks = num_tasks
        self.towers = Towers(
            self.bottom.out_features, num_tasks, head_dims, out_features, task_names, **layers, **factory
        )
        self.priors = nn.ModuleList(
            TensorNormal(weight.shape, learn, eps=eps, **factory) for weight in self._stacked_weights()
        )
        if not len(self.priors):
            raise ValueError(
                f"out_features={self.towers.out_features} differ, so that the last layers cannot be stacked: "
                "head_dims must name a hidden layer for the prior"
            )

    def _stacked_weights(self) -> list[Tensor]:
        """[T,N,K] of every tower layer with a prior."""
        linears = [] if self.towers.hidden is None else list(self.towers.hidden.linears)
        if len(set(self.towers.out_features)) == 1:
            linears.append(self.towers.last)
        return [linear.weight for linear in linears]

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        check_input(x, self.num_tasks + 1, self.in_features)
        return self.towers(self.bottom(x))

    def penalty(self) -> Tensor:
        """The negative logarithm of the priors but for a constant, a scalar, float32 at least; see TensorNormal."""
        pairs = zip(self.priors, self._stacked_weights(), strict=True)
        return torch.stack([prior(weight) for prior, weight in pairs]).sum()

    def update_covariances(self) -> None:
        """One flip-flop sweep for every layer, from the weights as they are."""
        for prior, weight in zip(self.priors, self._stacked_weights(), strict=True):
            prior.update(weight)

    def task_correlation(self) -> Tensor:
        """[layers,T,T]: ``Sigma_ij / sqrt(Sigma_ii Sigma_jj)`` of each layer's task covariance."""
        covariance = torch.stack([prior.covariance("task") for prior in self.priors])
        deviation = covariance.diagonal(dim1=1, dim2=2).sqrt()
        return covariance / (deviation[:, :, None] * deviation[:, None, :])


class FlipFlop:
    """Called after each optimizer step, it updates a network's covariances at every `every`-th call.

    Takes what an optimizer's hook is called with, and ignores it: ``optimizer.register_step_post_hook(FlipFlop(mrn))``.

    Args:
        network: an :class:`MRN`, or anything with ``update_covariances()``.
        every: steps between two updates.
    """

    def __init__(self, network: MRN, every: int = 100) -> None:
        if not callable(getattr(network, "update_covariances", None)):
            raise TypeError(f"network must have update_covariances(); got {type(network).__name__}")
        self.network, self.every, self.steps = network, count("every", every, 1), 0

    def __call__(self, *_: Any) -> None:
        self.steps += 1
        if self.steps % self.every == 0:
            self.network.update_covariances()
