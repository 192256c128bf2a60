"""SNR-Trans and SNR-Aver against numpy, written from the paper's equations."""

import math
import warnings

import numpy as np
import pytest
import torch
from numpy_layers import mlp, normal
from torch import nn

from python_models import MMoE, MultiTaskModel, SNRAver, SNRTrans, Towers
from python_models.serving import flops

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
CASES = {
    "one level": dict(num_tasks=3, num_experts=4, expert_dims=[[5, 4]]),
    "levels": dict(num_tasks=2, num_experts=[3, 2], expert_dims=[[4], [5, 3]]),
    "one of all": dict(num_tasks=1, num_experts=1, expert_dims=[[3], [2]]),
    "one below": dict(num_tasks=2, num_experts=[1, 3], expert_dims=[[4], [2]]),
    "dense above x": dict(num_tasks=2, num_experts=[3, 2], expert_dims=[[4], [3]], routed=[False, True]),
    "three levels of several layers": dict(
        num_tasks=2, num_experts=[2, 3, 1], expert_dims=[[4, 3], [3, 2, 4], [2, 3]], routed=[True, True, False]
    ),
    "batch norm": dict(num_tasks=2, num_experts=[3, 2], expert_dims=[[4], [3, 2]], norm="batch"),
    "layer norm": dict(num_tasks=2, num_experts=[3, 2], expert_dims=[[4], [3, 2]], norm="layer"),
    "constants": dict(num_tasks=2, num_experts=3, expert_dims=[[3]], beta=0.5, gamma=-0.2, zeta=1.3),
}
both = pytest.mark.parametrize("kind", [SNRTrans, SNRAver], ids=["trans", "aver"])
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def variables(phi, noise=None, beta=BETA, gamma=GAMMA, zeta=ZETA):
    """SPEC's z from log alpha: a sample with noise, the serving estimator (without beta) otherwise."""
    if noise is None:
        s = sigmoid(phi)
    else:
        noise = np.clip(noise, 1e-6, 1 - 1e-6)
        s = sigmoid((np.log(noise) - np.log(1 - noise) + phi) / beta)
    return np.minimum(1, np.maximum(0, s * (zeta - gamma) + gamma))


def layers(p, prefix, h, norm=None):
    """A bank's layers: h is one [B,K] a sub-network."""
    return [mlp(p, prefix, e, u, "tanh", norm) if f"{prefix}.linears.0.weight" in p else u for e, u in enumerate(h)]


def whole(p, prefix, i, v, norm):
    """tanh of the norm of this batch, or of the row, where there is one."""
    return np.tanh(v if norm is None else normal(p, prefix, i, v, norm))


def oracle(p, x, case, noise=None):
    """[B,T,D], loop by loop; noise is one [I,J] for every learned level, in order."""
    noise = None if noise is None else list(noise)
    constants = {name: case[name] for name in ("beta", "gamma", "zeta") if name in case}
    sizes = case["num_experts"]
    levels = len(case["expert_dims"])
    sizes = [sizes] * levels if isinstance(sizes, int) else sizes
    norm = case.get("norm")
    u = layers(p, "first", [x] * sizes[0], norm)
    for level in range(levels):
        upper = [*sizes, case["num_tasks"]][level + 1]
        z = np.ones((upper, len(u)))
        if f"levels.{level}.connections.log_alpha" in p:
            phi = p[f"levels.{level}.connections.log_alpha"]
            z = variables(phi, None if noise is None else noise.pop(0), **constants)
        if f"levels.{level}.weight" in p:
            w, b = p[f"levels.{level}.weight"], p[f"levels.{level}.bias"]
            v = [sum(z[i, j] * (u[j] @ w[i, j].T) for j in range(len(u))) + b[i] for i in range(upper)]
            v = [whole(p, f"levels.{level}.norm", i, v[i], norm) for i in range(upper)]
        else:
            v = [sum(z[i, j] * u[j] for j in range(len(u))) for i in range(upper)]
        u = layers(p, f"levels.{level}.tail", v, norm)
    return np.stack(u, 1)


def make(kind, case, **options):
    torch.manual_seed(0)
    return kind(5, activation="tanh", dtype=torch.float64, **{**case, **options})


