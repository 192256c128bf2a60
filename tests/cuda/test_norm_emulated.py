"""The CUDA kernels of partitioned_norm, executed on the host: every index, barrier and thread order against float64."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from emulated import Device, assert_every_barrier_matters, build, noticed
from torch import Tensor

from mtlkernels.reference import partitioned_norm as plain

FIELDS = (
    "type batch width domains training eps_inverse x x_row grad grad_row ids sorted wide_ids order weight bias "
    "own_weight own_bias affine_type running_mean running_var running_type mean var count out dx dweight dbias "
    "down_weight down_bias rows"
).split()
TYPE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@pytest.fixture(autouse=True)
def rows_of_no_domain(monkeypatch):
    """The oracle as on a GPU, where nobody looks at the ids."""
    monkeypatch.setattr(plain, "_can_look", lambda domain: False)


@dataclass(frozen=True)
class Case:
    """B, D, P. bad: a few ids outside [0, P). rows: of a chunk, in place of the plan's."""

    shape: tuple[int, int, int]
    dtype: torch.dtype = F32
    training: bool = True
    affine: torch.dtype = F32
    running: torch.dtype = F32
    ids: torch.dtype = torch.int64
    strided: bool = False
    bad: bool = False
    rows: int = 0
    offset: float = 0.0

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")]
        parts += [f"{k}={v}" for k, v in vars(self).items() if k not in ("shape", "dtype") and v not in (F32, False)]
        return "-".join(parts).replace("torch.", "")


def make(case: Case) -> dict[str, Tensor]:
    batch, width, domains = case.shape
    random = torch.Generator().manual_seed(batch + 10 * width + 100 * domains)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=F64)

    ids = torch.randint(domains, (batch,), generator=random)
    if case.bad:
        ids[1::5], ids[2::7] = -3, domains
    return {
        "x": (2 * draw(batch, width) + case.offset).to(case.dtype),
        "ids": ids.to(case.ids),
        **{name: draw(width).to(case.affine) for name in ("weight", "bias")},
        **{name: draw(domains, width).to(case.affine) for name in ("own_weight", "own_bias")},
        "running_mean": draw(domains, width).to(case.running),
        "running_var": (draw(domains, width).abs() + 0.5).to(case.running),
        "grad": draw(batch, width).to(case.dtype),
    }


