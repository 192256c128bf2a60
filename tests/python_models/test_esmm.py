"""ESMM against numpy and 50-digit arithmetic."""

from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch
from torch import nn

from python_models import ESMM
from python_models.esmm import both_logit

CASES = {"towers": [6, 4], "one layer": [3], "linear": []}
every_case = pytest.mark.parametrize("dims", CASES.values(), ids=CASES.keys())


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def towers(p, x):
    """Both logits [B], click then conversion; x is [B,K] or [B,2,K]."""
    logits = []
    for t in range(2):
        h, k = x if x.ndim == 2 else x[:, t], 0
        while f"hidden.linears.{k}.weight" in p:
            h = np.tanh(h @ p[f"hidden.linears.{k}.weight"][t].T + p[f"hidden.linears.{k}.bias"][t])
            k += 1
        logits.append((h @ p["last.weight"][t].T + p["last.bias"][t])[:, 0])
    return logits


def make(dims, **options):
    torch.manual_seed(0)
    return ESMM(5, dims, activation="tanh", dtype=torch.float64, **options)


@pytest.mark.parametrize("per_tower", [False, True], ids=["shared x", "per-tower x"])
@every_case
def test_equals_numpy(plain, dims, per_tower):
    model = make(dims)
    x = torch.randn((7, 2, 5) if per_tower else (7, 5), dtype=torch.float64, requires_grad=True)
    tensors = {"x": x, **dict(model.named_parameters())}

    def oracle(p):
        a, c = towers(p, p["x"])
        both = sigmoid(a) * sigmoid(c)
        return np.stack([a, c, np.log(both) - np.log(1 - both)])

    logits = model(x)
    assert list(logits) == ["pCTR", "pCVR", "pCTCVR"]
    plain.numpy(torch.stack(list(logits.values())), tensors, oracle)


@pytest.mark.parametrize("weight", [1.0, 0.3])
@every_case
def test_loss_equals_numpy(plain, dims, weight):
    model = make(dims)
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    click, conversion = torch.tensor([1, 1, 0, 0, 1, 0, 1]), torch.tensor([1, 0, 0, 0, 1, 0, 0])
    y, w = click.numpy(), (click * conversion).numpy()

    def oracle(p):
        a, c = towers(p, p["x"])
        ctr, ctcvr = sigmoid(a), sigmoid(a) * sigmoid(c)
        clicks = -(y * np.log(ctr) + (1 - y) * np.log(1 - ctr))
        conversions = -(w * np.log(ctcvr) + (1 - w) * np.log(1 - ctcvr))
        return (clicks + weight * conversions).mean()

    tensors = {"x": x, **dict(model.named_parameters())}
    plain.numpy(model.loss(model(x), click, conversion, ctcvr_weight=weight), tensors, oracle)


VALUES = [s * v for v in (0.1, 1, 10, 50, 90, 120) for s in (1, -1)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-15), (torch.float32, 5e-7)])
def test_product_of_probabilities_in_fifty_digits(dtype, tolerance):
    getcontext().prec = 120  # 50 digits of 1 - p need more of p, where p is near 1
    a, c = torch.cartesian_prod(torch.tensor(VALUES, dtype=dtype), torch.tensor(VALUES, dtype=dtype)).unbind(1)
    a.requires_grad_(), c.requires_grad_()
    found = both_logit(a, c)
    found.sum().backward()
    for i in range(len(a)):
        x, y = Decimal(a[i].item()), Decimal(c[i].item())
        p, q = 1 / (1 + (-x).exp()), 1 / (1 + (-y).exp())
        expected = (p * q).ln() - (1 - p * q).ln()
        assert abs(Decimal(found[i].item()) - expected) <= Decimal(tolerance) * max(1, abs(expected))
        # d logit / da = (1 - p) / (1 - pq), in (0, 1]
        for gradient, slope in ((a.grad[i], (1 - p) / (1 - p * q)), (c.grad[i], (1 - q) / (1 - p * q))):
            assert gradient >= 0 and abs(Decimal(gradient.item()) - slope) <= 100 * Decimal(tolerance)


