"""The CUDA kernels of mix, executed on the host: every index, barrier and thread order against a float64 oracle."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from emulated import Device, assert_every_barrier_matters, build, noticed
from torch import Tensor

FIELDS = (
    "type batch tasks experts width h h_row h_expert grad g_row g_task logits logits_type logits_row stat stat_type "
    "num_static mask columns grad_lse native out lse dexperts dlogits dstatic max_blocks"
).split()
TYPE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@dataclass(frozen=True)
class Case:
    """B, T, E, D and which of the optional parts take part."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype = F32
    logits: str | None = "dense"  # dense, packed
    static: str | None = None  # dense, packed, native, ones
    mask: bool = False
    small_dtype: torch.dtype = F32  # of logits and static
    grad_lse: bool = False
    strided: bool = False
    extreme: bool = False
    max_blocks: int = 0

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")]
        parts += [f"{name}={value}" for name, value in vars(self).items() if name not in ("shape", "dtype") and value]
        return "-".join(parts).replace("torch.", "")


def make(case: Case) -> dict[str, Tensor | None]:
    """Inputs of the case. Masked experts hold NaN wherever no row may use them; row 0 may use none."""
    b, t, e, d = case.shape
    random = torch.Generator().manual_seed(b + 10 * t + 100 * e + 1000 * d)
    draw = functools.partial(torch.randn, generator=random)
    packed = case.logits == "packed" or case.static == "packed"
    allowed = torch.ones(t, e, dtype=torch.bool)
    if case.mask or packed:
        allowed = torch.rand(t, e, generator=random) < 0.6
        allowed[:1] = False
        allowed[:, 1:2] = False
    columns = None
    if packed:
        # Two columns more than are used: their gradient is zero.
        order = torch.randperm(int(allowed.sum()) + 2, generator=random)[: int(allowed.sum())]
        columns = torch.full((t, e), -1, dtype=torch.int32)
        columns[allowed] = order.to(torch.int32)
    num_packed = int(allowed.sum()) + 2
    native = None
    if case.static in ("native", "ones"):
        counts = [1] * t if case.static == "ones" else [1 + i % 2 for i in range(t)]
        native = torch.tensor([*counts, e - sum(counts)])
        assert native.min() >= 0
    shapes = {"dense": (t, e), "packed": (num_packed,), "native": (int(native[:t].sum()) if native is not None else 0,)}
    h = draw(b, e, d, dtype=F64)
    if not allowed.all():
        h[:, ~allowed.any(0)] = torch.nan
    logits = None
    if case.logits:
        logits = 2 * draw(b, *((num_packed,) if case.logits == "packed" else (t, e)), dtype=F64)
        if case.extreme:
            logits = logits.sign() * 1e4 + logits.round()
            logits[..., ::3] = -torch.inf
    return {
        "h": h.to(case.dtype),
        "grad": draw(b, t, d, dtype=F64).to(case.dtype),
        "logits": None if logits is None else logits.to(case.small_dtype),
        "stat": draw(*shapes[case.static], dtype=F64).to(case.small_dtype) if case.static in shapes else None,
        "mask": allowed if case.mask and not packed else None,
        "columns": columns,
        "native": native,
        "grad_lse": draw(b, t) if case.grad_lse else None,
    }


