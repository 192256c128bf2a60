"""The CUDA kernels of expert_mix, executed on the host: every index, barrier, copy and order, against float64."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from emulated import ORDERS, Device, assert_every_barrier_matters, build, noticed
from torch import Tensor

FIELDS = (
    "type batch tasks experts width features units counts x x_row x_unit weight bias bias_type activation logits "
    "logits_type logits_row stat stat_type mask columns out lse"
).split()
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
TYPE = {F32: 0, F16: 1, BF16: 2, F64: 3}
ACTIVATIONS = ["", "relu", "gelu", "silu", "tanh", "sigmoid"]
FUNCTIONS = {
    "": lambda z: z, "relu": torch.relu, "gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu,
    "tanh": torch.tanh, "sigmoid": torch.sigmoid,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """B, T, D, K; experts of each unit, or how many read all of x [B,K]; the optional parts."""

    batch: int
    tasks: int
    width: int
    features: int
    counts: tuple[int, ...] | int = 3
    dtype: torch.dtype = F16
    activation: str = "relu"
    bias: torch.dtype | None = F32
    logits: bool = True
    static: bool = False
    map: str = ""  # mask, or columns of packed weights
    small_dtype: torch.dtype = F32  # of logits and static
    extreme: bool = False
    strided: bool = False

    def __str__(self) -> str:
        parts = [f"{self.batch}x{self.tasks}x{self.width}x{self.features}", str(self.counts)]
        rest = ("dtype", "activation", "bias", "logits", "static", "map", "small_dtype", "extreme", "strided")
        return "-".join(parts + [f"{name}={getattr(self, name)}" for name in rest]).replace("torch.", "")

    @property
    def units(self) -> list[int]:
        """Of each expert."""
        counts = (self.counts,) if isinstance(self.counts, int) else self.counts
        return [unit for unit, count in enumerate(counts) for _ in range(count)]


def make(case: Case) -> dict[str, Tensor | None]:
    """Inputs of the case. Experts that no task may use hold NaN, and so does the unit that they alone read."""
    b, t, d, k, e = case.batch, case.tasks, case.width, case.features, len(case.units)
    gen = torch.Generator().manual_seed(b + 7 * t + 31 * d + 101 * k)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, dtype=F64)

    allowed = torch.ones(t, e, dtype=torch.bool)
    if case.map:
        allowed = torch.rand(t, e, generator=gen) < 0.6
        allowed[:1] = False
        allowed[:, 1:2] = False
    columns, size = None, (t, e)
    if case.map == "columns":  # two more than are used
        size = (int(allowed.sum()) + 2,)
        columns = torch.full((t, e), -1, dtype=torch.int32)
        columns[allowed] = torch.randperm(*size, generator=gen)[:-2].to(torch.int32)
    shape = (b, k) if isinstance(case.counts, int) else (b, len(case.counts), k)
    x, weight, bias, logits = draw(*shape), draw(e, d, k) / max(1, k) ** 0.5, draw(e, d), 2 * draw(b, *size)
    used = allowed.any(0)
    weight[~used], bias[~used] = torch.nan, torch.nan
    for unit in range(0 if isinstance(case.counts, int) else len(case.counts)):
        if not any(used[i] for i, u in enumerate(case.units) if u == unit):
            x[:, unit] = torch.nan
    if case.extreme:
        logits = logits.sign() * 1e4 + logits.round()
        logits[..., ::3] = -torch.inf
    return {
        "x": x.to(case.dtype),
        "weight": weight.to(case.dtype),
        "bias": None if case.bias is None else bias.to(case.bias),
        "logits": logits.to(case.small_dtype) if case.logits else None,
        "stat": draw(*size).to(case.small_dtype) if case.static else None,
        "mask": allowed if case.map == "mask" else None,
        "columns": columns,
    }


def oracle(case: Case, inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """out and lse in float64."""
    x, weight, bias, logits, stat = (
        None if inputs[name] is None else inputs[name].double() for name in ("x", "weight", "bias", "logits", "stat")
    )
    t, e = case.tasks, len(case.units)
    place = torch.arange(t * e).view(t, e) if inputs["columns"] is None else inputs["columns"]
    allowed = place >= 0 if inputs["mask"] is None else inputs["mask"]
    rows = x[:, None].expand(-1, e, -1) if x.dim() == 2 else x[:, case.units]
    z = torch.einsum("bek,edk->bed", rows, weight) + (0 if bias is None else bias)
    h = FUNCTIONS[case.activation](z).where(allowed.any(0)[:, None], 0)
    weights, lse = torch.zeros(case.batch, t, e, dtype=F64), None
    if logits is not None:
        wide = logits.flatten(1)[:, place.clamp_min(0).long()].masked_fill(~allowed, -torch.inf)
        weights = torch.softmax(wide, 2).where(allowed, 0)
        lse = torch.logsumexp(wide, 2)
    if stat is not None:
        weights = weights + stat.flatten()[place.clamp_min(0).long()].where(allowed, 0)
    return {"out": torch.einsum("bte,bed->btd", weights, h), "lse": lse}


def run(device: Device, case: Case, inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Forward on the emulated device; every output starts as NaN."""
    b, t, d, k = case.batch, case.tasks, case.width, case.features
    put = {name: None if tensor is None else device.put(tensor) for name, tensor in inputs.items()}
    if case.strided:  # rows of a wider buffer that starts at an odd place
        wide = device.put(torch.full((*inputs["x"].shape[:-1], k + 3), torch.nan, dtype=case.dtype))
        put["x"] = wide[..., 1 : k + 1].copy_(inputs["x"])
    counts = torch.tensor([case.counts] if isinstance(case.counts, int) else case.counts, dtype=torch.int64)
    found = {
        "out": device.empty(b, t, d, dtype=case.dtype),
        "lse": device.empty(b, t, dtype=F32) if case.logits else None,
    }
    fields = {
        **put,
        **found,
        **dict(type=TYPE[case.dtype], batch=b, tasks=t, experts=len(case.units), width=d, features=k),
        **dict(units=len(counts), counts=counts, x_row=put["x"].stride(0)),
        **dict(x_unit=put["x"].stride(1) if put["x"].dim() == 3 else 0),
        **dict(bias_type=TYPE[case.bias or F32], activation=ACTIVATIONS.index(case.activation)),
        **dict(logits_type=TYPE[case.small_dtype], stat_type=TYPE[case.small_dtype]),
        "logits_row": put["logits"][:1].numel() if case.logits else 0,
    }
    device.call(device.library.expert_mix_forward, fields, FIELDS)
    return found


