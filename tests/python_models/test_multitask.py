"""What must hold of every network with towers on it."""

import copy

import pytest
import torch
from torch import nn

from python_models import (
    CGC,
    MRN,
    MTAN,
    PLE,
    STAR,
    AdaShare,
    AdaTT,
    BranchedMTL,
    CrossStitch,
    LearnedBranching,
    MMoE,
    MultiTaskModel,
    SharedBottom,
    Sluice,
    SNRAver,
    SNRTrans,
    SoftOrdering,
    SoftSharing,
    Towers,
)
from python_models.balancing import TaskBiasEmbedding
from python_models.data import TableFeatures
from python_models.serving import flops

FUSIONS = {
    "shared bottom": lambda **k: SharedBottom(6, 2, [5, 4], **k),
    "mmoe": lambda **k: MMoE(6, 2, 3, [[5], [4]], **k),
    "omoe": lambda **k: MMoE(6, 2, 3, [[5], [4]], omoe=True, **k),
    "cgc": lambda **k: CGC(6, 2, [1, 2], 2, [5, 4], **k),
    "ple": lambda **k: PLE(6, 2, [1, 2], 1, [[5], [4]], [3], **k),
    "adatt-sp": lambda **k: AdaTT(6, 2, 2, 0, [[5], [4]], **k),
    "adatt": lambda **k: AdaTT(6, 2, [1, 2], 1, [[5], [4]], [3], **k),
    "adatt per unit": lambda **k: AdaTT(6, 2, [1, 2], 1, [[5], [4]], single_expert="per_unit", **k),
    "snr-trans": lambda **k: SNRTrans(6, 2, 3, [[5, 4], [4]], **k),
    "snr-aver": lambda **k: SNRAver(6, 2, [3, 2], [[5], [4]], **k),
    "branched": lambda **k: BranchedMTL(6, 2, [[5], [4]], [[[0, 1]], [[0], [1]]], **k),
    "adashare's result": lambda **k: AdaShare(6, 2, [[5], [4]], **k).for_serving([[True, True], [False, True]]).train(),
    "cross-stitch": lambda **k: CrossStitch(6, 2, [[5], [4]], **k),
    "cross-stitch channels": lambda **k: CrossStitch(6, 2, [[5], [4]], channelwise=True, **k),
    "sluice": lambda **k: Sluice(6, 2, [[4], [4]], **k),
    "soft ordering": lambda **k: SoftOrdering(6, 2, 4, 2, **k),
    "soft ordering, one encoder": lambda **k: SoftOrdering(6, 2, 4, 2, encoder="shared", **k),
    "mtan": lambda **k: MTAN(6, 2, [5, 4], **{"norm": None, **k}),
    "soft sharing": lambda **k: SoftSharing(6, 2, [5, 4], **k),
}
every_fusion = pytest.mark.parametrize("fusion", FUSIONS.values(), ids=FUSIONS.keys())


def model(fusion, **options):
    torch.manual_seed(0)
    return MultiTaskModel(fusion(**options), Towers(4, 2, [3]))


@every_fusion
@pytest.mark.parametrize("norm", [None, "batch", "layer"])
def test_every_parameter_gets_a_gradient(fusion, norm):
    network = model(fusion, norm=norm, activation="tanh")
    network(torch.randn(9, 6)).square().sum().backward()
    for name, p in network.named_parameters():
        assert p.grad is not None and p.grad.any(), name


def compare_compiled(fusion, backend):
    network, x = model(fusion), torch.randn(7, 6)
    torch._dynamo.reset()  # all networks are one forward's graphs, and it may have eight
    options = {"fallback_random": True} if backend == "inductor" else None  # the noise of eager mode
    compiled = torch.compile(network, fullgraph=True, backend=backend, options=options)
    outputs, gradients = [], []
    for run in (network, compiled):
        torch.manual_seed(1)
        network.zero_grad()
        outputs.append(run(x))
        outputs[-1].square().sum().backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients)