def spread(model, scale=3.0, shift=-0.5, seed=1):
    """Connections that are closed, open and between."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for level in model.levels:
            if level.connections.log_alpha is not None:
                level.connections.log_alpha.normal_(shift, scale)
    return model


@pytest.mark.parametrize("training", [True, False], ids=["samples", "estimates"])
@every_case
@both
def test_equals_numpy(plain, kind, case, training):
    if case.get("norm") == "batch" and not training:
        pytest.skip("running statistics: serving's tests")
    model = spread(make(kind, case, generator=torch.Generator().manual_seed(11)), 1.0, 0.5).train(training)
    learned = [level.connections for level in model.levels if level.connections.log_alpha is not None]
    source = torch.Generator().manual_seed(11)
    rows = 12 if "norm" in case else 4  # of few rows the variance may be small, and a slope steep
    x = torch.randn(rows, 5, dtype=torch.float64, requires_grad=True)
    for _ in range(1 + training):  # the noise of the second step is another one
        noise = [torch.rand(c.upper, c.lower, generator=source, dtype=torch.float64).numpy() for c in learned]
        output = model(x)
    tensors = {"x": x, **dict(model.named_parameters())}
    plain.numpy(output, tensors, lambda p: oracle(p, p["x"], case, noise if training else None))


@both
def test_penalty(plain, kind):
    model = spread(make(kind, CASES["levels"]), 1.0)
    tensors = {str(i): level.connections.log_alpha for i, level in enumerate(model.levels)}

    def penalty(p, costs):
        chances = [sigmoid(phi - BETA * math.log(-GAMMA / ZETA)) for phi in p.values()]
        return np.asarray(sum((cost * chance).sum() for cost, chance in zip(costs, chances, strict=True)))

    plain.numpy(model.l0_penalty(), tensors, lambda p: penalty(p, (1, 1)))
    work = (4 * 5, 3 * 3) if kind is SNRTrans else (4, 3)
    plain.numpy(model.l0_penalty("flops"), tensors, lambda p: penalty(p, work))
    costs = [torch.rand(2, 3, dtype=torch.float64), 0.5]
    plain.numpy(model.l0_penalty(costs), tensors, lambda p: penalty(p, (costs[0].numpy(), 0.5)))
    assert make(kind, CASES["levels"], routed=False).l0_penalty() == 0
    with pytest.raises(ValueError, match="cost must be None, 'flops' or a list"):
        model.l0_penalty("bytes")
    with pytest.raises(ValueError, match="cost has 1 entries for 2 levels"):
        model.l0_penalty([1.0])
    with pytest.raises(ValueError, match=r"cost must be \[I,J\] = \(2, 3\)"):
        model.l0_penalty([torch.ones(3, 2), 1.0])


@pytest.mark.parametrize("out", [None, 7])
def test_parameter_count(out):
    trans = SNRTrans(6, 2, [3, 4], [[5], [7, 8]], out)
    linear = 3 * (6 * 5 + 5) + 4 * (7 * 8 + 8)
    last = out or 8
    count = linear + 4 * 3 * (5 * 7 + 1) + 4 * 7 + 2 * 4 * (8 * last + 1) + 2 * last
    assert sum(p.numel() for p in trans.parameters()) == count and trans.out_features == last
    aver = SNRAver(6, 2, [3, 4], [[5], [7, 8]])
    assert sum(p.numel() for p in aver.parameters()) == linear + 4 * (5 * 7 + 7) + 4 * 3 + 2 * 4
    dense = SNRAver(6, 2, [3, 4], [[5], [7, 8]], routed=False)
    assert sum(p.numel() for p in aver.parameters()) - sum(p.numel() for p in dense.parameters()) == 20


def fill(model, phi):
    with torch.no_grad():
        for level in model.levels:
            level.connections.log_alpha.fill_(phi)
    return model.eval()


def test_open_trans_is_one_dense_layer_of_concatenated_blocks():
    model = fill(make(SNRTrans, CASES["one level"]), 3.0)
    level, x = model.levels[0], torch.randn(7, 5).double()
    dense = nn.Linear(4 * 4, 3 * 4, dtype=torch.float64)
    with torch.no_grad():
        dense.weight.copy_(level.weight.transpose(1, 2).reshape(12, 16))
        dense.bias.copy_(level.bias.flatten())
    expected = torch.tanh(dense(model.first(x).flatten(1))).view(7, 3, 4)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-14)
    unrouted = make(SNRTrans, CASES["one level"], routed=False)
    unrouted.load_state_dict({k: v for k, v in model.state_dict().items() if "log_alpha" not in k})
    torch.testing.assert_close(unrouted(x), expected, rtol=0, atol=1e-14)


@both
def test_closed_is_the_bias_alone(kind):
    model, x = fill(make(kind, CASES["one level"]), -3.0), torch.randn(7, 5).double()
    bias = torch.tanh(model.levels[0].bias) if kind is SNRTrans else torch.zeros(3, 4).double()
    torch.testing.assert_close(model(x), bias.expand(7, -1, -1), rtol=0, atol=1e-15)
    assert model.density() == 0


def test_closed_blocks_are_not_read():
    model = dictate(make(SNRTrans, CASES["one level"]), [[1, 0, 0.5, 1]] * 3)
    with torch.no_grad():
        model.levels[0].weight[:, 1] = math.nan
    x = torch.randn(7, 5).double()
    assert model(x).isfinite().all()
    torch.testing.assert_close(model.for_serving()(x), model(x), rtol=0, atol=1e-14)


def test_open_aver_is_mmoe_with_equal_gates_times_their_number():
    model, x = fill(make(SNRAver, CASES["one level"]), 3.0), torch.randn(7, 5).double()
    mmoe = MMoE(5, 3, 4, [[5, 4]], activation="tanh", gate_init="zero").double()
    mmoe.experts[0].load_state_dict(model.first.state_dict())
    torch.testing.assert_close(model(x), 4 * mmoe(x), rtol=0, atol=1e-14)


@both
def test_noise(kind):
    model, x = make(kind, CASES["levels"]), torch.randn(7, 5).double()
    assert not torch.equal(model(x), model(x))
    torch.manual_seed(4)
    first = model(x)
    torch.manual_seed(4)
    assert torch.equal(model(x), first)
    seeded = [make(kind, CASES["levels"], generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(seeded[0](x), seeded[1](x)) and torch.equal(seeded[0](x), seeded[1](x))
    model.eval()
    state = torch.get_rng_state()
    assert torch.equal(model(x), model(x)) and torch.equal(torch.get_rng_state(), state)


def test_density_is_of_the_estimator():
    model = dictate(make(SNRAver, CASES["levels"]), [[0, 1, 0.5], [1, 1, 1]], [[0, 0], [1, 1]]).train()
    assert model.density() == 0.7 and model.connections()[0][0].tolist() == pytest.approx([0, 1, 0.5])
    assert make(SNRAver, CASES["one level"], routed=False).density() == 1


def test_trans_starts_as_one_dense_layer():
    level, bound = SNRTrans(6, 100, 200, [[9]], 7).levels[0], (200 * 9) ** -0.5
    for drawn in (level.weight, level.bias):
        assert 0.98 * bound < drawn.abs().max() <= bound


@both
def test_learns_what_to_close(kind):
    """The penalty closes everything where there is nothing to learn, and not where there is."""
    x = torch.randn(128, 4, generator=torch.Generator().manual_seed(1))
    for slope in (0.0, 3.0):
        torch.manual_seed(0)
        model = kind(4, 2, 3, [[8]], generator=torch.Generator().manual_seed(0), activation="tanh")
        optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.05), []
        for _ in range(120):
            losses.append((model(x).mean(2) - slope * x[:, :2].tanh()).square().mean())
            optimizer.zero_grad()
            (losses[-1] + 0.05 * model.l0_penalty()).backward()
            optimizer.step()
        if slope:
            assert model.density() > 0 and sum(losses[-10:]) < 0.9 * sum(losses[:10])
        else:
            assert model.density() == 0


@both
def test_compiled_training_clamps_and_draws_anew(kind):
    torch._dynamo.reset()
    model, x = make(kind, CASES["levels"]), torch.randn(7, 5).double()
    phi = model.levels[0].connections.log_alpha
    with torch.no_grad():
        phi.copy_(torch.tensor([[-9.0, 9.0, 0.5]] * 2))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    first = compiled(x)
    assert not torch.equal(first, compiled(x))
    first.sum().backward()
    assert phi[0].tolist() == [-math.log(100), math.log(100), 0.5] and phi.grad.any()


# Serving


@both
def test_serving_with_towers_and_in_half_precision(kind):
    torch.manual_seed(0)
    fusion, towers, x = spread(kind(5, 2, 3, [[4], [3]]), 4, 0), Towers(3, 2, [4]), torch.randn(64, 5)
    exact = MultiTaskModel(fusion, towers).eval()(x)
    served = MultiTaskModel(fusion.for_serving(), towers)
    torch.testing.assert_close(served(x), exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = served(x)
    assert found.dtype == torch.bfloat16 and (found - exact).abs().max() < 0.03 * max(1, exact.abs().max())
    found = served.bfloat16()(x.bfloat16())
    assert found.dtype == torch.bfloat16 and (found - exact).abs().max() < 0.06 * max(1, exact.abs().max())


@both
def test_functional_gradients_leave_the_parameters_alone(kind):
    model, x = make(kind, CASES["levels"]), torch.randn(7, 5).double()
    with torch.no_grad():
        model.levels[0].connections.log_alpha.fill_(9)
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(params)
    assert params["levels.0.connections.log_alpha"].eq(9).all() and grads["first.linears.0.weight"].any()


def test_aver_costs_no_products():
    """A mix of the sub-networks' outputs, and not a product with tiled identities."""
    x, below, mix = torch.randn(9, 5), 9 * 2 * 3 * 5 * 8, 9 * 2 * 2 * 3 * 8
    assert mix <= flops(SNRAver(5, 2, 3, [[8]]), x) - below < 1.1 * mix  # the sample of z is the rest
    assert flops(SNRTrans(5, 2, 3, [[8]]), x) - below >= 8 * mix


