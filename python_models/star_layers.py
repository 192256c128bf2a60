"""The layers of STAR: a normalisation and a linear layer that are partly a domain's own, and their checks."""

import math

import torch
from torch import Tensor, nn

import mtlkernels as mtl


def extended(table: Tensor, row: Tensor | float) -> Tensor:
    """table [P,...] with one more row."""
    return torch.cat([table, torch.as_tensor(row).to(table).expand(1, *table.shape[1:])])


def known(domain: Tensor, num_domains: int) -> Tensor:
    """The ids, those out of range as num_domains."""
    domain = domain.long()
    return torch.where((domain < 0) | (domain >= num_domains), num_domains, domain)


def check_rows(network: nn.Module, x: Tensor, domain: Tensor | None, context: Tensor | None) -> None:
    """Raises ValueError or TypeError unless x, domain and context are rows for a STAR network."""
    width = network.context_features
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor; got {type(x).__name__}")
    if x.dim() != 2 or x.shape[1] != network.in_features:
        raise ValueError(f"x must be [B,{network.in_features}]; got {tuple(x.shape)}")
    if (context is None) != (width == 0):
        got = "None" if context is None else f"{tuple(context.shape)}"
        raise ValueError(
            f"context must be {f'[B,{width}]' if width else 'None'}, as context_features={width}; got {got}"
        )
    if context is not None and context.shape != (x.shape[0], width):
        raise ValueError(f"context must be [{x.shape[0]},{width}]; got {tuple(context.shape)}")
    if domain is not None and domain.shape != x.shape[:1]:
        raise ValueError(f"domain must be [B], one id for each of x's {x.shape[0]} rows; got {tuple(domain.shape)}")


class StarLinear(nn.Module):
    """``act((W * W_p) x + b + b_p)``: [B,K] and ids [B] -> [B,N].

    ``weight`` [N,K] and ``bias`` [N] start as ``torch.nn.Linear``'s, ``domain_weight`` [P,N,K] at 1 and ``domain_bias``
    [P,N] at 0. Without `shared` there is W_p and b_p alone, which start as ``torch.nn.Linear``'s.
    """

    def __init__(
        self, num_domains: int, in_features: int, out_features: int, *, shared: bool = True, device=None, dtype=None
    ) -> None:
        super().__init__()
        sizes, factory = (out_features, in_features), {"device": device, "dtype": dtype}
        self.register_parameter("weight", nn.Parameter(torch.empty(sizes, **factory)) if shared else None)
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, **factory)) if shared else None)
        self.domain_weight = nn.Parameter(torch.empty(num_domains, *sizes, **factory))
        self.domain_bias = nn.Parameter(torch.empty(num_domains, out_features, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        k = self.domain_weight.shape[2]
        bound = 1 / math.sqrt(k) if k else 0.0
        if self.weight is not None:
            nn.init.ones_(self.domain_weight)
            nn.init.zeros_(self.domain_bias)
        for drawn in (self.domain_weight, self.domain_bias) if self.weight is None else (self.weight, self.bias):
            nn.init.uniform_(drawn, -bound, bound)

    def tables(self, other: bool) -> tuple[Tensor, Tensor]:
        """W_p and b_p; with `other` one more row, of a domain without any of its own."""
        w, b = self.domain_weight, self.domain_bias
        if not other:
            return w, b
        return extended(w, torch.zeros_like(w[0]) if self.weight is None else torch.ones_like(w[0])), extended(b, 0)

    def forward(self, x: Tensor, domain: Tensor, other: bool = False, activation: str | None = None) -> Tensor:
        w, b = self.tables(other)
        weight = w.new_ones(()).expand(w.shape[1:]) if self.weight is None else self.weight
        return mtl.star_linear(x, domain, weight, w, self.bias, b, activation=activation)

    def extra_repr(self) -> str:
        p, n, k = self.domain_weight.shape
        return f"{p}, {k}, {n}, shared={self.weight is not None}"


class PartitionedNorm(nn.Module):
    """:func:`mtlkernels.partitioned_norm` with its tensors: [B,D] and ids [B] -> [B,D].

    Parameters ``weight``, ``bias`` [D] and ``domain_weight``, ``domain_bias`` [P,D]; buffers ``running_mean``,
    ``running_var`` [P,D], and ``num_rows_tracked`` [P], the rows that went into them.
    """

    def __init__(
        self, num_domains: int, num_features: int, *, eps: float = 1e-5, momentum: float = 0.1, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.eps, self.momentum, shape = eps, momentum, (num_domains, num_features)
        factory = {"device": device, "dtype": dtype}
        for name in ("weight", "bias"):
            setattr(self, name, nn.Parameter(torch.empty(num_features, **factory)))
            setattr(self, f"domain_{name}", nn.Parameter(torch.empty(shape, **factory)))
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, torch.empty(shape, **factory))
        self.register_buffer("num_rows_tracked", torch.empty(num_domains, dtype=torch.int64, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights and variances 1, biases, means and counts 0."""
        for ones in (self.weight, self.domain_weight, self.running_var):
            nn.init.ones_(ones)
        for zeros in (self.bias, self.domain_bias, self.running_mean, self.num_rows_tracked):
            nn.init.zeros_(zeros)

    @torch.no_grad()
    def pooled(self) -> tuple[Tensor, Tensor]:
        """Mean and variance [D] over the domains' rows together; 0 and 1 as long as there were none."""
        mean, var = self.running_mean.double(), self.running_var.double()
        rows = self.num_rows_tracked.double()[:, None]
        share = rows / rows.sum().clamp(min=1)
        centre = (share * mean).sum(0)
        spread = (share * (var + (mean - centre).square())).sum(0)
        spread = torch.where(self.num_rows_tracked.any(), spread, 1.0)
        return centre.to(self.running_mean.dtype), spread.to(self.running_mean.dtype)

    def tables(self, other: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The domains' weight, bias, mean and variance; with `other` also those of a domain that is unknown."""
        own = self.domain_weight, self.domain_bias, self.running_mean, self.running_var
        if not other:
            return own
        return tuple(extended(t, row) for t, row in zip(own, (1, 0, *self.pooled()), strict=True))

    def forward(self, x: Tensor, domain: Tensor, other: bool = False) -> Tensor:
        w, b, mean, var = self.tables(other)
        y = mtl.partitioned_norm(
            x,
            domain,
            self.weight,
            self.bias,
            w,
            b,
            mean,
            var,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
        )
        if self.training:
            self._count(domain)
        return y

    @torch.no_grad()
    def _count(self, domain: Tensor) -> None:
        """Rows of domains with two rows or more, whose statistics have moved."""
        known = (domain >= 0) & (domain < len(self.num_rows_tracked))
        index = torch.where(known, domain, 0).long()
        rows = torch.zeros_like(self.num_rows_tracked).index_add_(0, index, known.long())
        self.num_rows_tracked.add_(torch.where(rows >= 2, rows, 0))

    def extra_repr(self) -> str:
        return f"{tuple(self.domain_weight.shape)}, eps={self.eps}, momentum={self.momentum}"
