"""Random calls, each a plain dictionary that hypothesis shrinks and a line of the corpus keeps, and what it stands for.

``{"op": ..., "sizes": {...}, "dtype": ..., "values": ..., "layouts": {...}, "grad": ..., "seed": ..., "spoil": ...}``:
`build` makes the same tensors of it every time.
"""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.gpu.subjects import (
    ACTIVATIONS,
    Subject,
    bce_subject,
    count_subject,
    esmm_subject,
    fused_subject,
    gate_subject,
    linear_subject,
    mix_subject,
    norm_subject,
    snr_subject,
    star_subject,
)
from tests.ops import norms
from tests.ops.cases import DTYPES, FORMS, GRAD_LAYOUTS, Linear, layouts, make_mix
from tests.ops.test_expert_mix import FORMS as FUSED_FORMS
from tests.ops.test_expert_mix import Fused
from tests.ops.test_snr_linear import Snr
from tests.ops.test_star_linear import Star

NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
Call = dict[str, Any]
Sizes = dict[str, Any]

# Small ones shrink well; the others lie around tiles, vectors and blocks of rows.
rows = st.one_of(st.integers(0, 9), st.sampled_from([15, 16, 17, 31, 33, 64, 65, 127, 129, 257]))
few = st.integers(0, 5)
some = st.integers(1, 5)
width = st.one_of(st.integers(0, 9), st.sampled_from([15, 16, 17, 31, 32, 33, 48, 63, 65, 100]))
activation = st.sampled_from(ACTIVATIONS)
counts = st.lists(st.integers(0, 3), min_size=0, max_size=4)


def _linear(z: Sizes) -> Linear:
    # One count for every unit, or x for each expert, or one for all.
    if z["inputs"] == "counts":
        return Linear(z["B"], sum(z["counts"]), z["N"], z["K"], tuple(z["counts"]))
    return Linear(z["B"], z["E"], z["N"], z["K"], units=z["inputs"] == "each")


def _fused(z: Sizes) -> Subject:
    linear = _linear(z)
    mixing = make_mix(z["form"], linear.batch, z["T"], linear.experts, linear.outputs)
    return fused_subject(Fused(linear, mixing), z["activation"])


def _mix(z: Sizes) -> Subject | None:
    case = make_mix(z["form"], z["B"], z["T"], z["E"], z["D"])
    return case and mix_subject(case)


def _star(z: Sizes) -> Subject:
    return star_subject(Star(z["B"], z["P"], z["N"], z["K"], z["spread"]), z["activation"])


bank = {"B": rows, "E": few, "N": width, "K": width, "counts": counts, "activation": activation}
bank |= {"inputs": st.sampled_from(["shared", "each", "counts"])}
# Of every operator the sizes of a call, and the subject that they make; None where no such call exists.
OPERATORS: dict[str, tuple[dict[str, st.SearchStrategy], Callable[[Sizes], Subject | None]]] = {
    "expert_linear": (bank, lambda z: linear_subject(_linear(z), z["activation"])),
    "mix": ({"B": rows, "T": few, "E": st.integers(0, 9), "D": width, "form": st.sampled_from(FORMS)}, _mix),
    "expert_mix": (bank | {"T": few, "form": st.sampled_from(FUSED_FORMS)}, _fused),
    "snr_linear": (
        {"B": rows, "I": few, "J": few, "N": width, "K": width, "closed": st.sampled_from([0.0, 0.4, 1.0]),
         "activation": activation, "skip": st.booleans()},
        lambda z: snr_subject(Snr(z["B"], z["I"], z["J"], z["N"], z["K"], z["closed"]), z["activation"], z["skip"]),
    ),
    "star_linear": (
        {"B": rows, "P": some, "N": width, "K": width, "activation": activation,
         "spread": st.sampled_from(["even", "skewed", "sorted"])},
        _star,
    ),
    "partitioned_norm": (
        {"B": rows, "D": width, "P": some, "training": st.booleans()},
        lambda z: norm_subject(norms.make(z["B"], z["D"], z["P"], z["training"])),
    ),
    "hard_concrete": (
        {"shape": st.lists(st.integers(0, 40), max_size=2), "drawn": st.booleans()},
        lambda z: gate_subject(tuple(z["shape"]), z["drawn"]),
    ),
    "hard_concrete_l0": ({"shape": st.lists(st.integers(0, 40), max_size=2)},
                         lambda z: count_subject(tuple(z["shape"]))),
    "esmm_loss": ({"B": rows, "scale": st.sampled_from([1.0, 8.0, 80.0])},
                  lambda z: esmm_subject(z["B"], z["scale"])),
    "masked_bce": (
        {"B": rows, "T": few, "masked": st.booleans(), "scale": st.sampled_from([1.0, 30.0])},
        lambda z: bce_subject((z["B"], z["T"]), z["masked"], z["scale"]),
    ),
}  # fmt: skip