@pytest.mark.parametrize("norm", [None, "batch", "layer"])
@pytest.mark.parametrize("seed", range(4))
@both
def test_serving_equals_evaluation_with_less_work(kind, norm, seed):
    case = dict(num_tasks=3, num_experts=[4, 5, 3], expert_dims=[[5, 7], [4], [6, 3]])
    model = make(kind, case, norm=norm, dropout=0.2)
    x = torch.randn(9, 5).double()
    for _ in range(3):
        model(x)  # running statistics
    spread(model, 4, -2, seed)
    served = model.for_serving()
    assert model.training and not served.training
    torch.testing.assert_close(served(x), model.eval()(x), rtol=1e-13, atol=1e-13)
    assert flops(served, x) < flops(model, x)
    per_unit = torch.randn(9, 4, 5).double()
    torch.testing.assert_close(served(per_unit), model(per_unit), rtol=1e-13, atol=1e-13)
    assert served(x[:0]).shape == (0, 3, model.out_features)
    assert not any(p.requires_grad for p in served.parameters())
    torch.testing.assert_close(served.float()(x.float()).double(), model(x), rtol=1e-4, atol=1e-5)


def dictate(model, *gates):
    """z as given: 0, 1, or 0.5."""
    with torch.no_grad():
        for level, gate in zip(model.levels, gates, strict=True):
            level.connections.log_alpha.copy_((torch.tensor(gate).double() - 0.5) * 8)
    return model.eval()


