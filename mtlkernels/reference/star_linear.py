"""star_linear in plain torch."""

import torch
from torch import Tensor

from .expert_linear import ACTIVATIONS, accumulate_dtype, without_autocast

_TILE = 128  # rows multiplied by one copy of a domain's weight


def star_linear(
    x: Tensor,
    domain: Tensor,
    weight: Tensor,
    domain_weight: Tensor,
    bias: Tensor | None,
    domain_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """``out_b = act((W * W_p) x_b + c + c_p)``, p = domain_b, accumulated in float32 (float64) and rounded once.

    x [B,K], domain [B], weight [N,K], domain_weight [P,N,K], bias [N], domain_bias [P,N] -> [B,N] in x's dtype.
    A row whose domain is not in 0 .. P-1 comes out as NaN and takes no part in any gradient.
    """
    acc = accumulate_dtype(x.dtype)
    known = (domain >= 0) & (domain.long() < domain_weight.shape[0])
    p = torch.where(known, domain.long(), 0)
    with without_autocast(x.device.type):
        z = _products(torch.where(known[:, None], x.to(acc), 0), p, weight.to(acc), domain_weight.to(acc))
        if bias is not None:
            z = z + bias.to(acc)
        if domain_bias is not None:
            z = z + domain_bias.to(acc).index_select(0, p)
        return ACTIVATIONS[activation](torch.where(known[:, None], z, torch.nan)).to(x.dtype)


def _products(x: Tensor, p: Tensor, weight: Tensor, domain_weight: Tensor) -> Tensor:
    """(W * W_p) x_b for every row: each domain's rows gathered into tiles, and one batched product over the tiles.

    Every shape follows from those of the arguments, never from the ids: compile and vmap need that, and one pass over
    all rows for each domain would cost P times as much.
    """
    num_domains = domain_weight.shape[0]
    counts = p.new_zeros(num_domains).index_add(0, p, torch.ones_like(p))  # [P]
    tiles = (counts + _TILE - 1) // _TILE
    tile_ends, ends = tiles.cumsum(0), counts.cumsum(0)

    # By domain, and within one by row: what a stable sort gives, which ONNX has not.
    order = torch.argsort(p * p.shape[0] + torch.arange(p.shape[0], device=p.device))
    sorted_p = p[order]
    rank = torch.arange(p.shape[0], device=p.device) - (ends - counts)[sorted_p]  # among its domain's rows
    tile = torch.empty_like(p).scatter(0, order, (tile_ends - tiles)[sorted_p] + rank // _TILE)  # [B]
    place = torch.empty_like(p).scatter(0, order, rank % _TILE)

    num_tiles = p.shape[0] // _TILE + num_domains  # at least as many as are needed
    # A tile's owner is the number of domains whose tiles end before it: a searchsorted, which ONNX has not either.
    over = p.new_zeros(num_tiles + 1).index_add(0, tile_ends, torch.ones_like(tile_ends)).cumsum(0)
    owner = over[:num_tiles].clamp(max=num_domains - 1)  # [tiles]
    gathered = x.new_zeros(num_tiles, _TILE, x.shape[1]).index_put((tile, place), x)
    # A domain without rows is not read: whatever its weight holds, its gradient is exactly 0.
    seen = torch.where((counts > 0)[:, None, None], domain_weight, 0)
    each = (weight * seen).index_select(0, owner)  # [tiles, N, K]
    return torch.bmm(gathered, each.mT)[tile, place]
