"""The connection variables of sub-network routing."""

import math

import torch
from torch import Tensor, nn

import mtlkernels as mtl

PHI_LIMIT = math.log(1e2)  # far beyond it a connection stays open, or closed, whatever the data say later


class Connections(nn.Module):
    """Connection variables z [I,J] in [0, 1], the same for all rows of a batch (Ma et al., AAAI 2019).

    In training every call draws a new hard-concrete sample; in evaluation z is the estimator, without noise (Louizos
    et al., ICLR 2018, eq. 10 to 13). ``log_alpha`` [I,J] is the one parameter.

    Args:
        upper, lower: I and J.
        learned: False opens every connection: z is 1, and log_alpha None.
        beta, gamma, zeta: as in :func:`mtlkernels.hard_concrete`.
        delta: log_alpha starts at N(log(1 - delta) - log(delta), 0.01^2); 0.5 is about 0.
        clamp: keeps log_alpha within +-log(100), where it has a gradient: the parameter itself is cut before a
            training step uses it, which is after the optimiser's last step.
        generator: source of the noise, on any device; None is torch's own. Data-parallel replicas train one structure
            only if their generators (or seeds) are alike. torch.compile traces no generator: leave it out there and
            use torch.manual_seed.

    Raises:
        TypeError, ValueError: at construction, naming the argument.
    """

    def __init__(
        self,
        upper: int,
        lower: int,
        *,
        learned: bool = True,
        beta: float = 2 / 3,
        gamma: float = -0.1,
        zeta: float = 1.1,
        delta: float = 0.5,
        clamp: bool = True,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(delta, bool) or not isinstance(delta, (int, float)) or not 0 < delta < 1:
            raise ValueError(f"delta must be a number between 0 and 1; got {delta!r}")
        for name, flag in (("clamp", clamp), ("routed", learned)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be a bool; got {flag!r}")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator; got {type(generator).__name__}")
        self.upper, self.lower, self.delta, self.clamp, self.generator = upper, lower, delta, clamp, generator
        self.beta, self.gamma, self.zeta = beta, gamma, zeta
        mtl.hard_concrete(torch.zeros(0, device="cpu"), **self._constants)  # raises what does not fit
        self.register_parameter("log_alpha", None)
        if learned:
            self.log_alpha = nn.Parameter(torch.empty(upper, lower, device=device, dtype=dtype))
            self.reset_parameters()

    @property
    def _constants(self) -> dict[str, float]:
        return {"beta": self.beta, "gamma": self.gamma, "zeta": self.zeta}

    def reset_parameters(self) -> None:
        """Draws log_alpha anew."""
        if self.log_alpha is not None:
            nn.init.normal_(self.log_alpha, math.log(1 - self.delta) - math.log(self.delta), 0.01)

    def _phi(self) -> Tensor:
        phi = self.log_alpha
        if not self.clamp:
            return phi
        # Under functorch's transforms, and where nothing is trained, the parameter is left as it is.
        if self.training and torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
            # By way of data, which a graph of an earlier forward does not notice: unless the optimiser has moved the
            # parameter since, and so ended that graph, nothing changes here.
            phi.data.clamp_(-PHI_LIMIT, PHI_LIMIT)
            return phi
        return phi.clamp(-PHI_LIMIT, PHI_LIMIT)

    def forward(self, like: Tensor) -> Tensor:
        """z [I,J]; where nothing is learned, ones in the dtype and on the device of `like`."""
        if self.log_alpha is None:
            return like.new_ones(self.upper, self.lower)
        phi, noise = self._phi(), None
        if self.training:
            source = phi.device if self.generator is None else self.generator.device
            wide = torch.promote_types(phi.dtype, torch.float32)
            noise = torch.rand(phi.shape, generator=self.generator, device=source, dtype=wide).to(phi.device)
        return mtl.hard_concrete(phi, noise, **self._constants)

    @torch.no_grad()
    def estimate(self, like: Tensor) -> Tensor:
        """The z that serves, whatever the mode; `like` as in :meth:`forward`."""
        if self.log_alpha is None:
            return self(like)
        phi = self.log_alpha
        return mtl.hard_concrete(phi.clamp(-PHI_LIMIT, PHI_LIMIT) if self.clamp else phi, **self._constants)

    def l0(self, cost: float | Tensor = 1.0) -> Tensor:
        """``sum_ij cost_ij Pr(z_ij != 0)``, a scalar; cost is one number or [I,J]. Needs learned connections."""
        phi = self._phi()
        if not isinstance(cost, Tensor):
            return cost * mtl.hard_concrete_l0(phi, **self._constants)
        if cost.shape != phi.shape:
            raise ValueError(f"cost must be [I,J] = {tuple(phi.shape)}; got shape {tuple(cost.shape)}")
        phi = phi.to(torch.promote_types(phi.dtype, torch.float32))
        return (cost.to(phi) * torch.sigmoid(phi - self.beta * math.log(-self.gamma / self.zeta))).sum()

    def extra_repr(self) -> str:
        return f"{self.upper}, {self.lower}, learned={self.log_alpha is not None}"
