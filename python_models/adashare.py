"""AdaShare: every task executes or skips each block of a shared residual trunk, by a learned policy."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import mtlkernels as mtl
from mtlkernels.arguments import count, is_one_of
from mtlkernels.nn import ACTIVATIONS, ExpertLinear

from .layers import Blocks, Pick, RoutedMix, check_input, check_levels
from .sampling import Temperature, relaxed_choice, wide


class AdaShare(nn.Module):
    """A residual trunk with a policy for each task: [B,K] -> [B,T,D] (Sun et al., NeurIPS 2020, section 3).

    ``x_t' = v[0] F(x_t) + v[1] R(x_t)`` with ``F(x) = act(R(x) + block(x))`` and R the identity, or a linear projection
    where the width changes. In training v is drawn from softmax(policy_logits[t,l]) by Gumbel-softmax, once a forward
    for the whole batch; in evaluation it is the likelier of execute and skip, execute where they are equal. A policy
    given to :meth:`fix_policy` takes the place of both.

    The search is: train with ``live_blocks = 0``, the plain trunk; then rounds of training :meth:`network_parameters`
    on one half of the data and :meth:`search_parameters` on the other, with :meth:`policy_loss` added, ``temperature``
    from :class:`python_models.sampling.ExponentialTemperature` and ``live_blocks`` from :class:`Curriculum`; then
    policies from :meth:`sample_policy`, and for the best one a new network's ``for_serving(policy)``, trained from
    scratch. The authors train the policy by Adam at rate 0.01 with weight decay 5e-4, the weights by SGD with momentum
    0.9, and the final network by Adam with betas (0.5, 0.999).

    Args:
        in_features: K.
        num_tasks: T.
        expert_dims: one list of widths a block; the last layer's activation stands behind the residual sum.
        temperature: of the draw at first.
        hard: draw v as one-hot, with the gradient of the softmax (straight-through).
        sample_in_eval: draw a policy from the probabilities in evaluation too, as the authors do during the search.
        **blocks: activation, dropout, norm, expert, device, dtype of :class:`python_models.layers.Blocks`. An `expert`
            makes block(x), without the last activation. A batch norm takes the rows of all tasks' streams together.

    Attributes: ``live_blocks``, how many blocks, the last ones, have a live policy: all tasks execute those below.
    ``policy_logits`` [T,L,2]: execute, skip. x may be per unit, [B,T,K].

    Raises:
        TypeError, ValueError: naming the argument, at construction, or for an x of another shape.
    """

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        expert_dims: Sequence[Sequence[int]],
        *,
        temperature: float = 5.0,
        hard: bool = False,
        sample_in_eval: bool = False,
        **blocks: Any,
    ) -> None:
        super().__init__()
        levels = check_levels(expert_dims)
        self.in_features, self.num_tasks = count("in_features", in_features, 0), count("num_tasks", num_tasks, 1)
        self.out_features, self.hard, self.sample_in_eval = levels[-1][-1], hard, sample_in_eval
        build = Blocks(**blocks).without_gates()
        self.blocks, width = nn.ModuleList(), in_features
        for dims in levels:
            self.blocks.append(ResidualBlock(width, dims, build))
            width = dims[-1]
        self.streams = RoutedMix([1] * (2 * num_tasks), [(t, num_tasks + t) for t in range(num_tasks)], build.device)
        self._temperature = Temperature(temperature, build.device)
        self.live_blocks = len(levels)
        self.register_buffer("policy", None, persistent=False)
        self.policy_logits = nn.Parameter(
            torch.empty(num_tasks, len(levels), 2, device=build.device, dtype=build.dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All logits 0.5, as in the authors' code: execute and skip are as likely."""
        nn.init.constant_(self.policy_logits, 0.5)

    @property
    def temperature(self) -> float:
        """Of the next draws, above 0."""
        return self._temperature.value

    @temperature.setter
    def temperature(self, value: float) -> None:
        self._temperature.set(value)

    @property
    def live_blocks(self) -> int:
        return self._live_blocks

    @live_blocks.setter
    def live_blocks(self, value: int) -> None:
        if count("live_blocks", value, 0) > len(self.blocks):
            raise ValueError(f"live_blocks must be at most {len(self.blocks)}, the blocks there are; got {value}")
        self._live_blocks = value

    def search_parameters(self) -> list[nn.Parameter]:
        """The policy logits, which have an optimizer of their own."""
        return [self.policy_logits]

    def network_parameters(self) -> list[nn.Parameter]:
        """All others."""
        return list(self.blocks.parameters())

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.num_tasks, self.in_features)
        x = x[:, None] if x.dim() == 2 else x
        weights = self._weights()
        first_live = len(self.blocks) - weights.shape[1]
        for i, block in enumerate(self.blocks):
            skipped, executed = block(x)
            if i < first_live:
                x = executed
                continue
            v, both = weights[:, i - first_live], torch.cat((executed, skipped), 1)
            # Until the policies differ one stream serves all tasks.
            x = mtl.linear_mix(both, v) if x.shape[1] == 1 else self.streams(both, static=v.flatten())
        return x.expand(-1, self.num_tasks, -1)

    def _weights(self) -> Tensor:
        """v [T,n,2] of the last n blocks, those below being executed by all."""
        logits = wide(self.policy_logits)
        if self.policy is None and self.training:
            return relaxed_choice(logits[:, len(self.blocks) - self.live_blocks :], self._temperature.tensor, self.hard)
        if self.policy is not None:
            executes = self.policy
        elif self.sample_in_eval:
            executes = self._drawn()[:, len(self.blocks) - self.live_blocks :]
        else:
            executes = self.likeliest_policy()[:, len(self.blocks) - self.live_blocks :]
        return torch.stack((executes, ~executes), -1).to(logits.dtype)

    def fix_policy(self, policy: Tensor | Sequence[Sequence[bool]] | None) -> None:
        """Run by this policy, [T,L] bool, True = execute; None returns to the learned one."""
        self.policy = None if policy is None else self._check_policy(policy).to(self.policy_logits.device, copy=True)

    @torch.no_grad()
    def likeliest_policy(self) -> Tensor:
        """[T,L] bool, True where execute is at least as likely as skip, and below the live blocks."""
        return self._forced(self.policy_logits[..., 0] >= self.policy_logits[..., 1])

    @torch.no_grad()
    def sample_policy(self) -> Tensor:
        """[T,L] bool, each True with the probability of execute, and below the live blocks."""
        return self._drawn()

    def _drawn(self) -> Tensor:
        probability = wide(self.policy_logits.detach()).softmax(-1)[..., 0]
        return self._forced(torch.rand_like(probability) < probability)

    def _forced(self, policy: Tensor) -> Tensor:
        dead = len(self.blocks) - self.live_blocks
        return torch.cat((torch.ones_like(policy[:, :dead]), policy[:, dead:]), 1)

    def _check_policy(self, policy: Tensor | Sequence[Sequence[bool]]) -> Tensor:
        # A list on the CPU, whatever the default device: for_serving reads its values.
        found = policy if isinstance(policy, Tensor) else torch.tensor(policy, device="cpu")
        shape = self.policy_logits.shape[:2]
        if found.dtype != torch.bool:
            raise TypeError(f"policy must be bool, True = execute; got {found.dtype}")
        if found.shape != shape:
            raise ValueError(f"policy must be [T,L] = {tuple(shape)}; got {tuple(found.shape)}")
        return found

    def sparsity_loss(self, form: str = "code") -> Tensor:
        """Of the live blocks. "code": mean over blocks of -log(1 - a), summed over tasks, a being the probability of
        execute; its gradient vanishes where a block is skipped. "paper": the sum of log a, which has no lower bound.
        """
        if form not in ("code", "paper"):
            raise ValueError(f"form must be 'code' or 'paper'; got {form!r}")
        log_p = wide(self.policy_logits)[:, len(self.blocks) - self.live_blocks :].log_softmax(-1)
        if form == "paper":
            return log_p[..., 0].sum()
        return -log_p[..., 1].sum() / max(1, self.live_blocks)

    def sharing_loss(self) -> Tensor:
        """``sum_{t<u} sum_l (L-l)/L |a_tl - a_ul|``, l from 1: lower blocks weigh more."""
        a = wide(self.policy_logits).softmax(-1)[..., 0]
        num_blocks = len(self.blocks)
        weight = torch.arange(num_blocks - 1, -1, -1, device=a.device, dtype=a.dtype) / num_blocks
        return ((a[:, None] - a).abs() * weight).sum() / 2

    def policy_loss(self, sparsity: float = 0.05, sharing: float = 0.05, form: str = "code") -> Tensor:
        """``sparsity * sparsity_loss(form) + sharing * sharing_loss()``, to add to the tasks' losses."""
        return sparsity * self.sparsity_loss(form) + sharing * self.sharing_loss()

    def for_serving(self, policy: Tensor | Sequence[Sequence[bool]] | None = None) -> "FixedPolicy":
        """The network of one policy, a copy in evaluation mode: skipped blocks cost nothing, unused ones are left out.

        policy: [T,L] bool, True = execute; None is the fixed policy, or else the likeliest one.
        """
        if policy is None:
            policy = self.likeliest_policy() if self.policy is None else self.policy
        return FixedPolicy(self, self._check_policy(policy).tolist()).eval()


