"""MTAN: a shared trunk, and for every task an attention that masks its features element by element."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtlkernels.arguments import count, counts
from mtlkernels.nn import ExpertLinear, ExpertMLP

from .layers import check_input
from .static_mix import check_choice, for_every_stream


class MTAN(nn.Module):
    """Multi-task attention network on feature vectors: [B,K] -> [B,T,dims[-1]] (Liu et al., CVPR 2019, section 3).

    Block j of the trunk gives u = act(U p') and p = act(V u) from the p' of the block below, x at first. Task t masks
    p: ``a^_t = H_t(G_t([u; F(a^'_t)])) * p``, with its own masked features a^'_t of the block below, and without F
    and them at the first block. F and G are linear, norm, ReLU; H is linear, norm, sigmoid. G and H are each task's, F
    is one for all tasks: its batch statistics are of all tasks' rows together, in training as in evaluation. The paper
    has 1x1 convolutions for the linear layers of G and H, and pooling; here they are layers of an MLP.

    Args:
        in_features: K.
        num_tasks: T.
        dims: widths of the blocks.
        attention_dims: widths between G and H, one int or one a block; None is the block's width.
        activation: of the trunk.
        dropout: of the trunk.
        norm: of F, G and H: "batch", "layer" or None. "batch" needs two rows in training.
        init: "xavier_normal" with biases at 0, as the authors start; "torch_default" as ``torch.nn.Linear``.

    An x [B,T+1,K], as the other networks take, has the trunk's input last.

    Raises:
        TypeError, ValueError: naming the argument, at construction, or for an x of another shape.
    """

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        dims: Sequence[int],
        attention_dims: int | Sequence[int] | None = None,
        *,
        activation: str | None = "relu",
        dropout: float = 0.0,
        norm: str | None = "batch",
        init: str = "xavier_normal",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.num_tasks = count("in_features", in_features, 0), count("num_tasks", num_tasks, 1)
        widths = counts("dims", dims, 1)
        if not widths:
            raise ValueError("dims must name at least one block; got an empty sequence")
        attention = widths if attention_dims is None else attention_dims
        attention = [attention] * len(widths) if isinstance(attention, int) else attention
        attention = counts("attention_dims", attention, 1)
        if len(attention) != len(widths):
            raise ValueError(f"attention_dims has {len(attention)} entries for {len(widths)} blocks of dims")
        check_choice("init", init, ("xavier_normal", "torch_default"))
        bank = XavierMLP if init == "xavier_normal" else ExpertMLP
        trunk = {"activation": activation, "dropout": dropout}
        factory = {"device": device, "dtype": dtype}
        self.blocks, below = nn.ModuleList(), in_features
        for j, (width, inner) in enumerate(zip(widths, attention, strict=True)):
            self.blocks.append(MTANBlock(below, width, inner, num_tasks, j == 0, bank, norm, trunk, factory))
            below = width
        self.out_features = widths[-1]

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.num_tasks + 1, self.in_features)
        late, masked = x if x.dim() == 2 else x[:, -1], None
        for block in self.blocks:
            late, masked = block(late, masked)
        return masked


class MTANBlock(nn.Module):
    """One block: the trunk's [B,K] or [B,1,K], and the tasks' masked [B,T,K] -> the trunk's [B,1,N] and masked [B,T,N].

    Args:
        first: whether there are no masked features below.
        bank: the class of its layers.
        trunk: their options in the trunk.
    """

    def __init__(
        self,
        below: int,
        width: int,
        inner: int,
        num_tasks: int,
        first: bool,
        bank: type[ExpertMLP],
        norm: str | None,
        trunk: dict[str, Any],
        factory: dict[str, Any],
    ) -> None:
        super().__init__()
        self.early = bank(1, below, [width], **trunk, **factory)
        self.late = bank(1, width, [width], **trunk, **factory)
        self.carry = None if first else bank(1, below, [width], norm=norm, **factory)
        self.inner = bank(num_tasks, width if first else 2 * width, [inner], norm=norm, **factory)
        self.mask = bank(num_tasks, inner, [width], activation="sigmoid", norm=norm, **factory)

    def forward(self, x: Tensor, masked: Tensor | None) -> tuple[Tensor, Tensor]:
        early = self.early(x)
        late = self.late(early)
        if self.carry is None:
            attention = self.inner(early.squeeze(1))
        else:
            carried = for_every_stream(self.carry, masked).squeeze(2)
            attention = self.inner(torch.cat([early.expand_as(carried), carried], 2))
        return late, self.mask(attention) * late


class XavierLinear(ExpertLinear):
    """Starts with Xavier-normal weights, each expert by its own fans, and biases at 0."""

    def reset_parameters(self) -> None:
        std = (2 / max(self.in_features + self.out_features, 1)) ** 0.5
        nn.init.normal_(self.weight, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class XavierMLP(ExpertMLP):
    linear_type = XavierLinear
