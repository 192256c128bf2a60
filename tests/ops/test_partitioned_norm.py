"""partitioned_norm on every backend of a CPU: values, gradients, running statistics, numerics, bad input."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mtlkernels as mtl

from .cases import (
    GRAD_LAYOUTS,
    TOLERANCE,
    agree,
    close,
    each_backend,
    each_dtype,
    expected,
    halves,
    layouts,
    native_only,
    outcome,
    over,
    random_grad,
    same_bits,
    same_bits_with_any_threads,
)
from .norms import CASES, FEW, MODES, Norm, accumulate, make

each_case = pytest.mark.parametrize("case", over({**CASES, "few": FEW}))
each_mode = pytest.mark.parametrize("training", over(MODES))
# What cancels: with two rows of a domain nearly all of their gradient does.
FLOOR = 10.0


def by_domain(case: Norm, eps: float = 1e-5, momentum: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: batch_norm of each domain's rows apart; y and the running statistics afterwards."""
    y, (mean, var) = torch.full_like(case.x, torch.nan), case.running()
    for p in range(case.domain_weight.shape[0]):
        rows = case.domain == p
        if rows.any() and case.x.shape[1]:
            weight, bias = case.weight * case.domain_weight[p], case.bias + case.domain_bias[p]
            training = case.training and int(rows.sum()) >= 2
            y[rows] = F.batch_norm(case.x[rows], mean[p], var[p], weight, bias, training, momentum, eps)
    return y, mean, var


@each_backend
@each_case
def test_is_batch_norm_of_each_domain(case, backend):
    running = case.running()
    found = case(*case.tensors(), backend=backend, running=running, eps=1e-3, momentum=0.3)
    for got, want in zip((found, *running), by_domain(case, 1e-3, 0.3), strict=True):
        close(got, want)


@each_backend
@each_dtype
@each_case
def test_against_float64(case, dtype, backend):
    """Output, every gradient and the running statistics, with parameters of x's dtype and of float32."""
    for parameters in {dtype, accumulate(dtype)}:
        tensors = case.tensors(dtype, parameters)
        running, wide = case.running(accumulate(dtype)), case.running()
        found = outcome(lambda *t, r=running: case(*t, backend=backend, running=r), tensors)
        wanted = expected(case, tensors, running=wide)
        agree(found, wanted, tensors, floor=FLOOR)
        for got, want in zip(running, wide, strict=True):
            close(got, want, TOLERANCE[accumulate(dtype)])


@each_backend
@halves
@each_mode
def test_half_precision_is_as_good_as_torchs(training, dtype, backend):
    """Errors against float64 are at most twice those of batch_norm in the same dtype."""
    case = make(200, 40, 1, training)
    tensors = case.tensors(dtype, torch.float32)

    def torchs(x, weight, bias, domain_weight, domain_bias):
        mean, var = (t[0] for t in case.running(torch.float32))
        return F.batch_norm(x, mean, var, weight * domain_weight[0], bias + domain_bias[0], training)

    wanted, ours = expected(case, tensors), outcome(lambda *t: case(*t, backend=backend), tensors)
    plain = outcome(torchs, tensors)
    for got, other, want in zip((ours.out, *ours.grads), (plain.out, *plain.grads), (wanted.out, *wanted.grads),
                                strict=True):  # fmt: skip
        errors = [(t.double() - want.double()).abs().max().item() for t in (got, other)]
        assert errors[0] <= 2 * errors[1] + 1e-6 * want.abs().max().item()


