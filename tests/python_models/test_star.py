"""STAR against numpy, written from the paper's equations row by row."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from python_models import STAR
from python_models.serving import flops
from python_models.star_layers import PartitionedNorm

CASES = {
    "product": dict(num_domains=4, dims=[4, 3]),
    "one layer": dict(num_domains=4, dims=[]),
    "one domain": dict(num_domains=1, dims=[3]),
    "context": dict(num_domains=4, dims=[3], context_features=2, aux_dims=[4, 3]),
    "linear auxiliary": dict(num_domains=4, dims=[3], context_features=2, aux_dims=[]),
    "no auxiliary": dict(num_domains=4, dims=[3], aux_dims=None, eps=1e-3, momentum=0.3),
    "logit sum": dict(num_domains=4, dims=[4, 3], mode="logit_sum", domain_dims=[2]),
    "logit sum, context": dict(num_domains=4, dims=[], mode="logit_sum", domain_dims=[3], context_features=2),
    "logit sum, equal": dict(num_domains=4, dims=[3], mode="logit_sum", aux_dims=None),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
IDS = [0, 3, 0, 1, 3, 0, 3, 0, 3]  # 1 is alone, 2 absent


def make(case, steps=3, **options):
    """A network away from its start: random parameters, and running statistics of a few batches."""
    torch.manual_seed(0)
    model = STAR(
        5, dtype=torch.float64, activation="tanh", **{"domain_features": 3, "aux_dims": [4], **case, **options}
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    for _ in range(steps):
        model(*rows(model, torch.randint(0, case["num_domains"], (12,))))
    return model


def rows(model, domain):
    domain = torch.as_tensor(domain) if model.num_domains > 1 else torch.zeros(len(domain), dtype=torch.long)
    context = torch.randn(len(domain), model.context_features).double() if model.context_features else None
    return 1 + 2 * torch.randn(len(domain), 5).double(), domain, context


def statistics(x, domain, mean, var, training):
    """Each domain's mean and biased variance in use."""
    mean, var = mean.copy(), var.copy()
    for p in range(len(mean)) if training else ():
        own = x[domain == p]
        if len(own) >= 2:
            mean[p], var[p] = own.mean(0), ((own - own.mean(0)) ** 2).mean(0)
    return mean, var


def tower(p, prefix, h):
    hidden = [name for name in p if name.startswith(f"{prefix}.hidden.linears.") and name.endswith("weight")]
    for k in range(len(hidden)):
        name = f"{prefix}.hidden.linears.{k}"
        h = np.tanh(p[f"{name}.weight"][0] @ h + p[f"{name}.bias"][0])
    return (p[f"{prefix}.last.weight"][0] @ h + p[f"{prefix}.last.bias"][0])[0]


def oracle(p, model, domain, context, mean, var, training):
    """The logit of every row by itself. An id of P, past the last, is the unknown domain."""
    x, known = p["x"], p["norm.domain_weight"].shape[0]
    mean, var = statistics(x, domain, mean, var, training)
    if (domain == known).any():
        counts = model.norm.num_rows_tracked.numpy()
        share = (counts / counts.sum())[:, None]
        centre = (share * mean).sum(0)
        spread = (share * (var + mean**2)).sum(0) - centre**2
        mean, var = np.vstack([mean, centre]), np.vstack([var, spread])
    logits = []
    for b, d in enumerate(domain):
        own = {
            name: p[f"norm.domain_{name}"][d] if d < known else float(name == "weight") for name in ("weight", "bias")
        }
        normed = (x[b] - mean[d]) / np.sqrt(var[d] + model.norm.eps)
        h = start = p["norm.weight"] * own["weight"] * normed + p["norm.bias"] + own["bias"]
        for k in range(len(model.layers)):
            w, c = (p[f"layers.{k}.domain_{name}"] for name in ("weight", "bias"))
            if model.mode == "product":
                w, c = (w[d], c[d]) if d < known else (np.ones_like(w[0]), np.zeros_like(c[0]))
                w, c = w * p[f"layers.{k}.weight"], c + p[f"layers.{k}.bias"]
            else:
                w, c = (w[d], c[d]) if d < known else (np.zeros_like(w[0]), np.zeros_like(c[0]))
            h = w @ h + c
            h = h if k == len(model.layers) - 1 else np.tanh(h)
        logit = h[0]
        if model.mode == "logit_sum":
            logit = logit + tower(p, "shared", start)
        if "domains.weight" in p:
            table = p["domains.weight"]
            a = table[d] if d < known else table.mean(0)
            a = a if context is None else np.concatenate([a, context[b]])
            for k in range(len(model.auxiliary)):
                a = p[f"auxiliary.{k}.weight"] @ a + p[f"auxiliary.{k}.bias"]
                a = a if k == len(model.auxiliary) - 1 else np.tanh(a)
            logit = logit + a[0]
        logits.append(logit)
    return np.array(logits)


