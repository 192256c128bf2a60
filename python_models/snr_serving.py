"""What is left of an SNR network to serve: open connections, and sub-networks that are read and depend on x."""

import warnings

import torch
from torch import Tensor, nn

import mtlkernels as mtl
from mtlkernels.nn import ACTIVATIONS, ExpertLinear

from .layers import FixedRoutes, check_input
from .serving import keep_norm, norm_affine, serving_bank


class SNRServing(nn.Module):
    """An SNR network pruned: [B,K] -> [B,T,D], for evaluation only. Made by its ``for_serving``.

    ``kept`` lists, a level, the sub-networks that are computed. The outputs of the others, which depend on no x, are
    in the constants of what reads them. ``constant`` [T,D] is the whole output where no task depends on x.
    """

    def __init__(self, in_features: int, num_tasks: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.num_tasks, self.out_features = in_features, num_tasks, out_features
        self.kept: list[list[int]] = []
        self.first, self.levels = None, nn.ModuleList()
        self.register_buffer("constant", None)

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.num_tasks + 1, self.in_features)
        if self.constant is not None:
            return self.constant.to(x.dtype).expand(x.shape[0], -1, -1)
        h = self.first(x if x.dim() == 2 else x[:, -1])
        for level in self.levels:
            h = level(h)
        return h


