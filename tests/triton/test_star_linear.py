"""The Triton star_linear against torch in float64: values, every gradient, and what must not be read or written."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter: overflow in exp

ACTIVATIONS = {"": lambda z: z, "relu": torch.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh,
               "sigmoid": torch.sigmoid}  # fmt: skip


@pytest.fixture
def ops(device, monkeypatch):
    """The launchers, with every fresh buffer full of NaN."""
    from mtlkernels.triton import star_linear

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: torch.zeros(*args, **kwargs).fill_(torch.nan))
    return star_linear


def oracle(x, domain, weight, own, bias, own_bias, activation):
    """One row at a time; rows of no domain are NaN."""
    rows = []
    for b, p in enumerate(domain.tolist()):
        if not 0 <= p < len(own):
            rows.append(torch.full_like(weight[:, :1].sum(1), torch.nan).detach())
            continue
        z = (weight * own[p]) @ x[b]
        z = z if bias is None else z + bias
        rows.append(ACTIVATIONS[activation](z if own_bias is None else z + own_bias[p]))
    return torch.stack(rows) if rows else x.new_zeros(0, len(weight))


def check(ops, device, domain, tensors, activation="", grad=None, tolerance=1e-5):
    """Forward and gradients of the launchers. Tolerances are of the largest element; inputs count as given."""
    domain, tensors = domain.to(device), [t if t is None else t.to(device) for t in tensors]
    x, weight = tensors[:2]
    wide = [t if t is None else t.double().requires_grad_() for t in tensors]
    with torch.enable_grad():
        y = oracle(wide[0], domain, *wide[1:], activation)
    found, z = ops.star_linear(x, domain, *tensors[1:], activation, True)
    assert found.dtype == x.dtype
    close(found, y, tolerance)
    keeps = activation in ("gelu", "silu")
    assert z.shape == (y.shape if keeps else (0,)) and z.dtype == x.dtype
    plain = ops.star_linear(x, domain, *tensors[1:], activation, False)
    torch.testing.assert_close(plain[0], found, rtol=0, atol=0, equal_nan=True)
    assert plain[1].shape == (0,)

    grad = torch.randn(y.shape, device=device, dtype=x.dtype) if grad is None else grad.to(device, x.dtype)
    given = [t for t in wide if t is not None]
    expected = [None] * len(given)
    if y.requires_grad:
        expected = torch.autograd.grad(y, given, grad.double(), allow_unused=True)
    expected = [torch.zeros_like(w) if e is None else e for e, w in zip(expected, given, strict=True)]
    needs = sum(1 << i for i, t in enumerate(tensors) if t is not None)
    gradients = ops.star_linear_backward(grad, x, domain, *tensors[1:3], z if keeps else found, activation, needs)
    left = iter(expected)
    for got, tensor, like in zip(gradients, tensors, (x, *[weight] * 4), strict=True):
        if tensor is None:
            assert got.shape == (0,)
            continue
        want = next(left)
        assert got.shape == want.shape and got.dtype == like.dtype
        close(got, want, 4 * tolerance)
    return found, gradients


def close(found, expected, tolerance):
    expected = expected.detach()
    assert found.shape == expected.shape
    scale = expected.nan_to_num().abs().max().item() if expected.numel() else 0
    atol = tolerance * max(scale, 1e-3)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=atol, equal_nan=True)


def make(batch, domains, features, width):
    """domain [B], and x [B,K], weight [N,K], domain_weight [P,N,K], bias [N], domain_bias [P,N]."""
    generator = torch.Generator().manual_seed(batch + 7 * features + 31 * width)
    shapes = (batch, width), (features, width), (domains, features, width), (features,), (domains, features)
    x, weight, *rest = (torch.randn(s, generator=generator) for s in shapes)
    return torch.randint(domains, (batch,), generator=generator), [x, weight / max(width, 1) ** 0.5, *rest]


CASES = [  # B, P, N, K
    (1, 1, 1, 1),
    (5, 3, 11, 40),
    (9, 2, 70, 20),
    (6, 20, 8, 5),
    (0, 2, 3, 4),
    (4, 2, 3, 0),
    (4, 2, 0, 3),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("activation", ["", "gelu"])
def test_shapes(ops, device, case, activation):
    domain, tensors = make(*case)
    check(ops, device, domain, tensors, activation)


@pytest.mark.parametrize("without", [(3,), (4,), (3, 4)])
def test_without_biases(ops, device, without):
    domain, tensors = make(9, 3, 10, 20)
    check(ops, device, domain, [None if i in without else t for i, t in enumerate(tensors)], "silu")


@pytest.mark.parametrize("activation", ["relu", "silu", "tanh", "sigmoid"])
def test_activations(ops, device, activation):
    domain, tensors = make(9, 3, 10, 20)
    check(ops, device, domain, tensors, activation)
    check(ops, device, domain, [30 * tensors[0], *tensors[1:]], activation)


@pytest.mark.parametrize("spread", ["even", "skewed", "sorted"])
def test_more_than_one_tile(ops, device, monkeypatch, spread):
    """Every size crosses a tile; a domain's rows cross tiles and chunks, and other tiles hold a single row."""
    monkeypatch.setattr(ops, "_MIN_ROWS", 20)
    domain, tensors = make(150, 3, 65, 20)
    if spread == "skewed":
        domain[torch.rand(150) < 0.9] = 1
    if spread == "sorted":
        domain = domain.sort().values
    check(ops, device, domain, tensors, "tanh")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_types_of_ids(ops, device, dtype):
    domain, tensors = make(7, 3, 4, 5)
    check(ops, device, domain.to(dtype), tensors)
    check(ops, device, torch.stack([domain, domain], 1).to(dtype)[:, 0], tensors)