def assert_right(case: Case, got: dict[str, Tensor | None], want: dict[str, Tensor | None]) -> None:
    """Within float32 sums and one rounding at the store: the experts' outputs are not rounded."""
    unit = {F32: 2e-6, BF16: 2.0**-8, F16: 2.0**-11}
    for name, reference in want.items():
        if reference is None:
            continue
        finite = reference[reference.isfinite()]
        scale = finite.abs().max().item() if finite.numel() else 1.0
        torch.testing.assert_close(
            got[name].double(), reference, rtol=unit[got[name].dtype], atol=3e-6 * scale,
            msg=lambda m, n=name: f"{n}: {m}",
        )  # fmt: skip


CASES = [
    Case(1, 1, 1, 1, 1),
    Case(5, 2, 7, 9, 3, F32, "gelu", static=True),
    Case(70, 3, 33, 40, (1, 2), F16, static=True),
    Case(66, 1, 72, 136, (2, 0, 3), BF16, "silu"),
    Case(67, 2, 40, 64, (1, 1, 1), BF16, "tanh", bias=BF16, map="mask", static=True),
    Case(64, 4, 64, 64, 2, F16, "", bias=None),
    Case(3, 5, 130, 24, (2, 2), F16, "sigmoid", map="columns", static=True, small_dtype=F16),
    Case(65, 4, 9, 5, (2, 1, 3), F32, map="mask", logits=False, static=True),
    Case(9, 8, 12, 70, 5, F32, "gelu", map="columns", small_dtype=BF16),
    Case(33, 2, 17, 35, (3, 1), F16, strided=True, bias=F16),
    Case(20, 1, 6, 18, (1, 3), F32, strided=True, map="mask"),
    Case(6, 3, 8, 16, 40, BF16, extreme=True, static=True),
    Case(5, 7, 8, 300, 2, BF16, "tanh", logits=False, static=True, small_dtype=F64),
    Case(4, 3, 5, 0, 2, F16),  # the bias alone
    Case(3, 2, 0, 4, 2, F16),  # lse alone
    Case(3, 2, 4, 5, 0, F32),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: Case) -> None:
    inputs, results = make(case), []
    want = oracle(case, inputs)
    for order in ORDERS:
        device = Device(build("expert_mix"), order, seed=3)
        got = run(device, case, inputs)
        assert_right(case, got, want)
        assert device.library.bank_conflicts() == 0
        results.append(got)
    for got in results[1:]:
        for name, first in results[0].items():
            assert first is None or torch.equal(got[name], first), f"{name} depends on the order of threads"