def oracle(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    wide = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    grad = wide.pop("grad")
    leaves = [wide[name].requires_grad_() for name in ("x", "weight", "bias", "own_weight", "own_bias")]
    out, mean, var, count = plain.partitioned_norm(*wide.values(), case.training, 1 / 1024)
    names = ("dx", "dweight", "dbias", "down_weight", "down_bias")
    gradients = dict(zip(names, torch.autograd.grad(out, leaves, grad), strict=True))
    return {"out": out.detach(), "mean": mean, "var": var, "count": count, **gradients}


def run(device: Device, case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Forward and backward on the emulated device; every output starts as NaN."""
    batch, width, domains = case.shape
    put = {name: device.put(t) for name, t in inputs.items()}
    if case.strided:  # rows of a wider buffer, and one row of gradients for all
        room = device.put(torch.full((batch, width + 16), torch.nan, dtype=case.dtype))
        put["x"] = room[:, :width].copy_(inputs["x"])
        put["grad"] = device.put(inputs["grad"][:1]).expand(batch, width)
    ids, order = torch.sort(inputs["ids"], stable=True)
    fields = {
        **put,
        **dict(type=TYPE[case.dtype], batch=batch, width=width, domains=domains, eps_inverse=1024),
        **dict(training=int(case.training), wide_ids=int(case.ids == torch.int64), rows=case.rows),
        **dict(x_row=put["x"].stride(0), grad_row=put["grad"].stride(0)),
        **dict(affine_type=TYPE[case.affine], running_type=TYPE[case.running]),
        "sorted": device.put(ids),
        "order": device.put(order),
    }
    statistics = {name: device.empty(domains, width, dtype=F32) for name in ("mean", "var")}
    statistics["count"] = device.put(torch.full((domains,), -1))
    own = {name: device.empty(domains, width, dtype=case.affine) for name in ("down_weight", "down_bias")}
    shared = {name: device.empty(width, dtype=case.affine) for name in ("dweight", "dbias")}
    out, dx = (device.empty(batch, width, dtype=case.dtype) for _ in range(2))
    forward = {name: t for name, t in fields.items() if name not in ("grad", "grad_row")}
    device.call(device.library.norm_forward, {**forward, **statistics, "out": out}, FIELDS)
    device.call(device.library.norm_backward, {**fields, **statistics, **own, **shared, "dx": dx}, FIELDS)
    return {"out": out, "dx": dx, **statistics, **own, **shared}


def assert_right(case: Case, got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Within one rounding to the storage type, and float32 sums of terms that may cancel."""
    unit = {F32: 2e-6, BF16: 2.0**-8, F16: 2.0**-11, F64: 2e-6}
    assert torch.equal(got["count"], want["count"])
    for name, reference in want.items():
        if name == "count":
            continue
        slack = 1e-4 if name.startswith("d") else 2e-5
        slack += abs(case.offset) * 2.0**-22 * (name in ("out", "mean", "dx", "dweight", "down_weight"))
        torch.testing.assert_close(
            got[name].double(), reference, rtol=unit[got[name].dtype], atol=slack, equal_nan=name == "out",
            msg=lambda m, n=name: f"{n}: {m}",
        )  # fmt: skip


CASES = [
    Case((40, 32, 3)),
    Case((40, 32, 3), training=False),
    Case((150, 7, 2), rows=8),  # more chunks of a domain than the merge has slices
    Case((33, 300, 2), affine=F64, running=F64),
    Case((60, 40, 4), BF16, affine=BF16, running=BF16, ids=torch.int32),
    Case((60, 264, 3), F16, rows=16),
    Case((50, 1100, 2), BF16, training=False),
    Case((30, 33, 1), F16, affine=F16),
    Case((45, 24, 3), strided=True, rows=5),
    Case((45, 21, 3), F16, strided=True, training=False, affine=F16),
    Case((45, 12, 3), bad=True, rows=4),
    Case((45, 12, 3), bad=True, training=False, ids=torch.int32),
    Case((40, 6, 50), BF16),  # most domains have no row or one
    Case((600, 4, 2), offset=1e4),
    Case((1, 1, 1)),
    Case((2, 1, 1), training=False),
    Case((9000, 1, 2)),  # chunks longer than the least
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: Case) -> None:
    inputs = make(case)
    if case.strided:
        inputs["grad"] = inputs["grad"][:1].expand_as(inputs["grad"])
    want = oracle(case, inputs)
    results = []
    for order in ("forward", "reverse", "shuffled"):
        got = run(Device(build("norm"), order, seed=3), case, inputs)
        assert_right(case, got, want)
        results.append(got)
    for got in results[1:]:
        for name, first in results[0].items():
            assert torch.equal(got[name].nan_to_num(7), first.nan_to_num(7)), f"{name} depends on the order of threads"


def test_rows_of_no_domain() -> None:
    """NaN, without a gradient."""
    for training in (True, False):
        case = Case((45, 12, 3), bad=True, training=training)
        inputs = make(case)
        got, bad = run(Device(build("norm")), case, inputs), (inputs["ids"] < 0) | (inputs["ids"] > 2)
        assert got["out"][bad].isnan().all() and not got["out"][~bad].isnan().any() and (got["dx"][bad] == 0).all()


def test_a_nan_stays_in_its_domain() -> None:
    case = Case((40, 32, 3), rows=8)
    inputs = make(case)
    clean = run(Device(build("norm")), case, inputs)
    inputs["x"][4, 7] = torch.nan
    got = run(Device(build("norm")), case, inputs)
    hurt = torch.zeros(40, 32, dtype=torch.bool)
    hurt[inputs["ids"] == inputs["ids"][4], 7] = True
    assert got["out"][hurt].isnan().all()
    for name in ("out", "dx"):
        assert torch.equal(got[name][~hurt], clean[name][~hurt]), name


# Several ways and chunks, and both merges with more than one warp, so that every barrier separates something.
SENSITIVE = Case((150, 12, 2), rows=16)


def check(case: Case) -> Callable[[Device], None]:
    inputs = make(case)
    want = oracle(case, inputs)
    return lambda device: assert_right(case, run(device, case, inputs), want)


def test_every_barrier_matters() -> None:
    assert_every_barrier_matters(check(SENSITIVE), build("norm"), range(6))


def test_a_wrong_index_is_noticed() -> None:
    wrong = build("norm", ("domain_groups.cuh", "a.bound[low] / rows - low) * rows",
                           "a.bound[low] / rows - low) * rows + 1"))  # fmt: skip
    assert noticed(check(SENSITIVE), wrong)
