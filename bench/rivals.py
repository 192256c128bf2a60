"""The same networks as people write them, with the weights of ours, so that they can be checked against ours and timed.

* slices: one nn.Module an expert and a gate, each given ``x[:, t, :]``, as facebookresearch/AdaTT does. The gradient of
  every slice fills a whole zero buffer of x's size and adds it up, which costs up to half a step above embeddings.
* unbind: the same modules over ``x.unbind(1)``, whose gradients are stacked once.
* batched: the expert weights stacked by hand, baddbmm for the layers and bmm for the mix.
* torch.compile: the per-expert modules with unbind, compiled.

AdaTT-sp reads x [B,T,K] (equations 7 to 11 of Li et al., KDD 2023; its code mixes in two passes, gates, then residual),
MMoE reads x [B,K] (Ma et al., KDD 2018, section 4.2). All networks map to [B,T,D].
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from python_models import AdaTT, MMoE

Take = Callable[[nn.Parameter], Tensor]  # a parameter's value, or its gradient


@dataclass
class Level:
    """One level's parameters, or their gradients, in one layout for all networks.

    weight: [E,N,K] a layer; bias: [E,N] a layer; gate_weight [T,E,K]; gate_bias [T,E]; native [E], unit by unit, or
    None. residual: whether each task adds its own experts, by unit weights where native is None.
    """

    weight: list[Tensor]
    bias: list[Tensor]
    gate_weight: Tensor
    gate_bias: Tensor
    native: Tensor | None = None
    residual: bool = False

    def named(self, prefix: str) -> dict[str, Tensor]:
        """Every tensor under a name to show in an error."""
        found = {f"{prefix}weight.{k}": w for k, w in enumerate(self.weight)}
        found |= {f"{prefix}bias.{k}": b for k, b in enumerate(self.bias)}
        found |= {f"{prefix}gate_weight": self.gate_weight, f"{prefix}gate_bias": self.gate_bias}
        return found if self.native is None else found | {f"{prefix}native": self.native}


def value(parameter: nn.Parameter) -> Tensor:
    """A copy of a parameter."""
    return parameter.detach().clone()


def gradient(parameter: nn.Parameter) -> Tensor:
    """A parameter's gradient; RuntimeError where it got none."""
    if parameter.grad is None:
        raise RuntimeError(f"a parameter of shape {tuple(parameter.shape)} got no gradient")
    return parameter.grad


