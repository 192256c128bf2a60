"""The short way to the CPU kernels: no bad argument passes it, and nothing that needs the long way takes it."""

import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mtlkernels as mtl
from mtlkernels.ops._operator import Operator

from . import test_expert_linear as linear_cases
from . import test_mix as mix_cases
from .cases import SOME, close, native_only, outcome, same_bits, tiny_call, tiny_inputs

pytestmark = native_only
X, W, BIAS, X3 = linear_cases.X, linear_cases.W, linear_cases.BIAS, linear_cases.X3
H, L, S, M, ROUTES = mix_cases.H, mix_cases.L, mix_cases.S, mix_cases.M, mix_cases.ROUTES
BOTH = "native", "reference"
ONE, V = torch.zeros(2, 1, 3), torch.zeros(4)


def bad_calls():
    """Every bad call of the operators' own tests, and some more: what, function, arguments, options."""
    for name, (_, _, args, options) in linear_cases.BAD.items():
        yield f"expert_linear {name}", mtl.expert_linear, args, options
    for name, (_, _, args, options) in mix_cases.BAD.items():
        yield f"mix {name}", mtl.mix, args, options
    for name, (_, _, args, counts) in mix_cases.BAD_ADATT.items():
        yield f"adatt {name}", mtl.adatt_mix, args, {"experts_per_unit": counts}
    yield "bias of no batch", mtl.expert_linear, (X[:0], W, BIAS[0]), {}
    yield "bias transposed", mtl.expert_linear, (X, W, BIAS.t()), {}
    yield "empty activation", mtl.expert_linear, (X, W), {"activation": ""}
    yield "counts that wrap", mtl.expert_linear, (X3, W), {"experts_per_unit": [2**62, 3 - 2**62]}
    yield "logits of one expert", mtl.mix, (ONE, torch.zeros(2, 4)), {}
    yield "logits four dimensions", mtl.mix, (H, L[..., None]), {}
    yield "static four dimensions", mtl.mix, (H, None, S[None, None]), {}
    yield "static flat", mtl.mix, (H, L, S.flatten()), {}
    yield "static for a native", mtl.adatt_mix, (H, L, S), {"experts_per_unit": [1] * 5}
    yield "native too long", mtl.adatt_mix, (H, L, torch.zeros(5)), {"experts_per_unit": [1] * 5}
    yield "native too short", mtl.adatt_mix, (H, L, torch.zeros(3)), {"experts_per_unit": [1] * 5}
    yield "native int", mtl.adatt_mix, (H, L, V.long()), {"experts_per_unit": [1] * 5}
    yield "no experts, static int", mtl.mix, (H[:, :0], None, S[:, :0].long()), {}
    yield "mask of no tasks", mtl.mix, (H, L, None), {"mask": M[:0]}
    yield "mask flat", mtl.mix, (H, L, None), {"mask": M.flatten()}
    wide = torch.zeros(2, ROUTES.num_routes + 1)
    yield "logits packed too wide", mtl.mix, (H, wide), {"routes": ROUTES}
    yield "static packed too wide", mtl.mix, (H, None, wide[0]), {"routes": ROUTES}
    yield "channels with routes", mtl.mix, (H, None, torch.zeros(4, 5, 3)), {"routes": ROUTES}


BAD = {name: call for name, *call in bad_calls()}


class Checked(Exception):
    """The Python checks ran."""


@pytest.fixture
def kernels(monkeypatch):
    """What went to the kernels of the short way, and what came through; both kernels have been chosen before."""
    mtl.expert_linear(X, W), mtl.mix(H, L), mtl.expert_linear(X.double(), W.double()), mtl.mix(H.double(), L)
    tried, passed = [], []

    def spied(kernel):
        def spy(*args):
            tried.append(args)
            out = kernel(*args)
            passed.append(args)
            return out

        return spy

    for name in ("expert_linear", "mix"):
        monkeypatch.setattr(Operator.all[name], "kernel", spied(Operator.all[name].kernel))
    return tried, passed


@pytest.mark.parametrize("name", BAD)
def test_no_bad_argument_passes_a_kernel(name, kernels, monkeypatch):
    """Without any check in Python: the kernel refuses, or the call never comes to it."""

    def checked(*_):
        raise Checked

    call, args, options = BAD[name]
    with pytest.raises((TypeError, ValueError)):
        call(*args, **options)
    monkeypatch.setattr(sys.modules["mtlkernels.ops.expert_linear"], "_check", checked)
    monkeypatch.setattr(sys.modules["mtlkernels.ops.mix"], "_check_all", checked)
    with pytest.raises((Checked, TypeError, ValueError)):
        call(*args, **options)
    assert not kernels[1]


def test_most_bad_arguments_come_to_a_kernel(kernels):
    """So the test above tests something."""
    for call, args, options in BAD.values():
        with pytest.raises((TypeError, ValueError)):
            call(*args, **options)
    assert len(kernels[0]) > len(BAD) // 2


