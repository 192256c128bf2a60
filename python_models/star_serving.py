"""A STAR network as it serves: everything that depends on the domain alone, computed once."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtlkernels as mtl
from mtlkernels.nn import ACTIVATIONS

from .star_layers import check_rows, extended, known


class STARServing(nn.Module):
    """x [B,K] and domain ids [B] -> [B] logits; x alone where it was folded for one domain. Made by STAR.for_serving.

    ``weights`` [P,N,K] and ``biases`` [P,N] hold a domain's own layers, one row more where an unknown domain is served,
    and one row in all for one domain.
    """

    def __init__(self, network: nn.Module, single: bool) -> None:
        super().__init__()
        self.in_features, self.num_domains = network.in_features, network.num_domains
        self.context_features, self.activation = network.context_features, network.activation
        self.fallback, self.single = network.fallback, single
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        self.shared, self.auxiliary = None, nn.ModuleList()
        for name in ("scale", "shift", "domains"):
            self.register_buffer(name, None)

    def forward(self, x: Tensor, domain: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        check_rows(self, x, domain, context)
        if (domain is None) != self.single:
            raise ValueError(f"domain must be {'None: this network is one domain' if self.single else '[B]; got None'}")
        if self.fallback is not None and domain is not None:
            domain = known(domain, self.num_domains)
        index = None if domain is None else domain.long().clamp(0, len(self.biases[0]) - 1)
        if self.scale is not None:
            x = torch.addcmul(_rows(self.shift, index), x, _rows(self.scale, index)).to(x.dtype)
        h, last = x, len(self.weights) - 1
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            activation = None if k == last else self.activation
            if domain is None:
                h = mtl.expert_linear(h, weight, bias, activation=activation).squeeze(1)
            else:
                one = weight.new_ones(()).expand(weight.shape[1:])
                h = mtl.star_linear(h, domain, one, weight, None, bias, activation=activation)
        logit = h.squeeze(1)
        if self.shared is not None:
            logit = logit + self.shared(x[:, None]).squeeze(1)
        return logit if context is None else logit + self._auxiliary(context, index)

    def _auxiliary(self, context: Tensor, index: Tensor | None) -> Tensor:
        h = F.linear(context, self.auxiliary[0].weight)
        h = h + _rows(self.domains, index).to(h.dtype)
        for linear in self.auxiliary[1:]:
            h = linear(h if self.activation is None else ACTIVATIONS[self.activation](h))
        return h.squeeze(1)


def _rows(table: Tensor, index: Tensor | None) -> Tensor:
    """Each row's entry of a table: its only one without index."""
    return table if index is None else table.index_select(0, index)


@torch.no_grad()
def fold(network: nn.Module, domain: int | None) -> STARServing:
    """A :class:`STARServing` of all domains, or of one."""
    served = STARServing(network, domain is not None)
    other = network.fallback is not None and domain is None
    dtype = network.norm.weight.dtype

    def pick(table: Tensor) -> Tensor:
        return (table if domain is None else table[domain : domain + 1]).double()

    norm = network.norm
    weight, bias, mean, var = (pick(t) for t in norm.tables(other))
    scale = norm.weight.double() * weight * (var + norm.eps).rsqrt()  # [P,K]
    shift = norm.bias.double() + bias - scale * mean
    weights, biases = [], []
    for layer in network.layers:
        weight, bias = (pick(t) for t in layer.tables(other))
        if layer.weight is not None:
            weight, bias = layer.weight.double() * weight, layer.bias.double() + bias
        weights.append(weight)
        biases.append(bias)
    if network.shared is None:
        biases[0] = biases[0] + torch.einsum("pnk,pk->pn", weights[0], shift)
        weights[0] = weights[0] * scale[:, None, :]
    else:
        served.shared = copy.deepcopy(network.shared)
        served.scale, served.shift = scale.to(dtype), shift.to(dtype)
    if network.domains is not None:
        h = network.domains.weight
        h = pick(extended(h, h.mean(0)) if other else h)
        first = network.auxiliary[0]
        table = h @ first.weight[:, : h.shape[1]].double().t() + first.bias.double()
        if network.context_features:
            served.auxiliary = copy.deepcopy(network.auxiliary)
            served.auxiliary[0] = nn.Linear(
                network.context_features, first.out_features, False, first.weight.device, dtype
            )
            served.auxiliary[0].weight.copy_(first.weight[:, h.shape[1] :])
            served.domains = table.to(dtype)
        else:
            for linear in network.auxiliary[1:]:
                act = ACTIVATIONS.get(network.activation)
                table = F.linear(table if act is None else act(table), linear.weight.double(), linear.bias.double())
            biases[-1] = biases[-1] + table
    served.weights.extend(nn.Parameter(weight.to(dtype)) for weight in weights)
    served.biases.extend(nn.Parameter(bias.to(dtype)) for bias in biases)
    return served.eval().requires_grad_(False)