VALUES = ("drawn", "whole numbers", "zeros", "first of 30", "first of 1/1000", "wide logits")
SPOILS = ["drop a dimension", "add a dimension", "longer", "shorter", "int64", "complex64", "bool", "not a tensor"]


def call_of(op: str) -> st.SearchStrategy[Call]:
    """Random calls of one operator. One in six is spoilt."""
    sizes, _ = OPERATORS[op]
    return st.fixed_dictionaries(
        {
            "op": st.just(op),
            "sizes": st.fixed_dictionaries(sizes),
            "dtype": st.sampled_from(list(NAMES)),
            "values": st.sampled_from(VALUES),
            "layouts": st.dictionaries(st.sampled_from("01234"), st.sampled_from(_LAYOUTS), max_size=2),
            "grad": st.sampled_from(["drawn", *GRAD_LAYOUTS]),
            "spoil": st.sampled_from(["sound"] * 40 + SPOILS),
            "which": st.integers(0, 4),
        }
    )


# The expanded ones change values, and with them what the reference is given: those of one number are among VALUES.
_LAYOUTS = [name for name in layouts(torch.zeros(2, 2, 2)) if "expanded" not in name and "single" not in name]


def build(call: Call) -> tuple[Subject, list[Tensor | None], Callable[[Tensor], Tensor]] | None:
    """The subject, its tensors, and what makes the gradient from above; None for a call that does not exist."""
    subject = OPERATORS[call["op"]][1](call["sizes"])
    if subject is None:
        return None
    dtype = NAMES[call["dtype"]]
    tensors = _with_values(call, list(subject.make(dtype)))
    for i, name in call["layouts"].items():
        t = tensors[int(i)] if int(i) < len(tensors) else None
        if t is not None and t.numel():
            tensors[int(i)] = layouts(t.reshape(1) if t.dim() == 0 else t).get(name, t).view(t.shape)
    return subject, tensors, subject.grad if subject.total else _gradient(call["grad"], subject.grad)


def _gradient(layout: str, drawn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def grad(out: Tensor) -> Tensor:
        return GRAD_LAYOUTS.get(layout, drawn)(out) if out.dim() > 1 and out.numel() else drawn(out)

    return grad


def _with_values(call: Call, tensors: list[Tensor | None]) -> list[Tensor | None]:
    kind, op = call["values"], call["op"]
    if op in ("esmm_loss", "masked_bce", "hard_concrete", "hard_concrete_l0"):
        return tensors  # they have scales of their own
    if kind == "zeros":
        return [t if t is None else torch.zeros_like(t) for t in tensors]
    if kind == "whole numbers" or call["sizes"].get("activation") == "relu":
        # Sums of these are exact, so that no rounding moves a number across the kink of a ReLU.
        return [t if t is None else (2 * t).round() for t in tensors]
    if kind.startswith("first"):
        return [tensors[0] * (30 if kind.endswith("30") else 1e-3), *tensors[1:]]
    if kind == "wide logits" and op in ("mix", "expert_mix"):
        at = 1 if op == "mix" else 3
        return [t if t is None or i != at else t * 100 for i, t in enumerate(tensors)]
    return tensors


def spoilt(call: Call, tensors: list[Tensor | None]) -> list[Any]:
    """One of the tensors changed so that it does not fit, or hardly."""
    at = [i for i, t in enumerate(tensors) if t is not None]
    i = at[call["which"] % len(at)]
    return [*tensors[:i], _spoil(call["spoil"], tensors[i]), *tensors[i + 1 :]]


def _spoil(how: str, t: Tensor) -> Any:
    if how == "drop a dimension":
        return t[0] if t.dim() and len(t) else t.reshape(-1)
    if how == "add a dimension":
        return t.unsqueeze(0)
    if how == "longer":
        return torch.cat([t, t.new_zeros(*t.shape[:-1], 1)], -1) if t.dim() else t.expand(2)
    if how == "shorter":
        return t[:-1] if t.dim() else t
    if how == "not a tensor":
        return t.tolist()
    return t.detach().to(getattr(torch, how))
