"""The Triton mix against plain formulas in float64: values, every gradient, and what must not be read or written."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter: log(0), 1/0


@pytest.fixture
def ops(device, monkeypatch):
    """The launchers, with every fresh buffer full of NaN."""
    from mtlkernels.triton import mix, mix_channels

    def poisoned(*args, **kwargs):
        out = torch.zeros(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    for module in (mix, mix_channels):
        monkeypatch.setattr(module.torch, "empty", poisoned)
    return mix


def oracle(experts, logits, static, mask=None, columns=None, native=None):
    """out and lse, one row of one task at a time."""
    h = experts.double()
    batch, num_experts, width = h.shape
    if static is not None and static.dim() == 3:
        return torch.einsum("ted,bed->btd", static.double(), h), None
    table = columns if columns is not None else mask
    num_rows = table.shape[0] if table is not None else static.shape[0] if logits is None else logits.shape[1]
    begins = [0, *itertools.accumulate(native or [])]
    out, lse = h.new_zeros(batch, num_rows, width), h.new_full((batch, num_rows), -torch.inf)
    cells_out, cells_lse = [], []
    for b, t in itertools.product(range(batch), range(num_rows)):
        usable = range(num_experts) if table is None else (table[t] if mask is not None else table[t] >= 0).nonzero()
        usable = [int(e) for e in usable]
        place = [e if columns is None else int(columns[t, e]) for e in usable]
        a = h.new_zeros(len(usable))
        if logits is not None:
            row = (logits[b] if columns is not None else logits[b, t]).double()[place]
            a = torch.softmax(row, 0)
            cells_lse.append(torch.logsumexp(row, 0))
        if native is not None:
            own = [begins[t] <= e < begins[t + 1] for e in usable]
            picks = [i for i, mine in enumerate(own) if mine]
            v = h.new_ones(len(picks)) if static is None else static.double()[[usable[i] for i in picks]]
            a = a.index_add(0, torch.tensor(picks, dtype=torch.long, device=h.device), v)
        elif static is not None:
            a = a + (static if columns is not None else static[t]).double()[place]
        cells_out.append(a @ h[b, usable])
    if cells_out:
        out = torch.stack(cells_out).reshape(batch, num_rows, width)
    if cells_lse:
        lse = torch.stack(cells_lse).reshape(batch, num_rows)
    return out, lse if logits is not None else None


def check(ops, device, args, dtype=torch.float32, grad_lse=False, grad=None, tolerance=None):
    """Forward and gradients of the launchers on args = experts, logits, static, mask, columns, native."""
    tolerance = tolerance or {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    args = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
    args[0] = args[0].to(dtype)
    wide = [a.detach().double().requires_grad_() if a is not None else None for a in args[:3]]
    with torch.enable_grad():
        out, lse = oracle(*wide, *args[3:])
    found, found_lse = ops.mix(*args)
    assert found.shape == out.shape and found.dtype == dtype
    close(found, out, tolerance)
    if args[1] is None:
        assert found_lse.shape == (0,)
    else:
        assert found_lse.dtype == torch.float32
        torch.testing.assert_close(found_lse.double(), lse.detach(), rtol=1e-5, atol=1e-5)
    grad = torch.randn(out.shape, device=device).to(dtype) if grad is None else grad.to(device, dtype)
    weight = torch.randn(lse.shape, device=device) if grad_lse else None
    if weight is not None:
        weight = torch.where(torch.isfinite(lse), weight, 0).detach()
    outputs, seeds = [out], [grad.double()]
    if weight is not None:
        outputs, seeds = [out, torch.where(torch.isfinite(lse), lse, 0)], [grad.double(), weight.double()]
    given = [w for w in wide if w is not None]
    expected = list(torch.autograd.grad(outputs, given, seeds, allow_unused=True)) if out.requires_grad else []
    expected = [torch.zeros_like(g) if e is None else e for e, g in itertools.zip_longest(expected, given)]
    needs = sum(bit for bit, w in zip((1, 2, 4), wide, strict=True) if w is not None)
    gradients = ops.mix_backward(grad, weight, *args, found_lse, needs)
    for want, got, arg in zip(expected, [g for g, w in zip(gradients, wide, strict=True) if w is not None],
                              [a for a in args[:3] if a is not None], strict=True):  # fmt: skip
        assert got.shape == arg.shape and got.dtype == arg.dtype
        close(got, want, max(tolerance, 2e-3 if arg.dtype == torch.float16 else 0))
    return found, gradients


def close(found, expected, tolerance):
    """Within `tolerance` of the largest element; NaN nowhere that the oracle has none."""
    expected = expected.detach()
    scale = expected.nan_to_num().abs().max().item() if expected.numel() else 0
    atol = tolerance * max(scale, 1e-3)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=atol, equal_nan=True)


def make(batch, num_rows, num_experts, width):
    generator = torch.Generator().manual_seed(batch + 7 * num_rows + 31 * num_experts + 101 * width)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    return normal(batch, num_experts, width), normal(batch, num_rows, num_experts), normal(num_rows, num_experts)


SHAPES = [  # B, T, E, D
    (1, 1, 1, 1),
    (5, 3, 7, 20),
    (17, 2, 6, 16),
    (3, 4, 9, 300),  # more than one tile of D
    (2, 6, 5, 129),
    (0, 2, 3, 4),
    (3, 0, 3, 4),
    (3, 2, 0, 4),
    (3, 2, 3, 0),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("parts", ["logits", "static", "both"])
def test_dense(ops, device, shape, parts):
    experts, logits, static = make(*shape)
    args = experts, None if parts == "static" else logits, None if parts == "logits" else static, None, None, None
    check(ops, device, args, grad_lse=parts == "both")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_dtypes(ops, device, dtype):
    experts, logits, static = make(5, 3, 7, 20)
    check(ops, device, (experts, logits, static, None, None, None), dtype=dtype)
    check(ops, device, (experts, logits.half(), static.half(), None, None, None), dtype=dtype)
    check(ops, device, (experts, logits.double(), static.double(), None, None, None), dtype=dtype)


MASK = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0], [1, 0, 1, 1, 0]], dtype=torch.bool)
COLUMNS = torch.where(MASK, MASK.flatten().cumsum(0).reshape(MASK.shape) - 1, -1).int()


@pytest.mark.parametrize(("parts", "width"), [("logits", 12), ("static", 12), ("both", 12), ("both", 300)])
@pytest.mark.parametrize("packed", [False, True])
def test_mask(ops, device, parts, packed, width):
    """A row with no expert is 0; an expert that no row may use, and one masked in some rows only, is not read there."""
    experts, logits, static = make(6, 4, 5, width)
    mask, columns = (None, COLUMNS) if packed else (MASK, None)
    if packed:
        logits, static = logits[:, MASK].contiguous(), static[MASK].contiguous()
    args = experts, None if parts == "static" else logits, None if parts == "logits" else static, mask, columns, None
    out, gradients = check(ops, device, args, grad_lse=parts != "static")
    assert (out[:, 1] == 0).all()
    hurt = experts.clone()
    hurt[:, 1], hurt[:, 4], hurt[:, 0], hurt[:, 3] = torch.nan, torch.inf, torch.nan, -torch.inf
    again = ops.mix(hurt.to(device), *(a if a is None else a.to(device) for a in args[1:]))[0]
    assert torch.equal(again[:, 2], out[:, 2]) and (again[:, 1] == 0).all() and again[:, 0].isnan().all()
    if not packed and parts != "static":
        assert (gradients[1][:, ~MASK] == 0).all()
    # The same through backward: row 2 uses expert 2 alone.
    grad = torch.randn(again.shape, device=device)
    lse = ops.mix(*(a if a is None else a.to(device) for a in args))[1]
    rest = [a if a is None else a.to(device) for a in args[1:]]
    clean = ops.mix_backward(grad, None, experts.to(device), *rest, lse, 7)
    dirty = ops.mix_backward(grad, None, hurt.to(device), *rest, lse, 7)
    assert torch.equal(clean[0], dirty[0])
    if parts != "static":
        row = (slice(None), COLUMNS[2, 2]) if packed else (slice(None), 2)
        assert torch.equal(clean[1][row], dirty[1][row])


@pytest.mark.parametrize("counts", [[2, 1, 3, 2], [0, 4, 1], [1, 1, 1, 2]])
@pytest.mark.parametrize("masked", [False, True])
def test_native(ops, device, counts, masked):
    rows = len(counts) - 1
    experts, logits, _ = make(6, rows, sum(counts), 18)
    v = torch.randn(sum(counts[:rows]))
    mask = torch.rand(rows, sum(counts), generator=torch.Generator().manual_seed(0)) > 0.3 if masked else None
    check(ops, device, (experts, logits, v, mask, None, counts))
    if set(counts[:rows]) == {1}:
        check(ops, device, (experts, logits, None, mask, None, counts))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (40, 3, 4, 20), (5, 2, 3, 300), *SHAPES[5:]])
def test_channels(ops, device, shape):
    batch, num_rows, num_experts, width = shape
    static = torch.randn(num_rows, num_experts, width)
    check(ops, device, (make(*shape)[0], None, static, None, None, None))


@pytest.mark.parametrize("shape", [(2, 2, 100, 3), (2, 64, 5, 6)])
def test_many(ops, device, shape):
    """More experts than a softmax tile holds, and 64 tasks."""
    experts, logits, static = make(*shape)
    check(ops, device, (experts, logits, static, None, None, None))


@pytest.mark.slow
def test_many_experts(ops, device):
    experts, logits, static = make(1, 64, 4096, 4)
    check(ops, device, (experts, logits, static, None, None, None), tolerance=1e-4)


def test_extreme_logits(ops, device):
    experts, logits, static = make(7, 3, 4, 9)
    logits[0], logits[1], logits[2] = 1e4, -1e4, 0
    logits[3, :, 1], logits[4, :, 2], logits[5, :, :2] = 3e4, -torch.inf, 88.5
    check(ops, device, (experts, logits, static, None, None, None))


def test_single_expert_is_exact(ops, device):
    experts, logits, _ = make(5, 2, 1, 8)
    out, gradients = check(ops, device, (experts, logits, None, None, None, None))
    assert torch.equal(out, experts.to(device).expand(-1, 2, -1)) and (gradients[1] == 0).all()


def test_layouts(ops, device):
    """Experts and gradients of any strides: transposed, sliced, expanded."""
    experts, logits, static = make(6, 3, 5, 12)
    strided = {
        "expert first": (experts.transpose(0, 1).contiguous().transpose(0, 1), logits),
        "channels first": (experts.transpose(1, 2).contiguous().transpose(1, 2), logits),
        "sliced": (torch.stack([experts, experts], -1)[..., 0], torch.cat([logits, logits], -1)[..., :5]),
        "expanded": (experts[:1].expand(6, -1, -1), logits[:, :1].expand(-1, 3, -1)),
    }
    for one, two in strided.values():
        check(ops, device, (one, two, static.t().contiguous().t(), None, None, None))
    check(ops, device, (experts, logits, static, None, None, None), grad=torch.tensor(2.0).expand(6, 3, 12))
    check(ops, device, (experts, logits, static, None, None, None), grad=torch.randn(3, 6, 12).transpose(0, 1))


def test_a_nan_stays_in_its_row(ops, device):
    experts, logits, static = (a.to(device) for a in make(6, 3, 5, 12))
    clean = ops.mix(experts, logits, static, None, None, None)
    experts[2, 1, 4], logits[4, 1, 2] = torch.nan, torch.nan
    out, lse = ops.mix(experts, logits, static, None, None, None)
    rows = [0, 1, 3, 5]
    assert torch.equal(out[rows], clean[0][rows]) and torch.equal(lse[rows], clean[1][rows])
    assert out[2, :, 4].isnan().all() and out[4, 1].isnan().all() and not out[4, 0].isnan().any()


def test_needs(ops, device):
    """Each gradient alone is the same as all together, and what is not asked for is empty."""
    experts, logits, static = (a.to(device) for a in make(6, 3, 5, 12))
    lse = ops.mix(experts, logits, static, None, None, None)[1]
    grad = torch.randn(6, 3, 12, device=device)
    everything = ops.mix_backward(grad, None, experts, logits, static, None, None, None, lse, 7)
    for needs in range(7):
        some = ops.mix_backward(grad, None, experts, logits, static, None, None, None, lse, needs)
        for i, (one, other) in enumerate(zip(some, everything, strict=True)):
            assert torch.equal(one, other) if needs >> i & 1 else one.shape == (0,)


def test_equal_rows_agree_bit_for_bit(ops, device):
    experts, logits, static = (a.to(device) for a in make(1, 3, 5, 12))
    experts, logits = experts.repeat(19, 1, 1), logits.repeat(19, 1, 1)
    out, lse = ops.mix(experts, logits, static, None, None, None)
    grad = torch.ones(19, 3, 12, device=device)
    dexperts, dlogits, _ = ops.mix_backward(grad, None, experts, logits, static, None, None, None, lse, 7)
    for found in (out, lse, dexperts, dlogits):
        assert torch.equal(found, found[:1].expand_as(found))