@pytest.mark.parametrize("mode", ["training", "evaluation", "fallback"])
@every_case
def test_equals_numpy(plain, case, mode):
    model = make(case, fallback="shared" if mode == "fallback" else None).train(mode == "training")
    x, domain, context = rows(model, IDS)
    sent = seen = domain
    if mode == "fallback":
        sent, seen = domain.clone(), domain.clone()
        sent[torch.tensor([2, 5])] = torch.tensor([-3, 99])
        seen[torch.tensor([2, 5])] = model.num_domains
    x.requires_grad_()
    mean, var = model.norm.running_mean.numpy().copy(), model.norm.running_var.numpy().copy()
    output = model(x, sent, context)
    tensors = {"x": x, **dict(model.named_parameters())}
    context = None if context is None else context.numpy()
    training = mode == "training"
    plain.numpy(output, tensors, lambda p: oracle(p, model, seen.numpy(), context, mean, var, training))
    if training and model.num_domains > 1 and model.mode == "product":
        assert not any(layer.domain_weight.grad is not None for layer in model.layers)  # autograd.grad left none
        model(x, domain, None if context is None else torch.as_tensor(context)).sum().backward()
        for layer in model.layers:
            present = layer.domain_weight.grad.flatten(1).any(1).tolist()
            assert present == [True, True, False, True]


def test_running_statistics():
    model, momentum = make(CASES["product"], steps=0, momentum=0.2), 0.2
    mean, var, counts = np.zeros((4, 5)), np.ones((4, 5)), np.zeros(4, dtype=int)
    for _ in range(3):
        x, domain, _ = rows(model, IDS)
        model(x, domain)
        for d in (0, 3):
            own = x[domain == d].numpy()
            mean[d] += momentum * (own.mean(0) - mean[d])
            var[d] += momentum * (own.var(0, ddof=1) - var[d])
            counts[d] += len(own)
    np.testing.assert_allclose(model.norm.running_mean.numpy(), mean, rtol=1e-12)
    np.testing.assert_allclose(model.norm.running_var.numpy(), var, rtol=1e-12)
    assert model.norm.num_rows_tracked.tolist() == counts.tolist() == [12, 0, 0, 12]
    before = [b.clone() for b in model.buffers()]
    model.eval()(x, domain)
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


