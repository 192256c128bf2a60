"""A rotation of the representation for every task, so that gradients agree in size and direction."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from mtlkernels.arguments import count
from mtlkernels.nn import ExpertLinear, Towers

from .base import Balancer, Losses
from .task_gradients import GradientMethod, Representation

_LEAST_NORM = 1e-15


class RotoGrad(GradientMethod):
    """Task t reads ``r_t = R_t z``; the trunk gets gradients of one size (Javaloy and Valera, ICLR 2022, section 4). ::

        z = trunk(x)
        losses = criterion(towers(method.rotate(z)), y)
        method.backward(losses, representation=z)

    Size: with ``n_t = |dL_t/dz|`` and ``k_t = n_t / n_t(0)``, the trunk gets ``C sum_t g_t / n_t``; C is the mean
    of n weighted by k. Direction: ``R_t = expm(A_t - A_t^T)`` descends ``mean_b |R_t v_b - g~_tb|^2``;
    g~ is the gradient of r_t, and v the mean of the g_t, each at the mean's length. Its gradient goes to A alone,
    ``skew``, which belongs to the caller's optimizer, at a smaller rate that decays:
    ``param_groups(model, lr, also=[method])``.

    ``fold`` puts the rotations into towers, and serving needs nothing of this.

    Args:
        num_tasks: T.
        features: d, the width of z.
        rotated: d' <= d, how many of the first features are rotated; None rotates all.
        rotate_only: the trunk gets the plain sum of gradients.
        burn_in: n_t(0) is taken at the first step and once more at this one.
        weighting, seed: as of :class:`GradientMethod`.
    """

    parameter_group = "rotations"

    def __init__(
        self,
        num_tasks: int,
        features: int,
        *,
        rotated: int | None = None,
        rotate_only: bool = False,
        burn_in: int = 20,
        weighting: Balancer | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(num_tasks, weighting=weighting, seed=seed)
        self.features = count("features", features, 1)
        self.rotated = self.features if rotated is None else count("rotated", rotated, 1)
        if self.rotated > self.features:
            raise ValueError(f"rotated must be at most features={features}; got {rotated}")
        self.rotate_only, self.burn_in = rotate_only, count("burn_in", burn_in, 0)
        self.skew = nn.Parameter(torch.zeros(num_tasks, self.rotated, self.rotated))
        self.register_buffer("initial", torch.zeros(num_tasks))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def rotations(self) -> Tensor:
        """R [T,d,d], differentiable in ``skew``."""
        turned = torch.matrix_exp(self.skew - self.skew.transpose(1, 2))
        if self.rotated == self.features:
            return turned
        whole = torch.eye(self.features, dtype=turned.dtype, device=turned.device).repeat(self.num_tasks, 1, 1)
        whole[:, : self.rotated, : self.rotated] = turned
        return whole

    def rotate(self, z: Tensor) -> Tensor:
        """r [B,T,d] of z [B,d]; the rotations are constants to the losses. In eval mode too, unless folded."""
        if z.dim() != 2 or z.shape[1] != self.features:
            raise ValueError(f"z must be [B,{self.features}]; got shape {tuple(z.shape)}")
        return torch.einsum("bk,tnk->btn", z, self.rotations().detach().to(z.dtype))

    @torch.no_grad()
    def fold(self, towers: Towers) -> Towers:
        """Puts the rotations into the towers' first layer, in place: then they read z for every task, not r."""
        layer = towers.last if towers.hidden is None else towers.hidden.linears[0]
        if not isinstance(layer, ExpertLinear) or layer.num_experts != self.num_tasks:
            raise ValueError("towers must be a bank with one first layer a task")
        layer.weight.copy_(layer.weight @ self.rotations().to(layer.weight))
        self.skew.zero_()
        return towers

    def backward(self, losses: Losses, **options: object) -> Tensor:
        self._direction: Tensor | None = None
        total = super().backward(losses, **options)
        if self._direction is not None and self.skew.requires_grad:
            scaler, backward = options.get("scaler"), options.get("backward")
            scalar = self._direction if scaler is None else scaler.scale(self._direction)
            (torch.Tensor.backward if backward is None else backward)(scalar)
        self._direction = None
        return total

    def combine(self, gradients: Tensor, tasks: Sequence[int], losses: Tensor) -> Tensor:
        which, plain = list(tasks), gradients.sum(0)
        norms = gradients.norm(dim=1).clamp_min(_LEAST_NORM)  # [n]
        if not norms.isfinite().all():
            return plain
        first = (self.initial[which] == 0) | (self.steps == self.burn_in)
        self.initial[which] = torch.where(first, norms.to(self.initial), self.initial[which])
        self.steps += 1
        self._direction = self._off_direction(gradients, norms, which)
        if self.rotate_only:
            return plain
        progress = norms / self.initial[which].to(norms).clamp_min(_LEAST_NORM)
        size = (progress / progress.sum() * norms).sum()
        return size * (gradients / norms.unsqueeze(1)).sum(0)

    def _off_direction(self, gradients: Tensor, norms: Tensor, which: list[int]) -> Tensor:
        """The sum over tasks of ``mean_b |R_t v_b - g~_tb|^2``; only R is variable."""
        each = gradients.view(len(which), -1, self.features)  # [n,B,d]
        mean = gradients.mean(0).norm()
        target = (each * (mean / norms).view(-1, 1, 1)).mean(0)  # v [B,d]
        with torch.enable_grad():
            turn = self.rotations()[which].to(gradients)
            wanted = torch.einsum("nbk,ndk->nbd", each, turn.detach())  # g~ = R g
            found = torch.einsum("bk,ndk->nbd", target, turn)
            return (found - wanted).square().sum(2).mean(1).sum()

    def _place(self, shared: Iterable[Tensor] | None, representation: Tensor | None) -> Representation:
        if representation is None:
            raise ValueError("representation must be z [B,d], which rotate() was given; got None")
        place = Representation(representation)
        if representation.dim() != 2 or representation.shape[1] != self.features:
            raise ValueError(f"representation must be [B,{self.features}]; got {tuple(representation.shape)}")
        return place