@each_backend
@each_dtype
@pytest.mark.parametrize("name", ["odd, train", "over a block, train", "odd, eval"])
def test_strides_of_inputs(name, dtype, backend):
    case = CASES[name]
    tensors = case.tensors(dtype)
    for i, tensor in enumerate(tensors):
        for layout, strided in layouts(tensor).items() if tensor.dim() == 2 else [("every second", tensor)]:
            given = [*tensors[:i], strided, *tensors[i + 1 :]]
            if tensor.dim() == 1:
                given[i] = torch.stack([torch.full_like(tensor, torch.nan), tensor], -1)[:, 1]
            if i == 0 and layout in ("expanded first", "a single number"):
                continue  # no variance: 1 / sqrt(eps) blows up the rounding of the mean
            found, wanted = outcome(lambda *t: case(*t, backend=backend), given), expected(case, given)
            agree(found, wanted, given, floor=FLOOR)
    ids = torch.stack([torch.full_like(case.domain, 99), case.domain], -1)[:, 1]
    strided = outcome(lambda *t: case._replace(domain=ids)(*t, backend=backend), tensors)
    same_bits(strided, outcome(lambda *t: case(*t, backend=backend), tensors))


@each_backend
@each_dtype
@pytest.mark.parametrize("layout", GRAD_LAYOUTS)
@each_mode
def test_strides_of_gradients(training, layout, dtype, backend):
    case = make(13, 7, 3, training)
    tensors = case.tensors(dtype)
    found = outcome(lambda *t: case(*t, backend=backend), tensors, GRAD_LAYOUTS[layout])
    agree(found, expected(case, tensors, GRAD_LAYOUTS[layout]), tensors, floor=FLOOR)


@each_backend
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_domain_dtypes(dtype, backend):
    case = CASES["odd, train"]
    found = outcome(lambda *t: case._replace(domain=case.domain.to(dtype))(*t, backend=backend), case.tensors())
    same_bits(found, outcome(lambda *t: case(*t, backend=backend), case.tensors()))


@each_backend
@each_mode
def test_order_of_rows_does_not_matter(training, backend):
    """Rows shuffled: outputs and gradients shuffled with them."""
    case = make(400, 12, 3, training)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    mixed = case._replace(x=case.x[order], domain=case.domain[order])
    found = outcome(lambda *t: mixed(*t, backend=backend), mixed.tensors(), torch.cos)
    wanted = outcome(lambda *t: case(*t, backend=backend), case.tensors(), torch.cos)
    close(found.out, wanted.out[order])
    close(found.grads[0], wanted.grads[0][order])
    for got, want in zip(found.grads[1:], wanted.grads[1:], strict=True):
        close(got, want)


@each_backend
@each_dtype
def test_a_constant_for_each_domain_does_not_matter(dtype, backend):
    """In training; the constants are such that nothing is rounded."""
    case = make(500, 10, 4)
    x = (case.x * 8).round() / 8
    case = case._replace(x=x.clamp(-4, 4))
    moved = case._replace(x=case.x + torch.tensor([0.0, 8, -8, 4], dtype=torch.float64)[case.domain, None])
    tensors = case.tensors(dtype)
    assert torch.equal(moved.x.to(dtype).double() - case.x, moved.x - case.x) or dtype == torch.bfloat16
    found = outcome(lambda *t: moved(*t, backend=backend), moved.tensors(dtype))
    wanted = outcome(lambda *t: case(*t, backend=backend), tensors)
    if dtype == torch.bfloat16:
        wanted = expected(moved, moved.tensors(dtype))
    agree(found, wanted, tensors, floor=FLOOR)


@each_backend
@pytest.mark.parametrize("offset", [1e4, -3e6])
def test_large_offsets(offset, backend):
    """float32 keeps what the input holds: mean, variance and output beside an offset many deviations away."""
    case = make(3000, 8, 3)
    case = case._replace(x=(case.x + offset).float().double())
    case.running_mean.zero_()
    running = case.running(torch.float32)
    found = case(*case.tensors(torch.float32), backend=backend, running=running, momentum=1.0)
    y, mean, var = by_domain(case, momentum=1.0)
    close(running[0], mean, 1e-7)
    close(running[1], var)
    # The mean is a float32 number: half a unit in its last place, in deviations, is the error that remains.
    unit = abs(offset) * 2.0**-23
    largest = (case.weight * case.domain_weight).abs().max().item()
    assert (found.double() - y).abs().max().item() <= unit * largest + 1e-4 * y.abs().max().item()


