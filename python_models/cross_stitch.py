"""Cross-stitch networks: one network a task, and after each level a learned linear mix of them."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from mtlkernels.arguments import count

from .layers import Blocks, check_input, check_levels
from .static_mix import Stitch, check_choice, check_share, like_linear, mostly_own


class CrossStitch(nn.Module):
    """Cross-stitch network: [B,K] -> [B,T,D] (Misra et al., CVPR 2016, section 3.3, eq. 1).

    ``x~_i = sum_j alpha_ij x_j`` after every level; x~_i is what the next level of task i reads, or its tower. The
    authors trained alpha at 100 to 1000 times the rate of the rest with SGD; with Adam, 1 to 10 times is enough::

        alphas = network.mixing_parameters()
        SGD([{"params": network.experts.parameters()}, {"params": alphas, "lr": 100 * lr}], lr)

    To start from networks trained alone, as section 5.3 does: ``network.experts[l].load_state_dict(
    ExpertMLP.from_modules(parts).state_dict())``, with level l of every one of them as parts.

    Args:
        in_features: K.
        num_tasks: T.
        expert_dims: one list of widths a level.
        channelwise: alpha [T,T,D], a weight a hidden unit, as in the paper; False is [T,T].
        same_task: alpha_ii at the start; the other tasks share 1 - same_task. 1 starts with T separate networks. One
            task starts at 1.
        init: "convex" starts as same_task says; "reference" as AdaTT's authors start their baseline, like the weight of
            ``torch.nn.Linear(T, T)``: of random sign, and far from single-task networks.
        **blocks: activation, dropout, norm, expert, device, dtype of :class:`python_models.layers.Blocks`.

    x may be per unit, [B,T,K].

    Raises:
        TypeError, ValueError: naming the argument, at construction, or for an x of another shape.
    """

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        expert_dims: Sequence[Sequence[int]],
        *,
        channelwise: bool = False,
        same_task: float = 0.9,
        init: str = "convex",
        **blocks: Any,
    ) -> None:
        super().__init__()
        levels = check_levels(expert_dims)
        self.in_features, self.num_tasks = count("in_features", in_features, 0), count("num_tasks", num_tasks, 1)
        self.out_features = levels[-1][-1]
        check_choice("init", init, ("convex", "reference"))
        start = partial(mostly_own, same=check_share("same_task", same_task)) if init == "convex" else like_linear
        build = Blocks(**blocks).without_gates()
        self.experts, self.stitches, width = nn.ModuleList(), nn.ModuleList(), in_features
        for dims in levels:
            self.experts.append(build.experts(width, dims, [1] * num_tasks))
            width = dims[-1]
            channels = width if channelwise else None
            self.stitches.append(Stitch(num_tasks, start, channels, device=build.device, dtype=build.dtype))

    def mixing_parameters(self) -> list[nn.Parameter]:
        """alpha of every level, for an optimizer group of their own."""
        return [stitch.weight for stitch in self.stitches]

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.num_tasks, self.in_features)
        for experts, stitch in zip(self.experts, self.stitches, strict=True):
            x = stitch(experts(x))
        return x
