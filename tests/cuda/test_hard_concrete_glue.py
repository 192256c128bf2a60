"""The CUDA hard_concrete, torch glue and kernels, run over the emulated device against the reference in float64."""

import pytest
import torch
from emulated import build
from torch import Tensor

from mtlkernels.reference.hard_concrete import hard_concrete, hard_concrete_l0

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {F32: 2e-6, F16: 1e-3, BF16: 8e-3}
CONSTANTS = [(2 / 3, -0.1, 1.1), (0.4, -0.3, 1.7)]


@pytest.fixture(scope="module")
def ops():
    torch.ops.load_library(str(build("operators")))
    return torch.ops.mtlkernels_emulated


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(len(shape))
    noise = torch.rand(shape, generator=gen)
    noise.flatten()[::4] = 0
    noise.flatten()[2::4] = 1
    return (3 * torch.randn(shape, generator=gen)).to(dtype), noise


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("constants", CONSTANTS, ids=["defaults", "others"])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, 2, 3, 2, 3), (300,)], ids=str)
def test_against_the_reference(ops, shape, constants, dtype) -> None:
    phi, noise = inputs(shape, dtype)
    for drawn in (noise, noise.double(), noise.half(), None):
        wide = phi.double().requires_grad_()
        z, _ = hard_concrete(wide, drawn, *constants)
        found, s = ops.hard_concrete(phi, drawn, *constants)
        assert found.dtype == dtype and s.dtype == F32 and found.shape == s.shape == phi.shape
        torch.testing.assert_close(found.double(), z.detach(), rtol=0, atol=TOLERANCE[dtype])
        grad = torch.linspace(-1, 1, phi.numel()).view(shape).to(dtype)
        (want,) = torch.autograd.grad(z, wide, grad.double())
        got = ops.hard_concrete_backward(grad, s, *constants, drawn is not None)
        assert got.dtype == dtype and got.shape == phi.shape
        torch.testing.assert_close(got.double(), want, rtol=2 * TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (300,)], ids=str)
def test_l0_against_the_reference(ops, shape, dtype) -> None:
    phi, _ = inputs(shape, dtype)
    for constants in CONSTANTS:
        total, slope = ops.hard_concrete_l0(phi, *constants)
        want, want_slope = hard_concrete_l0(phi.double(), *constants)
        assert total.shape == () and total.dtype == slope.dtype == F32 and slope.shape == phi.shape
        torch.testing.assert_close(total.double(), want, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(slope.double(), want_slope, rtol=1e-5, atol=1e-6)
        grad = torch.tensor(0.3)
        assert torch.equal(ops.hard_concrete_l0_backward(grad, slope), grad * slope)


def test_far_from_zero_at_the_bounds_and_nan(ops) -> None:
    phi = torch.tensor([-200.0, 200, 0, torch.nan])
    for noise in (None, torch.tensor([0.0, 1.0, 0.5, 0.5])):
        z, s = ops.hard_concrete(phi, noise, 2 / 3, -2.0, 2.0)
        assert z[:3].tolist() == [0, 1, 0] and z[3].isnan()
        grad = ops.hard_concrete_backward(torch.ones(4), s, 2 / 3, -2.0, 2.0, noise is not None)
        assert grad[:3].tolist() == [0, 0, 0] and grad[3].isnan()
    assert ops.hard_concrete(torch.zeros(1), torch.tensor([torch.nan]), 1.0, -0.1, 1.1)[0].isnan()
    total, slope = ops.hard_concrete_l0(phi[:3], 2 / 3, -0.1, 1.1)
    assert total.isfinite() and slope.isfinite().all()


def test_strides(ops) -> None:
    phi, noise = inputs((4, 6), F32)
    z, s = ops.hard_concrete(phi.T, noise.T, *CONSTANTS[0])
    assert torch.equal(z, ops.hard_concrete(phi, noise, *CONSTANTS[0])[0].T)
    grad = torch.tensor(2.0).expand(6, 4)
    found = ops.hard_concrete_backward(grad, s, *CONSTANTS[0], True)
    assert torch.equal(found, ops.hard_concrete_backward(grad.contiguous(), s, *CONSTANTS[0], True))


def test_errors_name_the_argument(ops) -> None:
    phi, constants = torch.zeros(3), CONSTANTS[0]
    with pytest.raises(RuntimeError, match="log_alpha: .*float64"):
        ops.hard_concrete(phi.double(), None, *constants)
    with pytest.raises(RuntimeError, match="noise: "):
        ops.hard_concrete(phi, phi[:2], *constants)
    with pytest.raises(RuntimeError, match="noise: .*floating-point"):
        ops.hard_concrete(phi, phi.int(), *constants)
    with pytest.raises(RuntimeError, match="s: "):
        ops.hard_concrete_backward(phi, phi[:2], *constants, True)
    with pytest.raises(RuntimeError, match="grad: "):
        ops.hard_concrete_l0_backward(phi, phi)
