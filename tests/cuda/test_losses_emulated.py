"""The CUDA kernels of the losses, executed on the host: every index, barrier and thread order against float64."""

from collections.abc import Callable

import pytest
import torch
from emulated import ORDERS, Device, assert_every_barrier_matters, build, noticed
from torch import Tensor

import mtlkernels as mtl

FIELDS = "type batch tasks x x2 y y_type z z_type factor loss dx dx2".split()
TYPE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3, torch.bool: 4, torch.uint8: 4,
        torch.int32: 5, torch.int64: 6}  # fmt: skip
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
Run = Callable[[Device], dict[str, Tensor]]


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def esmm_case(batch: int, dtype: torch.dtype, label: torch.dtype, weight: float = 0.7) -> tuple[Run, dict[str, Tensor]]:
    """A call on a device, and what it should give, in float64."""
    g = random(batch)
    a, c = (torch.randn(batch, generator=g).mul(20).to(dtype) for _ in range(2))
    y, z = torch.rand(batch, generator=g), torch.rand(batch, generator=g)
    if not label.is_floating_point:
        y = y < 0.5
        z = y & (z < 0.5)
    y, z = y.to(label), z.to(label)

    def run(device: Device) -> dict[str, Tensor]:
        found = {name: device.empty(*shape, dtype=F32) for name, shape in
                 (("loss", (1,)), ("dx", (batch,)), ("dx2", (batch,)))}  # fmt: skip
        fields = dict(type=TYPE[dtype], batch=batch, tasks=1, x=device.put(a), x2=device.put(c), y=device.put(y),
                      y_type=TYPE[label], z=device.put(z), z_type=TYPE[label],
                      factor=device.put(torch.tensor([weight])))  # fmt: skip
        device.call(device.library.esmm, {**fields, **found}, FIELDS)
        return found

    leaves = [t.double().requires_grad_() for t in (a, c)]
    loss = mtl.esmm_loss(*leaves, y, z, ctcvr_weight=torch.tensor(weight).item(), backend="reference")
    grads = torch.autograd.grad(loss, leaves)
    return run, {"loss": loss.detach().reshape(1), "dx": grads[0], "dx2": grads[1]}


def bce_case(shape: tuple[int, int], dtype: torch.dtype, label: torch.dtype, mask: torch.dtype | None):
    """The same of masked_bce. What is masked holds NaN; task 1 is masked throughout."""
    g = random(sum(shape))
    x = torch.randn(shape, generator=g).mul(20).to(dtype)
    y = torch.rand(shape, generator=g)
    y = (y if label.is_floating_point else y < 0.5).to(label)
    m = None
    if mask is not None:
        m = torch.rand(shape, generator=g)
        m = torch.where(m < 0.4, 0, m)
        m[:, 1:2] = 0
        m = (m if mask.is_floating_point else m > 0).to(mask)
        x[m == 0] = torch.nan
        if label.is_floating_point:
            y[m == 0] = torch.nan

    def run(device: Device) -> dict[str, Tensor]:
        found = {"loss": device.empty(shape[1], dtype=F32), "dx": device.empty(*shape, dtype=F32)}
        fields = dict(type=TYPE[dtype], batch=shape[0], tasks=shape[1], x=device.put(x), y=device.put(y),
                      y_type=TYPE[label])  # fmt: skip
        if m is not None:
            fields |= dict(z=device.put(m), z_type=TYPE[mask])
        device.call(device.library.bce, {**fields, **found}, FIELDS)
        return found

    leaf = x.double().requires_grad_()
    loss = mtl.masked_bce(leaf, y, m, backend="reference")
    return run, {"loss": loss.detach(), "dx": torch.autograd.grad(loss.sum(), leaf)[0]}


