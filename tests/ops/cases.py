"""The calls that the operators are tested on, what they give, and how close two answers must lie."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import mtlkernels as mtl
from mtlkernels import _library

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Relative to the largest element.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
native_only = pytest.mark.skipif(not _library.loaded(), reason=_library.reason() or "loaded")
BACKENDS = ["reference", pytest.param("native", marks=native_only)]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
halves = pytest.mark.parametrize("dtype", DTYPES[2:], ids=["bfloat16", "float16"])


def over(table: dict) -> list:
    """A table as pytest parameters."""
    return [pytest.param(value, id=name) for name, value in table.items()]


class Linear(NamedTuple):
    """Sizes of an expert_linear. counts None: x is [B,K], or, with `units`, [B,E,K]."""

    batch: int
    experts: int
    outputs: int
    features: int
    counts: tuple[int, ...] | None = None
    units: bool = False

    def tensors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
        """x, weight, bias."""
        gen = torch.Generator().manual_seed(sum(self[:4]))
        width = [len(self.counts)] if self.counts is not None else [self.experts] if self.units else []
        shapes = (self.batch, *width, self.features), (self.experts, self.outputs, self.features), self[1:3]
        x, weight, bias = (torch.randn(s, generator=gen, dtype=torch.float64) for s in shapes)
        return x.to(dtype), (weight / max(1, self.features) ** 0.5).to(dtype), bias.to(dtype)

    def __call__(self, x, weight, bias=None, *, activation=None, backend=None) -> Tensor:
        counts = self.counts
        return mtl.expert_linear(x, weight, bias, experts_per_unit=counts, activation=activation, backend=backend)


# Kernel tiles: 6 or 12 rows, 8 to 32 columns, blocks of 256 batch rows and 256 gradient rows, 4 to 40 tiles of rows.
LINEAR = {
    "one": Linear(1, 1, 1, 1),
    "one row": Linear(1, 3, 5, 4),
    "shared": Linear(5, 3, 7, 9),
    "a unit each": Linear(7, 4, 5, 3, units=True),
    "unequal": Linear(13, 6, 5, 11, (2, 0, 3, 1)),
    "one unit": Linear(4, 3, 6, 2, (3,)),
    "zeros at the ends": Linear(3, 2, 3, 5, (0, 2, 0)),
    "over a tile": Linear(25, 2, 33, 34),
    "whole tiles": Linear(24, 2, 32, 32, (1, 1)),
    "over a batch block": Linear(300, 3, 9, 17, (1, 2)),
    "over two batch blocks": Linear(520, 2, 3, 2),
    "over a gradient block": Linear(8, 3, 100, 5),
    "deep": Linear(30, 2, 3, 900, units=True),
    "wide": Linear(2, 2, 700, 3, (1, 1)),
    "no rows": Linear(0, 3, 4, 5),
    "no rows of units": Linear(0, 3, 4, 5, (1, 2)),
    "no experts": Linear(3, 0, 4, 5),
    "no units": Linear(3, 0, 4, 5, ()),
    "no outputs": Linear(3, 2, 0, 5),
    "no features": Linear(3, 2, 4, 0),
    "no features of units": Linear(3, 2, 4, 0, (0, 2)),
}
SMALL_LINEAR = {name: case for name, case in LINEAR.items() if case.batch * case.features * case.experts < 600}


class Mix(NamedTuple):
    """One mix: its tensors in float64, and what goes with them."""

    experts: Tensor
    logits: Tensor | None = None
    static: Tensor | None = None
    mask: Tensor | None = None
    routes: mtl.Routes | None = None
    native: tuple[int, ...] | None = None

    def tensors(self, dtype: torch.dtype = torch.float64, weights: torch.dtype | None = None) -> list[Tensor | None]:
        """experts in dtype; logits and static in `weights`, or in dtype too."""
        dtypes = dtype, weights or dtype, weights or dtype
        return [t if t is None else t.to(w, copy=True) for t, w in zip(self[:3], dtypes, strict=True)]

    def __call__(self, experts, logits=None, static=None, *, backend=None) -> Tensor:
        if self.native is not None:
            counts, mask = self.native, self.mask
            return mtl.adatt_mix(experts, logits, static, experts_per_unit=counts, mask=mask, backend=backend)
        return mtl.mix(experts, logits, static, mask=self.mask, routes=self.routes, backend=backend)

    def op_args(self, dtype: torch.dtype = torch.float64) -> tuple:
        """What the dispatcher op takes."""
        columns = None if self.routes is None else self.routes.columns
        return (*self.tensors(dtype), self.mask, columns, None if self.native is None else list(self.native))


FORMS = ["logits", "static", "both", "logits masked", "static masked", "both masked", "logits packed", "static packed",
         "both packed", "native", "native masked", "unit native", "unit native masked", "channel"]  # fmt: skip
# B, T, E, D. A task of the kernel is 64 batch rows.
SHAPES = {
    "one": (1, 1, 1, 1),
    "odd": (5, 3, 7, 20),
    "over a block": (65, 4, 9, 33),
    "over two blocks": (130, 2, 6, 16),
    "wide": (2, 3, 4, 1100),
    "many rows": (3, 17, 5, 6),
    "many experts": (4, 2, 70, 5),
    "one expert": (6, 3, 1, 8),
    "one row": (6, 1, 5, 129),
    "no batch": (0, 2, 3, 4),
    "no tasks": (3, 0, 3, 4),
    "no experts": (3, 2, 0, 4),
    "no width": (3, 2, 3, 0),
}


def unequal_counts(experts: int, rows: int) -> tuple[int, ...]:
    """Counts of rows + 1 units that sum to `experts`, unequal, with zeros."""
    counts = [0] * (rows + 1)
    for e in range(experts):
        counts[(e * e + e // 2) % (rows + 1)] += 1
    return tuple(counts)


def make_mix(form: str, batch: int, rows: int, experts: int, width: int) -> Mix | None:
    """A case of that form; None where the sizes do not allow it."""
    gen = torch.Generator().manual_seed(batch + 7 * rows + 31 * experts + 101 * width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64)

    h, parts = normal(batch, experts, width), form.split()[0]
    if form == "channel":
        return Mix(h, None, normal(rows, experts, width))
    mask = torch.rand(rows, experts, generator=gen) < 0.6
    mask[1:2] = False
    if "packed" in form:
        routes = mtl.Routes.from_mask(mask)
        logits, static = normal(batch, routes.num_routes), normal(routes.num_routes)
        return Mix(h, None if parts == "static" else logits, None if parts == "logits" else static, routes=routes)
    mask = mask if "masked" in form else None
    logits = normal(batch, rows, experts)
    if "native" in form:
        unit = parts == "unit"
        if unit and experts < rows:
            return None
        counts = (1,) * rows + (0, experts - rows) if unit else unequal_counts(experts, rows)
        return Mix(h, logits, None if unit else normal(sum(counts[:rows])), mask, native=counts)
    static = normal(rows, experts)
    return Mix(h, None if parts == "static" else logits, None if parts == "logits" else static, mask)


MIX = {f"{form}, {name}": make_mix(form, *shape) for form in FORMS for name, shape in SHAPES.items()}
MIX = {name: case for name, case in MIX.items() if case is not None}
ODD_MIX = {form: MIX[f"{form}, odd"] for form in FORMS}

# For derivatives by finite differences: every form of both operators, a few numbers each.
TINY = {f"mix {form}": make_mix(form, 2, 2, 3, 2) for form in FORMS}
TINY |= {"expert_linear": Linear(2, 2, 2, 3), "expert_linear units": Linear(2, 3, 2, 2, (1, 0, 2))}
SOME = ["expert_linear", "expert_linear units", "mix both", "mix both packed", "mix native masked", "mix channel"]


def tiny_call(name: str, backend: str | None, activation: str | None = "silu") -> Callable[..., Tensor]:
    """That case as a function of its tensors alone, in the order of tiny_inputs."""
    case, given = TINY[name], [t is not None for t in TINY[name].tensors()]

    def call(*tensors: Tensor) -> Tensor:
        left = iter(tensors)
        every = [next(left) if there else None for there in given]
        if isinstance(case, Linear):
            return case(*every, activation=activation, backend=backend)
        return case(*every, backend=backend)

    return call


def tiny_inputs(name: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Its tensors, each requiring a gradient."""
    return [t.clone().requires_grad_() for t in TINY[name].tensors(dtype) if t is not None]


