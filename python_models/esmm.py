"""ESMM: the conversion rate after a click, learned from all impressions."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import mtlkernels as mtl
from mtlkernels.arguments import count, counts
from mtlkernels.nn import ExpertLinear, ExpertMLP

from .layers import check_input
from .serving import serving_bank


class ESMM(nn.Module):
    """Entire-space multi-task model: features [B,K] -> logits {"pCTR", "pCVR", "pCTCVR"}, [B] each.

    Two equal towers give the logits of a click and of a conversion after one; that of both, of ``pCTCVR = pCTR pCVR``,
    follows from these, and torch.sigmoid makes probabilities of all three (Ma et al., SIGIR 2018, eq. 1 to 3). The
    towers share the features, and so the embeddings before them, and nothing else. pCVR has no loss of its own:
    measure it on clicked rows alone.

    Args:
        in_features: K.
        dims: widths of a tower's hidden layers; () is a linear tower.
        activation, dropout, norm: of the hidden layers, as in :class:`mtlkernels.nn.ExpertMLP`.

    An x [B,2,K] gives each tower its own input, the click's first.

    Raises:
        TypeError, ValueError: naming the argument, at construction, or for an x of another shape.
    """

    def __init__(
        self,
        in_features: int,
        dims: Sequence[int] = (200, 80),
        *,
        activation: str | None = "relu",
        dropout: float = 0.0,
        norm: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, dims = count("in_features", in_features, 0), counts("dims", dims, 0)
        factory = {"device": device, "dtype": dtype}
        self.hidden = None
        if dims:
            self.hidden = ExpertMLP(2, in_features, dims, activation=activation, dropout=dropout, norm=norm, **factory)
        self.last = ExpertLinear(2, dims[-1] if dims else in_features, 1, **factory)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        check_input(x, 2, self.in_features)
        ctr, cvr = self.last(x if self.hidden is None else self.hidden(x)).squeeze(2).unbind(1)
        return {"pCTR": ctr, "pCVR": cvr, "pCTCVR": both_logit(ctr, cvr)}

    @staticmethod
    def loss(logits: dict[str, Tensor], click: Tensor, conversion: Tensor, *, ctcvr_weight: float = 1.0) -> Tensor:
        """Cross entropy of the click, plus that of click and conversion, mean over all impressions.

        click and conversion [B] in [0, 1]; a row without click stays in the loss. Arguments, result and errors as in
        :func:`mtlkernels.esmm_loss`.
        """
        return mtl.esmm_loss(logits["pCTR"], logits["pCVR"], click, conversion, ctcvr_weight=ctcvr_weight)

    @staticmethod
    def validate(click: Tensor, conversion: Tensor) -> None:
        """Raises ValueError naming the first row with a label outside [0, 1], or a conversion without a click.

        For loaders, on any device; the labels are of one shape.
        """
        if click.shape != conversion.shape:
            raise ValueError(f"conversion must have click's shape {tuple(click.shape)}; got {tuple(conversion.shape)}")
        for name, label in (("click", click), ("conversion", conversion)):
            _raise_first(~((label >= 0) & (label <= 1)), label, f"{name} must lie in [0, 1]")
        _raise_first((click == 0) & (conversion > 0), conversion, "conversion must be 0 where click is 0")

    @torch.no_grad()
    def for_serving(self) -> "ESMM":
        """A copy for evaluation, same outputs to rounding: batch norms folded, activations fused, no dropout."""
        served = ESMM(self.in_features, (), device="meta")
        served.hidden = None if self.hidden is None else serving_bank(self.hidden)
        served.last = copy.deepcopy(self.last)
        return served.eval().requires_grad_(False)


def both_logit(a: Tensor, b: Tensor) -> Tensor:
    """Logit of ``sigmoid(a) sigmoid(b)``, ``-log(exp(-a) + exp(-b) + exp(-a-b))``: no probability is formed.

    In float32 (float64) and rounded once.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    x, y = -a.to(wide), -b.to(wide)
    return -torch.logsumexp(torch.stack([x, y, x + y]), 0).to(a.dtype)


def _raise_first(wrong: Tensor, values: Tensor, message: str) -> None:
    if wrong.any():
        row = int(wrong.flatten().nonzero()[0])
        raise ValueError(f"{message}; row {row} has {values.flatten()[row].item()}")
