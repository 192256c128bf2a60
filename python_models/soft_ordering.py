"""Soft layer ordering: a few modules shared by all tasks and depths, mixed anew at every depth of every task."""

import torch
from torch import Tensor, nn

import mtlkernels as mtl
from mtlkernels.arguments import count
from mtlkernels.nn import ExpertLinear, ExpertMLP

from .layers import RoutedMix, check_input
from .static_mix import check_choice, for_every_stream


class SoftOrdering(nn.Module):
    """Soft layer ordering: [B,K] -> [B,T,n] (Meyerson and Miikkulainen, ICLR 2018).

    ``y_t^k = sum_j softmax_j(S[k,t]) act(W_j y_t^{k-1} + b_j)`` for every depth k, from ``y_t^0 = enc_t(x)``, a linear
    layer. The modules W_j are those of all tasks and all depths. The towers are the decoders.

    Args:
        in_features: K.
        num_tasks: T.
        width: n, of every module's input and output.
        num_modules: D.
        depth: D', how often a task goes through the modules; None is num_modules, as in the paper.
        encoder: "task": one a task; "shared": one for all tasks; "none": x is y^0, which needs in_features == width.
        activation, dropout, norm: of the modules, before the mix, as in :class:`mtlkernels.nn.ExpertMLP`.

    ``logits`` is S [D',T,D], 0 at the start: all modules alike. An entry may be -inf, which shuts a module out, as long
    as each S[k,t] has a finite one. A single module has the weight 1, and no S. x may be per unit, [B,T,K].

    Raises:
        TypeError, ValueError: naming the argument, at construction, or for an x of another shape.
    """

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        width: int,
        num_modules: int,
        depth: int | None = None,
        *,
        encoder: str = "task",
        activation: str | None = "relu",
        dropout: float = 0.0,
        norm: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.num_tasks = count("in_features", in_features, 0), count("num_tasks", num_tasks, 1)
        self.out_features, self.num_modules = count("width", width, 1), count("num_modules", num_modules, 1)
        self.depth = num_modules if depth is None else count("depth", depth, 1)
        check_choice("encoder", encoder, ("task", "shared", "none"))
        factory = {"device": device, "dtype": dtype}
        self.encoder = None
        if encoder != "none":
            self.encoder = ExpertLinear(num_tasks if encoder == "task" else 1, in_features, width, **factory)
        elif in_features != width:
            raise ValueError(f"encoder='none' needs in_features equal to width={width}; got {in_features}")
        self.bank = ExpertMLP(num_modules, width, [width], activation=activation, dropout=dropout, norm=norm, **factory)
        self.mix = RoutedMix([num_modules] * num_tasks, [(t,) for t in range(num_tasks)], device)
        self.register_parameter("logits", None)
        if num_modules > 1:
            self.logits = nn.Parameter(torch.empty(self.depth, num_tasks, num_modules, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """S = 0."""
        if self.logits is not None:
            nn.init.zeros_(self.logits)

    def mixing_parameters(self) -> list[nn.Parameter]:
        """S, for an optimizer group of its own; empty with a single module."""
        return [] if self.logits is None else [self.logits]

    def ordering(self) -> Tensor:
        """s [D',T,D], the softmax of S over the modules, in float32 at least."""
        if self.logits is None:
            return self.bank.linears[0].weight.new_ones(self.depth, self.num_tasks, 1)
        return self.logits.softmax(-1, dtype=torch.promote_types(self.logits.dtype, torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.num_tasks, self.in_features)
        y = self._encode(x)
        for weights in self.ordering().unbind(0):
            h = for_every_stream(self.bank, y)
            if y.shape[1] == 1:  # the tasks still agree: one pass through the modules serves all of them
                y = mtl.linear_mix(h.squeeze(1), weights)
            else:
                y = self.mix(h.flatten(1, 2), static=weights.flatten())
        return y

    def _encode(self, x: Tensor) -> Tensor:
        """y^0, [B,T,n], or [B,1,n] where it is the same for every task."""
        if self.encoder is None:
            return x if x.dim() == 3 else x[:, None]
        if self.encoder.num_experts == self.num_tasks or x.dim() == 2:
            return self.encoder(x)
        return for_every_stream(self.encoder, x).squeeze(2)