def test_pooled_statistics_are_those_of_all_rows():
    norm = PartitionedNorm(3, 5, momentum=1.0, dtype=torch.float64)
    assert all(torch.equal(found, t) for found, t in zip(norm.pooled(), (torch.zeros(5), torch.ones(5)), strict=True))
    n, domain = 6000, torch.arange(6000) % 2
    x = torch.randn(n, 5).double() + 3 * domain[:, None]
    norm(x, domain)
    mean, var = norm.pooled()
    torch.testing.assert_close(mean, x.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(var, x.var(0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_norm_of_one_domain_is_batch_norm(training):
    model = make(CASES["product"])
    norm, d = model.norm.train(training), 3
    plain = nn.BatchNorm1d(5, dtype=torch.float64).train(training)
    with torch.no_grad():
        plain.weight.copy_(norm.weight * norm.domain_weight[d])
        plain.bias.copy_(norm.bias + norm.domain_bias[d])
        plain.running_mean.copy_(norm.running_mean[d])
        plain.running_var.copy_(norm.running_var[d])
    x = torch.randn(6, 5).double()
    torch.testing.assert_close(norm(x, torch.full((6,), d)), plain(x), rtol=0, atol=1e-14)
    torch.testing.assert_close(norm.running_var[d], plain.running_var, rtol=0, atol=1e-14)


def test_norm_takes_no_notice_of_a_constant_a_domain():
    norm, domain = PartitionedNorm(4, 5, dtype=torch.float64), torch.tensor(IDS)
    x = torch.randn(9, 5).double()
    several = domain != 1
    moved = x + torch.randn(4, 5).double()[domain]
    torch.testing.assert_close(norm(moved, domain)[several], norm(x, domain)[several], rtol=0, atol=1e-13)


def test_starts_as_the_shared_network():
    torch.manual_seed(0)
    model = STAR(5, 4, [4, 3], aux_dims=None).double().eval()
    x = torch.randn(9, 5).double()
    layers = [nn.Linear(k, n).double() for k, n in ((5, 4), (4, 3), (3, 1))]
    with torch.no_grad():
        for linear, layer in zip(layers, model.layers, strict=True):
            linear.weight.copy_(layer.weight)
            linear.bias.copy_(layer.bias)
            assert 0.5 * linear.in_features**-0.5 < layer.weight.abs().max() <= linear.in_features**-0.5
    h = x / math.sqrt(1 + 1e-5)
    expected = layers[2](layers[1](layers[0](h).relu()).relu())[:, 0]
    for domain in (torch.tensor(IDS), torch.zeros(9, dtype=torch.int32)):
        torch.testing.assert_close(model(x, domain), expected, rtol=0, atol=1e-14)
    helped = STAR(5, 4, [4, 3]).double().eval()  # the auxiliary network alone tells domains apart
    logits = torch.stack([helped(x, torch.full((9,), d)) for d in range(4)]).detach()
    apart = logits - logits[0]
    assert apart[1:].abs().min() > 1e-3
    torch.testing.assert_close(apart, apart[:, :1].expand(4, 9), rtol=0, atol=1e-14)
    own = STAR(5, 4, [4], mode="logit_sum").layers[0].domain_weight
    assert own.std() > 0.1 and own.abs().max() <= 5**-0.5


def test_parameter_count():
    def number(**options):
        return sum(p.numel() for p in STAR(5, 4, [6, 3], **options).parameters())

    norm, star = 2 * 5 * 5, 5 * (5 * 6 + 6 + 6 * 3 + 3 + 3 + 1)
    assert number(aux_dims=None) == norm + star
    assert number(aux_dims=[7], domain_features=2, context_features=3) == norm + star + 4 * 2 + 5 * 7 + 7 + 7 + 1
    shared, own = star // 5, 4 * (5 * 2 + 2 + 2 + 1)
    assert number(aux_dims=None, mode="logit_sum", domain_dims=[2]) == norm + shared + own


@every_case
def test_every_parameter_gets_a_gradient(case):
    model = STAR(5, **case)
    domain = torch.arange(12) % case["num_domains"]
    context = torch.randn(12, model.context_features) if model.context_features else None
    model(torch.randn(12, 5), domain, context).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.any(), name


def test_domains_are_separate():
    """Only the shared parameters hear of other domains' rows."""
    model = make(CASES["product"])
    x, domain, _ = rows(model, IDS)
    model(x, domain)[domain == 3].sum().backward()
    own = ("domain_weight", "domain_bias")
    for name, p in model.named_parameters():
        if name.endswith(own) or name == "domains.weight":
            assert p.grad[:3].eq(0).all() and p.grad[3].any(), name


# Serving


@pytest.mark.parametrize("fallback", [None, "shared"])
@every_case
def test_serving_equals_evaluation_with_less_work(case, fallback):
    model = make(case, fallback=fallback, dropout=0.3)
    x, domain, context = rows(model, IDS)
    sent = torch.where(torch.arange(9) < 2, 50, domain) if fallback else domain
    served = model.for_serving()
    assert model.training and not served.training and not any(p.requires_grad for p in served.parameters())
    model.eval()
    torch.testing.assert_close(served(x, sent, context), model(x, sent, context), rtol=1e-13, atol=1e-13)
    assert flops(served, x, sent, context) < flops(model, x, sent, context)
    single, short = served.float(), served(x.float(), sent, None if context is None else context.float())
    assert short.dtype == torch.float32 and single is served
    torch.testing.assert_close(short.double(), model(x, sent, context), rtol=1e-4, atol=1e-5)
    for d in {0, case["num_domains"] - 1}:
        all_d = torch.full((9,), d)
        found = model.for_serving(domain=d)(x, context=context)
        torch.testing.assert_close(found, model(x, all_d, context), rtol=1e-13, atol=1e-13)


def test_one_domain_costs_a_shared_network():
    model = make(CASES["product"])
    x, _, _ = rows(model, IDS)
    assert flops(model.for_serving(1), x) == 2 * 9 * (5 * 4 + 4 * 3 + 3)
    sizes = sum(p.numel() for p in model.for_serving(1).parameters())
    assert sizes == 5 * 4 + 4 + 4 * 3 + 3 + 3 + 1


@pytest.mark.parametrize("serving", [False, True], ids=["network", "served"])
@pytest.mark.parametrize("name", ["context", "logit sum"])
def test_copies_compile_and_export(plain, name, serving):
    def network(seed=0):
        model = make(CASES[name], fallback="shared")
        return model.for_serving() if serving else model.eval()

    model = network()
    batches = [rows(model, [*IDS, *IDS][:n]) for n in (9, 5, 17)]
    expected = model(*batches[0])
    for twin in plain.copies(model, network):
        assert torch.equal(twin(*batches[0]), expected)
    plain.compiles(model, *batches)
    rows_ = torch.export.Dim("rows", min=2)
    shapes = tuple(None if t is None else {0: rows_} for t in batches[0])
    program = torch.export.export(model, batches[0], dynamic_shapes=shapes)
    torch.testing.assert_close(program.module()(*batches[1]), model(*batches[1]))


def test_compiled_training_moves_statistics():
    torch._dynamo.reset()
    ours, theirs = make(CASES["context"]), make(CASES["context"])
    compiled = torch.compile(theirs, fullgraph=True, dynamic=True, backend="aot_eager")
    for ids in (IDS, IDS[:7]):
        batch = rows(ours, ids)
        for model, run in ((ours, ours), (theirs, compiled)):
            model.zero_grad()
            run(*batch).square().sum().backward()
        pairs = zip([*ours.buffers(), *(p.grad for p in ours.parameters())],
                    [*theirs.buffers(), *(p.grad for p in theirs.parameters())], strict=True)  # fmt: skip
        for left, right in pairs:
            torch.testing.assert_close(left, right)


def test_meta_device_empty_batches_dropout_and_autocast():
    with torch.device("meta"):
        model = STAR(5, 4, [4], dropout=0.5)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    x, domain = torch.randn(9, 5), torch.tensor(IDS)
    assert not torch.equal(model(x, domain), model(x, domain))
    out = model(x[:0], domain[:0])
    out.sum().backward()
    assert out.shape == (0,) and all(p.grad is not None and not p.grad.any() for p in model.parameters())
    exact = model.eval()(x, domain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(x, domain)
    assert found.dtype == torch.bfloat16 and (found - exact).abs().max() < 0.03 * max(1, exact.abs().max())
    found.float().sum().backward()
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert torch.equal(model(x, domain.to(dtype)), exact)


@pytest.mark.parametrize("fallback", [None, "shared"])
def test_unknown_domains(fallback):
    model, x = STAR(5, 4, [4], fallback=fallback), torch.randn(3, 5)
    for bad in (-1, 4):
        domain = torch.tensor([0, 1, bad])
        with pytest.raises(ValueError, match=r"domain"):
            model.train()(x, domain)  # training knows no unknown domain
        with pytest.raises(ValueError, match=rf"domain must hold ids from 0 to 3; row 2 has {bad}"):
            model.validate(domain)
        for network in (model.eval(), model.for_serving()):
            if fallback:
                assert network(x, domain).isfinite().all()
            else:
                with pytest.raises(ValueError, match="domain"):
                    network(x, domain)
    model.validate(torch.tensor([0, 3]))
    model.validate(torch.tensor([], dtype=torch.long))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(in_features=-1), ValueError, "in_features must be at least 0; got -1"),
        (dict(num_domains=0), ValueError, "num_domains must be at least 1; got 0"),
        (dict(num_domains=2.0), TypeError, "num_domains must be an int; got 2.0"),
        (dict(dims=4), TypeError, "dims must be a sequence of ints; got 4"),
        (dict(mode="sum"), ValueError, "mode must be 'product' or 'logit_sum'; got 'sum'"),
        (dict(fallback="mean"), ValueError, "fallback must be None or 'shared'; got 'mean'"),
        (dict(activation="swish"), ValueError, "activation must be None or one of .*; got 'swish'"),
        (dict(dropout=1), ValueError, r"dropout must be a probability in \[0, 1\); got 1"),
        (dict(domain_dims=[3]), ValueError, "domain_dims is for mode='logit_sum'"),
        (dict(aux_dims=None, context_features=2), ValueError, "context_features=2 needs the auxiliary network"),
        (dict(domain_features=0), ValueError, "domain_features must be at least 1; got 0"),
    ],
)
def test_bad_arguments(change, error, words):
    with pytest.raises(error, match=words):
        STAR(**{**dict(in_features=5, num_domains=4, dims=[4]), **change})


@pytest.mark.parametrize("serving", [False, True], ids=["network", "served"])
def test_bad_input(serving):
    plain, context = STAR(5, 4, [4]).eval(), STAR(5, 4, [4], context_features=2).eval()
    if serving:
        plain, context = plain.for_serving(), context.for_serving()
    x, domain = torch.zeros(3, 5), torch.zeros(3, dtype=torch.long)
    for error, words, call in (
        (ValueError, r"x must be \[B,5\]; got \(3, 4\)", lambda: plain(x[:, :4], domain)),
        (TypeError, "x must be a tensor; got list", lambda: plain([1.0], domain)),
        (ValueError, r"domain must be \[B\], one id for each of x's 3 rows; got \(2,\)", lambda: plain(x, domain[:2])),
        (TypeError, "domain must be .*integer", lambda: plain(x, domain.float())),
        (ValueError, r"context must be None, .* got \(3, 2\)", lambda: plain(x, domain, torch.zeros(3, 2))),
        (ValueError, r"context must be \[B,2\], as context_features=2; got None", lambda: context(x, domain)),
        (ValueError, r"context must be \[3,2\]; got \(3, 1\)", lambda: context(x, domain, torch.zeros(3, 1))),
    ):
        with pytest.raises(error, match=words):
            call()


def test_serving_one_domain_or_all():
    model, x = STAR(5, 4, [4]), torch.zeros(3, 5)
    with pytest.raises(ValueError, match="domain must be an id from 0 to 3; got 4"):
        model.for_serving(4)
    with pytest.raises(ValueError, match="domain must be None: this network is one domain"):
        model.for_serving(1)(x, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"domain must be \[B\]; got None"):
        model.for_serving()(x)