@every_fusion
def test_traces(fusion):
    compare_compiled(fusion, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@every_fusion
def test_compiles(fusion, backend):
    compare_compiled(fusion, backend)


@every_fusion
def test_state_dict_and_deepcopy(fusion):
    network, x = model(fusion).eval(), torch.randn(7, 6)
    other = MultiTaskModel(fusion(), Towers(4, 2, [3])).eval()
    assert not torch.equal(other(x), network(x))
    assert list(network.state_dict()) == [name for name, _ in network.named_parameters()]
    other.load_state_dict(network.state_dict())
    twin = copy.deepcopy(network)
    with torch.no_grad():
        expected = network(x)
        for p in network.parameters():
            p.zero_()
    assert torch.equal(other(x), expected) and torch.equal(twin(x), expected)


@every_fusion
def test_autocast(fusion):
    network, x = model(fusion).eval(), torch.randn(64, 6)
    exact = network(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = network(x)
    found.float().square().sum().backward()
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().max() < 0.03 * max(1, exact.abs().max())
    assert all(p.grad.dtype == torch.float32 for p in network.parameters())


@every_fusion
def test_no_rows(fusion):
    network = model(fusion)
    out = network(torch.zeros(0, 6))
    assert out.shape == (0, 2)
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in network.parameters())


SEARCHED = {
    "learned branching": lambda **k: LearnedBranching(6, 2, [3, 2], [[5], [4]], **k),
    "adashare": lambda **k: AdaShare(6, 2, [[5], [4]], **k),
}


@pytest.mark.parametrize("fusion", (FUSIONS | SEARCHED).values(), ids=(FUSIONS | SEARCHED).keys())
def test_serving(fusion):
    """The fusion's own form where it has one; towers without norms and dropout. Same outputs, and no more work."""
    torch.manual_seed(0)
    network = MultiTaskModel(fusion(norm="batch"), Towers(4, 2, [3], norm="batch", dropout=0.5)).double()
    for _ in range(3):
        network(torch.randn(20, 6).double())  # running statistics
    served, x = network.for_serving(), torch.randn(9, 6).double()
    assert network.training and not any(module.training for module in served.modules())
    torch.testing.assert_close(served(x), network.eval()(x), rtol=1e-13, atol=1e-13)
    assert flops(served, x) <= flops(network, x)
    assert all(isinstance(norm, nn.Identity) for norm in served.towers.hidden.norms)
    if hasattr(network.fusion, "for_serving"):
        assert type(served.fusion) is type(network.fusion.for_serving())
    with torch.no_grad():
        expected = served(x)
        for p in network.parameters():
            p.zero_()
    assert torch.equal(served(x), expected)


def test_serving_takes_the_fusions_words():
    network = MultiTaskModel(AdaShare(6, 2, [[5], [4]]), nn.Linear(4, 1))
    policy = [[True, False], [True, True]]
    assert network.for_serving(policy).fusion.policy == policy
    assert network.for_serving().towers is not network.towers
    network.towers.eval()
    assert flops(network, torch.randn(9, 6)) > 9 * 2 * (6 * 5 + 5 * 4)
    assert network.fusion.training and not network.towers.training  # as they were


@every_fusion
def test_dropout_only_in_training(fusion):
    network, x = model(fusion, dropout=0.5), torch.randn(64, 6)
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))


@pytest.mark.parametrize("name", ["mmoe", "omoe", "cgc", "ple", "adatt-sp", "adatt"])
def test_modules_of_ones_own(name):
    """Factories give the numbers of the banks they stand for."""

    def expert(k, dims):
        parts = [part for a, b in zip([k, *dims], dims, strict=False) for part in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*parts)

    linear_gates = {"ple": lambda **k: PLE(6, 2, [1, 2], 1, [[5], [4]], **k)}
    linear_gates["adatt"] = lambda **k: AdaTT(6, 2, [1, 2], 1, [[5], [4]], **k)
    make = linear_gates.get(name, FUSIONS[name])
    torch.manual_seed(0)
    ours, theirs = make().double(), make(expert=expert, gate=nn.Linear).double()
    with torch.no_grad():
        for key, p in ours.named_parameters():
            if key.endswith("native"):
                p.copy_(theirs.get_parameter(key))
        banks = [m for m in ours.modules() if type(m).__name__ in ("ExpertMLP", "Gates")]
        lists = [m for m in theirs.modules() if type(m).__name__ == "ModuleBank"]
        for bank, own in zip(banks, lists, strict=True):
            linears = [[m for m in e.modules() if isinstance(m, nn.Linear)] for e in own.experts]
            for k, layer in enumerate([bank.logits] if hasattr(bank, "logits") else bank.linears):
                layer.weight.copy_(torch.cat([e[k].weight for e in linears]).view_as(layer.weight))
                layer.bias.copy_(torch.cat([e[k].bias for e in linears]).view_as(layer.bias))
    x = torch.randn(7, 6).double()
    torch.testing.assert_close(theirs(x), ours(x), rtol=0, atol=1e-13)
    theirs(x).sum().backward()
    assert all(p.grad is not None for p in theirs.parameters())