@both
def test_what_is_kept(kind):
    """Sub-network 2 of the first level is read by none; 1 of the second has no input; 2 of it is read by none."""
    model = make(kind, dict(num_tasks=2, num_experts=3, expert_dims=[[4], [3, 2]]))
    dictate(model, [[1, 0.5, 0], [0, 0, 0], [0, 0, 1]], [[1, 1, 0], [0, 0.5, 0]])
    served, x = model.for_serving(), torch.randn(6, 5).double()
    assert served.kept == [[0, 1], [0], [0, 1]]
    torch.testing.assert_close(served(x), model(x), rtol=0, atol=1e-14)
    assert torch.equal(served(x)[0, 1], served(x)[1, 1]) and not torch.equal(served(x)[0, 0], served(x)[1, 0])
    blocks = 2 * (4 * 3 if kind is SNRTrans else 1)  # open, read and varying, below
    kept = sum(t.numel() for t in served.levels[0].state_dict().values()) - 3 * 2 - 2
    assert kept == blocks + (3 if kind is SNRTrans else 4 * 3 + 3)


@both
def test_all_closed_warns_and_serves_constants(kind):
    model = make(kind, CASES["levels"])
    dictate(model, [[0, 0, 0], [0, 0, 0]], [[1, 1], [0, 1]])
    with pytest.warns(UserWarning, match=r"levels\[0\] has no open connection"):
        served = model.for_serving()
    x = torch.randn(6, 5).double()
    torch.testing.assert_close(served(x), model(x), rtol=0, atol=1e-14)
    assert served(x[:0]).shape == model(x[:0]).shape and flops(served, x) == 0


