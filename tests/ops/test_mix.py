"""mix and its forms on every backend of a CPU: values, gradients, routes and masks, numerics, bad input."""

import itertools
import math

import numpy as np
import pytest
import torch

import mtlkernels as mtl

from .cases import (
    DTYPES,
    GRAD_LAYOUTS,
    MIX,
    ODD_MIX,
    Mix,
    agree,
    close,
    each_backend,
    each_dtype,
    expected,
    layouts,
    make_mix,
    outcome,
    over,
    random_grad,
    same_bits,
)

MASK = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0], [1, 0, 1, 1, 0]], dtype=torch.bool)


def loop(case: Mix):
    """The definition, one row of one task at a time."""
    h, logits, static = (None if t is None else t.numpy() for t in case.tensors())
    if static is not None and static.ndim == 3:
        return torch.from_numpy((static * h[:, None]).sum(2))
    if case.routes is not None:
        offsets, used = case.routes.offsets.tolist(), case.routes.experts.tolist()
        rows = [[(e, r) for r, e in enumerate(used) if a <= r < z] for a, z in itertools.pairwise(offsets)]
    else:
        count = (static if logits is None else logits).shape[-2]
        may = case.mask if case.mask is not None else torch.ones(count, h.shape[1], dtype=torch.bool)
        rows = [[(e, (t, e)) for e in range(h.shape[1]) if may[t, e]] for t in range(count)]
    begins = [0, *itertools.accumulate(case.native or ())]
    out = np.zeros((len(h), len(rows), h.shape[2]))
    for b, (t, row) in itertools.product(range(len(h)), enumerate(rows)):
        gate = {} if logits is None else {e: math.exp(logits[b][at]) for e, at in row}
        for e, at in row:
            a = gate[e] / sum(gate.values()) if gate else 0.0
            if case.native is not None:
                a += (1.0 if static is None else static[e]) if begins[t] <= e < begins[t + 1] else 0.0
            elif static is not None:
                a += static[at]
            out[b, t] += a * h[b, e]
    return torch.from_numpy(out)


@pytest.mark.parametrize("case", over({k: v for k, v in MIX.items() if v.experts.numel() < 1000}))
def test_the_reference_is_the_definition(case):
    close(case(*case.tensors(), backend="reference"), loop(case), 1e-14)


@each_backend
@pytest.mark.parametrize("case", over(MIX))
def test_shapes_and_forms(case, backend):
    for dtype in DTYPES:
        tensors = case.tensors(dtype)
        agree(outcome(lambda *t: case(*t, backend=backend), tensors), expected(case, tensors), tensors)


@each_backend
@pytest.mark.parametrize("weights", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["both", "both packed", "native masked", "channel"])
@each_dtype
def test_weights_of_another_dtype(form, weights, dtype, backend):
    case = MIX[f"{form}, over a block"]
    tensors = case.tensors(dtype, weights)
    agree(outcome(lambda *t: case(*t, backend=backend), tensors), expected(case, tensors), tensors)
    if form == "both":
        logits, static = tensors[1].float(), tensors[2].double()
        agree(
            outcome(lambda *t: case(*t, backend=backend), (tensors[0], logits, static)),
            expected(case, (tensors[0], logits, static)),
            (tensors[0], logits, static),
        )


@each_backend
@pytest.mark.parametrize("which", ["experts", "logits", "static"])
@pytest.mark.parametrize("form", ["both", "both masked", "both packed", "native", "channel"])
def test_layouts(form, which, backend):
    case = make_mix(form, 6, 3, 5, 12)
    position = ["experts", "logits", "static"].index(which)
    for dtype in (torch.float32, torch.bfloat16):
        tensors = case.tensors(dtype)
        if tensors[position] is None:
            pytest.skip(f"{form} has no {which}")
        for name, other in layouts(tensors[position]).items():
            strided = [*tensors[:position], other, *tensors[position + 1 :]]
            dense = [t if t is None else t.contiguous() for t in strided]
            try:
                found = outcome(lambda *t: case(*t, backend=backend), strided)
                # Equal experts: the softmax's gradient is exactly 0, a difference of numbers of size 1.
                equal = which == "experts" and name in ("expanded middle", "a single number")
                agree(found, expected(case, strided), strided, floor=1 if equal else 1e-2)
                if backend == "native":
                    same_bits(found, outcome(lambda *t: case(*t, backend=backend), dense))
            except AssertionError as error:
                raise AssertionError(f"{which} {name}") from error


