"""Gate weights come with the outputs of the pass that used them."""

import pytest
import torch

from python_models import CGC, PLE, AdaTT, MMoE, MultiTaskModel, SharedBottom, Towers
from python_models.data.features import TableFeatures, TableModel

NETWORKS = {
    "mmoe": lambda: MMoE(6, 2, [3, 4], [[5], [4]], [3]),
    "omoe": lambda: MMoE(6, 2, 3, [[5], [4]], omoe=True),
    "one expert": lambda: MMoE(6, 2, 1, [[4]]),
    "cgc": lambda: CGC(6, 2, [1, 2], 2, [5, 4]),
    "ple": lambda: PLE(6, 3, [1, 2, 0], 1, [[5], [4]]),
    "ple, dense": lambda: PLE(6, 2, 0, 3, [[5], [4]]),
    "ple, no shared": lambda: PLE(6, 2, [1, 3], 0, [[5], [4]]),
    "adatt-sp": lambda: AdaTT(6, 2, [2, 0], 0, [[5], [4]]),
    "adatt-sp, single": lambda: AdaTT(6, 2, 1, 0, [[5], [4]]),
    "adatt": lambda: AdaTT(6, 2, [1, 2], 1, [[5], [4]], [3]),
    "adatt, per unit": lambda: AdaTT(6, 3, [1, 2, 0], 1, [[5], [4]], single_expert="per_unit"),
    "adatt, ablated": lambda: AdaTT(6, 2, [1, 2], 1, [[5], [4]], residual=False),
    "own gates": lambda: PLE(6, 2, [1, 2], 1, [[5], [4]], gate=torch.nn.Linear),
}
every_network = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS.keys())


def build(make):
    torch.manual_seed(1)
    return make()


@every_network
def test_gates_make_the_outputs(make):
    """The last level's experts, weighed by its gates (and AdaTT's v), are y; every bank runs once."""
    network = build(make).double()
    levels = getattr(network, "levels", None)
    banks = [level.experts for level in levels] if levels is not None else list(network.experts)
    outputs = []
    hooks = [bank.register_forward_hook(lambda _, __, out: outputs.append(out)) for bank in banks]
    x = torch.randn(7, 6, dtype=torch.float64)
    y, gates = network(x, return_gates=True)
    assert len(outputs) == len(gates) == len(banks)
    for hook in hooks:
        hook.remove()
    assert torch.equal(y, network(x))
    for i, (weights, experts) in enumerate(zip(gates, outputs, strict=True)):
        assert weights.shape[::2] == experts.shape[:2] and weights.dtype == torch.float64
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]).double(), rtol=0, atol=1e-14)
        if isinstance(network, AdaTT):
            weights = weights + levels[i].residual_weights()
    torch.testing.assert_close(y, torch.einsum("bte,bed->btd", weights, outputs[-1]), rtol=0, atol=1e-13)


def test_experts_without_a_route_weigh_nothing():
    *_, (first, last) = PLE(6, 2, [1, 2], 1, [[5], [4]])(torch.randn(7, 6), return_gates=True)
    reads = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]]).bool()
    assert torch.equal((first > 0).all(0), reads) and torch.equal((first == 0).all(0), ~reads)
    assert torch.equal((last > 0).all(0), reads[:2])


def test_residual_weights():
    level = AdaTT(6, 3, [1, 2, 0], 1, [[5], [4]]).levels[0]
    v = level.native.detach()
    expected = torch.tensor([[v[0], 0, 0, 0], [0, v[1], v[2], 0], [0, 0, 0, 0], [0, 0, 0, v[3]]])
    assert torch.equal(level.residual_weights(), expected)
    assert torch.equal(AdaTT(6, 3, 1, 0, [[5]]).levels[0].residual_weights(), torch.eye(3))
    assert not AdaTT(6, 3, 2, 0, [[5]], residual=False).levels[0].residual_weights().any()


@pytest.fixture
def fresh_compiler():
    """All networks here compile the same forward, and a process compiles one for no more than 8."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["omoe", "ple", "adatt", "own gates"])
def test_compiles_in_one_graph(name, fresh_compiler):
    network = build(NETWORKS[name])
    model = MultiTaskModel(network, Towers(4, network.num_tasks, [3]))
    x = torch.randn(7, 6)
    expected = model(x, return_gates=True)
    found = torch.compile(model, fullgraph=True, backend="eager")(x, return_gates=True)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["mmoe", "ple", "adatt"])
def test_a_loss_on_the_gates_trains_the_gates_alone(name):
    network = build(NETWORKS[name])
    _, gates = network(torch.randn(7, 6), return_gates=True)
    entropy = torch.special.entr(gates[0]).sum()
    entropy.backward()
    trained = {key for key, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained and all("gates.0" in key or "levels.0.gates" in key for key in trained)


def test_exports():
    network = build(NETWORKS["ple"])
    x = torch.randn(7, 6)
    rows = torch.export.Dim("rows")
    program = torch.export.export(
        network, (x[:3],), {"return_gates": True}, dynamic_shapes={"x": {0: rows}, "return_gates": None}
    )
    torch.testing.assert_close(program.module()(x, return_gates=True), network(x, return_gates=True))


@every_network
def test_float32_under_autocast_and_no_rows(make):
    network = build(make)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, gates = network(torch.randn(7, 6), return_gates=True)
    assert all(weights.dtype == torch.float32 for weights in gates)
    y, empty = network(torch.zeros(0, 6), return_gates=True)
    assert len(y) == 0 and [w.shape[1:] for w in empty] == [w.shape[1:] for w in gates]


def test_through_features_and_without_gates():
    model = TableModel(TableFeatures(6), MultiTaskModel(build(NETWORKS["ple"]), Towers(4, 3)))
    x, nothing = torch.randn(7, 6), torch.zeros(7, 0, dtype=torch.long)
    y, gates = model(x, nothing, return_gates=True)
    assert torch.equal(y, model(x, nothing)) and [tuple(w.shape) for w in gates] == [(7, 4, 4), (7, 3, 4)]
    with pytest.raises(TypeError, match="return_gates"):
        MultiTaskModel(SharedBottom(6, 2, [4]), Towers(4, 2))(x, return_gates=True)