def test_ids_out_of_range(ops, device):
    """Rows of no domain: NaN, dx 0, no part in any other gradient, whatever they hold and however far out they are."""
    _, tensors = make(12, 3, 11, 20)
    domain = torch.tensor([0, 3, 2, -1, 2, 2**32, 0, 2**40 + 1, 2, -(2**33), 2, 0])
    bad = (domain < 0) | (domain > 2)
    hurt = tensors[0].clone()
    hurt[bad] = torch.nan
    for activation in ("", "gelu", "relu"):
        for x in (tensors[0], hurt):
            grad = torch.randn(12, 11)
            found, gradients = check(ops, device, domain, [x, *tensors[1:]], activation, grad)
            assert found[bad].isnan().all() and (gradients[0][bad] == 0).all()
    everything = torch.full((12,), 3)
    found, gradients = check(ops, device, everything, tensors, "tanh")
    assert found.isnan().all() and all((g == 0).all() for g in gradients)


def test_a_domain_without_rows_is_not_read(ops, device):
    """Its gradients are exactly 0, whatever its weight and the shared one hold."""
    _, tensors = make(9, 4, 6, 5)
    tensors = [t.to(device) for t in tensors]
    domain = torch.tensor([0, 2, 2, 0, 0, 2, 0, 2, 2], device=device)
    y = ops.star_linear(tensors[0], domain, *tensors[1:], "", False)[0]
    grad = torch.randn(y.shape, device=device)
    clean = ops.star_linear_backward(grad, tensors[0], domain, *tensors[1:3], y, "", 31)
    assert (clean[2][[1, 3]] == 0).all() and (clean[4][[1, 3]] == 0).all()
    own, own_bias = tensors[2].clone(), tensors[4].clone()
    own[[1, 3]], own_bias[[1, 3]] = torch.nan, torch.inf
    assert torch.equal(ops.star_linear(tensors[0], domain, tensors[1], own, tensors[3], own_bias, "", False)[0], y)
    hurt = ops.star_linear_backward(grad, tensors[0], domain, tensors[1], own, y, "", 31)
    assert all(torch.equal(a, b) for a, b in zip(clean, hurt, strict=True))
    weight = torch.full_like(tensors[1], torch.nan)
    assert (ops.star_linear_backward(grad, tensors[0], domain, weight, own, y, "", 4)[2][[1, 3]] == 0).all()


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16])
def test_float16(ops, device, weight_dtype):
    domain, tensors = make(140, 3, 24, 40)
    check(ops, device, domain, half(tensors, torch.float16, weight_dtype), "silu", tolerance=2e-3)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16(ops, device, weight_dtype):
    domain, tensors = make(33, 3, 24, 40)
    check(ops, device, domain, half(tensors, torch.bfloat16, weight_dtype), "relu", tolerance=1.6e-2)


def half(tensors, dtype, weight_dtype):
    """x in dtype, weights and biases in weight_dtype; W_p a power of two, so that no product is rounded twice."""
    x, weight, own, *biases = tensors
    own = torch.sign(own) * 2.0 ** own.round().clamp(-2, 2)
    return [x.to(dtype), weight.to(dtype).to(weight_dtype), own.to(weight_dtype), *(b.to(weight_dtype) for b in biases)]