@each_backend
@pytest.mark.parametrize("form", ["both masked", "native masked"])
def test_mask_layouts(form, backend):
    case = ODD_MIX[form]
    tensors = case.tensors(torch.float32)
    may = case.mask
    for mask in (may.t().contiguous().t(), torch.stack([~may, may], -1)[..., 1], may[:1].expand(3, -1)):
        strided, dense = case._replace(mask=mask), case._replace(mask=mask.contiguous())
        found = outcome(lambda *t, c=strided: c(*t, backend=backend), tensors)
        agree(found, expected(dense, tensors), tensors)


@each_backend
@pytest.mark.parametrize("grad", over(GRAD_LAYOUTS))
@pytest.mark.parametrize("form", ["both", "both packed", "channel"])
def test_gradient_layouts(form, grad, backend):
    case = MIX[f"{form}, over a block"]
    for dtype in (torch.float64, torch.bfloat16):
        tensors = case.tensors(dtype)
        agree(outcome(lambda *t: case(*t, backend=backend), tensors, grad), expected(case, tensors, grad), tensors)


@each_backend
@pytest.mark.parametrize("case", over(ODD_MIX))
def test_each_gradient_alone(case, backend):
    tensors = case.tensors(torch.float32)

    def call(*t):
        return case(*t, backend=backend)

    every = outcome(call, tensors)
    for needs in itertools.product((False, True), repeat=3):
        if any(n and t is not None for n, t in zip(needs, tensors, strict=True)):
            same_bits(outcome(call, tensors, needs=needs), every)
    with torch.no_grad():
        plain = call(*(t if t is None else t.requires_grad_() for t in tensors))
    assert not plain.requires_grad and torch.equal(plain, every.out)


@each_backend
@each_dtype
@pytest.mark.parametrize("packed", [False, True], ids=["mask", "routes"])
@pytest.mark.parametrize("parts", ["logits", "static", "both"])
def test_what_is_masked_is_not_read(parts, packed, dtype, backend):
    """NaN and Inf in experts that a row may not use, and in their logits and weights, change nothing there."""
    gen = torch.Generator().manual_seed(0)
    h, logits, static = (torch.randn(s, generator=gen).to(dtype) for s in ((70, 5, 9), (70, 4, 5), (4, 5)))
    bad_logits, bad_static = logits.clone(), static.clone()
    for bad in (bad_logits, bad_static):
        bad[..., ~MASK] = torch.tensor([math.nan, math.inf, -math.inf]).repeat(5)[: int((~MASK).sum())].to(dtype)
    routes = mtl.Routes.from_mask(MASK) if packed else None
    if packed:
        logits, static, bad_logits, bad_static = (t[..., MASK] for t in (logits, static, bad_logits, bad_static))
    case = Mix(h, mask=None if packed else MASK, routes=routes)
    weights = [None if parts == "static" else logits, None if parts == "logits" else static]
    bad_weights = [None if parts == "static" else bad_logits, None if parts == "logits" else bad_static]

    def call(*t):
        return case(*t, backend=backend)

    clean = outcome(call, [h, *weights])
    assert (clean.out[:, 1] == 0).all() and (clean.grads[0][:, [1, 4]] == 0).all()
    # Experts 1 and 4 serve nobody; 0 and 3 serve rows 0 and 3, not row 2.
    unread = h.clone()
    unread[:, 1], unread[:, 4] = math.nan, math.inf
    dirty = outcome(call, [unread, *bad_weights])
    same_bits(clean, dirty)
    unread[:, 0], unread[:, 3] = math.nan, -math.inf
    keep = torch.tensor([0.0, 1, 1, 0])[:, None].to(dtype)
    found = outcome(call, [unread, *bad_weights], lambda out: random_grad(out) * keep)
    wanted = outcome(call, [h, *weights], lambda out: random_grad(out) * keep)
    assert torch.equal(found.out[:, 1:3], clean.out[:, 1:3]) and found.out[:, [0, 3]].isnan().all()
    assert torch.equal(found.grads[0], wanted.grads[0])
    if not packed:
        for got, want in zip(found.grads[1:], wanted.grads[1:], strict=True):
            if got is not None:
                assert torch.equal(got[..., 1:3, :], want[..., 1:3, :])
                assert (got[..., ~MASK] == 0).all()