def test_an_error_shows_no_other(kernels):
    with pytest.raises(ValueError, match="weight must be") as caught:
        mtl.expert_linear(X, W[0])
    assert kernels[0] and caught.value.__context__ is None and caught.value.__cause__ is None


def test_what_the_kernel_cannot_do_is_told_as_it_is(monkeypatch):
    """An error that is not about the arguments comes out as it is, from one attempt."""
    seen = []

    class Stop(Exception):
        pass

    def pack(tensor):
        seen.append(tensor)
        raise Stop

    w = W.clone().requires_grad_()
    mtl.expert_linear(X, w)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), pytest.raises(Stop):
        mtl.expert_linear(X, w)
    assert len(seen) == 1


def test_short_and_long_way_give_the_same(kernels, monkeypatch):
    for name in SOME:
        call = tiny_call(name, None)
        tiny = tiny_inputs(name)
        call(*tiny)
        with torch.no_grad():
            assert torch.equal(call(*tiny), tiny_call(name, "native")(*tiny).detach())
        before = len(kernels[1])
        short = outcome(call, tiny)
        plain = [t.detach() for t in tiny]
        out = call(*plain)
        assert len(kernels[1]) == before + 1 and torch.equal(out, short.out)
        with monkeypatch.context() as patch:
            patch.setattr(Operator, "goes_straight", lambda *_: False)
            long = outcome(call, tiny)
        same_bits(short, long)


class Sub(torch.Tensor):
    pass


def test_who_takes_the_long_way(kernels):
    tried = kernels[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mtl.expert_linear(X, W).dtype == torch.bfloat16
    torch.func.grad(lambda h: mtl.mix(h, L).sum())(H)
    torch.func.vmap(lambda h: mtl.mix(h[None], L[:1]))(H)
    torch.func.jvp(lambda h: mtl.mix(h, L), (H,), (H,))
    mtl.mix(H.as_subclass(Sub), L)
    mtl.mix(H.to("meta"), L.to("meta"))
    with FakeTensorMode() as mode:
        assert mtl.mix(mode.from_tensor(H), mode.from_tensor(L)).shape == (2, 4, 3)
    with mtl.use_backend("reference"):
        mtl.mix(H, L)
    mtl.mix(H, L, backend="reference")
    torch.compile(lambda h: mtl.mix(h, L), backend="eager", fullgraph=True)(H)
    assert not tried
    mtl.mix(H, L, backend="native")  # chosen now, if not before
    tried.clear()
    with mtl.use_backend("native"):
        mtl.mix(H, L)
    with torch.inference_mode():
        mtl.mix(H, L)
    assert len(tried) == 2


@pytest.mark.parametrize("there", ["logits", "static", "mask", "routes"])
def test_nothing_elsewhere_comes_to_a_kernel(there, kernels):
    routes = there == "routes"
    given = dict(logits=torch.zeros(2, ROUTES.num_routes) if routes else L, static=None if routes else S)
    given |= {"routes": ROUTES} if routes else {"mask": M}
    mtl.mix(H, **given)
    kernels[0].clear()
    with pytest.raises(ValueError, match=f"{there} (is on meta|must be .* on cpu)"):
        mtl.mix(H, **given | {there: given[there].to("meta")})
    assert not kernels[0]


@pytest.mark.parametrize("alone", range(3))
def test_one_tensor_alone_wants_a_gradient_by_the_long_way(alone, monkeypatch):
    monkeypatch.setattr(Operator, "goes_straight", lambda *_: False)
    linear, mix = [X + 1, W + 1, torch.ones(W.shape[:2])], [H + 1, L + 1, S + 1]
    for call, args, without in ((mtl.expert_linear, linear, (2,)), (mtl.mix, mix, (1, 2))):
        for left_out in ((), *((n,) for n in without if n != alone)):
            given = [None if n in left_out else t.requires_grad_(n == alone) for n, t in enumerate(args)]
            found, wanted = (torch.autograd.grad(call(*given, backend=b).sum(), args[alone])[0] for b in BOTH)
            close(found, wanted)


def test_counts_are_kept_as_they_were():
    """A list that changes between forward and backward changes nothing."""
    counts = [2, 1, 2]
    h, logits = torch.randn(2, 5, 3), torch.randn(2, 2, 5)
    v = torch.randn(3, requires_grad=True)
    wanted = torch.autograd.grad(mtl.adatt_mix(h, logits, v, experts_per_unit=counts).sum(), v)[0]
    out = mtl.adatt_mix(h, logits, v, experts_per_unit=counts)
    counts[:] = [1, 2, 2]
    assert torch.equal(torch.autograd.grad(out.sum(), v)[0], wanted)


def test_a_tensor_that_outlived_its_transform():
    leaked = []
    torch.func.grad(lambda h: (leaked.append(h * 2), h.sum())[1])(H + 1)
    logits = L.clone().requires_grad_()
    out = mtl.mix(leaked[0], logits)
    assert torch.equal(out, mtl.mix((H + 1) * 2, L))
    out.sum().backward()
    assert logits.grad.shape == L.shape