class PerExpert(nn.Module):
    """AdaTT-sp or MMoE with a module an expert and a gate. inputs: "slices", "unbind" or "shared" (x [B,K])."""

    def __init__(self, levels: list[Level], inputs: str) -> None:
        super().__init__()
        self.inputs = inputs
        self.residual = [level.residual for level in levels]
        self.experts = nn.ModuleList(
            nn.ModuleList(_mlp(level, e) for e in range(level.gate_bias.shape[1])) for level in levels
        )
        self.gates = nn.ModuleList(
            nn.ModuleList(linear(w, b) for w, b in zip(level.gate_weight, level.gate_bias, strict=True))
            for level in levels
        )
        self.native = nn.ParameterList(
            [nn.Parameter(level.native.view(len(level.gate_bias), -1)) for level in levels if level.native is not None]
        )

    def forward(self, x: Tensor) -> Tensor:
        native = iter(self.native)
        for experts, gates, residual in zip(self.experts, self.gates, self.residual, strict=True):
            tasks, per_task = len(gates), len(experts) // len(gates)
            if self.inputs == "shared":
                expert_inputs, gate_inputs = [x] * len(experts), [x] * tasks
            else:
                expert_inputs, gate_inputs = self._split(x, len(experts), per_task), self._split(x, tasks, 1)
            hidden = torch.stack([expert(z) for expert, z in zip(experts, expert_inputs, strict=True)], 1)
            weights = [torch.softmax(gate(z), -1) for gate, z in zip(gates, gate_inputs, strict=True)]
            mixed = torch.bmm(torch.stack(weights, 1), hidden)
            if residual and per_task > 1:
                own = hidden.view(hidden.shape[0], tasks, per_task, hidden.shape[2])
                mixed = mixed + torch.einsum("te,bted->btd", next(native), own)
            elif residual:
                mixed = mixed + hidden
            x = mixed
        return x

    def _split(self, x: Tensor, readers: int, per_task: int) -> list[Tensor]:
        if self.inputs == "slices":  # anew for every reader: that is the style
            return [x[:, r // per_task, :] for r in range(readers)]
        tasks = x.unbind(1)
        return [tasks[r // per_task] for r in range(readers)]

    def levels(self, take: Take) -> list[Level]:
        """The parameters, or what `take` makes of each, in the common layout."""
        native = iter(self.native)
        found = []
        for experts, gates, residual in zip(self.experts, self.gates, self.residual, strict=True):
            layers = range(0, len(experts[0]), 2)
            learned = residual and len(experts) > len(gates)
            found.append(
                Level(
                    [torch.stack([take(expert[k].weight) for expert in experts]) for k in layers],
                    [torch.stack([take(expert[k].bias) for expert in experts]) for k in layers],
                    torch.stack([take(gate.weight) for gate in gates]),
                    torch.stack([take(gate.bias) for gate in gates]),
                    take(next(native)).flatten() if learned else None,
                    residual,
                )
            )
        return found


class Batched(nn.Module):
    """The same with stacked weights: a baddbmm a layer over [E,B,K], one for the gates, a bmm for the mix."""

    def __init__(self, levels: list[Level]) -> None:
        super().__init__()
        self.residual = [level.residual for level in levels]
        self.weight = nn.ModuleList(_parameters([w.transpose(1, 2) for w in level.weight]) for level in levels)
        self.bias = nn.ModuleList(_parameters([b.unsqueeze(1) for b in level.bias]) for level in levels)
        self.gate_weight = _parameters([level.gate_weight.transpose(1, 2) for level in levels])
        self.gate_bias = _parameters([level.gate_bias.unsqueeze(1) for level in levels])
        self.native = _parameters([lv.native.view(len(lv.gate_bias), -1) for lv in levels if lv.native is not None])

    def forward(self, x: Tensor) -> Tensor:
        native = iter(self.native)
        for k, residual in enumerate(self.residual):
            tasks, experts = self.gate_bias[k].shape[0], self.gate_bias[k].shape[2]
            if x.dim() == 2:
                units = x.expand(tasks, *x.shape)
                hidden = x.expand(experts, *x.shape)
            else:
                units = x.transpose(0, 1)
                hidden = units.repeat_interleave(experts // tasks, 0)
            for weight, bias in zip(self.weight[k], self.bias[k], strict=True):
                hidden = torch.relu(torch.baddbmm(bias, hidden, weight))
            gates = torch.softmax(torch.baddbmm(self.gate_bias[k], units, self.gate_weight[k]), -1)
            hidden = hidden.transpose(0, 1)  # [B,E,D]
            mixed = torch.bmm(gates.transpose(0, 1), hidden)
            if residual and experts > tasks:
                own = hidden.unflatten(1, (tasks, experts // tasks))
                mixed = mixed + torch.einsum("te,bted->btd", next(native), own)
            elif residual:
                mixed = mixed + hidden
            x = mixed
        return x

    def levels(self, take: Take) -> list[Level]:
        """As PerExpert.levels."""
        native = iter(self.native)
        return [
            Level(
                [take(w).transpose(1, 2) for w in self.weight[k]],
                [take(b).squeeze(1) for b in self.bias[k]],
                take(self.gate_weight[k]).transpose(1, 2),
                take(self.gate_bias[k]).squeeze(1),
                take(next(native)).flatten() if residual and self._learned(k) else None,
                residual,
            )
            for k, residual in enumerate(self.residual)
        ]

    def _learned(self, k: int) -> bool:
        return self.gate_bias[k].shape[2] > self.gate_bias[k].shape[0]


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A layer with the numbers of weight [N,K] and bias [N]."""
    n, k = weight.shape
    layer = nn.Linear(k, n, bias=bias is not None, dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def _mlp(level: Level, expert: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for weight, bias in zip(level.weight, level.bias, strict=True):
        layers += [linear(weight[expert], bias[expert]), nn.ReLU()]
    return nn.Sequential(*layers)


def _parameters(tensors: list[Tensor]) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(t.detach().clone(memory_format=torch.contiguous_format)) for t in tensors])


def levels_of(network: nn.Module, take: Take) -> list[Level]:
    """The parameters of any of the networks, ours too, or what `take` makes of each, in the common layout.

    Ours may be AdaTT-sp with equal task experts, or MMoE with one level; linear gates, no norms. TypeError for others.
    """
    if isinstance(network, (PerExpert, Batched)):
        return network.levels(take)
    if isinstance(network, AdaTT):
        return [_level(lv.experts, lv.gates, lv.native, lv.residual, take) for lv in network.levels]
    if isinstance(network, MMoE) and len(network.experts) == 1:
        return [_level(network.experts[0], network.gates[0], None, False, take)]
    raise TypeError(f"network: got {type(network).__name__}, expected AdaTT, one-level MMoE, PerExpert or Batched")


def _level(experts: nn.Module, gates: nn.Module, native: nn.Parameter | None, residual: bool, take: Take) -> Level:
    return Level(
        [take(linear.weight) for linear in experts.linears],
        [take(linear.bias) for linear in experts.linears],
        take(gates.logits.weight),
        take(gates.logits.bias),
        None if native is None else take(native),
        residual,
    )