@each_backend
@each_dtype
@pytest.mark.parametrize("form", ["both masked", "both packed", "native masked", "unit native masked", "logits masked"])
def test_rows_without_experts_are_zero(form, dtype, backend):
    """All rows empty: zeros come out and go back, whatever the tensors hold."""
    case = ODD_MIX[form]
    if case.routes is not None:
        case = Mix(case.experts, torch.zeros(5, 0), torch.zeros(0), routes=mtl.Routes([0, 0, 0, 0], [], 7))
    else:
        case = case._replace(mask=torch.zeros(3, 7, dtype=torch.bool))
    tensors = case.tensors(dtype)
    for t in tensors:
        if t is not None and t.numel():
            t.view(-1)[::2] = math.nan
    found = outcome(lambda *t: case(*t, backend=backend), tensors)
    assert all((t == 0).all() for t in (found.out, *found.grads) if t is not None)
    assert found.out.shape == (5, 3, 20)


@each_backend
def test_forms_are_mix(backend):
    """gated_mix, linear_mix and adatt_mix give what mix gives for the same weights."""
    case = ODD_MIX["both"]
    experts, logits, static = case.tensors()
    mask = torch.rand(3, 7) < 0.7
    routes = mtl.Routes.from_mask(mask)

    def mix(*args, **kwargs):
        return mtl.mix(*args, **kwargs, backend=backend)

    assert torch.equal(mtl.gated_mix(experts, logits, mask=mask, backend=backend), mix(experts, logits, mask=mask))
    packed = mtl.gated_mix(experts, logits[:, mask], routes=routes, backend=backend)
    torch.testing.assert_close(packed, mix(experts, logits, mask=mask))
    assert torch.equal(mtl.linear_mix(experts, static, backend=backend), mix(experts, None, static))
    native, counts = torch.randn(5, dtype=torch.float64), (2, 0, 3, 2)
    padded = torch.zeros(3, 7, dtype=torch.float64)
    padded[0, :2], padded[2, 2:5] = native[:2], native[2:]
    found = mtl.adatt_mix(experts, logits, native, experts_per_unit=counts, backend=backend)
    torch.testing.assert_close(found, mix(experts, logits, padded))
    found = mtl.adatt_mix(experts, logits, None, experts_per_unit=(1, 1, 1, 4), mask=mask, backend=backend)
    torch.testing.assert_close(found, mix(experts, logits, torch.eye(3, 7, dtype=torch.float64), mask=mask))


H, L, S, M = torch.zeros(2, 5, 3), torch.zeros(2, 4, 5), torch.zeros(4, 5), torch.ones(4, 5, dtype=torch.bool)
ROUTES = mtl.Routes.from_mask(MASK)
R = ROUTES.num_routes
BAD = {
    "experts no tensor": (TypeError, "experts must be a tensor; got list", ([1.0], L), {}),
    "experts shape": (ValueError, r"experts must be \[B,E,D\]; got shape \(5, 3\)", (H[0], L), {}),
    "experts int": (TypeError, "experts must be float64.*torch.int64", (H.long(), L), {}),
    "nothing": (ValueError, "logits, static", (H,), {}),
    "logits no tensor": (TypeError, "logits must be a tensor; got float", (H, 1.0), {}),
    "logits int": (TypeError, "logits must be float64.*torch.int32", (H, L.int()), {}),
    "logits batch": (ValueError, r"logits must be \[B,T,E\] = \[2, T, 5\]; got \(1, 4, 5\)", (H, L[:1]), {}),
    "logits experts": (ValueError, "logits must be", (H, L[..., :4]), {}),
    "logits two dimensions": (ValueError, "logits must be", (H, L[0]), {}),
    "logits elsewhere": (ValueError, "logits is on meta", (H, L.to("meta")), {}),
    "static no tensor": (TypeError, "static must be a tensor", (H, L, 1), {}),
    "static bool": (TypeError, "static must be float64.*torch.bool", (H, L, M), {}),
    "static rows": (ValueError, r"static must be \[T,E\] = \[4, 5\]; got \(3, 5\)", (H, L, S[:3]), {}),
    "static experts": (ValueError, r"static must be \[T,E\] = \[T, 5\]; got \(4, 4\)", (H, None, S[:, :4]), {}),
    "static one dimension": (ValueError, "static must be", (H, None, S[0]), {}),
    "static elsewhere": (ValueError, "static is on meta", (H, L, S.to("meta")), {}),
    "channels with logits": (ValueError, r"static \[T,E,D\]", (H, L, torch.zeros(4, 5, 3)), {}),
    "channels with mask": (ValueError, r"static \[T,E,D\]", (H, None, torch.zeros(4, 5, 3)), {"mask": M}),
    "channels of another width": (ValueError, r"static must be \[T,E,D\]", (H, None, torch.zeros(4, 5, 2)), {}),
    "mask no tensor": (TypeError, "mask must be a bool tensor; got list", (H, L), {"mask": [[True]]}),
    "mask float": (TypeError, "mask must be a bool tensor; got torch.float32", (H, L), {"mask": M.float()}),
    "mask shape": (ValueError, r"mask must be \[T,E\] = \(4, 5\).*got \(1, 5\)", (H, L), {"mask": M[:1]}),
    "mask elsewhere": (ValueError, "mask must be.*meta", (H, L), {"mask": M.to("meta")}),
    "mask and routes": (ValueError, "mask or routes", (H, L), {"mask": M, "routes": ROUTES}),
    "routes no Routes": (TypeError, "routes must be a mtlkernels.Routes; got list", (H, L), {"routes": [0, 1]}),
    "routes experts": (ValueError, "routes is over 5 experts.*4", (H[:, :4], L), {"routes": ROUTES}),
    "routes elsewhere": (ValueError, "routes is on meta", (H, L), {"routes": ROUTES.to("meta")}),
    "experts no tensor, routes": (TypeError, "experts must be a tensor", ([1.0], L), {"routes": ROUTES}),
    "logits not packed": (ValueError, r"logits must be packed \[B,R\] = \(2, 7\)", (H, L), {"routes": ROUTES}),
    "static not packed": (ValueError, r"static must be packed \[R\] = \[7\]", (H, None, S), {"routes": ROUTES}),
    "backend": (ValueError, "backend must be one of.*'fast'", (H, L), {"backend": "fast"}),
}