def assert_right(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, want in wanted.items():
        scale = max(want.abs().max().item(), 1e-2) if want.numel() else 0
        torch.testing.assert_close(found[name].double(), want, rtol=1e-6, atol=1e-6 * scale,
                                   msg=lambda m, n=name: f"{n}: {m}")  # fmt: skip


CASES = {
    **{f"esmm {b} {d} {t}": esmm_case(b, d, t) for b, d, t in [
        (1, F32, F32), (5, F16, torch.bool), (257, BF16, torch.int64), (1500, F32, torch.uint8), (70, F32, F64),
        (33, F16, BF16), (0, F32, F32), (70, F32, F16), (9, F32, torch.int32)]},
    **{f"bce {s} {d} {t} {m}": bce_case(s, d, t, m) for s, d, t, m in [
        ((1, 1), F32, F32, None), ((700, 4), F32, torch.bool, torch.bool), ((37, 3), F16, torch.int64, F32),
        ((5, 300), BF16, F32, torch.uint8), ((3, 520), F32, F16, F64), ((150, 16), F32, BF16, torch.int64),
        ((0, 3), F32, F32, None), ((0, 3), F32, F32, torch.bool), ((4, 0), F32, F32, torch.bool),
        ((1300, 1), F32, F32, None), ((600, 2), F32, F64, torch.int32), ((20, 129), F32, F32, BF16)]},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_against_float64(name: str) -> None:
    run, wanted = CASES[name]
    results = []
    for order in ORDERS:
        found = run(Device(build("losses"), order, seed=3))
        assert_right(found, wanted)
        results.append(found)
    for found in results[1:]:
        for part, first in results[0].items():
            assert torch.equal(found[part], first), f"{part} depends on the order of threads"


@pytest.mark.parametrize("shape", [(5, 3), (300, 1), (2, 600), (0, 3), (3, 0), (1, 1)], ids=str)
def test_scale(shape: tuple[int, int]) -> None:
    """to = grad * from; 0 stays 0, also under an infinite gradient."""
    g = random(1)
    grad, a, b = torch.randn(shape[1], generator=g), torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    grad[-1:], a[:, -1:] = torch.inf, 0
    for order in ORDERS:
        device = Device(build("losses"), order, seed=2)
        fields = dict(batch=shape[0], tasks=shape[1], factor=device.put(grad), x=device.put(a), x2=device.put(b),
                      dx=device.empty(*shape, dtype=F32), dx2=device.empty(*shape, dtype=F32))  # fmt: skip
        device.call(device.library.scale, fields, FIELDS)
        assert torch.equal(fields["dx"], torch.where(a == 0, 0, a * grad)) and torch.equal(fields["dx2"], b * grad)


def test_a_bad_row_is_nan_there_alone() -> None:
    y = torch.tensor([1.0, 0, 1.5, torch.nan, 1, 1])
    z = torch.tensor([1.0, 1, 0, 0, -1, 1])
    a, c = torch.randn(6, generator=random(0)), torch.randn(6, generator=random(1))
    device = Device(build("losses"))
    found = {name: device.empty(n, dtype=F32) for name, n in (("loss", 1), ("dx", 6), ("dx2", 6))}
    fields = dict(batch=6, tasks=1, x=device.put(a), x2=device.put(c), y=device.put(y), z=device.put(z),
                  factor=device.put(torch.ones(1)))  # fmt: skip
    device.call(device.library.esmm, {**fields, **found}, FIELDS)
    bad = torch.tensor([False, True, True, True, True, False])
    assert found["loss"].isnan().all()
    assert torch.equal(found["dx"].isnan(), bad) and torch.equal(found["dx2"].isnan(), bad)


def test_bad_labels_and_weights_are_nan_in_their_task_alone() -> None:
    x, y, m = torch.randn(5, 3, generator=random(0)), torch.ones(5, 3), torch.ones(5, 3)
    y[1, 0], y[2, 1], m[2, 1], m[4, 2] = 2, torch.nan, 0, -1
    device = Device(build("losses"))
    found = {"loss": device.empty(3, dtype=F32), "dx": device.empty(5, 3, dtype=F32)}
    fields = dict(batch=5, tasks=3, x=device.put(x), y=device.put(y), z=device.put(m))
    device.call(device.library.bce, {**fields, **found}, FIELDS)
    assert found["loss"].isnan().tolist() == [True, False, True]
    assert found["dx"].isnan().nonzero().tolist() == sorted([[1, 0], *([row, 2] for row in range(5))])
    device.call(device.library.bce, {**fields, **found, "z": device.put(torch.full((5, 3), 1e38))}, FIELDS)
    assert found["loss"].isnan().all(), "weights whose sum overflows"


# Several rows of threads a block and several blocks, so that every barrier separates something.
SENSITIVE = ("esmm 1500 torch.float32 torch.uint8", "bce (700, 4) torch.float32 torch.bool torch.bool")


def check(name: str) -> Callable[[Device], None]:
    run, wanted = CASES[name]
    return lambda device: assert_right(run(device), wanted)


@pytest.mark.parametrize("name", SENSITIVE)
def test_every_barrier_matters(name: str) -> None:
    assert_every_barrier_matters(check(name), build("losses"), range(3))


@pytest.mark.parametrize(
    "change",
    [
        ("losses.cuh", "sums[i + half * p.cols]", "sums[i + half]"),
        ("losses.cuh", "row0 += kLossUnroll * place.step) {\n    float x", "row0 += place.step) {\n    float x"),
        ("../common/losses.h", "x < C{0} ? large : small", "small"),
    ],
)
def test_a_wrong_kernel_is_noticed(change: tuple[str, str, str]) -> None:
    assert noticed(check("bce (700, 4) torch.float32 torch.bool torch.bool"), build("losses", change))