@each_backend
@each_dtype
def test_few_rows(dtype, backend):
    """None: untouched, zero gradients. One: running statistics, as constants, which stay. Two: batch statistics."""
    tensors, running = FEW.tensors(dtype), FEW.running(accumulate(dtype))
    before = [t.clone() for t in running]
    found = outcome(lambda *t: FEW(*t, backend=backend, running=running), tensors)
    for now, old in zip(running, before, strict=True):
        assert torch.equal(now[:2], old[:2]) and not (now[2:] == old[2:]).any()
    one = FEW.domain == 1
    wanted = outcome(lambda *t: FEW(*t, backend=backend, training=False), tensors)
    assert torch.equal(found.out[one], wanted.out[one])
    assert torch.equal(found.grads[0][one], wanted.grads[0][one])
    assert all((g[0] == 0).all() for g in found.grads[3:])
    two = found.grads[0][FEW.domain == 2].double()
    close(two.sum(0), torch.zeros(10), TOLERANCE[dtype], floor=FLOOR)


@each_backend
def test_running_statistics(backend):
    """As batch_norm moves them, step after step; of 16-bit ones too; none outside training."""
    case, wide = make(90, 6, 2), torch.float32
    tensors, running = case.tensors(wide), case.running(wide)
    want = case.running(wide)
    for step in range(3):
        case(tensors[0] * step, *tensors[1:], backend=backend, running=running)
        for p in range(2):
            F.batch_norm((tensors[0] * step)[case.domain == p], want[0][p], want[1][p], training=True)
    for got, wanted in zip(running, want, strict=True):
        close(got, wanted)
    short = case.running(torch.bfloat16)
    case(*tensors, backend=backend, running=short)
    assert all(t.dtype == torch.bfloat16 for t in short)
    fresh = case.running(wide)
    case(*tensors, backend=backend, running=fresh)
    for got, wanted in zip(short, fresh, strict=True):
        close(got, wanted)
    same = [t.clone() for t in running]
    case(*tensors, backend=backend, running=running, training=False)
    case(*tensors, backend=backend, running=running, momentum=0.0)
    assert all(torch.equal(a, b) for a, b in zip(running, same, strict=True))


@each_backend
@each_mode
def test_backward_after_the_running_statistics_moved(training, backend):
    """The statistics that served are kept, though the tensors they came from have changed since."""
    running, fresh = FEW.running(), FEW.running()

    def derivatives(backend, running, moved):
        tensors = [t.requires_grad_() for t in FEW.tensors()]
        out = FEW(*tensors, backend=backend, running=running, training=training)
        for t in running:
            t.add_(moved)
        first = torch.autograd.grad(out, tensors, torch.cos(out.detach()), create_graph=True)
        squares = sum(g.square().sum() for g in first)
        return *first, *torch.autograd.grad(squares, tensors, allow_unused=True, materialize_grads=True)

    for got, want in zip(derivatives(backend, running, 1), derivatives("reference", fresh, 0), strict=True):
        close(got.detach(), want.detach())
    assert not any(torch.equal(a, b) for a, b in zip(running, fresh, strict=True))


