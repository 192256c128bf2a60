"""Weights by each task's learned uncertainty."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import Balancer

# By the words of python_models.losses too.
_FACTORS = {
    "regression": 0.5,
    "huber": 1.0,  # d^2 / 2 near 0: the half is in it
    "classification": 1.0,
    "binary": 1.0,
    "multiclass": 1.0,
    "watch_time": 1.0,
}


class UncertaintyWeighting(Balancer):
    """``sum_t c_t exp(-s_t) L_t + s_t / 2`` with learned ``s_t = log sigma_t^2``.

    Kendall et al., CVPR 2018, equations 7 to 10.

    c is 1/2 for regression, whose L_t is the squared error, and 1 for classification, whose L_t is the cross entropy.
    ``log_variance`` [T] holds s. It belongs to the caller's optimizer, without weight decay:
    ``param_groups(model, lr, also=[balancer])`` says so. At rest ``exp(s)`` is L, or 2 L for classification. The total
    may be negative: stop early by something else.

    Args:
        kinds: of every task, "regression" or "classification"; also "binary", "multiclass", "watch_time" and "huber",
            all with c = 1, as :class:`python_models.losses.TaskLosses` calls them. Huber's loss has its 1/2 within.
        initial: s at the start.
    """

    parameter_group = "loss_weights"

    def __init__(self, kinds: Sequence[str], initial: float = 0.0) -> None:
        if isinstance(kinds, str) or not isinstance(kinds, Sequence):
            raise TypeError(f"kinds must be a sequence of words, one a task; got {kinds!r}")
        for i, kind in enumerate(kinds):
            if kind not in _FACTORS:
                raise ValueError(f"kinds[{i}] must be one of {', '.join(_FACTORS)}; got {kind!r}")
        super().__init__(len(kinds))
        self.kinds = tuple(kinds)
        self.register_buffer("factor", torch.tensor([_FACTORS[kind] for kind in kinds]), persistent=False)
        self.log_variance = nn.Parameter(torch.full((len(kinds),), float(initial)))

    def _weigh(self, losses: Tensor) -> Tensor:
        s = self.log_variance.to(losses)
        return self.factor.to(losses) * torch.exp(-s) * losses + 0.5 * s
