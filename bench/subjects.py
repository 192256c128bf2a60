"""Every operator as the bench calls it: its operands, and how people compute the same with plain torch.

The formula of the reference backend is a rival of every operator; a `Subject` adds the natural one where there is one.
An operator that this mtlkernels does not have yet is left out by `available`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mtlkernels as mtl

FORMULA = "plain formula"  # what the formula of the reference backend is called as a rival
PLAIN, BATCHED = "plain", "batched"  # rivals: a module an expert, and one batched product for all
Shape = dict[str, int]
Operands = dict[str, Any]


class Draw:
    """Seeded operands of one dtype, drawn on the CPU, so that every device gets the same."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        self.dtype, self.device = dtype, device
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Standard normal values times `scale`."""
        return (torch.randn(shape, generator=self._generator) * scale).to(self.device, self.dtype)

    def weight(self, *shape: int) -> Tensor:
        """A weight [..., N, K] that keeps the size of what it multiplies."""
        return self.normal(*shape, scale=1 / math.sqrt(max(shape[-1], 1)))

    def uniform(self, *shape: int) -> Tensor:
        """float32 in (0, 1)."""
        return torch.rand(shape, generator=self._generator).clamp(1e-3, 1 - 1e-3).to(self.device)

    def below(self, limit: int, *shape: int) -> Tensor:
        """int64 in [0, limit)."""
        return torch.randint(limit, shape, generator=self._generator).to(self.device)

    def coin(self, share: float, *shape: int) -> Tensor:
        """float32 zeros, and ones where a coin that shows them with probability `share` does."""
        return (torch.rand(shape, generator=self._generator) < share).float().to(self.device)


@dataclass(frozen=True)
class Subject:
    """One use of an operator.

    op       its name in mtlkernels; form: which use of it.
    make     (shape, draw) -> operands.
    call     operands -> the result, by mtlkernels.
    leaves   the operands whose gradients are wanted.
    rival    name of the natural plain way, and operands -> the same result by it.
    """

    op: str
    form: str
    make: Callable[[Shape, Draw], Operands]
    call: Callable[[Operands], Tensor]
    leaves: tuple[str, ...]
    rival: tuple[str, Callable[[Operands], Tensor]] | None = None

    @property
    def name(self) -> str:
        """op, or op/form."""
        return f"{self.op}/{self.form}" if self.form else self.op


def _bank(shape: Shape, draw: Draw) -> Operands:
    units, experts = shape.get("U", 0), shape["E"]
    x = (shape["B"], units, shape["K"]) if units else (shape["B"], shape["K"])
    weight, bias = draw.weight(experts, shape["N"], shape["K"]), draw.normal(experts, shape["N"])
    counts = [experts // units] * units if units else None
    return {"x": draw.normal(*x), "weight": weight, "bias": bias, "counts": counts}


def _plain_bank(o: Operands) -> Tensor:
    x, weight, bias = o["x"], o["weight"], o["bias"]
    experts, width = bias.shape
    if x.dim() == 2:
        return F.linear(x, weight.flatten(0, 1), bias.flatten()).view(-1, experts, width).relu()
    return _all_experts(o)


def _each_expert(o: Operands) -> Tensor:
    """A product an expert, as a list of modules has it; unbind, since a slice's gradient would be as large as all."""
    x, weight, bias = o["x"], o["weight"], o["bias"]
    units = [x] if x.dim() == 2 else x.unbind(1)
    readers = [unit for unit in units for _ in range(len(weight) // len(units))]
    experts = zip(readers, weight.unbind(), bias.unbind(), strict=True)
    return torch.stack([F.linear(*expert).relu() for expert in experts], 1)


def _all_experts(o: Operands) -> Tensor:
    """A batched product over [E,B,K]."""
    x, weight, bias = o["x"], o["weight"], o["bias"]
    experts = len(weight)
    inputs = (
        x.expand(experts, *x.shape) if x.dim() == 2 else x.transpose(0, 1).repeat_interleave(experts // x.shape[1], 0)
    )
    return torch.baddbmm(bias.unsqueeze(1), inputs, weight.transpose(1, 2)).transpose(0, 1).relu()


def _mix(shape: Shape, draw: Draw) -> Operands:
    experts = draw.normal(shape["B"], shape["E"], shape["D"])
    return {"experts": experts, "logits": draw.normal(shape["B"], shape["T"], shape["E"])}


def _softmax_bmm(o: Operands) -> Tensor:
    return torch.bmm(torch.softmax(o["logits"], -1), o["experts"])


def _adatt(shape: Shape, draw: Draw) -> Operands:
    counts = [shape["E"] // shape["T"]] * shape["T"]
    return {**_mix(shape, draw), "native": draw.normal(shape["E"]), "counts": counts}


def _adatt_bmm(o: Operands) -> Tensor:
    own = torch.block_diag(*o["native"].view(o["logits"].shape[1], -1).unbind())
    return torch.bmm(torch.softmax(o["logits"], -1) + own, o["experts"])


def _routed(shape: Shape, draw: Draw) -> Operands:
    """A level of PLE: E experts in T units and a shared one; a task's gate spans its own and the shared experts."""
    tasks, each = shape["T"], shape["E"] // (shape["T"] + 1)
    units = [(t, tasks) for t in range(tasks)]
    routes = mtl.Routes.by_unit([each] * (tasks + 1), units).to(draw.device)
    experts = draw.normal(shape["B"], each * (tasks + 1), shape["D"])
    return {"experts": experts, "logits": draw.normal(shape["B"], routes.num_routes), "routes": routes}


def _routed_bmm(o: Operands) -> Tensor:
    tasks = o["routes"].num_rows
    each = o["experts"].shape[1] // (tasks + 1)
    gates, own = torch.softmax(o["logits"].unflatten(1, (tasks, 2 * each)), -1), o["experts"].split(each, 1)
    mixed = [torch.bmm(gates[:, t : t + 1], torch.cat([own[t], own[-1]], 1)) for t in range(tasks)]
    return torch.cat(mixed, 1)


def _stitch(shape: Shape, draw: Draw) -> Operands:
    weight = draw.normal(shape["T"], shape["E"], *([shape["D"]] if shape.get("channels") else []))
    return {"experts": draw.normal(shape["B"], shape["E"], shape["D"]), "weight": weight}


def _plain_stitch(o: Operands) -> Tensor:
    if o["weight"].dim() == 2:
        return torch.matmul(o["weight"], o["experts"])
    return (o["weight"] * o["experts"].unsqueeze(1)).sum(2)


def _expert_mix(shape: Shape, draw: Draw) -> Operands:
    return {**_bank(shape, draw), "logits": draw.normal(shape["B"], shape["T"], shape["E"])}


def _mixed(experts: Callable[[Operands], Tensor]) -> Callable[[Operands], Tensor]:
    return lambda o: torch.bmm(torch.softmax(o["logits"], -1), experts(o))


def _gates(shape: Shape, draw: Draw) -> Operands:
    size = (shape["I"], shape["J"])
    noise = draw.uniform(*size)
    log_alpha = draw.normal(*size).float()
    return {"log_alpha": log_alpha, "noise": noise}


def _snr(shape: Shape, draw: Draw) -> Operands:
    upper, lower = shape["I"], shape["J"]
    weight = draw.weight(upper, lower, shape["N"], shape["K"])
    operands = {"x": draw.normal(shape["B"], lower, shape["K"]), "weight": weight}
    return operands | {"gate": draw.uniform(upper, lower).to(draw.dtype), "bias": draw.normal(upper, shape["N"])}


def _snr_half_closed(shape: Shape, draw: Draw) -> Operands:
    """Every other gate at 0, where hard concrete's has no gradient."""
    operands = _snr(shape, draw)
    operands["gate"].flatten()[::2] = 0
    return operands


def _one_matmul(o: Operands) -> Tensor:
    """All blocks as one matrix, as TensorFlow's Monolith does."""
    upper, lower, width, _ = o["weight"].shape
    blocks = (o["gate"][..., None, None] * o["weight"]).transpose(1, 2).reshape(upper * width, -1)
    return F.linear(o["x"].flatten(1), blocks, o["bias"].flatten()).view(-1, upper, width).relu()


def _star(shape: Shape, draw: Draw) -> Operands:
    domains, width, features = shape["P"], shape["N"], shape["K"]
    operands = {"x": draw.normal(shape["B"], features), "domain": draw.below(domains, shape["B"])}
    operands |= {"weight": draw.weight(width, features), "domain_weight": 1 + draw.weight(domains, width, features)}
    return operands | {"bias": draw.normal(width), "domain_bias": draw.normal(domains, width)}


def _star_by_domain(o: Operands) -> Tensor:
    out = o["x"].new_zeros(len(o["x"]), len(o["weight"]))
    for p, (weight, bias) in enumerate(zip(o["domain_weight"], o["domain_bias"], strict=True)):
        rows = (o["domain"] == p).nonzero().squeeze(1)
        out = out.index_copy(0, rows, F.linear(o["x"][rows], o["weight"] * weight, o["bias"] + bias))
    return out.relu()


def _norm(shape: Shape, draw: Draw) -> Operands:
    domains, width = shape["P"], shape["D"]
    operands = {"x": draw.normal(shape["B"], width), "domain": draw.below(domains, shape["B"])}
    operands |= {"weight": 1 + draw.normal(width, scale=0.1), "bias": draw.normal(width)}
    operands |= {
        "domain_weight": 1 + draw.normal(domains, width, scale=0.1),
        "domain_bias": draw.normal(domains, width),
    }
    size = (domains, width)
    zeros, ones = (torch.full(size, value, device=draw.device) for value in (0.0, 1.0))
    return operands | {"running_mean": zeros, "running_var": ones}


def _norm_by_domain(o: Operands) -> Tensor:
    out = torch.zeros_like(o["x"])
    for p in range(len(o["domain_weight"])):
        rows = (o["domain"] == p).nonzero().squeeze(1)
        if len(rows) > 1:
            scale, shift = o["weight"] * o["domain_weight"][p], o["bias"] + o["domain_bias"][p]
            statistics = (o["running_mean"][p], o["running_var"][p])
            out = out.index_copy(0, rows, F.batch_norm(o["x"][rows], *statistics, scale, shift, True))
    return out


def _esmm(shape: Shape, draw: Draw) -> Operands:
    click = draw.coin(0.1, shape["B"])
    conversion = click * draw.coin(0.2, shape["B"])
    logits = {name: draw.normal(shape["B"], scale=2.0) for name in ("ctr_logit", "cvr_logit")}
    return {**logits, "click": click, "conversion": conversion}


def _esmm_by_probability(o: Operands) -> Tensor:
    click, conversion = (o[name].to(o["ctr_logit"].dtype) for name in ("click", "conversion"))
    both = torch.sigmoid(o["ctr_logit"]) * torch.sigmoid(o["cvr_logit"])
    return F.binary_cross_entropy_with_logits(o["ctr_logit"], click) + F.binary_cross_entropy(both, conversion)


def _labels(shape: Shape, draw: Draw) -> Operands:
    size = (shape["B"], shape["T"])
    return {"logits": draw.normal(*size), "labels": draw.coin(0.3, *size), "mask": draw.coin(0.7, *size) > 0}


def _masked_mean(o: Operands) -> Tensor:
    labels, mask = (o[name].to(o["logits"].dtype) for name in ("labels", "mask"))
    loss = F.binary_cross_entropy_with_logits(o["logits"], labels, reduction="none")
    return (loss * mask).sum(0) / mask.sum(0).clamp_min(1)


def _apply(op: str, *names: str, **keywords: Any) -> Callable[[Operands], Tensor]:
    """A call of mtlkernels.<op> with the operands of these names by position; "$name" among the keywords is one too."""

    def call(operands: Operands) -> Tensor:
        given = {k: operands[v[1:]] if isinstance(v, str) and v[0] == "$" else v for k, v in keywords.items()}
        return getattr(mtl, op)(*(operands[name] for name in names), **given)

    return call


_BANK = ("x", "weight", "bias")
_SNR = ("x", "weight", "gate", "bias")
_STAR = ("x", "domain", "weight", "domain_weight", "bias", "domain_bias")
_NORM = ("x", "domain", "weight", "bias", "domain_weight", "domain_bias", "running_mean", "running_var")
_ESMM = ("ctr_logit", "cvr_logit", "click", "conversion")

# fmt: off
SUBJECTS = (
    Subject("expert_linear", "", _bank, _apply("expert_linear", *_BANK, experts_per_unit="$counts", activation="relu"),
            _BANK, ("F.linear / baddbmm", _plain_bank)),
    Subject("mix", "gated", _mix, _apply("mix", "experts", "logits"), ("experts", "logits"),
            ("softmax + bmm", _softmax_bmm)),
    Subject("mix", "adatt", _adatt, _apply("adatt_mix", "experts", "logits", "native", experts_per_unit="$counts"),
            ("experts", "logits", "native"), ("padded softmax + bmm", _adatt_bmm)),
    Subject("mix", "routed", _routed, _apply("mix", "experts", "logits", routes="$routes"), ("experts", "logits"),
            ("a bmm a task", _routed_bmm)),
    Subject("mix", "linear", _stitch, _apply("linear_mix", "experts", "weight"), ("experts", "weight"),
            ("matmul / multiply and sum", _plain_stitch)),
    Subject("expert_mix", "", _expert_mix,
            _apply("expert_mix", *_BANK, "logits", experts_per_unit="$counts", activation="relu"),
            (*_BANK, "logits"), ("F.linear + softmax + bmm", _mixed(_plain_bank))),
    Subject("hard_concrete", "", _gates, _apply("hard_concrete", "log_alpha", "noise"), ("log_alpha",)),
    Subject("hard_concrete_l0", "", _gates, _apply("hard_concrete_l0", "log_alpha"), ("log_alpha",)),
    Subject("snr_linear", "", _snr, _apply("snr_linear", *_SNR, activation="relu"), _SNR,
            ("one matmul of gated blocks", _one_matmul)),
    Subject("snr_linear", "half closed", _snr_half_closed,
            _apply("snr_linear", *_SNR, activation="relu", skip_closed=True), ("x", "weight", "bias"),
            ("one matmul of gated blocks", _one_matmul)),
    Subject("star_linear", "", _star, _apply("star_linear", *_STAR, activation="relu"),
            ("x", "weight", "domain_weight", "bias", "domain_bias"), ("F.linear over masks", _star_by_domain)),
    Subject("partitioned_norm", "", _norm, _apply("partitioned_norm", *_NORM, training=True),
            ("x", "weight", "bias", "domain_weight", "domain_bias"), ("F.batch_norm a domain", _norm_by_domain)),
    Subject("esmm_loss", "", _esmm, _apply("esmm_loss", *_ESMM), ("ctr_logit", "cvr_logit"),
            ("BCEWithLogits + BCE of the product", _esmm_by_probability)),
    Subject("masked_bce", "", _labels, _apply("masked_bce", "logits", "labels", "mask"), ("logits",),
            ("BCEWithLogits times mask", _masked_mean)),
)
# fmt: on

# Operators that are whole banks of experts, as they are written without them.
EAGER = {
    "expert_linear": {PLAIN: _each_expert, BATCHED: _all_experts},
    "expert_mix": {PLAIN: _mixed(_each_expert), BATCHED: _mixed(_all_experts)},
}


def available() -> list[Subject]:
    """The subjects whose operator this mtlkernels has."""
    return [subject for subject in SUBJECTS if hasattr(mtl, subject.op)]


def find(name: str) -> Subject:
    """The subject called `name`; KeyError for another name."""
    return {subject.name: subject for subject in SUBJECTS}[name]