class FixedPolicy(nn.Module):
    """AdaShare's network of one policy: [B,K] or [B,T,K] -> [B,T,D]; made by :meth:`AdaShare.for_serving`.

    Tasks that have executed the same blocks so far are one stream. ``policy`` is a list of T lists of L bools.
    """

    def __init__(self, network: AdaShare, policy: list[list[bool]]) -> None:
        super().__init__()
        self.in_features, self.num_tasks = network.in_features, network.num_tasks
        self.out_features, self.policy = network.out_features, policy
        device = network.policy_logits.device
        self.blocks = nn.ModuleList()
        for i, block in enumerate(network.blocks):
            kept = copy.deepcopy(block)
            if not any(row[i] for row in policy):
                kept.block = None
            self.blocks.append(kept)
        self.shared = Streams([0] * self.num_tasks, policy, device)
        self.separate = Streams(list(range(self.num_tasks)), policy, device)

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.num_tasks, self.in_features)
        streams = self.shared if x.dim() == 2 else self.separate
        x = x[:, None] if x.dim() == 2 else x
        for block, executing, skipping in zip(self.blocks, streams.executing, streams.skipping, strict=True):
            skipped, executed = block(x, executing)
            parts = [] if executed is None else [executed]
            if skipping.rows:
                parts.append(skipping(skipped))
            x = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return streams.tasks(x)