@pytest.mark.parametrize("gate_dims", [(), (3,)])
def test_gate_norms(gate_dims):
    network = MMoE(6, 2, 3, [[4]], gate_dims, gate_norm="batch", gate_logit_norm=True, gate_dropout=0.1).double()
    x = torch.randn(50, 6).double()
    logits = network.gates[0](x)
    torch.testing.assert_close(logits.mean(0), torch.zeros(2, 3).double(), rtol=0, atol=1e-12)
    assert network(x).shape == (50, 2, 4)


@every_fusion
def test_starts_on_the_meta_device(fusion):
    """Deferred initialisation: shapes first, then memory, then each module's reset_parameters."""
    with torch.device("meta"):
        network = model(fusion, norm="batch")
    network.to_empty(device="cpu")
    for module in network.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        if type(module).__name__ == "GateLinear":
            assert not module.bias.any()
    out = network(torch.randn(64, 6))
    assert out.isfinite().all() and 0 < out.abs().max() < 100


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MMoE(6, 2, 3, [[5]]), "routes=[3, 3], packed=False"),
        (lambda: BranchedMTL(6, 2, [[5], [4]], [[[0, 1]], [[0], [1]]]), "partitions=[[[0, 1]], [[0], [1]]]"),
        (lambda: SNRTrans(6, 2, 3, [[5], [4]]), "3, 3, learned=True"),
        (lambda: LearnedBranching(6, 2, [2, 2], [[5], [4]]), "children="),
        (lambda: STAR(6, 3, [5]), "3, 6, 5, shared=True"),
        (lambda: STAR(6, 3, [5]), "(3, 6), eps="),
        (lambda: MRN(6, 3, [5]), "(3, 1, 5), learn=['task'], eps="),
        (lambda: CrossStitch(6, 2, [[5]]), "(2, 2)"),
        (lambda: TaskBiasEmbedding(2, (5, 7), [1]), "num_tasks=2, fields=[1], dim=1"),
        (lambda: TableFeatures(2, (5, 7), 4), "2, vocab_sizes=(5, 7), embedding_dim=4"),
    ],
)
def test_repr_says_what_it_is_made_of(make, said):
    assert said in repr(make())


def test_out_features_and_outputs():
    network = MultiTaskModel(AdaTT(6, 2, 1, expert_dims=[[5]]), Towers(5, 2, [3], [1, 4], ["ctr", "category"]))
    found = network(torch.randn(7, 6))
    assert {name: tuple(y.shape) for name, y in found.items()} == {"ctr": (7, 1), "category": (7, 4)}


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda: MultiTaskModel(MMoE(6, 2, 2, [[5]]), Towers(4, 2)),
            ValueError,
            "towers has in_features=4, fusion has out_features=5",
        ),
        (
            lambda: MultiTaskModel(MMoE(6, 2, 2, [[5]]), Towers(5, 3)),
            ValueError,
            "towers has num_tasks=3, fusion has num_tasks=2",
        ),
        (lambda: MultiTaskModel(MMoE, Towers(5, 3)), TypeError, "fusion must be a module; got type"),
    ],
)
def test_bad_arguments(make, error, words):
    with pytest.raises(error, match=words):
        make()