def random_grad(out: Tensor) -> Tensor:
    gen = torch.Generator().manual_seed(out.numel())
    return torch.randn(out.shape, generator=gen, dtype=torch.float64).to(out.device, out.dtype)


class Outcome(NamedTuple):
    out: Tensor
    grads: list[Tensor | None]


def outcome(
    call: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    grad: Callable[[Tensor], Tensor] = random_grad,
    needs: Sequence[bool] | None = None,
) -> Outcome:
    """Output and gradients of call(*tensors); the layout of every tensor is kept. needs: whose gradient is wanted."""
    needs = needs or [True] * len(tensors)
    leaves = [t if t is None else t.detach().requires_grad_(n) for t, n in zip(tensors, needs, strict=True)]
    out = call(*leaves)
    found = iter(torch.autograd.grad(out, [t for t in leaves if t is not None and t.requires_grad], grad(out)))
    return Outcome(out.detach(), [next(found) if t is not None and t.requires_grad else None for t in leaves])


def expected(call, tensors: Sequence[Tensor | None], grad=random_grad, **options) -> Outcome:
    """The reference's outcome in float64, of tensors and a gradient that were rounded already."""
    dtype = next(t.dtype for t in tensors if t is not None)

    def wide(*args: Tensor | None) -> Tensor:
        return call(*args, backend="reference", **options)

    doubles = [t if t is None else t.double() for t in tensors]
    return outcome(wide, doubles, lambda out: grad(out.to(dtype)).double())