@each_backend
@each_dtype
def test_nan_stays_where_it_is(dtype, backend):
    """Outside training, and in a domain of one row, in its row; in training in its column of its domain."""
    bad = FEW._replace(x=FEW.x.clone())
    bad.x[1, 3] = bad.x[2, 4] = torch.nan
    found = outcome(lambda *t: bad(*t, backend=backend), bad.tensors(dtype))
    clean = outcome(lambda *t: FEW(*t, backend=backend), FEW.tensors(dtype))
    hurt = torch.zeros(6, 10, dtype=torch.bool)
    hurt[1, 3] = hurt[2, 4] = hurt[4, 4] = True
    assert torch.equal(found.out.isnan(), hurt)
    assert torch.equal(found.out[~hurt], clean.out[~hurt])
    hurt[1, 3] = False
    assert torch.equal(found.grads[0][~hurt], clean.grads[0][~hurt]) and found.grads[0][hurt].isnan().all()
    found = outcome(lambda *t: bad(*t, backend=backend, training=False), bad.tensors(dtype))
    clean = outcome(lambda *t: FEW(*t, backend=backend, training=False), FEW.tensors(dtype))
    assert torch.equal(found.out.isnan(), bad.x.isnan()) and torch.equal(found.grads[0], clean.grads[0])


@each_backend
@each_dtype
def test_extreme_values(dtype, backend):
    """No variance, none but eps, and numbers near the ends of the type."""
    case = make(140, 4, 2)
    case.x[:, 0], case.running_var[:] = 5.0, 1.0
    case.x[:, 1] *= 1e-3
    case.x[:, 2] *= 3e3
    tensors = case.tensors(dtype)
    agree(outcome(lambda *t: case(*t, backend=backend), tensors), expected(case, tensors), tensors, floor=1e3)
    assert torch.equal(case(*tensors, backend=backend)[:, 0], (tensors[2] + tensors[4][case.domain])[:, 0])


@native_only
@pytest.mark.parametrize("name", ["odd, train", "odd, eval", "over a chunk, train", "many domains, train"])
def test_needs(name):
    """Each gradient alone is that of all together; what is not asked for is empty."""
    case, op = CASES[name], torch.ops.mtlkernels
    tensors = case.tensors(torch.float32)
    args = tensors[0], case.domain, *tensors[1:], *case.running(torch.float32), case.training, 1e-5
    y, *kept = op.partitioned_norm(*args)
    back = torch.cos(y), *args[:3], args[4], *kept, case.training, 1e-5
    every = op.partitioned_norm_backward(*back, 31)
    for needs in range(32):
        for i, got in enumerate(op.partitioned_norm_backward(*back, needs)):
            assert torch.equal(got, every[i]) if needs >> i & 1 else got.shape == (0,), (needs, i)


@native_only
@each_dtype
@pytest.mark.parametrize("shape", [(2000, 300, 5), (70, 40, 30)], ids=str)
@each_mode
def test_threads(training, shape, dtype):
    case = make(*shape, training)
    same_bits_with_any_threads(lambda *t: case(*t, backend="native"), lambda: case.tensors(dtype))


@each_backend
@pytest.mark.parametrize("bad", [4, -1, 2**40])
@each_mode
def test_an_id_out_of_range_is_named(training, bad, backend):
    case = make(9, 3, 4, training)
    case.domain[5] = bad
    with pytest.raises(ValueError, match=rf"domain must lie in \[0, 4\); row 5 has {bad}"):
        case(*case.tensors(), backend=backend)


def test_an_id_out_of_range_becomes_nan_where_none_can_look(monkeypatch):
    """The reference on a GPU: the row is NaN, without a gradient, and the rest as without it."""
    from mtlkernels.reference import partitioned_norm as plain

    monkeypatch.setattr(plain, "_can_look", lambda domain: False)
    keep = torch.arange(9) != 5

    def check(case):
        rest = case._replace(x=case.x[keep], domain=case.domain[keep])
        found = outcome(lambda *t: case(*t, backend="reference"), case.tensors())
        grad = random_grad(found.out)[keep]
        wanted = outcome(lambda *t: rest(*t, backend="reference"), rest.tensors(), lambda out: grad)
        assert found.out[5].isnan().all() and (found.grads[0][5] == 0).all()
        close(found.out[keep], wanted.out)
        close(found.grads[0][keep], wanted.grads[0])
        for got, want in zip(found.grads[1:], wanted.grads[1:], strict=True):
            close(got, want)

    for training, bad in itertools.product((True, False), (4, -1)):
        case = make(9, 3, 4, training)
        case.domain[5] = bad
        check(case)


