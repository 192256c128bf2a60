"""The tensor-normal prior of stacked task weights, and its covariances in closed form."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Where each mode lies in a bank's weight [T,N,K].
MODES = {"task": 0, "class": 1, "feature": 2}


class TensorNormal(nn.Module):
    """The prior of weights W [T,N,K] (Long et al., NeurIPS 2017): ``prior(W)`` is its penalty, a scalar.

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


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
