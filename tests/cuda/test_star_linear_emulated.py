"""The CUDA kernels of star_linear, executed on the host: every index, barrier, copy and order, against float64."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from emulated import Device, build, noticed
from torch import Tensor

FIELDS = (
    "type parameter_type batch domains outputs features x x_row sorted wide_ids order weight own_weight bias own_bias "
    "grad saved activation out z dweight down_weight dbias down_bias large chunk_rows"
).split()
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
TYPE = {F32: 0, F16: 1, BF16: 2}
ACTIVATIONS = ["", "relu", "gelu", "silu", "tanh", "sigmoid"]
FUNCTIONS = {
    "": lambda z: z, "relu": torch.relu, "gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu,
    "tanh": torch.tanh, "sigmoid": torch.sigmoid,
}  # fmt: skip
NEEDS_INPUT = ("gelu", "silu")
UNIT = {F32: 2e-6, BF16: 2.0**-8, F16: 2.0**-11}


@dataclass(frozen=True)
class Case:
    """B, P, N, K; how it is computed. bad: some ids outside [0, P)."""

    batch: int
    domains: int
    outputs: int
    features: int
    dtype: torch.dtype = F16
    activation: str = ""
    bias: str = "both"  # "both", "shared", "own", "none"
    parameters: torch.dtype | None = None  # None: dtype
    ids: torch.dtype = torch.int64
    bad: bool = False
    strided: bool = False
    large: int = -1
    chunk_rows: int = 0

    def __str__(self) -> str:
        parts = [f"{self.batch}x{self.domains}x{self.outputs}x{self.features}", str(self.dtype)]
        rest = ("activation", "parameters", "bad", "strided", "large", "chunk_rows")
        parts += [f"{name}={getattr(self, name)}" for name in rest if getattr(self, name) not in ("", None, False, 0)]
        return "-".join(parts).replace("torch.", "")


def make(case: Case) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(case.batch + 7 * case.outputs + 31 * case.features)
    parameters = case.parameters or case.dtype

    def draw(*shape: int, dtype: torch.dtype = parameters) -> Tensor:
        return torch.randn(shape, generator=gen).to(dtype)

    ids = torch.randint(case.domains, (case.batch,), generator=gen)
    ids = torch.where(torch.rand(case.batch, generator=gen) < 0.5, case.domains // 2, ids)  # one of them is large
    if case.bad:
        ids[1::5], ids[2::7] = -3, case.domains
    return {
        "ids": ids.to(case.ids),
        "x": draw(case.batch, case.features, dtype=case.dtype),
        "weight": (draw(case.outputs, case.features, dtype=F32) / max(1, case.features) ** 0.5).to(parameters),
        "own_weight": draw(case.domains, case.outputs, case.features),
        "bias": draw(case.outputs),
        "own_bias": draw(case.domains, case.outputs),
        "grad": draw(case.batch, case.outputs, dtype=case.dtype),
    }


def oracle(case: Case, inputs: dict[str, Tensor], saved: Tensor | None) -> dict[str, Tensor]:
    """z, y and the gradients in float64; those that come after an activation use the values that it left, rounded.

    W * W_p enters as the kernels have it, rounded once to x's dtype.
    """
    ids = inputs["ids"].long()
    x, weight, own, bias, own_bias, grad = (t.double() for name, t in inputs.items() if name != "ids")
    known = (ids >= 0) & (ids < case.domains)
    p = torch.where(known, ids, 0)
    product = weight * own
    if case.dtype != F32:
        product = product.to(F32).to(case.dtype).double()
    x = torch.where(known[:, None], x, 0)
    z = torch.einsum("bk,bnk->bn", x, product[p])
    z = z + (bias if case.bias in ("both", "shared") else 0) + (own_bias[p] if case.bias in ("both", "own") else 0)
    z = torch.where(known[:, None], z, torch.nan)
    dz = grad
    if case.activation:
        at = saved.double()
        if case.activation in NEEDS_INPUT:
            leaf = at.requires_grad_()
            (dz,) = torch.autograd.grad(FUNCTIONS[case.activation](leaf), leaf, grad)
        else:
            slope = {"relu": (at > 0).double(), "tanh": 1 - at * at, "sigmoid": at * (1 - at)}
            dz = grad * slope[case.activation]
    dz = torch.where(known[:, None], dz, 0)
    one_hot = torch.nn.functional.one_hot(p, case.domains).double() * known[:, None]
    sums = torch.einsum("bp,bn,bk->pnk", one_hot, dz, x)
    down_bias = torch.einsum("bp,bn->pn", one_hot, dz)
    return {
        "z": z,
        "y": FUNCTIONS[case.activation](z),
        "dx": torch.einsum("bn,bnk->bk", dz, product[p]),
        "dweight": (sums * own).sum(0),
        "down_weight": sums * weight,
        "dbias": down_bias.sum(0),
        "down_bias": down_bias,
    }


def run(device: Device, case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Forward and all gradients on the emulated device; every output starts as NaN."""
    b, domains, n, k = case.batch, case.domains, case.outputs, case.features
    put = {name: device.put(tensor) for name, tensor in inputs.items()}
    if case.strided:  # rows of a wider buffer that starts at an odd place
        put["x"] = device.put(torch.full((b, k + 3), torch.nan, dtype=case.dtype))[:, 1 : k + 1].copy_(inputs["x"])
    parameters = case.parameters or case.dtype
    ids, order = torch.sort(inputs["ids"], stable=True)
    shared = {
        **dict(type=TYPE[case.dtype], parameter_type=TYPE[parameters], batch=b, domains=domains),
        **dict(outputs=n, features=k, x=put["x"], x_row=put["x"].stride(0), weight=put["weight"]),
        **dict(sorted=device.put(ids), order=device.put(order), wide_ids=int(case.ids == torch.int64)),
        **dict(own_weight=put["own_weight"], activation=ACTIVATIONS.index(case.activation)),
        **dict(large=case.large, chunk_rows=case.chunk_rows),
    }
    found = {name: device.empty(b, n, dtype=case.dtype) for name in ("y", "z")}
    found["dx"] = device.empty(b, k, dtype=case.dtype)
    shapes = dict(dweight=(n, k), down_weight=(domains, n, k), dbias=(n,), down_bias=(domains, n))
    own = {name: device.empty(*shape, dtype=parameters) for name, shape in shapes.items()}
    biases = {"bias": put["bias"] if case.bias in ("both", "shared") else None}
    biases["own_bias"] = put["own_bias"] if case.bias in ("both", "own") else None
    device.call(device.library.forward, {**shared, **biases, "out": found["y"], "z": found["z"]}, FIELDS)
    saved = found["z"] if case.activation in NEEDS_INPUT else found["y"]
    back = {**shared, "grad": put["grad"], "saved": saved if case.activation else None}
    device.call(device.library.input_gradient, {**back, "out": found["dx"]}, FIELDS)
    device.call(device.library.parameter_gradients, {**back, **own}, FIELDS)
    return {**found, **own}