@pytest.mark.parametrize("error, match, args, options", [pytest.param(*v, id=k) for k, v in BAD.items()])
def test_bad_input(error, match, args, options):
    with pytest.raises(error, match=match):
        mtl.mix(*args, **options)


V = torch.zeros(4)
BAD_ADATT = {
    "logits None": (TypeError, "logits must be a tensor", (H, None, V), [1, 1, 1, 1, 1]),
    "logits shape": (ValueError, "logits must be", (H, L[0], V), [1, 1, 1, 1, 1]),
    "sum": (ValueError, "experts_per_unit must be counts.*5 experts", (H, L, V), [1, 1, 1, 1]),
    "negative": (ValueError, "experts_per_unit must be counts", (H, L, V), [1, 1, 1, 3, -1]),
    "counts no ints": (TypeError, "experts_per_unit", (H, L, V), [1.0, 1, 1, 1, 1]),
    "counts no sequence": (TypeError, "experts_per_unit", (H, L, V), 5),
    "too few units": (ValueError, "logits has 4 rows, experts_per_unit only 3", (H, L, V), [1, 2, 2]),
    "unit weights of two experts": (ValueError, "native None needs one expert", (H, L, None), [1, 1, 1, 2]),
    "native length": (ValueError, r"native must be \[4\].*\(5,\)", (H, L, torch.zeros(5)), [1, 1, 1, 1, 1]),
    "native shape": (ValueError, r"native must be \[4\]", (H, L, S), [1, 1, 1, 1, 1]),
    "native no tensor": (TypeError, "native must be a tensor; got list", (H, L, [0.0] * 4), [1, 1, 1, 1, 1]),
    "native int": (TypeError, "native must be float64.*torch.int64", (H, L, V.long()), [1, 1, 1, 1, 1]),
    "native elsewhere": (ValueError, "native is on meta", (H, L, V.to("meta")), [1, 1, 1, 1, 1]),
}


@pytest.mark.parametrize("error, match, args, counts", [pytest.param(*v, id=k) for k, v in BAD_ADATT.items()])
def test_bad_adatt_input(error, match, args, counts):
    with pytest.raises(error, match=match):
        mtl.adatt_mix(*args, experts_per_unit=counts)


def test_bad_input_of_the_other_forms():
    with pytest.raises(TypeError, match="logits must be a tensor"):
        mtl.gated_mix(H, None)
    with pytest.raises(TypeError, match="weight must be a tensor"):
        mtl.linear_mix(H, None)
    with pytest.raises(ValueError, match=r"weight must be \[T,E\]"):
        mtl.linear_mix(H, S[:, :4])
    with pytest.raises(ValueError, match="mask must be"):
        mtl.adatt_mix(H, L, V, experts_per_unit=[1] * 5, mask=M[:2])
