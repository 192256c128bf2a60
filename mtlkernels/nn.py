"""Drop-in modules: banks of experts and task towers on the fused operators.

A bank keeps the weights of E equal modules as one tensor, each slice stored as ``torch.nn.Linear`` stores it, so that
all of them run as one batched GEMM. :meth:`ExpertMLP.from_modules` and :meth:`ExpertMLP.to_modules` go between a
``torch.nn.ModuleList`` and a bank without changing a number.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtlkernels.ops import expert_linear

from . import stacking
from .arguments import count, counts, is_one_of, per_layer
from .norms import NORMS

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def _activation(name: str, value: str | None) -> str | None:
    if value is not None and not is_one_of(value, ACTIVATIONS):
        raise ValueError(f"{name} must be None or one of {', '.join(ACTIVATIONS)}; got {value!r}")
    return value


class ExpertLinear(nn.Module):
    """E linear layers as one: ``[B,K]`` (every expert reads it) or ``[B,U,K]`` (per unit) -> ``[B,E,N]``.

    Parameters are ``weight`` [E,N,K] and ``bias`` [E,N]; each slice is initialised as ``torch.nn.Linear(K, N)`` is,
    with fan-in K.

    Args:
        num_experts: E, at least 1.
        in_features: K.
        out_features: N.
        bias: False leaves the bias out.
        activation: None, "relu", "gelu" (exact), "silu", "tanh" or "sigmoid", fused into the GEMM.
        experts_per_unit: U counts that sum to E: unit u of x [B,U,K] feeds that many consecutive experts. None is one
            expert a unit. An x [B,K] is read by every expert in either case.

    Raises:
        TypeError, ValueError: at construction, naming the argument.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        activation: str | None = None,
        experts_per_unit: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = count("num_experts", num_experts, 1)
        self.in_features = count("in_features", in_features, 0)
        self.out_features = count("out_features", out_features, 0)
        self.activation = _activation("activation", activation)
        self.experts_per_unit = None
        if experts_per_unit is not None:
            self.experts_per_unit = counts("experts_per_unit", experts_per_unit, 0)
            if sum(self.experts_per_unit) != num_experts:
                raise ValueError(
                    f"experts_per_unit must sum to num_experts={num_experts}; got {self.experts_per_unit}, "
                    f"which sums to {sum(self.experts_per_unit)}"
                )
            if all(n == 1 for n in self.experts_per_unit):
                self.experts_per_unit = None
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(num_experts, out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weight and bias from U(-1/sqrt(K), 1/sqrt(K)): ``torch.nn.Linear``'s rule for every slice."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        units = self.experts_per_unit if x.dim() == 3 else None
        return expert_linear(x, self.weight, self.bias, experts_per_unit=units, activation=self.activation)

    def extra_repr(self) -> str:
        units = "" if self.experts_per_unit is None else f", experts_per_unit={self.experts_per_unit}"
        return (
            f"{self.num_experts}, {self.in_features}, {self.out_features}, bias={self.bias is not None}, "
            f"activation={self.activation!r}{units}"
        )


class ExpertMLP(nn.Module):
    """E equal MLPs as one: ``[B,K]`` or ``[B,U,K]`` -> ``[B,E,dims[-1]]``.

    Every layer is linear, norm, activation, dropout, in this order and the last layer included, as experts are built
    in the papers. The activation is fused into the GEMM of a layer that has no norm. ``linears.{k}`` and ``norms.{k}``
    hold the parameters of layer k.

    Args:
        num_experts: E, at least 1.
        in_features: K.
        dims: widths of the layers, at least one.
        activation: None, "relu", "gelu" (exact), "silu", "tanh" or "sigmoid".
        experts_per_unit: as in :class:`ExpertLinear`, for the first layer; the later ones stay within their expert.
        dropout: probability in [0, 1).
        norm: None; "batch": each expert feature over the batch, with running statistics; "layer": over the features.
        bias: False leaves the linear layers' bias out.

    ``activation``, ``dropout``, ``norm`` and ``bias`` take one value, or a list with one a layer.

    Raises:
        TypeError, ValueError: at construction, naming the argument.
    """

    # Of every layer; a subclass names its own to draw other weights.
    linear_type: type[ExpertLinear] = ExpertLinear

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        dims: Sequence[int],
        *,
        activation: str | None | Sequence[str | None] = "relu",
        experts_per_unit: Sequence[int] | None = None,
        dropout: float | Sequence[float] = 0.0,
        norm: str | None | Sequence[str | None] = None,
        bias: bool | Sequence[bool] = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dims = counts("dims", dims, 0)
        if not dims:
            raise ValueError("dims must name at least one layer; got an empty sequence")
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, dims[-1]
        self.activations = [_activation("activation", a) for a in per_layer("activation", activation, len(dims))]
        self.dropouts = per_layer("dropout", dropout, len(dims))
        for p in self.dropouts:
            if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p < 1:
                raise ValueError(f"dropout must be a probability in [0, 1); got {p!r}")
        kinds = per_layer("norm", norm, len(dims))
        for kind in kinds:
            if kind is not None and not is_one_of(kind, NORMS):
                raise ValueError(f"norm must be None, 'batch' or 'layer'; got {kind!r}")
        factory = {"device": device, "dtype": dtype}
        self.linears, self.norms = nn.ModuleList(), nn.ModuleList()
        biases, widths_in = per_layer("bias", bias, len(dims)), [in_features, *dims[:-1]]
        layers = zip(widths_in, dims, self.activations, kinds, biases, strict=True)
        for k, (width_in, width, act, kind, has_bias) in enumerate(layers):
            self.linears.append(
                self.linear_type(
                    num_experts,
                    width_in,
                    width,
                    bias=has_bias,
                    activation=act if kind is None else None,
                    experts_per_unit=experts_per_unit if k == 0 else None,
                    **factory,
                )
            )
            self.norms.append(nn.Identity() if kind is None else NORMS[kind](num_experts, width, **factory))

    def forward(self, x: Tensor) -> Tensor:
        for linear, norm, activation, p in self._layers():
            x = norm(linear(x))
            if linear.activation is None and activation is not None:
                x = ACTIVATIONS[activation](x)
            if p:
                x = F.dropout(x, p, self.training)
        return x

    def _layers(self):
        return zip(self.linears, self.norms, self.activations, self.dropouts, strict=True)

    @classmethod
    def from_modules(cls, modules: Sequence[nn.Module], experts_per_unit: Sequence[int] | None = None) -> "ExpertMLP":
        """A bank with the numbers of equal MLPs, copied.

        Each module is a ``Linear``, a ``Sequential`` (nested too), or a module that does nothing but call the one
        such child it has; its layers are ``Linear``, then optionally ``BatchNorm1d`` or ``LayerNorm``, then
        optionally an activation, then optionally ``Dropout``. Weights, running statistics, dtype, device, training
        mode and requires_grad carry over.

        Raises:
            TypeError: a module, or something inside it, is not of these kinds; the message names the module's index.
            ValueError: no modules, or unequal ones; the message names the index and what differs.
        """
        layers, sources = stacking.read(modules)
        first = modules[0]
        kinds = [layer.norm for layer in layers]
        bank = cls(
            len(sources),
            layers[0].in_features,
            [layer.out_features for layer in layers],
            activation=[layer.activation for layer in layers],
            experts_per_unit=experts_per_unit,
            dropout=[layer.dropout for layer in layers],
            norm=kinds,
            bias=[layer.bias for layer in layers],
            device=layers[0].device,
            dtype=layers[0].dtype,
        )
        for k, layer in enumerate(layers):
            stacking.stack([source[k].linear for source in sources], bank.linears[k])
            if layer.norm is not None:
                bank.norms[k].eps = layer.eps
                if layer.norm == "batch":
                    bank.norms[k].momentum = layer.momentum
                stacking.stack([source[k].normalise for source in sources], bank.norms[k])
        return bank.train(first.training)

    def to_modules(self) -> nn.ModuleList:
        """The experts as ``torch.nn.Sequential`` modules with the same numbers, copied."""
        experts = nn.ModuleList()
        for e in range(self.num_experts):
            parts: list[nn.Module] = []
            for linear, norm, activation, p in self._layers():
                parts.extend(stacking.unstack(e, linear, norm, activation, p))
            experts.append(nn.Sequential(*parts))
        return experts.train(self.training)


class Towers(nn.Module):
    """One small MLP a task: ``[B,T,D]`` -> ``[B,T]`` logits, or a dict of named outputs.

    The hidden layers are an :class:`ExpertMLP`; the last layer is linear, without activation. With one output each the
    result is [B,T]; otherwise it is ``{name: [B, n]}``, n that task's ``out_features``. Unequal outputs lie packed
    behind one another: nothing is padded.

    Args:
        in_features: D.
        num_tasks: T, at least 1.
        dims: widths of the hidden layers; () is a linear tower.
        out_features: outputs of a task, one int for all or one a task.
        task_names: names of the tasks, "task0", "task1", ... by default.
        activation, dropout, norm: of the hidden layers, as in :class:`ExpertMLP`.
        tower: ``tower(in_features, out_features)`` makes a module [B,D] -> [B,n], called once a task; the modules run
            as they are, in place of the bank.

    Raises:
        TypeError, ValueError: at construction, naming the argument.
    """

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        dims: Sequence[int] = (),
        out_features: int | Sequence[int] = 1,
        task_names: Sequence[str] | None = None,
        *,
        activation: str | None = "relu",
        dropout: float = 0.0,
        norm: str | None = None,
        tower: Callable[[int, int], nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = count("in_features", in_features, 0)
        self.num_tasks = count("num_tasks", num_tasks, 1)
        dims = counts("dims", dims, 0)
        outputs = [out_features] * num_tasks if isinstance(out_features, int) else out_features
        self.out_features = counts("out_features", outputs, 1)
        names = [f"task{t}" for t in range(num_tasks)] if task_names is None else list(task_names)
        for name, values in (("out_features", self.out_features), ("task_names", names)):
            if len(values) != num_tasks:
                raise ValueError(f"{name} has {len(values)} entries for num_tasks={num_tasks}: {values}")
        if len(set(names)) != num_tasks or not all(isinstance(name, str) for name in names):
            raise ValueError(f"task_names must be different strings; got {names}")
        self.task_names = names
        self.towers = self.hidden = None
        if tower is not None:
            self.towers = nn.ModuleList(tower(in_features, n) for n in self.out_features)
            return
        factory = {"device": device, "dtype": dtype}
        if len(dims):
            self.hidden = ExpertMLP(
                num_tasks, in_features, dims, activation=activation, dropout=dropout, norm=norm, **factory
            )
        width = dims[-1] if len(dims) else in_features
        if len(set(self.out_features)) == 1:
            self.last = ExpertLinear(num_tasks, width, self.out_features[0], **factory)
        else:
            units = self.out_features
            self.last = ExpertLinear(sum(units), width, 1, experts_per_unit=units, **factory)

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        if x.dim() != 3 or x.shape[1:] != (self.num_tasks, self.in_features):
            raise ValueError(
                f"x must be [B,{self.num_tasks},{self.in_features}] (batch, tasks, features); got {tuple(x.shape)}"
            )
        if self.towers is not None:
            outputs = [tower(features) for tower, features in zip(self.towers, x.unbind(1), strict=True)]
            flat = torch.cat(outputs, 1)
        else:
            flat = self.last(x if self.hidden is None else self.hidden(x)).flatten(1)
        if flat.shape[1] == self.num_tasks:
            return flat
        return dict(zip(self.task_names, flat.split(self.out_features, 1), strict=True))

    def extra_repr(self) -> str:
        return f"tasks={dict(zip(self.task_names, self.out_features, strict=True))}"
