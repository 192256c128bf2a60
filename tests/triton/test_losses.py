"""The Triton losses against the reference in float64: on a GPU, or in the interpreter."""

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import mtlkernels as mtl
from mtlkernels.triton.losses import pick_loss

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter: 0/0
TOLERANCE = {F32: 2e-6, F16: 2e-3, BF16: 2e-2}


@pytest.fixture
def dtypes(device: str) -> list[torch.dtype]:
    return [F32, F16, BF16] if device == "cuda" else [F32, F16]  # the interpreter's bfloat16 is not to be trusted


def both(call, logits: list[Tensor], grad: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Loss and gradients on Triton, and in float64 on the reference."""
    results = []
    for backend, dtype in (("triton", logits[0].dtype), ("reference", F64)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in logits]
        loss = call(*leaves, backend=backend)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves, grad.to(loss.dtype))])
    return results[0], results[1]


def close(found: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    assert found[0].dtype == F32 and all(g.dtype == dtype for g in found[1:])
    for one, other in zip(found, wanted, strict=True):
        tolerance = TOLERANCE[one.dtype]
        scale = max(other.abs().max().item(), 1e-2) if other.numel() else 0
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("label", [F32, F16, F64, torch.bool, torch.int64, torch.int32, torch.int8])
@pytest.mark.parametrize("batch", [0, 1, 37, 1024, 2500])
def test_esmm(batch: int, label: torch.dtype, device: str, dtypes: list[torch.dtype]) -> None:
    torch.manual_seed(batch)
    y, z = torch.rand(batch, device=device), torch.rand(batch, device=device)
    if not label.is_floating_point:
        y = y < 0.5
        z = y & (z < 0.5)
    y, z = y.to(label), z.to(label)
    for dtype in dtypes:
        logits = [torch.randn(batch, device=device).mul(8).to(dtype) for _ in range(2)]
        found, wanted = both(lambda a, c, backend: mtl.esmm_loss(a, c, y, z, ctcvr_weight=0.7, backend=backend),
                             logits, torch.tensor(100.0, device=device))  # fmt: skip
        close(found, wanted, dtype)


def test_esmm_extremes(device: str) -> None:
    sizes = [s * m for m in (0.1, 1, 10, 50, 90, 120, 200, 1e4) for s in (1, -1)]
    a, c = torch.tensor([(a, c) for a in sizes for c in sizes], device=device).unbind(1)
    for click, conversion in ((0, 0), (1, 0), (1, 1), (0.3, 0.6)):
        y, z = torch.full_like(a, click), torch.full_like(a, conversion)
        found, wanted = both(lambda a, c, y=y, z=z, backend=None: mtl.esmm_loss(a, c, y, z, backend=backend), [a, c],
                             torch.tensor(1.0 * len(sizes) ** 2, device=device))  # fmt: skip
        close(found, wanted, F32)
        alone = mtl.esmm_loss(a[:, None, None][:1], c[:, None, None][:1], y[:, None, None][:1], z[:, None, None][:1],
                              backend="triton")  # fmt: skip
        assert alone.shape == () and alone >= 0


@pytest.mark.parametrize("label", [F32, torch.bool, torch.int64])
@pytest.mark.parametrize("mask", [None, torch.bool, F32, F64, torch.int64])
@pytest.mark.parametrize("shape", [(1, 1), (0, 3), (5, 0), (300, 3), (40, 70), (1100, 1)], ids=str)
def test_bce(shape: tuple[int, int], mask, label: torch.dtype, device: str, dtypes: list[torch.dtype]) -> None:
    torch.manual_seed(sum(shape))
    y = torch.rand(shape, device=device)
    y = (y if label.is_floating_point else y < 0.5).to(label)
    m = None
    if mask is not None:
        m = torch.rand(shape, device=device)
        m = torch.where(m < 0.4, 0, m)
        m[:, 1:2] = 0
        m = (m if mask.is_floating_point else m > 0).to(mask)
        if label.is_floating_point:
            y[m == 0] = math.nan
    for dtype in dtypes:
        x = torch.randn(shape, device=device).mul(8).to(dtype)
        if m is not None:
            x[m == 0] = math.nan
        grad = torch.randn(shape[1], device=device) * 50
        if m is not None:
            grad[1:2] = math.inf  # what a logarithm of an empty task's loss sends down
        found, wanted = both(lambda x, backend: mtl.masked_bce(x, y, m, backend=backend), [x], grad)
        close(found, wanted, dtype)


def test_layouts(device: str) -> None:
    x = torch.randn(3, 9, device=device).T
    y = (torch.randn(9, 1, device=device) > 0).expand(9, 3)
    m = torch.randn(9, 6, device=device)[:, ::2] > 0
    close(*both(lambda x, backend: mtl.masked_bce(x, y, m, backend=backend), [x],
                torch.ones((), device=device).expand(3)), F32)  # fmt: skip
    a, c = torch.randn(9, 2, device=device).unbind(1)
    close(*both(lambda a, c, backend: mtl.esmm_loss(a, c, y[:, 0], m[:, 1] & y[:, 1], backend=backend), [a, c],
                torch.ones((), device=device)), F32)  # fmt: skip


def test_bad_labels_are_nan_there_alone(device: str) -> None:
    y = torch.tensor([1.0, 0, 1.5, math.nan, 1, 1], device=device)
    z = torch.tensor([1.0, 1, 0, 0, -1, 1], device=device)
    leaves = [torch.randn(6, device=device, requires_grad=True) for _ in range(2)]
    loss = mtl.esmm_loss(*leaves, y, z, backend="triton")
    assert loss.isnan()
    for grad in torch.autograd.grad(loss, leaves):
        assert grad.isnan().tolist() == [False, True, True, True, True, False]
    x = torch.randn(5, 3, device=device, requires_grad=True)
    labels, mask = torch.ones(5, 3, device=device), torch.ones(5, 3, device=device)
    labels[1, 0], labels[2, 1], mask[2, 1], mask[4, 2] = 2, math.nan, 0, -1
    loss = mtl.masked_bce(x, labels, mask, backend="triton")
    assert loss.isnan().tolist() == [True, False, True]
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert grad.isnan().nonzero().tolist() == sorted([[1, 0], *([row, 2] for row in range(5))])
    assert mtl.masked_bce(x, labels, torch.full_like(mask, 1e38), backend="triton").isnan().all()


def test_two_runs_agree_bit_for_bit(device: str) -> None:
    x = torch.randn(3000, 5, device=device)
    y, m = torch.rand(3000, 5, device=device), torch.rand(3000, 5, device=device)
    runs = [both(lambda x, backend: mtl.masked_bce(x, y, m, backend=backend), [x], torch.ones(5, device=device))[0]
            for _ in range(2)]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_tiles() -> None:
    for num_tasks in (1, 2, 3, 16, 64, 65, 1000):
        tile = pick_loss(num_tasks)
        assert tile.rows * tile.tasks == 1024 and tile.tasks >= min(num_tasks, 64)
