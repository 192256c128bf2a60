"""DEVIATIONS.md names tests that exist; and what it promises where no other file holds it."""

import re
from pathlib import Path

import pytest
import torch

from python_models import CGC, PLE, AdaTT, MMoE, MultiTaskModel, Towers

TESTS = Path(__file__).resolve().parent.parent
TEXT = (TESTS.parent / "python_models" / "DEVIATIONS.md").read_text()
NAMED = sorted(set(re.findall(r"`((?:tests/)?[\w/]+\.py(?:::\w+)?)`", TEXT)))


def test_tests_are_named():
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith("| where")]
    assert len(rows) > 50
    for row in rows:
        # A whole file holds nothing in particular.
        assert re.fullmatch(r" (`[\w/]+\.py::test_\w+`(, )?)+ ", row.split("|")[-2]), row


@pytest.mark.parametrize("name", NAMED)
def test_named_tests_exist(name):
    file, _, function = name.partition("::")
    path = TESTS / file.removeprefix("tests/") if "/" in file else Path(__file__).parent / file
    assert path.is_file()
    assert not function or f"\ndef {function}(" in path.read_text()


NETWORKS = {
    "mmoe": lambda: MMoE(6, 3, 2, [[5], [4]]),
    "cgc": lambda: CGC(6, 3, 1, 2, [5, 4]),
    "ple": lambda: PLE(6, 3, [1, 2, 1], 1, [[5], [4]]),
    "adatt-sp": lambda: AdaTT(6, 3, 2, 0, [[5], [4]]),
    "adatt": lambda: AdaTT(6, 3, [1, 2, 1], 1, [[5], [4]]),
}


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS.keys())
def test_one_row_is_a_row_of_many(make):
    model = MultiTaskModel(make(), Towers(4, 3, [3])).double()
    x = torch.randn(5, 6).double()
    one = model(x[2:3])
    assert one.shape == (1, 3)
    torch.testing.assert_close(one, model(x)[2:3], rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MMoE(6, 1, 1, [[4]]),
        lambda: CGC(6, 1, 1, 0, [4]),
        lambda: PLE(6, 1, 0, 1, [[5], [4]]),
        lambda: AdaTT(6, 1, 1, 0, [[5], [4]]),
        lambda: AdaTT(6, 1, 0, 1, [[5], [4]]),
    ],
)
def test_one_task_and_one_expert(make):
    """A gate over one expert is 1 and has no gradient; the expert has one."""
    network = make()
    y, gates = network(torch.randn(5, 6), return_gates=True)
    assert y.shape == (5, 1, 4) and all((weights == 1).all() for weights in gates)
    y.sum().backward()
    for name, p in network.named_parameters():
        assert p.grad is not None and ("gates" in name) != bool(p.grad.any()), name


def test_arguments_are_left_alone():
    counts, shared, dims, gate_dims = [[1, 2], [2, 1]], [1, 2], [[5, 4], [3]], [7]
    for network in (AdaTT, PLE):
        network(6, 2, counts, shared, dims, gate_dims)
        assert (counts, shared, dims, gate_dims) == ([[1, 2], [2, 1]], [1, 2], [[5, 4], [3]], [7])
    network = AdaTT(6, 2, counts, shared, dims)
    before = network(torch.ones(2, 6))
    counts[0][0], dims[0][0] = 9, 9  # and what was built stays what it is
    assert torch.equal(network(torch.ones(2, 6)), before)


@pytest.mark.parametrize(
    "make", [lambda d: AdaTT(6, 2, 1, 0, d), lambda d: PLE(6, 2, 1, 1, d), lambda d: MMoE(6, 2, 2, d)]
)
def test_no_levels(make):
    with pytest.raises(ValueError, match="expert_dims must have at least one level"):
        make([])


@pytest.mark.parametrize(
    "make",
    [
        lambda **k: AdaTT(6, 2, 1, 1, [[5], [4]], **k),
        lambda **k: AdaTT(6, 3, [1, 2, 1], 0, [[5], [4]], single_expert="per_unit", **k),
        lambda **k: AdaTT(6, 3, [1, 0, 1], 2, [[4]], single_expert="per_unit", **k),
    ],
)
def test_unit_weights_are_made_where_the_experts_are(make):
    """On the meta device, which refuses a CPU tensor beside its own."""
    network = make(device="meta")
    assert network(torch.ones(3, 6, device="meta")).device.type == "meta"
    assert all(level.residual_weights().device.type == "meta" for level in network.levels)


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS.keys())
def test_experts_start_apart(make):
    """No two experts of a bank start alike, and none near zero."""
    torch.manual_seed(0)
    network = make()
    seen = []
    for module in network.modules():
        if type(module).__name__ == "ExpertMLP":
            module.register_forward_hook(lambda _, __, out: seen.append(out.detach()))
    network(torch.randn(64, 6))
    assert seen
    for outputs in seen:
        flat = outputs.transpose(0, 1).flatten(1)
        apart = torch.cdist(flat, flat) + torch.eye(len(flat)) * 100
        assert apart.min() > 0.5 and outputs.abs().mean() > 0.02
