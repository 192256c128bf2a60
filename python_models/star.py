"""STAR: one network for many domains, a shared weight times the domain's own in every layer."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtlkernels.arguments import count, counts, is_one_of
from mtlkernels.nn import ACTIVATIONS, Towers

from .star_layers import PartitionedNorm, StarLinear, check_rows, extended, known
from .star_serving import STARServing, fold


class STAR(nn.Module):
    """Star topology adaptive recommender: x [B,K] and domain ids [B] -> [B] logits (Sheng et al., CIKM 2021).

    A partitioned normalisation, star layers ``act((W * W_p) h + b + b_p)`` of widths `dims`, a last one of width 1
    without activation, and to its output the logit of a small auxiliary network is added, which reads the domain's
    embedding and context features. A batch may hold rows of several domains. At the start all
    domains are equal but for that logit.

    Args:
        in_features: K.
        num_domains: P; ids are 0 to P-1.
        dims: widths of the hidden layers; () is one star layer.
        mode: "product" is the paper's. "logit_sum" adds the logits of a shared tower and one a domain instead.
        domain_dims: widths of the domains' towers in mode "logit_sum"; None is dims.
        aux_dims: widths of the auxiliary network's hidden layers; None leaves it out.
        domain_features: width of the domains' embedding.
        context_features: C, of the auxiliary network's second input.
        fallback: None: an id out of range is an error, as :func:`mtlkernels.star_linear` says it. "shared": in
            evaluation such a row is served by the shared network alone, with W_p = 1, b_p = 0, statistics pooled over
            the domains' rows, and the mean of their embeddings; in mode "logit_sum" by the shared tower.
        activation, dropout: of the hidden layers.
        eps, momentum: of the normalisation.

    Raises:
        TypeError, ValueError: naming the argument, at construction, or for an x, domain or context that does not fit.
    """

    def __init__(
        self,
        in_features: int,
        num_domains: int,
        dims: Sequence[int],
        *,
        mode: str = "product",
        domain_dims: Sequence[int] | None = None,
        aux_dims: Sequence[int] | None = (16,),
        domain_features: int = 8,
        context_features: int = 0,
        fallback: str | None = None,
        activation: str | None = "relu",
        dropout: float = 0.0,
        eps: float = 1e-5,
        momentum: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if mode not in ("product", "logit_sum"):
            raise ValueError(f"mode must be 'product' or 'logit_sum'; got {mode!r}")
        if fallback not in (None, "shared"):
            raise ValueError(f"fallback must be None or 'shared'; got {fallback!r}")
        if activation is not None and not is_one_of(activation, ACTIVATIONS):
            raise ValueError(f"activation must be None or one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ValueError(f"dropout must be a probability in [0, 1); got {dropout!r}")
        if mode == "product" and domain_dims is not None:
            raise ValueError("domain_dims is for mode='logit_sum': a product needs equal shapes")
        if aux_dims is None and context_features:
            raise ValueError(f"context_features={context_features} needs the auxiliary network; got aux_dims=None")
        self.in_features, self.num_domains = count("in_features", in_features, 0), count("num_domains", num_domains, 1)
        self.context_features = count("context_features", context_features, 0)
        self.mode, self.fallback, self.activation, self.dropout = mode, fallback, activation, dropout
        factory = {"device": device, "dtype": dtype}
        dims = counts("dims", dims, 0)
        own = dims if domain_dims is None else counts("domain_dims", domain_dims, 0)
        self.norm = PartitionedNorm(num_domains, in_features, eps=eps, momentum=momentum, **factory)
        self.shared = None
        if mode == "logit_sum":
            self.shared = Towers(in_features, 1, dims, activation=activation, dropout=dropout, **factory)
        self.layers = nn.ModuleList(
            StarLinear(num_domains, k, n, shared=mode == "product", **factory)
            for k, n in zip([in_features, *own], [*own, 1], strict=True)
        )
        self.domains, self.auxiliary = None, nn.ModuleList()
        if aux_dims is not None:
            self.domains = nn.Embedding(num_domains, count("domain_features", domain_features, 1), **factory)
            widths = [domain_features + context_features, *counts("aux_dims", aux_dims, 0), 1]
            self.auxiliary.extend(nn.Linear(k, n, **factory) for k, n in zip(widths[:-1], widths[1:], strict=True))

    def forward(self, x: Tensor, domain: Tensor, context: Tensor | None = None) -> Tensor:
        check_rows(self, x, domain, context)
        other = self.fallback is not None and not self.training
        if other:
            domain = known(domain, self.num_domains)
        x = h = self.norm(x, domain, other)
        for layer in self.layers[:-1]:
            h = self._drop(layer(h, domain, other, self.activation))
        logit = self.layers[-1](h, domain, other).squeeze(1)
        if self.shared is not None:
            logit = logit + self.shared(x[:, None]).squeeze(1)
        if self.domains is not None:
            logit = logit + self._auxiliary(domain, context, other)
        return logit

    def _auxiliary(self, domain: Tensor, context: Tensor | None, other: bool) -> Tensor:
        # Within the tables whatever comes: a row of an id out of range is NaN already.
        index = domain.long().clamp(0, self.num_domains - 1 + other)
        h = self.domains.weight
        if other:
            h = extended(h, h.mean(0))
        if context is not None:
            h = torch.cat([h.index_select(0, index), context], 1)
        for linear in self.auxiliary[:-1]:
            h = self._drop(linear(h) if self.activation is None else ACTIVATIONS[self.activation](linear(h)))
        h = self.auxiliary[-1](h).squeeze(1)
        # Without context a domain's rows have one logit.
        return h if context is not None else h.index_select(0, index)

    def _drop(self, h: Tensor) -> Tensor:
        return F.dropout(h, self.dropout, self.training) if self.dropout else h

    def validate(self, domain: Tensor) -> None:
        """Raises ValueError naming the first id that this network does not know; for loaders, on any device."""
        unknown = (domain < 0) | (domain >= self.num_domains)
        if unknown.any():
            row = int(unknown.nonzero()[0, 0])
            raise ValueError(f"domain must hold ids from 0 to {self.num_domains - 1}; row {row} has {int(domain[row])}")

    def for_serving(self, domain: int | None = None) -> STARServing:
        """A network for evaluation with the same outputs to rounding: ``W * W_p`` and ``b + b_p`` for every domain.

        The normalisation is inside the first layer, and what the auxiliary network makes of the domain inside the last
        bias. With `domain` the network is that domain's: x [B,K] -> [B], as large as one shared network.
        """
        if domain is not None and count("domain", domain, 0) >= self.num_domains:
            raise ValueError(f"domain must be an id from 0 to {self.num_domains - 1}; got {domain}")
        return fold(self, domain)
