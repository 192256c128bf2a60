"""MMoE out of other libraries' layers, where these are installed, with the weights of ours.

The experts are their layers, and the loop over experts and tasks is that of their MMoE's forward; embeddings and towers
are left out on both sides. torch-rechub puts a batch norm into every expert and gate, and there is no way to leave it
out: it runs as in serving, with statistics at which it changes nothing, and its time counts.
"""

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.rivals import Level, linear

RECHUB, DEEPCTR, LIBMTL = "torch-rechub", "DeepCTR-Torch", "LibMTL"
_LAYERS = {
    RECHUB: ("torch_rechub.basic.layers", "MLP"),
    DEEPCTR: ("deepctr_torch.layers", "DNN"),
    LIBMTL: ("LibMTL.architecture", "MMoE"),
}


@functools.cache
def missing(library: str) -> str | None:
    """Why the library cannot be measured here; None where it can."""
    module, name = _LAYERS[library]
    try:
        getattr(importlib.import_module(module), name)
    except Exception as error:  # not only ImportError: their modules run a good deal when they are imported
        return f"{library} cannot be imported: {error}"
    return None


class _Library(nn.Module):
    """experts and gates are filled in by the subclasses; x [B,K] goes to [B,T,D]."""

    experts: nn.ModuleList
    gates: nn.ModuleList

    def take(self, level: Level) -> None:
        """The numbers of ours; norms such that they change nothing."""
        for e, expert in enumerate(self.experts):
            layers = [m for m in expert.modules() if isinstance(m, nn.Linear)]
            for layer, weight, bias in zip(layers, level.weight, level.bias, strict=True):
                _fill(layer, weight[e], bias[e])
        for gate, weight, bias in zip(self.gates, level.gate_weight, level.gate_bias, strict=True):
            _fill(next(m for m in gate.modules() if isinstance(m, nn.Linear)), weight, bias)
        for norm in (m for m in self.modules() if isinstance(m, nn.BatchNorm1d)):
            norm.eps = 0.0
            norm.eval().requires_grad_(False)
        self.to(level.weight[0].device, level.weight[0].dtype)


def _fill(layer: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    copied = linear(weight, bias)
    layer.weight, layer.bias = copied.weight, copied.bias


class Rechub(_Library):
    """torch_rechub.models.multi_task.MMOE."""

    def __init__(self, layer: Callable[..., nn.Module], level: Level) -> None:
        super().__init__()
        tasks, experts, features = level.gate_weight.shape
        dims = [weight.shape[1] for weight in level.weight]
        self.experts = nn.ModuleList(layer(features, output_layer=False, dims=dims) for _ in range(experts))
        gate = {"output_layer": False, "dims": [experts], "activation": "softmax"}
        self.gates = nn.ModuleList(layer(features, **gate) for _ in range(tasks))
        self.take(level)

    def forward(self, x: Tensor) -> Tensor:
        outputs = torch.cat([expert(x).unsqueeze(1) for expert in self.experts], dim=1)
        weights = [gate(x).unsqueeze(-1) for gate in self.gates]
        return torch.stack([torch.sum(torch.mul(weight, outputs), dim=1) for weight in weights], 1)


class DeepCTR(_Library):
    """deepctr_torch.models.MMOE without hidden layers in the gates, which get the biases of ours."""

    def __init__(self, layer: Callable[..., nn.Module], level: Level) -> None:
        super().__init__()
        tasks, experts, features = level.gate_weight.shape
        dims = [weight.shape[1] for weight in level.weight]
        self.experts = nn.ModuleList(layer(features, dims) for _ in range(experts))
        self.gates = nn.ModuleList(nn.Linear(features, experts) for _ in range(tasks))
        self.take(level)

    def forward(self, x: Tensor) -> Tensor:
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        mixed = [torch.matmul(gate(x).softmax(1).unsqueeze(1), outputs).squeeze(1) for gate in self.gates]
        return torch.stack(mixed, 1)


class LibMTL(_Library):
    """LibMTL.architecture.MMoE, with MLPs for encoders and decoders that change nothing."""

    def __init__(self, layer: Callable[..., nn.Module], level: Level) -> None:
        super().__init__()
        tasks, experts, features = level.gate_weight.shape
        widths = [features, *(weight.shape[1] for weight in level.weight)]

        def encoder() -> nn.Module:
            pairs = zip(widths, widths[1:], strict=False)
            return nn.Sequential(*(m for k, n in pairs for m in (nn.Linear(k, n), nn.ReLU())))

        names = [str(t) for t in range(tasks)]
        decoders = nn.ModuleDict({name: nn.Identity() for name in names})
        sizes = {"img_size": [features], "num_experts": [experts]}
        self.whole = layer(names, encoder, decoders, False, False, level.weight[0].device, **sizes)
        self.take(level)

    @property
    def experts(self) -> nn.ModuleList:
        return self.whole.experts_shared

    @property
    def gates(self) -> list[nn.Module]:
        return list(self.whole.gate_specific.values())

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(list(self.whole(x).values()), 1)


LIBRARIES = {RECHUB: Rechub, DEEPCTR: DeepCTR, LIBMTL: LibMTL}


def build(library: str, level: Level) -> nn.Module:
    """MMoE with the numbers of `level`; ImportError, or what the library raises instead, where it is not there."""
    module, name = _LAYERS[library]
    return LIBRARIES[library](getattr(importlib.import_module(module), name), level)
