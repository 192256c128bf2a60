"""ReLU where its input is exactly 0: every kernel takes the slope from below, which is 0, in every gradient."""

import pytest
import torch

import mtlkernels as mtl

from .cases import each_backend, outcome


def numbers(*shape):
    """Small whole numbers, whose sums are exact."""
    gen = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-2, 3, shape, generator=gen).double()


MIX = torch.tensor([[1.0, 2.0], [-3.0, 1.0]], dtype=torch.float64)
DOMAIN = torch.tensor([0, 1, 0, 1, 1])
# Each call's tensors, and the call. With whole numbers a good part of the sums is exactly 0.
CALLS = {
    "expert_linear": (
        lambda: [numbers(5, 3), numbers(2, 4, 3), numbers(2, 4)],
        lambda x, w, b, **k: mtl.expert_linear(x, w, b, activation="relu", **k),
        lambda x, w, b: torch.einsum("bk,enk->ben", x, w) + b,
    ),
    "expert_mix": (
        lambda: [numbers(5, 3), numbers(2, 4, 3), numbers(2, 4)],
        lambda x, w, b, **k: mtl.expert_mix(x, w, b, static=MIX.to(x.dtype), activation="relu", **k),
        lambda x, w, b: torch.einsum("bk,enk->ben", x, w) + b,
    ),
    "snr_linear": (
        lambda: [numbers(5, 2, 3), numbers(2, 2, 4, 3), numbers(2, 2), numbers(2, 4)],
        lambda x, w, z, b, **k: mtl.snr_linear(x, w, z, b, activation="relu", **k),
        lambda x, w, z, b: torch.einsum("bjk,ijnk,ij->bin", x, w, z) + b,
    ),
    "star_linear": (
        lambda: [numbers(5, 3), numbers(4, 3), numbers(2, 4, 3), numbers(4), numbers(2, 4)],
        lambda x, w, p, b, c, **k: mtl.star_linear(x, DOMAIN, w, p, b, c, activation="relu", **k),
        lambda x, w, p, b, c: torch.einsum("bk,bnk->bn", x, w * p[DOMAIN]) + b + c[DOMAIN],
    ),
}


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_slope_at_zero_is_the_one_from_below(name, dtype, backend):
    """Against products of numbers and a mask ``sum > 0``; from above, ``sum >= 0``, the gradients would differ."""
    make, call, sums = CALLS[name]

    def masked(at_zero):
        def form(*tensors):
            z = sums(*tensors)
            h = z * ((z >= 0) if at_zero else (z > 0)).double()
            return torch.einsum("te,bed->btd", MIX, h) if name == "expert_mix" else h

        return outcome(form, make(), torch.ones_like)

    below, above = masked(False), masked(True)
    assert (sums(*make()) == 0).any()
    found = outcome(lambda *tensors: call(*tensors, backend=backend), [t.to(dtype) for t in make()], torch.ones_like)
    assert torch.equal(found.out.double(), below.out)
    for got, want in zip(found.grads, below.grads, strict=True):
        assert torch.equal(got.double(), want)
    assert any(not torch.equal(a, b) for a, b in zip(below.grads, above.grads, strict=True))
