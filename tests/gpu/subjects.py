"""The calls of tests/ops, each in a form that runs on any device."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mtlkernels as mtl
from tests.ops import norms
from tests.ops import test_esmm_loss as esmm
from tests.ops import test_expert_mix as fused
from tests.ops import test_hard_concrete as gates
from tests.ops import test_masked_bce as bce
from tests.ops import test_partitioned_norm as norm_tests
from tests.ops import test_snr_linear as snr
from tests.ops import test_star_linear as star
from tests.ops.cases import LINEAR, MIX, Linear, Mix, make_mix, random_grad

ACTIVATIONS = [None, "relu", "gelu", "silu", "tanh", "sigmoid"]
BEYOND = 70_001  # rows: more than a grid has blocks in its second and third direction
Tensors = Sequence[Tensor | None]


class Subject(NamedTuple):
    """One call.

    op     the operator.
    make   (dtype) -> the tensors that get gradients, on the CPU, the one with the batch's rows first.
    bind   (device) -> the call, which takes these, there, and backend; what goes with them, masks or ids, lies there.
    floor  what the largest element of a result counts for at least (see `cases.close`).
    grad   (output) -> its gradient.
    total  the output is a sum over the rows, in float32.
    mixes  rows of the output depend on other rows.
    unread (tensors) -> the same with NaN where nothing may look.
    """

    op: str
    make: Callable[[torch.dtype], Tensors]
    bind: Callable[[str], Callable[..., Tensor]]
    floor: float = 1e-2
    grad: Callable[[Tensor], Tensor] = random_grad
    total: bool = False
    mixes: bool = False
    unread: Callable[[Tensors], Tensors] | None = None


def _there(thing: Any, device: str) -> Any:
    return None if thing is None else thing.to(device)


def linear_subject(case: Linear, activation: str | None) -> Subject:
    def bind(device: str) -> Callable[..., Tensor]:
        def call(x, weight, bias, backend=None):
            return mtl.expert_linear(
                x, weight, bias, experts_per_unit=case.counts, activation=activation, backend=backend
            )

        return call

    return Subject("expert_linear", case.tensors, bind)


def mix_subject(case: Mix, unread: Callable[[Tensors], Tensors] | None = None) -> Subject:
    def bind(device: str) -> Callable[..., Tensor]:
        mask, routes = _there(case.mask, device), _there(case.routes, device)

        def call(experts, logits, static, backend=None):
            if case.native is None:
                return mtl.mix(experts, logits, static, mask=mask, routes=routes, backend=backend)
            return mtl.adatt_mix(experts, logits, static, experts_per_unit=case.native, mask=mask, backend=backend)

        return call

    return Subject("mix", case.tensors, bind, unread=unread)


def fused_subject(
    case: fused.Fused, activation: str | None, unread: Callable[[Tensors], Tensors] | None = None
) -> Subject:
    def bind(device: str) -> Callable[..., Tensor]:
        mask, routes = _there(case.mixing.mask, device), _there(case.mixing.routes, device)

        def call(x, weight, bias, logits, static, backend=None):
            return mtl.expert_mix(x, weight, bias, logits, static, experts_per_unit=case.linear.counts, mask=mask,
                                  routes=routes, activation=activation, backend=backend)  # fmt: skip

        return call

    return Subject("expert_mix", case.tensors, bind, unread=unread)


def snr_subject(case: snr.Snr, activation: str | None, skip: bool) -> Subject:
    def bind(device: str) -> Callable[..., Tensor]:
        def call(x, weight, gate, bias, backend=None):
            return mtl.snr_linear(x, weight, gate, bias, activation=activation, skip_closed=skip, backend=backend)

        return call

    def unread(tensors: Tensors) -> Tensors:
        x, weight, gate, bias = tensors
        return [x, torch.where((gate == 0)[..., None, None], torch.nan, weight), gate, bias]

    return Subject("snr_linear", case.tensors, bind, unread=unread if skip else None)


def star_subject(case: star.Star, activation: str | None, domain: Tensor | None = None) -> Subject:
    ids = case.domain if domain is None else domain

    def bind(device: str) -> Callable[..., Tensor]:
        there = ids.to(device)

        def call(x, weight, domain_weight, bias, domain_bias, backend=None):
            return mtl.star_linear(
                x, there, weight, domain_weight, bias, domain_bias, activation=activation, backend=backend
            )

        return call

    def unread(tensors: Tensors) -> Tensors:
        x, weight, domain_weight, bias, domain_bias = tensors
        empty = torch.ones(case.domains, dtype=torch.bool).index_fill(0, ids, False).to(x.device)
        assert empty.any()
        return [x, weight, torch.where(empty[:, None, None], torch.nan, domain_weight), bias, domain_bias]

    return Subject("star_linear", case.tensors, bind, floor=1, unread=unread if case.domains > case.batch else None)


def norm_subject(case: norms.Norm) -> Subject:
    def bind(device: str) -> Callable[..., Tensor]:
        domain, running = case.domain.to(device), [t.to(device) for t in case.running()]

        def call(x, weight, bias, domain_weight, domain_bias, backend=None):
            sums = norms.accumulate(x.dtype) if isinstance(x, Tensor) else torch.float32
            mean, var = (t.to(sums, copy=True) for t in running)
            return mtl.partitioned_norm(x, domain, weight, bias, domain_weight, domain_bias, mean, var,
                                        training=case.training, backend=backend)  # fmt: skip

        return call

    return Subject("partitioned_norm", case.tensors, bind, norm_tests.FLOOR, mixes=case.training)


def gate_subject(shape: tuple[int, ...], drawn: bool) -> Subject:
    # Of many some would lie where the gate turns on the last digits of 1 - noise, of which float32 has few.
    least = 0.0 if math.prod(shape) < 1000 else 1e-3
    noise = gates.inputs(shape)[1].float().clamp(least, 1 - least) if drawn else None

    def bind(device: str) -> Callable[..., Tensor]:
        there = _there(noise, device)

        def call(log_alpha, backend="auto"):
            with mtl.use_backend(backend):
                return mtl.hard_concrete(log_alpha, there)

        return call

    # A gradient in 16 bit is rounded twice: the sigmoid is kept in that type.
    return Subject("hard_concrete", lambda dtype: [gates.inputs(shape, dtype)[0]], bind, floor=2)


def count_subject(shape: tuple[int, ...]) -> Subject:
    def bind(device: str) -> Callable[..., Tensor]:
        def call(log_alpha, backend="auto"):
            with mtl.use_backend(backend):
                return mtl.hard_concrete_l0(log_alpha)

        return call

    make = lambda dtype: [gates.inputs(shape, dtype)[0]]  # noqa: E731
    return Subject("hard_concrete_l0", make, bind, grad=torch.ones_like, total=True)


def _large(out: Tensor) -> Tensor:
    """For the mean over a batch: else float16 could not hold a row's gradient."""
    return torch.full_like(out, 4096.0)