def test_probabilities_multiply():
    logits = make([4])(torch.randn(50, 5).double())
    p = {name: torch.sigmoid(logit) for name, logit in logits.items()}
    torch.testing.assert_close(p["pCTCVR"], p["pCTR"] * p["pCVR"], rtol=1e-13, atol=0)
    assert all(((v > 0) & (v < 1)).all() for v in p.values())


def test_half_precision_is_rounded_once():
    a, c = (4 * torch.randn(2, 100)).bfloat16()
    found = both_logit(a, c)
    assert found.dtype == torch.bfloat16 and torch.equal(found, both_logit(a.float(), c.float()).bfloat16())


@pytest.mark.parametrize("norm", [None, "batch", "layer"])
@every_case
def test_parameters(dims, norm):
    """The paper's count, and a gradient for each."""
    model = ESMM(5, dims, norm=norm)
    widths = [5, *dims, 1]
    tower = sum(k * n + n for k, n in zip(widths[:-1], widths[1:], strict=True)) + (2 * sum(dims) if norm else 0)
    assert sum(p.numel() for p in model.parameters()) == 2 * tower
    click, conversion = torch.tensor([1, 0, 1] * 4), torch.tensor([0, 0, 1] * 4)
    model.loss(model(torch.randn(12, 5)), click, conversion).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and (p.grad.any() or (norm and name.startswith("hidden.linears"))), name
    assert model.last.weight.grad.flatten(1).any(1).all()


def test_towers_share_nothing():
    model = make([4])
    model(torch.randn(7, 5).double())["pCVR"].sum().backward()
    assert all(not p.grad[0].any() and p.grad[1].any() for p in model.parameters())


def test_two_modules_as_one_writes_them():
    """pCVR hears of conversions through the product alone, on every impression."""
    model, x = make([4]), torch.randn(6, 5).double()
    ctr, cvr = (
        nn.Sequential(hidden, nn.Linear(4, 1).double())
        for hidden in model.hidden.to_modules()
    )  # fmt: skip
    with torch.no_grad():
        for t, tower in enumerate((ctr, cvr)):
            tower[1].weight.copy_(model.last.weight[t])
            tower[1].bias.copy_(model.last.bias[t])
    click = torch.tensor([1.0, 1, 0, 0, 1, 0]).double()
    conversion = torch.tensor([1.0, 0, 0, 0, 1, 0]).double()
    p, q = ctr(x).sigmoid()[:, 0], cvr(x).sigmoid()[:, 0]
    loss = nn.functional.binary_cross_entropy
    expected = loss(p, click) + loss(p * q, click * conversion)
    torch.testing.assert_close(model.loss(model(x), click, conversion), expected, rtol=1e-13, atol=0)


def test_learns_conversion_on_impressions():
    torch.manual_seed(0)
    x = torch.randn(512, 4)
    click = (torch.rand(512) < (2 * x[:, 0]).sigmoid()).float()
    conversion = click * (torch.rand(512) < (2 * x[:, 1]).sigmoid()).float()
    model = ESMM(4, [16])
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for _ in range(120):
        losses.append(model.loss(model(x), click, conversion))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.85 * losses[0]
    logits = model(x)
    for name, signal in (("pCTR", x[:, 0]), ("pCVR", x[:, 1])):
        assert torch.corrcoef(torch.stack([logits[name], signal]))[0, 1] > 0.7


@pytest.mark.parametrize("norm", [None, "batch", "layer"])
@every_case
def test_serving(plain, dims, norm):
    model = make(dims, norm=norm, dropout=0.3)
    for _ in range(3):
        model(2 + torch.randn(12, 5).double())
    served, x = model.for_serving(), torch.randn(7, 5).double()
    assert model.training and not served.training and not any(p.requires_grad for p in served.parameters())
    torch.testing.assert_close(served(x), model.eval()(x), rtol=1e-13, atol=1e-13)
    if norm == "batch" and dims:
        assert all(isinstance(n, nn.Identity) for n in served.hidden.norms)
        assert all(linear.activation == "tanh" for linear in served.hidden.linears)
    for twin in plain.copies(served, make(dims, norm=norm).for_serving):
        torch.testing.assert_close(twin(x), served(x), rtol=0, atol=0)


