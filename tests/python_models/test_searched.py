"""What test_multitask.py holds of fusion networks, of those that draw in training and of UberNet."""

import copy
import pickle

import pytest
import torch

from python_models import AdaShare, LearnedBranching, MultiTaskModel, Towers, UberNet

NETWORKS = {
    "learned branching": lambda **k: MultiTaskModel(LearnedBranching(6, 2, [3, 2], [[5], [4]], **k), Towers(4, 2)),
    "soft branching": lambda **k: MultiTaskModel(LearnedBranching(6, 2, 3, [[4]], hard=False, **k), Towers(4, 2)),
    "adashare": lambda **k: MultiTaskModel(AdaShare(6, 2, [[5], [4]], **k), Towers(4, 2)),
    "adashare, hard": lambda **k: MultiTaskModel(AdaShare(6, 2, [[5], [4]], hard=True, **k), Towers(4, 2)),
    "ubernet": lambda **k: UberNet(6, 2, [5, 4], skip_features=2, **k),
    "ubernet, unequal": lambda **k: UberNet(6, 2, [5, 4], 1, skip_features=[2, 1], skip_norm="layer", **k),
}
every_network = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS.keys())


def build(make, **options):
    torch.manual_seed(0)
    return make(**options)


def seeded(network, x):
    torch.manual_seed(1)
    return network(x)


def compare_compiled(make, backend):
    torch._dynamo.reset()  # all are MultiTaskModels: its forward would soon have too many graphs
    network = build(make)
    compiled = torch.compile(network, fullgraph=True, backend=backend, dynamic=True)
    for rows in (7, 5):
        for training in (True, False):
            network.train(training)
            x, found = torch.randn(rows, 6), []
            for run in (network, compiled):
                network.zero_grad()
                out = seeded(run, x)
                out.square().sum().backward()
                # Not the running statistics: those have moved in between, and the outputs in training do not say.
                found.append([out] + [p.grad.clone() for p in network.parameters() if p.grad is not None])
            torch.testing.assert_close(*found, msg=lambda m: f"{rows} rows, training {training}: {m}")  # noqa: B023


@every_network
def test_traces(make):
    compare_compiled(make, "eager")


@pytest.mark.slow
@every_network
def test_compiles(make):
    with torch._inductor.config.patch(fallback_random=True):
        compare_compiled(make, "inductor")


@pytest.mark.parametrize("name", ["learned branching", "adashare"])
def test_a_new_temperature_is_no_new_graph(name):
    torch._dynamo.reset()
    network, x = build(NETWORKS[name]), torch.randn(7, 6)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(network, fullgraph=True, backend=backend)
    found = []
    for temperature in (5.0, 0.5, float("inf"), 0.5):
        network.fusion.temperature = temperature
        assert network.fusion.temperature == temperature
        found.append(seeded(compiled, x))
        torch.testing.assert_close(found[-1], seeded(network, x))
    assert len(graphs) == 1
    assert not torch.equal(found[1], found[2]) and torch.equal(found[1], found[3])


@every_network
def test_state_dict_copies_and_pickles(make):
    network, x = build(make), torch.randn(7, 6)
    other = make()
    assert not torch.equal(seeded(other, x), seeded(network, x))
    names = {name for name, _ in network.named_parameters()}
    assert {name for name in network.state_dict() if not name.startswith("norms.")} == names
    other.load_state_dict(network.state_dict())
    twins = [other, copy.deepcopy(network), pickle.loads(pickle.dumps(network))]
    for training in (True, False):
        expected = seeded(network.train(training), x)
        for twin in twins:
            assert torch.equal(seeded(twin.train(training), x), expected)
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()
    assert all(torch.equal(seeded(twin, x), expected) for twin in twins)


@every_network
def test_evaluation_draws_nothing(make):
    network, x = build(make, dropout=0.5), torch.randn(64, 6)
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))


@every_network
def test_starts_on_the_meta_device(make):
    with torch.device("meta"):
        network = make()
    network.to_empty(device="cpu")
    for module in network.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    out = network(torch.randn(64, 6))
    assert out.isfinite().all() and 0 < out.abs().max() < 100


@every_network
def test_meta_then_a_state_dict(make):
    network, x = build(make), torch.randn(7, 6)
    with torch.device("meta"):
        other = make()
    other.to_empty(device="cpu").load_state_dict(network.state_dict())
    assert torch.equal(seeded(other, x), seeded(network, x))


@every_network
def test_autocast(make):
    network, x = build(make), torch.randn(64, 6)
    exact = seeded(network, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = seeded(network, x)
    found.float().square().sum().backward()
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().max() < 0.03 * max(1, exact.abs().max())
    assert all(p.grad.dtype == torch.float32 for p in network.parameters())


@every_network
def test_sixteen_bit(make):
    """The whole network in bfloat16: the draws are those of float32."""
    network, x = build(make), torch.randn(64, 6).bfloat16()
    exact = seeded(network, x.float())
    found = seeded(network.bfloat16(), x)
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().max() < 0.05 * max(1, exact.abs().max())


@every_network
def test_no_rows(make):
    network = build(make).eval()
    assert network(torch.zeros(0, 6)).shape == (0, 2)
    if isinstance(network, MultiTaskModel):  # a batch norm in training refuses no rows, as torch's does
        network.train()
        network(torch.zeros(0, 6)).sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in network.parameters())


@every_network
def test_strided_input(make):
    network, x = build(make), torch.randn(7, 12)
    found = seeded(network, x[:, ::2])
    torch.testing.assert_close(found, seeded(network, x[:, ::2].contiguous()))