def esmm_subject(batch: int, scale: float = 4.0) -> Subject:
    click, conversion = esmm.rows(batch)[2:]

    def bind(device: str) -> Callable[..., Tensor]:
        labels = click.float().to(device), conversion.float().to(device)

        def call(ctr_logit, cvr_logit, backend=None):
            return mtl.esmm_loss(ctr_logit, cvr_logit, *labels, ctcvr_weight=0.75, backend=backend)

        return call

    make = lambda dtype: esmm.rows(batch, dtype, scale)[:2]  # noqa: E731
    return Subject("esmm_loss", make, bind, grad=_large, total=True)


def bce_subject(shape: tuple[int, int], masked: bool, scale: float = 1.0) -> Subject:
    _, labels, mask = bce.batch(shape)

    def bind(device: str) -> Callable[..., Tensor]:
        there = labels.to(device), mask.to(device) if masked else None

        def call(logits, backend=None):
            return mtl.masked_bce(logits, *there, backend=backend)

        return call

    def unread(tensors: Tensors) -> Tensors:
        return [torch.where(mask.to(tensors[0].device), tensors[0], torch.nan)]

    make = lambda dtype: [bce.batch(shape, dtype)[0] * scale]  # noqa: E731
    return Subject("masked_bce", make, bind, grad=_large, total=True, unread=unread if masked else None)