def test_all_open_serves_as_one_linear_layer():
    model, x = fill(make(SNRTrans, CASES["levels"]), 3.0), torch.randn(6, 5).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        served = model.for_serving()
    assert all(level.linear is not None for level in served.levels)
    torch.testing.assert_close(served(x), model(x), rtol=0, atol=1e-14)


@both
def test_modules_of_ones_own(kind):
    def expert(k, dims):
        return nn.Sequential(
            *(part for a, b in zip([k, *dims], dims, strict=False) for part in (nn.Linear(a, b), nn.Tanh()))
        )

    torch.manual_seed(0)
    model = spread(kind(5, 2, 3, [[4], [3, 2]], expert=expert, activation="tanh").double(), 4, -1)
    x = torch.randn(6, 5).double()
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.testing.assert_close(model.for_serving()(x), model.eval()(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("serving", [False, True], ids=["network", "served"])
@both
def test_copies_compile_and_export(plain, kind, serving):
    def network():
        model = spread(make(kind, CASES["levels"], generator=torch.Generator().manual_seed(0)), 4, -1)
        return model.for_serving() if serving else model

    model, x = network(), torch.randn(9, 5).double()
    expected = [model(x), model(x)]
    for twin in plain.copies(network(), network):
        assert torch.equal(twin(x), expected[0]) and torch.equal(twin(x), expected[1])
    plain.compiles(model, (x,), (x[:5],), (torch.randn(17, 5).double(),))
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    torch.testing.assert_close(program.module()(x[:3]), model(x[:3]))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(expert_dims=[5, 4]), ValueError, r"\[\[5, 4\]\] for one level .* \[\[5\], \[4\]\] for 2 levels"),
        (dict(num_experts=0), ValueError, "num_experts must be at least 1; got 0"),
        (dict(num_experts=[2, 2, 2]), ValueError, "num_experts has 3 entries for 2 levels"),
        (dict(num_tasks=0), ValueError, "num_tasks must be at least 1; got 0"),
        (dict(routed=[True]), ValueError, "routed has 1 entries for 2 layers"),
        (dict(routed="yes"), TypeError, "routed must be a bool; got 'yes'"),
        (dict(gamma=0.1), ValueError, "gamma must be below 0"),
        (dict(gate_dims=[3]), TypeError, "SNR.* has no gates; got gate_dims"),
        (dict(dropout=1.5), ValueError, "dropout must be a probability"),
        (dict(colour=1), TypeError, "colour"),
    ],
)
@both
def test_bad_arguments(kind, change, error, words):
    with pytest.raises(error, match=words):
        kind(**{**dict(in_features=5, num_tasks=2, num_experts=3, expert_dims=[[5], [4]]), **change})


@both
def test_bad_input(kind):
    model = kind(5, 2, 3, [[4]])
    for network in (model, model.for_serving()):
        with pytest.raises(ValueError, match=r"x must be \[B,5\] or \[B,3,5\]"):
            network(torch.zeros(4, 6))
    with pytest.raises(ValueError, match="out_features must be at least 0"):
        SNRTrans(5, 2, 3, [[4]], -1)
