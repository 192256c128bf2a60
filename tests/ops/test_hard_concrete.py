"""hard_concrete and hard_concrete_l0 on every backend of a CPU: values, gradients, frequencies, compile, bad input."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import mtlkernels as mtl

from .cases import (
    TOLERANCE,
    close,
    each_backend,
    each_dtype,
    halves,
    layouts,
    native_only,
    outcome,
    same_bits,
    same_bits_with_any_threads,
)

DEFAULTS = {"beta": 2 / 3, "gamma": -0.1, "zeta": 1.1}
OTHERS = {"beta": 0.4, "gamma": -0.3, "zeta": 1.7}
SHAPES = [(), (0,), (1,), (7,), (3, 5), (2, 0, 3), (2, 1, 3, 2, 2), (300,)]


def run(backend, op=mtl.hard_concrete, **constants):
    def call(*tensors):
        with mtl.use_backend(backend):
            return op(*tensors, **constants)

    return call


def inputs(shape, dtype=torch.float64, scale=3.0):
    """log_alpha, and noise with numbers to be clamped among it."""
    gen = torch.Generator().manual_seed(sum(shape) + len(shape))
    phi = scale * torch.randn(shape, generator=gen, dtype=torch.float64)
    noise = torch.rand(shape, generator=gen, dtype=torch.float64)
    noise.flatten()[::5] = 0
    noise.flatten()[3::5] = 1
    return phi.to(dtype), noise.to(dtype)


def definition(phi, noise, beta, gamma, zeta):
    """z and its derivative, one number at a time."""
    z, slope = np.empty(phi.shape), np.empty(phi.shape)
    for at in np.ndindex(phi.shape):
        x, scale = float(phi[at]), 1.0
        if noise is not None:
            e = min(max(float(noise[at]), 1e-6), 1 - 1e-6)
            x, scale = (math.log(e) - math.log1p(-e) + x) / beta, 1 / beta
        s = 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))
        stretched = s * (zeta - gamma) + gamma
        z[at] = min(max(stretched, 0.0), 1.0)
        slope[at] = (zeta - gamma) * s * (1 - s) * scale if 0 < stretched < 1 else 0.0
    return torch.from_numpy(z), torch.from_numpy(slope)


@each_backend
@each_dtype
@pytest.mark.parametrize("constants", [DEFAULTS, OTHERS], ids=["defaults", "others"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_definition(shape, constants, dtype, backend):
    phi, noise = inputs(shape, dtype)
    for drawn in (noise, None):
        z, slope = definition(phi, drawn, **constants)
        found = outcome(lambda a, d=drawn: run(backend, **constants)(a, d), [phi])
        grad = torch.randn(z.shape, generator=torch.Generator().manual_seed(max(z.numel(), 1)), dtype=torch.float64)
        assert found.out.dtype == found.grads[0].dtype == dtype
        close(found.out, z)
        found = outcome(lambda a, d=drawn: run(backend, **constants)(a, d), [phi], lambda _, g=grad: g.to(dtype))
        close(found.grads[0], slope * grad.to(dtype), 2 * TOLERANCE[dtype])


@each_backend
@each_dtype
@pytest.mark.parametrize("constants", [DEFAULTS, OTHERS], ids=["defaults", "others"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_l0_against_the_definition(shape, constants, dtype, backend):
    phi, _ = inputs(shape, dtype)
    x = phi.double() - constants["beta"] * math.log(-constants["gamma"] / constants["zeta"])
    chance = 1 / (1 + torch.exp(-x))
    found = outcome(run(backend, mtl.hard_concrete_l0, **constants), [phi], lambda out: torch.full_like(out, 0.3))
    assert found.out.shape == () and found.out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(found.out, chance.sum())
    assert found.grads[0].dtype == dtype
    close(found.grads[0], 0.3 * chance * (1 - chance))


@each_backend
def test_l0_against_finite_differences(backend):
    phi, step = inputs((12,))[0], 1e-5
    call = run(backend, mtl.hard_concrete_l0)
    (grad,) = outcome(call, [phi], torch.ones_like).grads
    moves = step * torch.eye(12, dtype=torch.float64)
    close(grad, torch.stack([(call(phi + m) - call(phi - m)) / (2 * step) for m in moves]), 1e-8)


@each_backend
@each_dtype
def test_frequencies(dtype, backend):
    """Pr(z = 0) and Pr(z = 1) within four standard errors of the formulas; l0 counts what is open."""
    draws, phi = 200_000, 0.7
    noise = torch.rand(draws, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    z = run(backend)(torch.full((draws,), phi, dtype=dtype), noise.float() if dtype != torch.float64 else noise)
    phi = float(torch.tensor(phi, dtype=dtype))
    closed = 1 / (1 + math.exp(phi - 2 / 3 * math.log(0.1 / 1.1)))
    full = 1 / (1 + math.exp(-(phi - 2 / 3 * math.log(1.1 / 0.1))))
    if dtype == torch.float64:
        assert abs(closed - 0.0912) < 1e-4 and abs(full - 0.2893) < 1e-4
    # Rounding to 16 bit makes a 1 of what is just below; a 0 it leaves alone.
    slack = {torch.bfloat16: 2e-3, torch.float16: 3e-4}.get(dtype, 0)
    for expected, found, more in ((closed, z == 0, 0), (full, z == 1, slack)):
        error = 4 * math.sqrt(expected * (1 - expected) / draws)
        assert -error <= found.double().mean().item() - expected <= error + more
    assert abs(run(backend, mtl.hard_concrete_l0)(torch.tensor([phi])).item() - (1 - closed)) < 1e-6


@each_backend
def test_the_serving_estimator_closes_at_its_thresholds(backend):
    """z = 0 up to log(-gamma / zeta), z = 1 from log((1 - gamma) / (zeta - 1)) on; beta plays no part."""
    threshold = math.log(11)
    phi = torch.tensor([-threshold - 1e-3, -threshold + 1e-3, threshold - 1e-3, threshold + 1e-3])
    z, _ = outcome(run(backend), [phi])
    assert z[0] == 0 and 0 < z[1] < 1e-3 and 1 - 1e-3 < z[2] < 1 and z[3] == 1
    assert torch.equal(run(backend, beta=0.1)(phi), z)


@each_backend
@each_dtype
def test_the_derivative_is_zero_at_the_bounds(dtype, backend):
    """Where the stretched s is exactly 0 or 1, as where it is cut off."""
    for constants, bound in (({"gamma": -2.0, "zeta": 2.0}, 0), ({"gamma": -1.0, "zeta": 3.0}, 1)):
        for noise in (None, torch.tensor([0.5], dtype=dtype)):
            found = outcome(
                lambda a, n=noise, c=constants: run(backend, **c)(a, n), [torch.zeros(1, dtype=dtype)], torch.ones_like
            )
            assert found.out.item() == bound and found.grads[0].item() == 0


@each_backend
@each_dtype
@pytest.mark.parametrize("noise", [None, 0.0, 0.5, 1.0])
def test_far_from_zero(noise, dtype, backend):
    phi = torch.tensor([-1e4, -200, -100, 100, 200, 1e4], dtype=dtype)
    drawn = None if noise is None else torch.full_like(phi, noise)
    found = outcome(lambda a: run(backend)(a, drawn), [phi], torch.ones_like)
    assert found.out.tolist() == [0, 0, 0, 1, 1, 1] and (found.grads[0] == 0).all()
    found = outcome(run(backend, mtl.hard_concrete_l0), [phi], torch.ones_like)
    assert abs(found.out.item() - 3) < 1e-6 and (found.grads[0].double().abs() < 1e-30).all()


@each_backend
@each_dtype
def test_a_nan_stays_in_its_place(dtype, backend):
    phi, noise = inputs((6,), dtype)
    noise[:] = 0.4
    phi[:] = 0.1
    clean = outcome(lambda a, n: run(backend)(a, n), [phi, noise], needs=[True, False])
    for place in (0, 1):
        hurt = [phi.clone(), noise.clone()]
        hurt[place][2] = math.nan
        found = outcome(lambda a, n: run(backend)(a, n), hurt, needs=[True, False])
        assert found.out[2].isnan() and found.grads[0][2].isnan()
        others = torch.arange(6) != 2
        assert torch.equal(found.out[others], clean.out[others])
        assert torch.equal(found.grads[0][others], clean.grads[0][others])


@each_backend
def test_layouts_and_noise_of_another_type(backend):
    phi, noise = (t.float() for t in inputs((4, 6)))
    for name, other in layouts(phi).items():
        found = outcome(lambda a: run(backend)(a, noise), [other])
        same_bits(found, outcome(lambda a: run(backend)(a, noise), [other.contiguous()]))
        assert found.out.is_contiguous(), name
        close(run(backend)(phi, other.sigmoid()), run("reference")(phi.double(), other.sigmoid().double()))
        close(run(backend, mtl.hard_concrete_l0)(other), run("reference", mtl.hard_concrete_l0)(other.double()))
    close(run(backend)(phi.bfloat16(), noise), run("reference")(phi.bfloat16().double(), noise.double()))
    close(run(backend)(phi, noise.double()), run("reference")(phi.double(), noise.double()))
    grad = torch.tensor(1.5).expand(4, 6)
    found = outcome(lambda a: run(backend)(a, noise), [phi], lambda _: grad)
    same_bits(found, outcome(lambda a: run(backend)(a, noise), [phi], lambda _: grad.contiguous()))


@native_only
@halves
def test_half_precision_is_rounded_once(dtype):
    phi, noise = inputs((300,), dtype)
    for drawn in (None, noise):
        exact = run("reference")(phi.double(), None if drawn is None else drawn.double())
        error = (run("native")(phi, drawn).double() - exact).abs()
        assert (error <= torch.finfo(dtype).eps / 2 * exact * 1.001 + 2e-6).all()


@native_only
def test_threads_change_nothing():
    noise = inputs((70_000,))[1].float()
    same_bits_with_any_threads(lambda a: run("native")(a, noise), lambda: [inputs((70_000,), torch.float32)[0]])
    same_bits_with_any_threads(run("native", mtl.hard_concrete_l0), lambda: [inputs((70_000,), torch.float32)[0]])


@each_backend
def test_gradcheck(backend):
    phi, noise = torch.tensor([[-1.0, 0.3, 1.2]], dtype=torch.float64), torch.tensor([[0.3, 0.6, 0.4]]).double()
    for call in (run(backend), lambda a: run(backend)(a, noise), run(backend, mtl.hard_concrete_l0)):
        torch.autograd.gradcheck(call, [phi.clone().requires_grad_()], check_batched_grad=True)
        torch.autograd.gradgradcheck(call, [phi.clone().requires_grad_()])
        jacobian = torch.func.jacrev(call)(phi)
        close(jacobian, torch.func.jacfwd(call)(phi))
        two = torch.stack([phi, 2 * phi])
        close(torch.func.vmap(call)(two)[1], call(2 * phi))


@each_backend
def test_noise_gets_no_gradient(backend):
    phi, noise = torch.zeros(3, requires_grad=True), torch.full((3,), 0.4, requires_grad=True)
    grads = torch.autograd.grad(run(backend)(phi, noise).sum(), [phi, noise], allow_unused=True)
    assert grads[1] is None and (grads[0] > 0).all()


@native_only
def test_opcheck():
    ops = torch.ops.mtlkernels
    phi, noise = (t.float() for t in inputs((3, 4)))
    constants = tuple(DEFAULTS.values())
    z, s = ops.hard_concrete_eager(phi, noise, *constants)
    total, slope = ops.hard_concrete_l0_eager(phi, *constants)
    for op, args in (
        (ops.hard_concrete, (phi.clone().requires_grad_(), noise, *constants)),
        (ops.hard_concrete, (phi.bfloat16().requires_grad_(), None, *constants)),
        (ops.hard_concrete_backward, (torch.ones_like(z), s, *constants, True)),
        (ops.hard_concrete_l0, (phi.clone().requires_grad_(), *constants)),
        (ops.hard_concrete_l0_backward, (torch.ones_like(total), slope)),
    ):
        torch.library.opcheck(op.default, args)


class Structure(nn.Module):
    """A sampled structure of that many connections, and its penalty."""

    def __init__(self, backend: str, n: int = 12) -> None:
        super().__init__()
        self.log_alpha, self.backend = nn.Parameter(torch.linspace(-1, 1, n)), backend

    def forward(self, noise):
        with mtl.use_backend(self.backend):
            z = mtl.hard_concrete(self.log_alpha.expand(noise.shape), noise)
            return z * mtl.hard_concrete(self.log_alpha), mtl.hard_concrete_l0(self.log_alpha, gamma=-0.2)


def step(module, noise, parameter):
    z, penalty = module(noise)
    return z.detach(), *torch.autograd.grad(z.square().sum() + penalty, [parameter])


@each_backend
def test_compile(backend):
    torch._dynamo.reset()
    structure = Structure(backend)
    compiled = torch.compile(structure, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (3, 2, 7):
        noise = inputs((batch, 12))[1].float()
        for a, b in zip(
            step(compiled, noise, structure.log_alpha), step(structure, noise, structure.log_alpha), strict=True
        ):
            close(a, b)
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=native_only)])
def test_export_keeps_gradients(backend):
    structure = Structure(backend)
    noise = inputs((4, 12))[1].float()
    module = torch.export.export(structure, (noise,)).module()
    for a, b in zip(step(module, noise, module.log_alpha), step(structure, noise, structure.log_alpha), strict=True):
        close(a, b)


PHI = torch.zeros(2, 3)
BAD = {
    "log_alpha no tensor": (TypeError, "log_alpha must be a tensor; got float", (1.0,), {}),
    "log_alpha int": (TypeError, "log_alpha must be float64.*int64", (PHI.long(),), {}),
    "noise no tensor": (TypeError, "noise must be a tensor; got float", (PHI, 0.5), {}),
    "noise int": (TypeError, "noise must be float64.*int64", (PHI, PHI.long()), {}),
    "noise shape": (ValueError, r"noise must have log_alpha's shape \(2, 3\); got shape \(3,\)", (PHI, PHI[0]), {}),
    "noise elsewhere": (ValueError, "noise is on meta", (PHI, PHI.to("meta")), {}),
    "beta zero": (ValueError, "beta must be above 0.*got 0", (PHI,), {"beta": 0}),
    "beta nan": (ValueError, "beta must be above 0", (PHI,), {"beta": math.nan}),
    "beta tensor": (TypeError, "beta must be a float", (PHI,), {"beta": torch.tensor(1.0)}),
    "gamma above zero": (ValueError, "gamma must be below 0.*got 0.1", (PHI,), {"gamma": 0.1}),
    "zeta one": (ValueError, "zeta must be above 1.*got 1", (PHI,), {"zeta": 1.0}),
    "zeta text": (TypeError, "zeta must be a float; got '2'", (PHI,), {"zeta": "2"}),
}


@pytest.mark.parametrize("error, match, args, options", [pytest.param(*v, id=k) for k, v in BAD.items()])
def test_bad_input(error, match, args, options):
    with pytest.raises(error, match=match):
        mtl.hard_concrete(*args, **options)
    if len(args) == 1:
        with pytest.raises(error, match=match):
            mtl.hard_concrete_l0(*args, **options)


def test_explain():
    assert "hard_concrete on cpu" in mtl.explain("hard_concrete", PHI)
    assert "hard_concrete_l0 on cpu" in mtl.explain("hard_concrete_l0", PHI)