class Streams(nn.Module):
    """Which streams execute each block, and which skip it; those that do come first afterwards.

    Args:
        stream_of: the stream of each task at the start.
        policy: [T][L], True = execute.
    """

    def __init__(self, stream_of: list[int], policy: list[list[bool]], device: torch.device) -> None:
        super().__init__()
        self.executing, self.skipping = nn.ModuleList(), nn.ModuleList()
        for i in range(len(policy[0])):
            num_streams = max(stream_of) + 1
            after = sorted({(not row[i], stream) for row, stream in zip(policy, stream_of, strict=True)})
            for picks, skips in ((self.executing, False), (self.skipping, True)):
                picks.append(Pick(num_streams, [stream for skip, stream in after if skip == skips], device))
            stream_of = [after.index((not row[i], stream)) for row, stream in zip(policy, stream_of, strict=True)]
        self.tasks = Pick(max(stream_of) + 1, stream_of, device)


class ResidualBlock(nn.Module):
    """[B,S,K] -> R(x) and ``act(R(x) + block(x))``, [B,S,N] each; every stream goes through the same block."""

    def __init__(self, in_features: int, dims: Sequence[int], build: Blocks) -> None:
        super().__init__()
        if build.activation is not None and not is_one_of(build.activation, ACTIVATIONS):
            raise ValueError(f"activation must be None or one of {', '.join(ACTIVATIONS)}; got {build.activation!r}")
        self.activation = build.activation
        last_linear = replace(build, activation=[build.activation] * (len(dims) - 1) + [None])
        self.block = last_linear.experts(in_features, dims, [1])
        self.projection = None
        if in_features != dims[-1]:
            factory = {"device": build.device, "dtype": build.dtype}
            self.projection = ExpertLinear(1, in_features, dims[-1], bias=False, **factory)

    def forward(self, x: Tensor, executing: Pick | None = None) -> tuple[Tensor, Tensor | None]:
        """`executing` picks the streams that execute it; the second result is None where there are none."""
        skipped = x if self.projection is None else _by_stream(self.projection, x)
        if self.block is None:
            return skipped, None
        y = skipped if executing is None else executing(skipped)
        y = y + _by_stream(self.block, x if executing is None else executing(x))
        return skipped, y if self.activation is None else ACTIVATIONS[self.activation](y)


def _by_stream(module: nn.Module, x: Tensor) -> Tensor:
    """One module of a single expert for all of [B,S,K] -> [B,S,N]."""
    batch, streams, width = x.shape
    y = module(x.reshape(batch * streams, width))
    return y.view(batch, streams, y.shape[-1])


@dataclass(frozen=True)
class Curriculum:
    """How many blocks have a live policy in a policy round, counted from 0: ``1 + floor(round / speed)``, at most all.

    The authors' speed is 3, or 1 for Taskonomy.
    """

    num_blocks: int
    speed: int = 3

    def __post_init__(self) -> None:
        count("num_blocks", self.num_blocks, 0)
        count("speed", self.speed, 1)

    def __call__(self, round: int) -> int:
        return min(self.num_blocks, 1 + count("round", round, 0) // self.speed)