def oracle(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """out, lse and the gradients in float64, by autograd."""
    h, grad, logits, stat = (None if inputs[k] is None else inputs[k].double() for k in ("h", "grad", "logits", "stat"))
    (b, e, _), t = h.shape, grad.shape[1]
    dense = torch.arange(t * e).view(t, e)
    cell = dense if inputs["columns"] is None else inputs["columns"].long()
    if inputs["mask"] is not None:
        cell = cell.where(inputs["mask"], -1)
    allowed, at = cell >= 0, cell.clamp(min=0)
    leaves = [x.requires_grad_() for x in (h, logits, stat) if x is not None]
    weights, lse = h.new_zeros(b, t, e), None
    if logits is not None:
        wide = logits.reshape(b, -1)[:, at].masked_fill(~allowed, -torch.inf)
        some = allowed.any(1)[:, None]
        lse = torch.logsumexp(wide.where(some, 0), 2)
        weights = torch.softmax(wide.where(some, 0), 2)
        lse = lse.where(some[:, 0], -torch.inf)
    if inputs["native"] is not None:
        unit = torch.repeat_interleave(torch.arange(len(inputs["native"])), inputs["native"])
        values = (
            torch.ones(e, dtype=torch.float64) if stat is None else torch.cat([stat, stat.new_zeros(e - len(stat))])
        )
        weights = weights + values.where(unit == torch.arange(t)[:, None], 0)
    elif stat is not None:
        weights = weights + stat.reshape(-1)[at]
    out = torch.einsum("bte,bted->btd", weights.where(allowed, 0), h[:, None].where(allowed[..., None], 0))
    loss = (out * grad).sum()
    if lse is not None and inputs["grad_lse"] is not None:
        loss = loss + (lse * inputs["grad_lse"].double()).where(allowed.any(1), 0).sum()
    gradients = iter(torch.autograd.grad(loss, leaves, allow_unused=True))
    result = {"out": out, "lse": lse}
    for name, leaf in (("dexperts", h), ("dlogits", logits), ("dstatic", stat)):
        gradient = None if leaf is None else next(gradients)
        result[name] = torch.zeros_like(leaf) if leaf is not None and gradient is None else gradient
    return {name: None if x is None else x.detach() for name, x in result.items()}


def run(device: Device, case: Case, inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Forward and backward on the emulated device; every output starts as NaN."""
    b, t, e, d = case.shape
    put = {name: None if x is None else device.put(x) for name, x in inputs.items()}
    if case.strided:  # rows of a wider buffer, and a gradient in [T,B,D] order
        wide = device.put(torch.full((b, e, d + 16), torch.nan, dtype=case.dtype))
        put["h"] = wide[..., :d].copy_(inputs["h"])
        put["grad"] = device.put(inputs["grad"].transpose(0, 1)).transpose(0, 1)
    logits, stat = put["logits"], put["stat"]
    fields = {
        **put,
        **dict(type=TYPE[case.dtype], batch=b, tasks=t, experts=e, width=d, max_blocks=case.max_blocks),
        **dict(h_row=put["h"].stride(0), h_expert=put["h"].stride(1)),
        **dict(g_row=put["grad"].stride(0), g_task=put["grad"].stride(1)),
        **dict(logits_type=TYPE[case.small_dtype], stat_type=TYPE[case.small_dtype]),
        "logits_row": 0 if logits is None else logits[:1].numel(),
        "num_static": 0 if stat is None else stat.numel(),
    }
    result = {
        "out": device.empty(b, t, d, dtype=case.dtype),
        "lse": None if logits is None else device.empty(b, t, dtype=F32),
        "dexperts": device.empty(b, e, d, dtype=case.dtype),
        "dlogits": None if logits is None else device.empty(*logits.shape, dtype=logits.dtype),
        "dstatic": None if stat is None else device.empty(*stat.shape, dtype=stat.dtype),
    }
    forward = {name: x for name, x in fields.items() if name not in ("grad", "g_row", "g_task")}
    if t:
        device.call(device.library.mix_forward, {**forward, "out": result["out"], "lse": result["lse"]}, FIELDS)
    device.call(device.library.mix_backward, {**fields, **result, "out": None}, FIELDS)
    return result


def assert_right(case: Case, got: dict[str, Tensor | None], want: dict[str, Tensor | None]) -> None:
    """Within one rounding to the storage type, and float32 accumulation."""
    unit = {F32: 2e-6, BF16: 2.0**-8, F16: 2.0**-11, F64: 2e-6}
    # lse near 1e4 is stored to 1e-3, and backward recomputes the softmax from it.
    slack = 2e-3 if case.extreme else 2e-5
    for name, reference in want.items():
        if reference is not None:
            rtol = unit[got[name].dtype] + (slack if case.extreme else 0)
            torch.testing.assert_close(
                got[name].double(), reference, rtol=rtol, atol=slack, msg=lambda m, n=name: f"{n}: {m}"
            )


CASES = [
    Case((5, 3, 5, 32)),
    Case((3, 5, 6, 7), static="dense", mask=True, grad_lse=True, max_blocks=1),
    Case((9, 2, 4, 1), static="native"),
    Case((4, 9, 3, 40), BF16, mask=True, small_dtype=BF16),
    Case((2, 4, 8, 264), BF16, static="native", strided=True, max_blocks=1),
    Case((3, 3, 4, 1030), F16, static="dense"),
    Case((2, 2, 3, 1100), F32, logits="packed", static="packed", grad_lse=True),
    Case((6, 4, 7, 12), logits="packed", small_dtype=F16, max_blocks=2),
    Case((5, 3, 6, 9), F16, logits=None, static="dense", mask=True, max_blocks=1),
    Case((5, 3, 6, 16), logits=None, static="packed", small_dtype=F64),
    Case((4, 5, 8, 24), BF16, static="ones", mask=True),
    Case((4, 3, 40, 8), static="native", extreme=True, grad_lse=True),
    Case((3, 2, 7, 20), mask=True, extreme=True, strided=True),
    Case((3, 8, 1601, 4), static="dense", mask=True, max_blocks=2),  # weights too large for shared memory
    Case((2, 9, 1500, 3), BF16, small_dtype=F64),
    Case((1, 1, 1, 1), static="dense"),
    Case((600, 2, 3, 4), static="dense", mask=True),  # several rows a block
    Case((3, 0, 3, 4), mask=True),
    Case((3, 2, 0, 4), grad_lse=True),
    Case((3, 2, 3, 0), static="dense", grad_lse=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: Case) -> None:
    inputs = make(case)
    want = oracle(inputs)
    results = []
    for order in ("forward", "reverse", "shuffled"):
        got = run(Device(build("mix"), order, seed=3), case, inputs)
        assert_right(case, got, want)
        results.append(got)
    for got in results[1:]:
        for name, first in results[0].items():
            assert first is None or torch.equal(got[name], first), f"{name} depends on the order of threads"


def test_an_empty_batch_leaves_zero_gradients() -> None:
    """The summing kernel runs over the partials of no blocks at all."""
    device = Device(build("mix"))
    dstatic = device.empty(2, 3, dtype=F32)
    device.call(device.library.sum_nothing, dict(num_static=6, dstatic=dstatic), FIELDS)
    assert dstatic.eq(0).all()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("width", [5, 64, 300])
def test_equal_rows_give_equal_bits(width: int, dtype: torch.dtype) -> None:
    """Whatever warp, lane or block a batch row falls on, its sums have one order."""
    case = Case((7, 3, 6, width), dtype, mask=True, max_blocks=3)
    inputs = make(case)
    for name in ("h", "grad", "logits"):
        inputs[name][1:] = inputs[name][:1].clone()
    got = run(Device(build("mix")), case, inputs)
    for name in ("out", "lse", "dexperts", "dlogits"):
        assert torch.equal(got[name], got[name][:1].expand_as(got[name])), name


def test_nan_stays_in_its_row() -> None:
    case = Case((6, 2, 3, 20), max_blocks=1)
    inputs = make(case)
    want = oracle(inputs)
    inputs["h"][2, 1, 3] = torch.nan
    got = run(Device(build("mix")), case, inputs)
    others = torch.arange(6) != 2
    assert got["out"][2].isnan().any()
    assert_right(case, {k: v[others] for k, v in got.items() if v is not None},
                 {k: v[others] for k, v in want.items() if v is not None})  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("shape", [(5, 3, 2, 4), (70, 5, 6, 130), (1, 1, 1, 1), (3, 4, 5, 257)], ids=str)
def test_channel_wise(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    b, t, e, d = shape
    random = torch.Generator().manual_seed(d)
    draw = functools.partial(torch.randn, generator=random)
    h, grad, stat = draw(b, e, d).to(dtype), draw(b, t, d).to(dtype), draw(t, e, d)
    for order in ("forward", "shuffled"):
        device = Device(build("mix"), order, seed=1)
        put = {"h": device.put(h), "grad": device.put(grad), "stat": device.put(stat)}
        out, dexperts = device.empty(b, t, d, dtype=dtype), device.empty(b, e, d, dtype=dtype)
        dstatic = device.empty(t, e, d, dtype=F32)
        fields = {
            **put,
            **dict(type=TYPE[dtype], batch=b, tasks=t, experts=e, width=d, num_static=stat.numel()),
            **dict(h_row=e * d, h_expert=d, g_row=t * d, g_task=d, out=out, dexperts=dexperts, dstatic=dstatic),
        }
        device.call(device.library.channel_forward, fields, FIELDS)
        device.call(device.library.channel_backward, fields, FIELDS)
        want = {
            "out": torch.einsum("tjd,bjd->btd", stat.double(), h.double()),
            "dexperts": torch.einsum("tjd,btd->bjd", stat.double(), grad.double()),
            "dstatic": torch.einsum("btd,bjd->tjd", grad.double(), h.double()),
        }
        assert_right(Case(shape, dtype), {"out": out, "dexperts": dexperts, "dstatic": dstatic}, want)


# Small, with several groups of rows a block and more than one warp, so that every barrier separates something.
SENSITIVE = Case((600, 2, 3, 12), static="dense", max_blocks=3)


def check(case: Case) -> Callable[[Device], None]:
    inputs = make(case)
    want = oracle(inputs)
    return lambda device: assert_right(case, run(device, case, inputs), want)


def test_every_barrier_matters() -> None:
    assert_every_barrier_matters(check(SENSITIVE), build("mix"), range(5))


def test_a_wrong_index_is_noticed() -> None:
    wrong = build("mix", ("mix.cuh", "dweights + (static_cast<int64_t>(slice0) * a.rows + r)",
                          "dweights + (static_cast<int64_t>(slice0) * a.rows + 0)"))  # fmt: skip
    assert noticed(check(SENSITIVE), wrong)