def test_half_precision_against_plain_torch(ops, device):
    """At most twice the error of a loop over the domains in float16."""
    domain, tensors = make(140, 3, 24, 40)
    domain, tensors = domain.to(device), [t.half().to(device) for t in tensors]
    x, weight, own, bias, own_bias = tensors
    exact = oracle(x.double(), domain, *(t.double() for t in tensors[1:]), "")
    plain = torch.empty(140, 24, dtype=torch.float16, device=device)
    for p in range(3):
        plain[domain == p] = F.linear(x[domain == p], weight * own[p], bias + own_bias[p])
    found = ops.star_linear(x, domain, *tensors[1:], "", False)[0]
    assert (found.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max()
    assert (found.double() - exact).norm() <= 2 * (plain.double() - exact).norm()


def test_layouts(ops, device):
    """Every tensor and the gradient of any strides."""
    domain, (x, weight, own, bias, own_bias) = make(6, 3, 9, 12)
    check(ops, device, domain, (x.mT.contiguous().mT, weight.mT.contiguous().mT, own, bias, own_bias), "relu")
    check(ops, device, domain, (x[:1].expand(6, -1), weight, own[:1].expand(3, -1, -1), bias, own_bias), "gelu")
    check(ops, device, domain, (torch.stack([x, x], -1)[..., 0], weight, own.mT.contiguous().mT,
                                bias[:1].expand(9), own_bias.t().contiguous().t()))  # fmt: skip
    check(ops, device, domain, (x, weight, own, bias, own_bias), grad=torch.tensor(2.0).expand(6, 9))
    check(ops, device, domain, (x, weight, own, bias, own_bias), "tanh", grad=torch.randn(9, 6).t())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_nan_stays_in_its_row(ops, device, activation):
    domain, tensors = make(7, 3, 9, 12)
    domain, tensors = domain.to(device), [t.to(device) for t in tensors]
    clean = ops.star_linear(tensors[0], domain, *tensors[1:], activation, False)[0]
    tensors[0][2, 4] = torch.nan
    hurt = ops.star_linear(tensors[0], domain, *tensors[1:], activation, False)[0]
    assert hurt[2].isnan().all()
    hurt[2] = clean[2]
    assert torch.equal(hurt, clean)


def test_needs(ops, device):
    """Each gradient alone is the same as all together, and what is not asked for is empty."""
    domain, tensors = make(9, 3, 10, 20)
    domain, (x, weight, own, *biases) = domain.to(device), [t.to(device) for t in tensors]
    y = ops.star_linear(x, domain, weight, own, *biases, "relu", True)[0]
    grad = torch.randn(y.shape, device=device)
    everything = ops.star_linear_backward(grad, x, domain, weight, own, y, "relu", 31)
    for needs in (0, 1, 2, 4, 6, 8, 16, 24, 18, 12):
        some = ops.star_linear_backward(grad, x, domain, weight, own, y, "relu", needs)
        for i, (one, other) in enumerate(zip(some, everything, strict=True)):
            assert torch.equal(one, other) if needs >> i & 1 else one.shape == (0,)


def test_one_row_of_each_domain(ops, device):
    _, tensors = make(19, 19, 5, 6)
    check(ops, device, torch.randperm(19), tensors, "tanh")


def test_rows_in_another_order_give_the_same(ops, device):
    """Bit for bit on a GPU; the interpreter's products are numpy's, whose rounding depends on the place in the tile."""

    def same(a, b):
        return torch.equal(a, b) if device == "cuda" else torch.allclose(a, b, rtol=1e-5, atol=1e-6)

    domain, tensors = make(150, 3, 10, 20)
    domain, (x, *rest) = domain.to(device), [t.to(device) for t in tensors]
    plain = ops.star_linear(x, domain, *rest, "tanh", False)[0]
    grad = torch.randn(plain.shape, device=device)
    dx = ops.star_linear_backward(grad, x, domain, *rest[:2], plain, "tanh", 1)[0]
    order = torch.randperm(150, device=device)
    found = ops.star_linear(x[order], domain[order], *rest, "tanh", False)[0]
    assert same(found, plain[order])
    again = ops.star_linear_backward(grad[order], x[order], domain[order], *rest[:2], found, "tanh", 1)[0]
    assert same(again, dx[order])


def test_a_dtype_without_kernel_is_named(ops, device):
    domain, tensors = make(2, 2, 3, 4)
    with pytest.raises(ValueError, match="float64"):
        ops.star_linear(tensors[0].double(), domain, *(t.double() for t in tensors[1:]), "", False)


def test_the_public_function_goes_here(device):
    """Values and gradients as the reference's, through the dispatcher and autograd."""
    import mtlkernels as mtl

    domain, tensors = make(9, 3, 10, 20)
    found, wanted = [], []
    for backend, results in (("triton", found), ("reference", wanted)):
        leaves = [t.to(device).requires_grad_() for t in tensors]
        y = mtl.star_linear(leaves[0], domain.to(device), *leaves[1:], activation="gelu", backend=backend)
        results += [y, *torch.autograd.grad(y.square().sum(), leaves)]
    for a, b in zip(found, wanted, strict=True):
        close(a, b.double(), 1e-5)