def test_as_many_units_as_a_launch_holds() -> None:
    """And as many more as there are, where each has one expert."""
    for counts in ((2, *(1 for _ in range(254)), 0), (1,) * 300):
        case = Case(2, 2, 3, 8, counts)
        inputs = make(case)
        assert_right(case, run(Device(build("expert_mix")), case, inputs), oracle(case, inputs))


@pytest.mark.parametrize("dtype", [F32, F16])
def test_equal_rows_give_equal_bits(dtype: torch.dtype) -> None:
    """In whatever tile and lane a batch row falls."""
    case = Case(70, 3, 37, 40, 4, dtype, "gelu", static=True)
    inputs = make(case)
    for name in ("x", "logits"):
        inputs[name] = inputs[name][:1].repeat(case.batch, *[1] * (inputs[name].dim() - 1))
    for tensor in run(Device(build("expert_mix")), case, inputs).values():
        assert torch.equal(tensor, tensor[:1].expand_as(tensor))


def test_a_nan_stays_in_its_row_and_an_expert_with_its_tasks() -> None:
    case = Case(70, 3, 20, 12, (2, 1), BF16, map="mask", static=True)
    inputs = make(case)
    inputs["mask"] = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 0]], dtype=torch.bool)
    for name in ("weight", "bias", "x"):
        inputs[name] = inputs[name].nan_to_num(0.5)
    clean = run(Device(build("expert_mix")), case, inputs)["out"]
    inputs["x"][5, 0], inputs["logits"][66, 2, 1], inputs["weight"][2] = torch.nan, torch.nan, torch.nan
    found = run(Device(build("expert_mix")), case, inputs)["out"]
    hurt = torch.zeros(70, 3, dtype=torch.bool)
    hurt[5], hurt[66, 2], hurt[:, 0] = True, True, True
    assert found[hurt].isnan().all() and torch.equal(found[~hurt], clean[~hurt])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_used_experts(dtype: torch.dtype) -> None:
    """Copied or cleared in their place; what nobody uses is zero, whatever was in it."""
    mask = torch.tensor([[1, 0, 0, 1], [1, 0, 1, 0]], dtype=torch.bool)
    x = torch.randn(4, 4099, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1] = torch.nan
    for order in ORDERS:
        device = Device(build("expert_mix"), order, seed=1)
        given, found = device.put(x), device.empty(*x.shape, dtype=dtype)
        fields = dict(type=TYPE[dtype], tasks=2, experts=4, features=4099, mask=device.put(mask))
        for to in (found, given):
            device.call(device.library.used_experts, {**fields, "x": given, "out": to}, FIELDS)
            assert torch.equal(to, x.where(mask.any(0)[:, None], 0))


def test_what_one_kernel_serves() -> None:
    library = Device(build("expert_mix")).library
    library.slab_rows.restype = ctypes.c_int64
    many = 1 << 16
    for tasks, counts, fused in ((1, [5], 1), (8, [2, 0], 1), (9, [2, 0], 0), (2, [1] * 300, 1), (2, [2] * 257, 0)):
        assert library.fuses(ctypes.c_int64(tasks), (ctypes.c_int64 * len(counts))(*counts), len(counts)) == fused
    for row_bytes in (0, 1, 500, 4096, 8192 + 2, many, 1 << 30):
        rows = library.slab_rows(ctypes.c_int64(row_bytes))
        assert rows > 0 and rows % 128 == 0
        assert rows == 128 or (32 << 20) - 128 * row_bytes < rows * row_bytes <= 32 << 20 or row_bytes == 0


# Several experts, steps and tiles, so that every stage is filled anew and both places of the weights are.
SENSITIVE = Case(70, 2, 40, 136, 3, F16, static=True)


def check(case: Case) -> Callable[[Device], None]:
    inputs = make(case)
    want = oracle(case, inputs)
    return lambda device: assert_right(case, run(device, case, inputs), want)


def test_every_barrier_and_every_wait_matters() -> None:
    """The barrier and the wait for copies in each step."""
    library = build("expert_mix")
    others = Device(library).library.others_barriers()
    assert_every_barrier_matters(check(SENSITIVE), library, range(others, others + 2))


WRONG = {
    "the other expert's weights": ("place = 1 - place;", "place = place;"),
    "every unit reads the first": ("x + walk.unit * a.linear.x_unit", "x + 0 * walk.unit * a.linear.x_unit"),
    "a strip in another's place": ("c[MixTile::kTilesM - 1][j][k] = h;", "c[0][j][k] = h;"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_index_is_noticed(wrong: str) -> None:
    library = build("expert_mix", ("expert_mix.cuh", *WRONG[wrong]), "FLOAT16_ONLY")
    assert any(noticed(check(case), library) for case in (SENSITIVE, CASES[2]))