X, IDS, W, T = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long), torch.zeros(3), torch.zeros(2, 3)
GOOD = {"x": X, "domain": IDS, "weight": W, "bias": W, "domain_weight": T, "domain_bias": T, "running_mean": T,
        "running_var": T, "training": True}  # fmt: skip
BAD = {
    "x no tensor": (TypeError, "x must be a tensor; got list", {"x": [1.0]}),
    "x shape": (ValueError, r"x must be \[B,D\]; got shape \(3,\)", {"x": W}),
    "x int": (TypeError, "x must be float64.*torch.int64", {"x": X.long()}),
    "domain no tensor": (TypeError, "domain must be an integer tensor; got list", {"domain": [0] * 4}),
    "domain float": (TypeError, "domain must be an integer tensor; got torch.float32", {"domain": X[:, 0]}),
    "domain bool": (TypeError, "domain must be an integer tensor; got torch.bool", {"domain": IDS.bool()}),
    "domain length": (ValueError, r"domain must be \[B\] = \[4\].*got \(3,\)", {"domain": IDS[:3]}),
    "domain elsewhere": (ValueError, "domain must be.*on meta", {"domain": IDS.to("meta")}),
    "weight no tensor": (TypeError, "weight must be a tensor; got NoneType", {"weight": None}),
    "weight int": (TypeError, "weight must be float64.*torch.int64", {"weight": W.long()}),
    "weight shape": (ValueError, r"weight must be \[D\] = \[3\]; got \(2,\)", {"weight": W[:2]}),
    "bias shape": (ValueError, r"bias must be \[D\] = \[3\]; got \(2, 3\)", {"bias": T}),
    "bias dtype": (TypeError, "bias must have weight's dtype torch.float32; got torch.float64", {"bias": W.double()}),
    "bias elsewhere": (ValueError, "bias is on meta, x on cpu", {"bias": W.to("meta")}),
    "domain_weight shape": (ValueError, r"domain_weight must be \[P,D\] = \[P, 3\]", {"domain_weight": W}),
    "domain_weight dtype": (TypeError, "domain_weight must have weight's dtype", {"domain_weight": T.double()}),
    "no domains": (ValueError, "domain_weight must have at least one domain", {"domain_weight": T[:0]}),
    "domain_bias domains": (ValueError, r"domain_bias must be .* = \[2, 3\]; got \(1, 3\)", {"domain_bias": T[:1]}),
    "running_mean width": (ValueError, r"running_mean must be \[P,D\] = \[2, 3\]", {"running_mean": T[:, :2]}),
    "running_var dtype": (TypeError, "running_var must have running_mean's dtype", {"running_var": T.double()}),
    "running_var gradient": (ValueError, "running_var must not require a gradient",
                             {"running_var": torch.zeros(2, 3, requires_grad=True)}),
    "momentum": (TypeError, "momentum must be a number; got None", {"momentum": None}),
    "eps": (TypeError, "eps must be a number; got 'small'", {"eps": "small"}),
    "backend": (ValueError, "backend must be one of.*'fast'", {"backend": "fast"}),
}  # fmt: skip


@pytest.mark.parametrize("error, match, change", [pytest.param(*v, id=k) for k, v in BAD.items()])
def test_bad_input(error, match, change):
    with pytest.raises(error, match=match):
        mtl.partitioned_norm(**{**GOOD, **change})


def test_explain():
    lines = mtl.explain("partitioned_norm", **GOOD, backend="reference").splitlines()
    assert lines[0] == "partitioned_norm on cpu, float32: reference (asked for)" and len(lines) == 4
    assert mtl.explain("partitioned_norm", **GOOD) == mtl.explain("partitioned_norm", X)