def saved_of(case: Case, got: dict[str, Tensor]) -> Tensor:
    return got["z" if case.activation in NEEDS_INPUT else "y"]


def assert_right(case: Case, got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Within float32 sums of operands of the dtype (dz is rounded to it), and one rounding at the store."""
    for name, reference in want.items():
        tensor = got[name]
        scale = reference.nan_to_num().abs().max().item() if reference.numel() else 1.0
        rounded_dz = name.startswith("d") and case.activation and case.dtype != F32
        atol = scale * (2e-6 + (UNIT[case.dtype] if rounded_dz else 0))
        torch.testing.assert_close(
            tensor.double(), reference, rtol=UNIT[tensor.dtype], atol=atol, equal_nan=name in ("y", "z"),
            msg=lambda m, n=name: f"{n}: {m}",
        )  # fmt: skip


CASES = [
    Case(1, 1, 1, 1),
    Case(5, 3, 7, 9, F32, "relu", bad=True),
    Case(90, 3, 33, 40, F16, "gelu", bias="own"),
    Case(130, 4, 24, 136, BF16, "relu", bad=True, ids=torch.int32),
    Case(67, 2, 40, 64, BF16, "silu", parameters=F32, bias="shared"),
    Case(70, 3, 37, 21, F16, "sigmoid", parameters=F32, bias="none"),
    Case(160, 2, 64, 64, F16, "", chunk_rows=32),
    Case(200, 2, 72, 136, F16, "tanh", large=1, chunk_rows=64),
    Case(150, 3, 136, 72, BF16, "gelu", large=1, bad=True),
    Case(140, 2, 129, 35, F16, "relu", large=1, strided=True),
    Case(300, 2, 12, 20, F32, "gelu", chunk_rows=64),
    Case(33, 3, 17, 35, F16, "sigmoid", strided=True, bias="none"),
    Case(20, 2, 6, 18, F32, "tanh", strided=True),
    Case(9, 2, 3, 300, BF16, "silu", bias="shared"),
    Case(7, 30, 5, 12, F32, bad=True),  # most domains have no row; more domains than slices of the combining sums
    Case(3, 2, 4, 0, F16, "relu"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: Case) -> None:
    inputs, results = make(case), []
    for order in ("forward", "reverse", "shuffled"):
        device = Device(build("star_linear"), order, seed=3)
        got = run(device, case, inputs)
        assert_right(case, got, oracle(case, inputs, saved_of(case, got)))
        assert device.library.bank_conflicts() == 0
        results.append(got)
    for got in results[1:]:
        for name, first in results[0].items():
            assert torch.equal(got[name].nan_to_num(7), first.nan_to_num(7)), f"{name} depends on the order of threads"


def test_rows_and_domains_that_nobody_has() -> None:
    """Rows of no domain: NaN, no gradient, and nothing of them read. A domain without rows: exactly 0, not read."""
    case = Case(70, 6, 12, 16, F16, "relu", bad=True)
    inputs = make(case)
    inputs["ids"][inputs["ids"] == 4] = 1
    clean = run(Device(build("star_linear")), case, inputs)
    bad = (inputs["ids"] < 0) | (inputs["ids"] >= 6)
    for name in ("x", "grad"):
        inputs[name][bad] = torch.nan
    for name in ("own_weight", "own_bias"):
        inputs[name][4] = torch.nan
    got = run(Device(build("star_linear")), case, inputs)
    assert got["y"][bad].isnan().all() and not got["y"][~bad].isnan().any() and (got["dx"][bad] == 0).all()
    assert (got["down_weight"][4] == 0).all() and (got["down_bias"][4] == 0).all()
    for name in clean:
        assert torch.equal(got[name].nan_to_num(7), clean[name].nan_to_num(7)), name


def test_a_nan_stays_in_its_row_and_its_domain() -> None:
    case = Case(90, 3, 12, 40, F16, "silu", chunk_rows=32)
    inputs = make(case)
    clean = run(Device(build("star_linear")), case, inputs)
    inputs["x"][4, 7] = torch.nan
    got = run(Device(build("star_linear")), case, inputs)
    others = torch.arange(90) != 4
    assert got["y"][4].isnan().all() and got["dx"][4].isnan().all()
    for name in ("y", "z", "dx"):
        assert torch.equal(got[name][others], clean[name][others]), name
    other_domains = torch.arange(3) != inputs["ids"][4]
    for name in ("down_weight", "down_bias"):
        assert torch.equal(got[name][other_domains], clean[name][other_domains]), name


# Chunks of five steps of 32 rows, so that the last panels lie where the bias's sums go; more than one warp and tile.
SENSITIVE = Case(400, 3, 40, 136, F16, "relu", chunk_rows=160)


def check(case: Case) -> Callable[[Device], None]:
    inputs = make(case)

    def on(device: Device) -> None:
        got = run(device, case, inputs)
        assert_right(case, got, oracle(case, inputs, saved_of(case, got)))

    return on


def test_every_barrier_and_every_wait_matters() -> None:
    """The sums' of expert_linear, one barrier and the wait for copies in each step, one before the bias's sums, one
    between the domains' shares."""
    library = build("star_linear")
    barriers = Device(library).library.barriers()
    mine = [b for b in range(barriers) if b not in EXPERT_LINEAR_KERNEL]
    assert barriers == 8 and len(mine) == 5
    assert not noticed(check(SENSITIVE), library)
    for barrier in mine:
        assert noticed(check(SENSITIVE), library, skipped_barrier=barrier), f"barrier {barrier} may go without notice"


# Of the header that star_linear includes: their kernel is not run here.
EXPERT_LINEAR_KERNEL = (1, 2, 3)

WRONG = {
    "rows as they come": ("star_linear.cuh", "return row[i];", "return row[i] + 1;"),
    "stored where they lie": ("star_linear.cuh", "return order[row];", "return row;"),
    "the first domain's weight": ("star_linear.cuh", "+ p.domain * (a.outputs * a.features);", ";"),
    "a chunk too far": ("star_linear.cuh", "a.partial + (begin / a.rows + p + 1)", "a.partial + (begin / a.rows + p)"),
    "rows of the step after": ("star_linear.cuh", "coming = rows_of(next + 1)", "coming = rows_of(next)"),
    "the tile's column forgotten": ("star_linear.cuh", "own + corner", "own"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_index_is_noticed(wrong: str) -> None:
    assert noticed(check(SENSITIVE), build("star_linear", WRONG[wrong], "FLOAT16_ONLY"))


def plan(product: int, batch: int, domains: int, outputs: int, features: int, numbers: int = 1, weights: int = 1):
    """large, rows of a chunk."""
    found = (ctypes.c_int64 * 2)()
    sizes = [ctypes.c_int64(n) for n in (batch, domains, outputs, features)]
    Device(build("star_linear")).library.plan(product, *sizes, numbers, weights, found)
    return tuple(found)


def test_plan() -> None:
    """Large tiles where they fill a GPU without waste, though every domain may end in the middle of one."""
    assert plan(0, 16384, 4, 256, 512) == (1, 128)
    assert plan(0, 16384, 200, 256, 512) == (0, 64)  # a hundred rows a domain
    assert plan(0, 1024, 4, 256, 512) == (0, 64)  # 24 large tiles
    assert plan(0, 16384, 4, 256, 512, numbers=0, weights=0) == (0, 64)
    assert plan(0, 16384, 4, 256, 512, weights=0) == (0, 64)
    assert plan(1, 16384, 4, 256, 6) == (0, 64)
    large, rows = plan(2, 16384, 4, 256, 512, weights=0)
    assert large == 1 and rows % 32 == 0 and rows >= 512