def _extreme(case: Mix) -> Mix:
    """Logits at the ends of what float16 holds, and rows that leave one expert, or one less."""
    logits = case.logits.clone()
    logits[0], logits[1], logits[2, ..., :1] = 1e4, -1e4, 3e4
    logits[3, ..., :1] = -torch.inf
    return case._replace(logits=logits)


# An expert that no row may use: 3, whose weights are masked, or not there.
_FREE = torch.tensor([[1, 0, 1, 0, 1, 1, 0], [0] * 7, [1, 1, 0, 0, 0, 0, 1]], dtype=torch.bool)


def _free(form: str) -> Mix:
    case = make_mix("both masked", 5, 3, 7, 20)._replace(mask=_FREE)
    if form == "both masked":
        return case
    packed = mtl.Routes.from_mask(_FREE)
    return Mix(case.experts, case.logits[:, _FREE], case.static[_FREE], routes=packed)


def _hurt_experts(tensors: Tensors) -> Tensors:
    experts = tensors[0].clone()
    experts[:, 3] = torch.nan
    rest = [_where_masked(t) for t in tensors[1:]]
    return [experts, *rest]


def _hurt_weights(tensors: Tensors) -> Tensors:
    x, weight, bias, *rest = tensors
    weight, bias = weight.clone(), bias.clone()
    weight[3], bias[3] = torch.nan, torch.inf
    return [x, weight, bias, *(_where_masked(t) for t in rest)]


def _where_masked(weights: Tensor) -> Tensor:
    """NaN where _FREE is False; packed weights have no such place."""
    may = _FREE.to(weights.device)
    return torch.where(may, weights, torch.nan) if weights.shape[-2:] == may.shape else weights


def _table(make: Callable[..., Subject], cases: dict[str, Any], *others: Sequence[Any]) -> dict[str, Subject]:
    """Every case, with the values of `others` in turn."""
    turns = [itertools.cycle(values) for values in others]
    return {name: make(case, *map(next, turns)) for name, case in cases.items()}


def _by_activation(make: Callable[..., Subject], case: Any, *rest: Any) -> dict[str, Subject]:
    return {f"odd, {activation or 'no activation'}": make(case, activation, *rest) for activation in ACTIVATIONS}


_BIG_NORM, _BIG_EVAL = norms.make(BEYOND, 3, 4), norms.make(BEYOND, 3, 4, False)
EVERY: dict[str, dict[str, Subject]] = {
    "expert_linear": {
        **_table(linear_subject, {**LINEAR, "beyond a grid": Linear(BEYOND, 2, 3, 4)}, ACTIVATIONS),
        **_by_activation(linear_subject, LINEAR["unequal"]),
    },
    "mix": {
        **_table(mix_subject, {**MIX, "beyond a grid": make_mix("both", BEYOND, 2, 3, 4)}),
        "extreme": mix_subject(_extreme(MIX["both, over a block"])),
        "extreme, masked": mix_subject(_extreme(MIX["both masked, over a block"])),
    },
    "expert_mix": {
        **{
            f"{form}, {shape}": fused_subject(fused.make(form, shape), activation)
            for (form, shape), activation in zip(
                itertools.product(("both", "logits masked", "static packed"), fused.SHAPES),
                itertools.cycle(ACTIVATIONS), strict=False)
        },
        **_table(fused_subject, {f"{form}, odd, again": case for form, case in fused.ODD.items()}, ACTIVATIONS),
        **_by_activation(fused_subject, fused.UNITS),
        "beyond a grid": fused_subject(fused.Fused(Linear(BEYOND, 3, 4, 5), make_mix("both", BEYOND, 2, 3, 4)), "relu"),
        "extreme": fused_subject(
            fused.make("both", "over a block")._replace(mixing=_extreme(make_mix("both", 101, 4, 9, 33))), "gelu"
        ),
    },
    "snr_linear": {
        **{
            f"{name}, {'skip closed' if skip else 'all'}": snr_subject(case, activation, skip)
            for ((name, case), skip), activation in zip(
                itertools.product([*snr.CASES.items(), ("beyond a grid", snr.Snr(BEYOND, 2, 2, 3, 4))], (False, True)),
                itertools.cycle(ACTIVATIONS), strict=False)
        },
        **_by_activation(snr_subject, snr.ODD, True),
    },
    "star_linear": {
        **_table(star_subject, {**star.CASES, "beyond a grid": star.Star(BEYOND, 3, 3, 4)}, ACTIVATIONS),
        **_by_activation(star_subject, star.MIDDLE),
    },
    "partitioned_norm": _table(norm_subject, {
        **norms.CASES, "few": norms.FEW, "beyond a grid, train": _BIG_NORM, "beyond a grid, eval": _BIG_EVAL
    }),
    "hard_concrete": {
        f"{shape}, {'drawn' if drawn else 'serving'}": gate_subject(shape, drawn)
        for shape in (*gates.SHAPES, (BEYOND,)) for drawn in (True, False)
    },
    "hard_concrete_l0": {str(shape): count_subject(shape) for shape in (*gates.SHAPES, (BEYOND,))},
    "esmm_loss": {
        **{str(batch): esmm_subject(batch) for batch in (0, 1, 3, 255, 256, 257, 2049, 5000, BEYOND)},
        "extreme": esmm_subject(301, 200.0),
    },
    "masked_bce": {
        **{
            f"{shape}, {'masked' if masked else 'all'}": bce_subject(shape, masked)
            for shape in (*bce.SHAPES, (0, 3), (3, 0), (0, 0), (BEYOND, 3), (3, BEYOND)) for masked in (True, False)
        },
        "extreme": bce_subject((65, 4), True, 100.0),
    },
}  # fmt: skip