class PrunedTrans(nn.Module):
    """Level of SNR-Trans: ``act(sum_open W_ij u_j + c_i)``, the connection variables in W: [B,J,K] -> [B,I,N].

    With every block there it is one linear layer; otherwise the blocks that are left are a bank whose outputs are
    added up row by row, each row's bias on its first block.

    Args:
        weight: [I,J,N,K]. is_open: [I,J] bool. bias: [I,N].
        norm: follows the sum, or None. tail: the rest of the sub-networks' layers, or None.
    """

    def __init__(
        self,
        weight: Tensor,
        is_open: Tensor,
        bias: Tensor,
        activation: str | None,
        norm: nn.Module | None,
        tail: nn.Module | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        rows, columns, width, features = weight.shape
        factory = {"device": weight.device, "dtype": dtype}
        self.norm, self.tail, self.activation = norm, tail, activation
        self.linear = self.route = None
        for name in ("weight", "bias", "ones", "constant"):
            self.register_buffer(name, None)
        if is_open.all():
            fused = activation if norm is None else None
            sizes = rows, columns * features, width
            self.linear = ExpertLinear(*sizes, activation=fused, dtype=dtype, device="meta")
            self.linear.to_empty(device=weight.device)
            self.linear.weight.copy_(weight.transpose(1, 2).flatten(2))
            self.linear.bias.copy_(bias)
            return
        j, i = is_open.t().nonzero().unbind(1)  # blocks column by column, as expert_mix takes experts unit by unit
        self.experts_per_unit = is_open.sum(0).tolist()
        belongs = i == torch.arange(rows, device=i.device)[:, None]  # [I,R]
        self.route = FixedRoutes(mtl.Routes.from_mask(belongs.cpu()), weight.device)
        first = belongs.int().argmax(1)
        has = belongs.any(1)
        self.weight = weight[i, j].to(dtype)
        self.ones = torch.ones(len(i), device=weight.device, dtype=torch.promote_types(dtype, torch.float32))
        self.bias = torch.zeros(len(i), width, **factory)
        self.bias[first[has]] = bias[has].to(dtype)
        if not has.all():
            self.constant = torch.where(has[:, None], 0, bias).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.linear is not None:
            y = self.linear(x.flatten(1))
        else:
            y = mtl.expert_mix(
                x,
                self.weight,
                self.bias,
                static=self.ones,
                experts_per_unit=self.experts_per_unit,
                routes=self.route.routes,
            )
            y = y if self.constant is None else y + self.constant.to(y.dtype)
        if self.norm is not None:
            y = self.norm(y)
        if self.activation is not None and (self.linear is None or self.norm is not None):
            y = ACTIVATIONS[self.activation](y)
        return y if self.tail is None else self.tail(y)


class PrunedAver(nn.Module):
    """Level of SNR-Aver: ``sum_open z_ij u_j``, then the sub-networks: [B,J,K] -> [B,I,N].

    Args:
        gate: [I,J], 0 where closed. constant: [I,K], added to the sums. tail: the sub-networks, None for the tasks.
    """

    def __init__(self, gate: Tensor, constant: Tensor, tail: nn.Module | None, dtype: torch.dtype) -> None:
        super().__init__()
        is_open = gate != 0
        self.tail = tail
        self.route = None if is_open.all() else FixedRoutes(mtl.Routes.from_mask(is_open.cpu()), gate.device)
        self.register_buffer("gate", (gate if self.route is None else gate[is_open]).to(dtype))
        self.register_buffer("constant", constant.to(dtype) if constant.any() else None)

    def forward(self, x: Tensor) -> Tensor:
        y = mtl.mix(x, static=self.gate, routes=None if self.route is None else self.route.routes)
        y = y if self.constant is None else y + self.constant.to(y.dtype)
        return y if self.tail is None else self.tail(y)


@torch.no_grad()
def prune(network: nn.Module) -> SNRServing:
    """The network for serving: the estimated connections, only what is open, read and not constant.

    Warns where every connection of a level is closed; its outputs are constants then.
    """
    p = next(network.parameters())
    gates = [gate.double() for gate in network.connections()]
    for i, gate in enumerate(gates):
        if not gate.any():
            warnings.warn(f"levels[{i}] has no open connection: its outputs do not depend on x", stacklevel=3)
    served = SNRServing(network.in_features, network.num_tasks, network.out_features)
    modes = [(module, module.training) for module in network.modules()]
    try:
        network.eval()
        outputs = [network.first(p.new_zeros(1, network.in_features))]
        for level in network.levels:
            outputs.append(level(outputs[-1]))
    finally:
        for module, training in modes:
            module.training = training
    varies = [torch.ones(gates[0].shape[1], dtype=torch.bool, device=gates[0].device)]
    for gate in gates:
        varies.append(((gate != 0) & varies[-1]).any(1))
    if not varies[-1].any():
        served.constant = outputs[-1][0]
        served.kept = [[] for _ in varies]
        return served.eval()
    kept = [torch.arange(network.num_tasks, device=p.device)]
    for gate, varying in zip(reversed(gates), reversed(varies[:-1]), strict=True):
        kept.insert(0, ((gate[kept[0]] != 0).any(0) & varying).nonzero().flatten())
    served.kept = [indices.tolist() for indices in kept]
    served.first = serving_bank(network.first, served.kept[0])
    for i, level in enumerate(network.levels):
        constants = torch.where(varies[i][:, None], 0, outputs[i][0].double())
        served.levels.append(level.pruned(gates[i], constants, kept[i + 1], kept[i], p.dtype))
    return served.eval().requires_grad_(False)


# A level's gate [I,J], the constants [J,K] of lower sub-networks that vary with no x (0 of the others), and which upper
# and lower ones are kept.
def pruned_trans(
    level: nn.Module, gate: Tensor, constants: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype
) -> PrunedTrans:
    z = gate[..., None, None]
    weight = torch.where(z != 0, z * level.weight.double(), 0)  # what is closed may hold NaN
    bias = level.bias.double() + torch.einsum("ijnk,jk->in", weight, constants)
    norm = level.norm
    if getattr(norm, "kind", None) == "batch":
        scale, shift = norm_affine(norm)
        weight, bias, norm = weight * scale[:, None, :, None], bias * scale + shift, None
    elif norm is not None:
        norm = keep_norm(norm, rows.tolist())
    tail = None if level.tail is None else serving_bank(level.tail, rows.tolist())
    weight, is_open = weight[rows][:, columns], (gate != 0)[rows][:, columns]
    return PrunedTrans(weight, is_open, bias[rows], level.activation, norm, tail, dtype)


def pruned_aver(
    level: nn.Module, gate: Tensor, constants: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype
) -> PrunedAver:
    tail = None if level.tail is None else serving_bank(level.tail, rows.tolist())
    return PrunedAver(gate[rows][:, columns], (gate @ constants)[rows], tail, dtype)
