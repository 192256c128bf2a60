"""The Triton hard_concrete against the reference in float64: values, gradients, and what must not be written."""

import pytest
import torch

pytest.importorskip("triton")

from mtlkernels.reference.hard_concrete import hard_concrete as plain
from mtlkernels.reference.hard_concrete import hard_concrete_l0 as plain_l0

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter: overflow in exp

CONSTANTS = [(2 / 3, -0.1, 1.1), (0.4, -0.3, 1.7)]
SHAPES = [(), (0,), (1,), (3, 5), (2, 2, 3, 2, 3), (513,)]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture
def ops(device, monkeypatch):
    """The launchers, with every fresh buffer full of NaN."""
    from mtlkernels.triton import hard_concrete

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: torch.zeros(*args, **kwargs).fill_(torch.nan))
    return hard_concrete


def inputs(shape, device, dtype):
    gen = torch.Generator().manual_seed(len(shape))
    noise = torch.rand(shape, generator=gen)
    noise.flatten()[::4] = 0
    noise.flatten()[2::4] = 1
    return (3 * torch.randn(shape, generator=gen)).to(device, dtype), noise.to(device)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("constants", CONSTANTS, ids=["defaults", "others"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_reference(ops, device, shape, constants, dtype):
    phi, noise = inputs(shape, device, dtype)
    for drawn in (noise, noise.half(), None):
        wide = phi.double().requires_grad_()
        z, s = plain(wide, drawn, *constants)
        found, kept = ops.hard_concrete(phi, drawn, *constants)
        assert found.dtype == dtype and kept.dtype == torch.float32 and found.shape == kept.shape == phi.shape
        torch.testing.assert_close(found.double(), z.detach(), rtol=0, atol=TOLERANCE[dtype])
        # The clamp at 1 - 1e-6 is not a float32: the logit there is 1.3 % of a unit off.
        torch.testing.assert_close(kept.double(), s.detach(), rtol=0, atol=2e-5)
        grad = torch.linspace(-1, 1, phi.numel(), device=device).view(shape).to(dtype)
        (want,) = torch.autograd.grad(z, wide, grad.double())
        got = ops.hard_concrete_backward(grad, kept, *constants, drawn is not None)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=2 * TOLERANCE[dtype], atol=TOLERANCE[dtype])

    total, slope = ops.hard_concrete_l0(phi, *constants)
    want, want_slope = plain_l0(phi.double(), *constants)
    assert total.shape == () and total.dtype == slope.dtype == torch.float32
    torch.testing.assert_close(total.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(slope.double(), want_slope, rtol=1e-5, atol=1e-6)
    scaled = ops.hard_concrete_l0_backward(torch.tensor(0.3, device=device), slope)
    assert torch.equal(scaled, 0.3 * slope)


def test_far_from_zero_at_the_bounds_and_nan(ops, device):
    phi = torch.tensor([-200.0, 200, 0, torch.nan], device=device)
    for noise in (None, torch.tensor([0.0, 1.0, 0.5, 0.5], device=device)):
        z, s = ops.hard_concrete(phi, noise, 2 / 3, -2.0, 2.0)
        assert z[:3].tolist() == [0, 1, 0] and z[3].isnan()
        grad = ops.hard_concrete_backward(torch.ones_like(z), s, 2 / 3, -2.0, 2.0, noise is not None)
        assert grad[:3].tolist() == [0, 0, 0] and grad[3].isnan()
    z, _ = ops.hard_concrete(torch.zeros(2, device=device), torch.tensor([torch.nan, 0.5]).to(device), 1.0, -0.1, 1.1)
    assert z[0].isnan() and z[1] == 0.5
    total, slope = ops.hard_concrete_l0(phi[:3], 2 / 3, -0.1, 1.1)
    assert total.isfinite() and slope.isfinite().all()


def test_strides(ops, device):
    phi, noise = inputs((4, 6), device, torch.float32)
    z, s = ops.hard_concrete(phi.T, noise.T, *CONSTANTS[0])
    want, _ = ops.hard_concrete(phi.T.contiguous(), noise.T.contiguous(), *CONSTANTS[0])
    assert torch.equal(z, want)
    grad = torch.tensor(2.0, device=device).expand(6, 4)
    one = ops.hard_concrete_backward(grad, s, *CONSTANTS[0], True)
    assert torch.equal(one, ops.hard_concrete_backward(grad.contiguous(), s, *CONSTANTS[0], True))


def test_public_function(device):
    """The operators find their launchers, forward and backward."""
    import mtlkernels as mtl

    phi = torch.tensor([0.3, -0.2], device=device, requires_grad=True)
    with mtl.use_backend("triton"):
        (mtl.hard_concrete(phi).sum() + mtl.hard_concrete_l0(phi)).backward()
    wide = phi.detach().double().requires_grad_()
    (plain(wide, None, *CONSTANTS[0])[0].sum() + plain_l0(wide, *CONSTANTS[0])[0]).backward()
    torch.testing.assert_close(phi.grad.double(), wide.grad, rtol=1e-5, atol=1e-6)
