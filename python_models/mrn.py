"""MRN: a shared trunk, and task layers under a tensor-normal prior that learns how the tasks relate."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtlkernels.arguments import count
from mtlkernels.nn import Towers

from .layers import check_input
from .shared_bottom import SharedBottom

# Where each mode lies in a bank's weight [T,N,K].
MODES = {"task": 0, "class": 1, "feature": 2}


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


class TensorNormal(nn.Module):
    """The prior of weights W [T,N,K], each mode with a covariance Sigma_k: ``penalty = prior(W)``.

    ``R(W) = 1/2 (vec(W)^T (Sigma_1 x Sigma_2 x Sigma_3)^-1 vec(W) + sum_k D/D_k ln|Sigma_k|)``, the negative
    log-density without its constant. Its minimum over the Sigma_k is where :meth:`update` stands still. The buffers
    are Cholesky factors, Sigma = L L^T, the identity at first: they serve inverse and determinant alike. No gradient
    goes to them.

    Args:
        shape: (T, N, K).
        learn: the modes with a covariance, of "task", "class", "feature", "task" among them.
        eps: added to the diagonal of an updated covariance.
    """

    def __init__(
        self,
        shape: Sequence[int],
        learn: Sequence[str] = ("task",),
        *,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(learn, str) or "task" not in learn or not set(learn) <= set(MODES):
            raise ValueError(f"learn must hold 'task', and may hold 'class' and 'feature'; got {learn!r}")
        if isinstance(eps, bool) or not isinstance(eps, (int, float)) or eps <= 0:
            raise ValueError(f"eps must be a positive number; got {eps!r}")
        self.shape, self.eps = tuple(shape), eps
        self.learn = [mode for mode in ("feature", "class", "task") if mode in learn]
        for mode in self.learn:
            size = self.shape[MODES[mode]]
            self.register_buffer(f"{mode}_factor", torch.empty(size, size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every covariance is the identity."""
        for mode in self.learn:
            nn.init.eye_(self._factor(mode))

    def _factor(self, mode: str) -> Tensor:
        return getattr(self, f"{mode}_factor")

    def covariance(self, mode: str) -> Tensor:
        """Sigma of a mode, [D_k,D_k], in float32 at least; ValueError for another name."""
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
        if mode not in self.learn:
            size, like = self.shape[MODES[mode]], self.task_factor
            return torch.eye(size, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
        factor = _wide(self._factor(mode))
        return factor @ factor.mT

    def forward(self, weight: Tensor) -> Tensor:
        """R(weight), a scalar."""
        weight = _wide(weight)
        total = self._whiten(weight, self.learn).square().sum()
        for mode in self.learn:
            log_determinant = 2 * _wide(self._factor(mode)).diagonal().log().sum()
            total = total + self._others(mode) * log_determinant
        return total / 2

    def _others(self, mode: str) -> int:
        """D/D_k."""
        sizes = list(self.shape)
        del sizes[MODES[mode]]
        return sizes[0] * sizes[1]

    def _whiten(self, weight: Tensor, modes: Sequence[str]) -> Tensor:
        """``weight x_k L_k^-1`` along each of the modes: its square is the quadratic form."""
        for mode in modes:
            unfolded = weight.movedim(MODES[mode], 0)
            solved = torch.linalg.solve_triangular(
                self._factor(mode).to(weight.dtype), unfolded.flatten(1), upper=False
            )
            weight = solved.view(unfolded.shape).movedim(0, MODES[mode])
        return weight

    @torch.no_grad()
    def update(self, weight: Tensor) -> None:
        """``Sigma_k = D_k/D W_(k) (x_j!=k Sigma_j)^-1 W_(k)^T + eps I`` for every mode that is learned, tasks last.

        The scales of the three are ambiguous: those of class and feature are set to trace D_k, and the tasks' carries
        the rest. In float64.
        """
        if not weight.numel():
            return
        weight = weight.double()
        for mode in self.learn:
            others = [other for other in self.learn if other != mode]
            unfolded = self._whiten(weight, others).movedim(MODES[mode], 0).flatten(1)
            covariance = unfolded @ unfolded.mT / self._others(mode)
            covariance.diagonal().add_(self.eps)
            if mode != "task":
                covariance *= len(covariance) / covariance.trace()
            self._factor(mode).copy_(torch.linalg.cholesky(covariance))

    def extra_repr(self) -> str:
        return f"{self.shape}, learn={self.learn}, eps={self.eps}"


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


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