def close(found: Tensor, wanted: Tensor, tolerance: float | None = None, what: str = "", floor: float = 1e-2) -> None:
    """Same shape, and every element within `tolerance` (by default that of found's dtype) of the largest one.

    floor: what the largest one counts for at least: for sums that cancel, the size of their terms.
    """
    tolerance = tolerance or TOLERANCE[found.dtype]
    assert found.shape == wanted.shape, (what, found.shape, wanted.shape)
    scale = max(wanted.nan_to_num(0, 0, 0).abs().max().item(), floor) if wanted.numel() else 0
    torch.testing.assert_close(
        found.double(), wanted.double(), rtol=0, atol=tolerance * scale, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def agree(
    found: Outcome,
    wanted: Outcome,
    tensors: Sequence[Tensor | None],
    floor: float = 1e-2,
    out_dtype: torch.dtype | None = None,
) -> None:
    """Outputs and all gradients close; each gradient of the shape and dtype of its tensor.

    out_dtype: the output's, where that is not the first tensor's.
    """
    dtype = next(t.dtype for t in tensors if t is not None)
    assert found.out.dtype == (out_dtype or dtype)
    close(found.out, wanted.out, what=f"{dtype} out", floor=floor)
    for i, (got, want, tensor) in enumerate(zip(found.grads, wanted.grads, tensors, strict=True)):
        assert (got is None) == (tensor is None)
        if got is not None:
            assert got.shape == tensor.shape and got.dtype == tensor.dtype
            close(got, want, max(TOLERANCE[dtype], TOLERANCE[got.dtype]), f"{dtype} gradient {i}", floor)


def same_bits(one: Outcome, other: Outcome) -> None:
    """Equal bit for bit, NaN like NaN."""
    for a, b in zip((one.out, *one.grads), (other.out, *other.grads), strict=True):
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def same_bits_with_any_threads(call: Callable[..., Tensor], tensors: Callable[[], Sequence[Tensor]]) -> None:
    """Output and every gradient of call(*tensors()) are the same bits with 1, 2 and 5 threads."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(outcome(call, tensors()))
    finally:
        torch.set_num_threads(before)
    same_bits(found[0], found[1])
    same_bits(found[0], found[2])


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """The same shape with other strides. Values differ in the expanded ones alone."""
    last = tensor.dim() - 1
    pairs = torch.stack([torch.full_like(tensor, torch.nan), tensor], -1)
    bigger = torch.cat([torch.full_like(tensor, torch.nan), tensor, torch.full_like(tensor, torch.nan)], 0)
    columns = torch.cat([torch.full_like(tensor, torch.nan), tensor], last)
    found = {
        "transposed": tensor.transpose(0, last).contiguous().transpose(0, last),
        "every second": pairs[..., 1],
        "rows of a bigger one": bigger[tensor.shape[0] : 2 * tensor.shape[0]],
        "columns of a bigger one": columns[..., tensor.shape[last] :],
        "expanded first": tensor[:1].expand(tensor.shape),
        "expanded last": tensor[..., :1].expand(tensor.shape),
        "a single number": tensor.flatten()[0].expand(tensor.shape),
    }
    if tensor.dim() == 3:
        found["middle first"] = tensor.transpose(0, 1).contiguous().transpose(0, 1)
        found["middle last"] = tensor.transpose(1, 2).contiguous().transpose(1, 2)
        found["expanded middle"] = tensor[:, :1].expand(tensor.shape)
    return found


GRAD_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "of .sum()": lambda out: torch.tensor(1.5, dtype=out.dtype, device=out.device).expand(out.shape),
    "of .sum(0)": lambda out: random_grad(out[:1]).expand(out.shape),
    "of .sum(-1)": lambda out: random_grad(out[..., :1]).expand(out.shape),
    "transposed": lambda out: random_grad(out.transpose(0, 1)).transpose(0, 1),
    "sliced": lambda out: torch.cat([random_grad(out), random_grad(out)], -1)[..., : out.shape[-1]],
}
