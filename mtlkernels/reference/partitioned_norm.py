"""partitioned_norm in plain torch."""

import torch
from torch import Tensor

from .expert_linear import accumulate_dtype


def partitioned_norm(
    x: Tensor,
    domain: Tensor,
    weight: Tensor,
    bias: Tensor,
    domain_weight: Tensor,
    domain_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``y = (w * w_p) * (x - mean_p) / sqrt(var_p + eps) + (b + b_p)``, p the row's domain.

    x [B,D]; domain [B], any integer dtype; weight, bias [D]; the domains' own and the running statistics [P,D].

    Returns y [B,D] in x's dtype; mean and var [P,D], the statistics that were used; count [P] int64, the rows they were
    taken from. A domain of fewer than two rows, and every domain outside training, uses its running statistics;
    outside training count is 0. Mean and var carry no gradient of their own.

    A row whose domain is outside [0, P) becomes NaN and enters no statistic; on a CPU, where looking costs nothing and
    the values are there, it raises ValueError instead.
    """
    num_domains = domain_weight.shape[0]
    known = (domain >= 0) & (domain < num_domains)
    if _can_look(domain) and not known.all():
        row = int((~known).nonzero()[0])
        raise ValueError(f"domain must lie in [0, {num_domains}); row {row} has {int(domain[row])}")
    p = torch.where(known, domain, 0).long()
    acc = accumulate_dtype(x.dtype)
    z = x.to(acc)
    mean, var = running_mean.detach().to(acc), running_var.detach().to(acc)
    count = torch.zeros(num_domains, dtype=torch.int64, device=x.device)
    if training:
        # Rows of no domain are counted in a bucket of their own, which is cut off.
        bucket = torch.where(known, domain, num_domains).long()
        ones = torch.ones_like(bucket)
        count = torch.zeros(num_domains + 1, dtype=torch.int64, device=x.device).index_add(0, bucket, ones)
        count = count[:num_domains]
        n = count[:, None]
        # A row alone in its domain takes no part; as it is, a NaN in it would come back as gradient, 0 * NaN.
        several = (n >= 2).index_select(0, p)
        used = torch.where(several, z, 0)

        def average(rows: Tensor) -> Tensor:
            sums = torch.zeros(num_domains + 1, x.shape[1], dtype=torch.float64, device=x.device)
            return sums.index_add(0, bucket, rows)[:num_domains] / n.clamp(min=1)

        # In double: a float32 sum of 4096 numbers near 1e4 is off by 100, their mean by 0.03.
        batch_mean = average(used.double())
        batch_var = average((used - batch_mean.index_select(0, p)).square())
        mean, var = torch.where(n >= 2, batch_mean.to(acc), mean), torch.where(n >= 2, batch_var.to(acc), var)
    scale = weight.to(acc) * domain_weight.to(acc) * (var + eps).rsqrt()
    shift = bias.to(acc) + domain_bias.to(acc)
    centred = z - mean.index_select(0, p)
    y = torch.addcmul(shift.index_select(0, p), centred, scale.index_select(0, p))
    y = torch.where(known[:, None], y, torch.nan)
    return y.to(x.dtype), mean.detach(), var.detach(), count


def _can_look(domain: Tensor) -> bool:
    """Whether the ids' values can be asked for: not while tracing, nor under vmap; on a GPU it would have to wait."""
    tracing = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return domain.device.type == "cpu" and not tracing