def test_copies_compile_and_export(plain):
    model, x = make([6, 4]), torch.randn(9, 5).double()
    for twin in plain.copies(model, lambda: ESMM(5, [6, 4], activation="tanh", dtype=torch.float64)):
        torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)
    plain.compiles(model, (x,), (x[:5],), (torch.randn(17, 5).double(),))
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    torch.testing.assert_close(program.module()(x[:3]), model(x[:3]))


def test_compiled_training():
    torch._dynamo.reset()
    model = make([6, 4])

    def step(x, click, conversion):
        return model.loss(model(x), click, conversion)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (9, 12):
        batch = torch.randn(n, 5).double(), torch.ones(n), (torch.arange(n) % 2).float()
        gradients = []
        for run in (step, compiled):
            model.zero_grad()
            run(*batch).backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        torch.testing.assert_close(*gradients)


def test_meta_device_empty_batches_and_autocast():
    with torch.device("meta"):
        model = ESMM(5, norm="batch")
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert [linear.out_features for linear in model.hidden.linears] == [200, 80]
    logits = model(torch.randn(64, 5))
    assert all(v.shape == (64,) and v.isfinite().all() and v.abs().max() < 100 for v in logits.values())
    model = ESMM(5, [4])
    nobody = model(torch.zeros(0, 5))
    loss = model.loss(nobody, torch.zeros(0), torch.zeros(0))
    (loss + nobody["pCTCVR"].sum()).backward()
    assert loss == 0 and all(p.grad is not None and not p.grad.any() for p in model.parameters())
    x = torch.randn(64, 5)
    exact = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(x)
    for name in exact:
        assert found[name].dtype == torch.bfloat16
        assert (found[name] - exact[name]).abs().max() < 0.03 * max(1, exact[name].abs().max())


def test_labels():
    ones, zeros = torch.ones(3), torch.zeros(3)
    ESMM.validate(ones, torch.tensor([1.0, 0, 0]))
    ESMM.validate(torch.tensor([True, False]), torch.tensor([True, False]))
    ESMM.validate(zeros[:0], zeros[:0])
    for click, conversion, words in (
        (torch.tensor([0.0, 1, 0]), torch.tensor([0.0, 1, 1]), "conversion must be 0 where click is 0; row 2 has 1.0"),
        (2 * ones, zeros, r"click must lie in \[0, 1\]; row 0 has 2.0"),
        (ones, torch.tensor([0.0, -1, 0]), r"conversion must lie in \[0, 1\]; row 1 has -1.0"),
        (ones, torch.tensor([0.0, float("nan"), 0]), r"conversion must lie in \[0, 1\]; row 1 has nan"),
        (ones, zeros[:2], r"conversion must have click's shape \(3,\); got \(2,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            ESMM.validate(click, conversion)
    model = ESMM(5, [4])
    with pytest.raises((RuntimeError, ValueError), match="row 1|conversion"):
        model.loss(model(torch.zeros(2, 5)), zeros[:2], torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ESMM(-1), ValueError, "in_features must be at least 0; got -1"),
        (lambda: ESMM(5, 4), TypeError, "dims must be a sequence of ints; got 4"),
        (lambda: ESMM(5, [4], norm="group"), ValueError, "norm must be None, 'batch' or 'layer'; got 'group'"),
        (lambda: ESMM(5, [4], activation="swish"), ValueError, "activation must be .*; got 'swish'"),
        (lambda: ESMM(5, [4])(torch.zeros(3, 4)), ValueError, r"x must be \[B,5\] or \[B,2,5\] .* got \(3, 4\)"),
        (lambda: ESMM.loss({"pCTR": torch.zeros(2), "pCVR": torch.zeros(2)}, torch.zeros(3), torch.zeros(3)),
         ValueError, "click must have the shape of ctr_logit"),
    ],
)  # fmt: skip
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()