# Some of every operator, a few numbers each, for what asks for several calls.
USUAL: dict[str, Subject] = {
    "expert_linear, units": linear_subject(LINEAR["unequal"], "gelu"),
    "expert_linear, shared": linear_subject(Linear(9, 3, 7, 20), "relu"),
    "mix, masked": mix_subject(_free("both masked"), _hurt_experts),
    "mix, packed": mix_subject(_free("both packed"), _hurt_experts),
    "mix, native": mix_subject(MIX["native, odd"]),
    "mix, channel": mix_subject(MIX["channel, odd"]),
    "expert_mix, units": fused_subject(fused.UNITS, "silu"),
    "expert_mix, masked": fused_subject(fused.Fused(Linear(5, 7, 20, 9), _free("both masked")), "relu", _hurt_weights),
    "expert_mix, packed": fused_subject(fused.Fused(Linear(5, 7, 20, 9), _free("both packed")), "gelu", _hurt_weights),
    "snr_linear": snr_subject(snr.Snr(9, 3, 4, 19, 21), "tanh", True),
    "snr_linear, all": snr_subject(snr.Snr(9, 3, 4, 19, 21), "gelu", False),
    "star_linear": star_subject(star.CASES["more domains than rows"], "silu"),
    "star_linear, skewed": star_subject(star.Star(40, 3, 9, 10, "skewed"), "relu"),
    "partitioned_norm, train": norm_subject(norms.make(13, 7, 3)),
    "partitioned_norm, eval": norm_subject(norms.make(13, 7, 3, False)),
    "hard_concrete": gate_subject((5, 7), True),
    "hard_concrete_l0": count_subject((5, 7)),
    "esmm_loss": esmm_subject(33),
    "masked_bce": bce_subject((33, 3), True),
}
BAD_IDS = torch.tensor([3, 11])
_ODD_STAR, _ODD_NORM = star.Star(13, 3, 5, 4), norms.make(13, 7, 3)
_IDS = {name: case.domain.clone() for name, case in (("star_linear", _ODD_STAR), ("partitioned_norm", _ODD_NORM))}
for _ids in _IDS.values():
    _ids[BAD_IDS] = torch.tensor([3, -(2**40)])
_KNOWN = torch.tensor([row not in BAD_IDS for row in range(13)])
# Beside each call with two ids out of range, the same without their rows.
BROKEN: dict[str, tuple[Subject, Subject]] = {
    "star_linear": (
        star_subject(_ODD_STAR, "tanh", _IDS["star_linear"]),
        star_subject(_ODD_STAR, "tanh", _ODD_STAR.domain[_KNOWN]),
    ),
    "partitioned_norm": (
        norm_subject(_ODD_NORM._replace(domain=_IDS["partitioned_norm"])),
        norm_subject(_ODD_NORM._replace(domain=_ODD_NORM.domain[_KNOWN])),
    ),
}
