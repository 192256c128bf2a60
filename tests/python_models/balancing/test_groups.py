"""Every parameter in exactly one group, and in the one that its place says."""

import pytest
import torch
from torch import nn

import python_models as pm
from python_models.balancing import GradNorm, TaskBiasEmbedding, UncertaintyWeighting, param_groups
from python_models.data.features import TableFeatures, TableModel

NETWORKS = {
    "AdaShare": lambda: pm.AdaShare(8, 2, [[4], [4]]),
    "AdaTT": lambda: pm.AdaTT(8, 2, 2, 1, [[4]]),
    "CGC": lambda: pm.CGC(8, 2, 1, 1, [4]),
    "CrossStitch": lambda: pm.CrossStitch(8, 2, [[4], [4]]),
    "LearnedBranching": lambda: pm.LearnedBranching(8, 2, [2, 2], [[4], [4]]),
    "MMoE": lambda: pm.MMoE(8, 2, 3, [[4]]),
    "MTAN": lambda: pm.MTAN(8, 2, [4]),
    "PLE": lambda: pm.PLE(8, 2, 1, 1, [[4], [4]], gate_dims=(3,)),
    "SNRTrans": lambda: pm.SNRTrans(8, 2, 2, [[4], [4]]),
    "SharedBottom": lambda: pm.SharedBottom(8, 2, [4]),
    "Sluice": lambda: pm.Sluice(8, 2, [[4], [4]]),
    "SoftOrdering": lambda: pm.SoftOrdering(8, 2, 3, 4),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_is_in_exactly_one_group(name):
    network = NETWORKS[name]()
    model = TableModel(TableFeatures(4, [3, 5], 2), pm.MultiTaskModel(network, pm.Towers(network.out_features, 2)))
    bias, balancer = TaskBiasEmbedding(2, [3, 5]), UncertaintyWeighting(["binary"] * 2)
    groups = param_groups(model, 0.01, also=[bias, balancer])
    ids = [id(p) for group in groups for p in group["params"]]
    every = [p for module in (model, bias, balancer) for p in module.parameters()]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in every}
    named = {group["name"]: group for group in groups}
    assert [id(p) for p in named["sparse_embedding"]["params"]] == [id(model.features.table)]
    assert named["bias_embedding"]["params"][0] is bias.table
    assert named["loss_weights"]["params"][0] is balancer.log_variance
    assert {id(p) for p in named["towers"]["params"]} == {id(p) for p in model.network.towers.parameters()}
    assert named["bottom"]["lr"] == pytest.approx(0.001) and named["towers"]["lr"] == 0.01
    gates = {n for n, _ in network.named_parameters() if "gate" in n}
    assert ("gates" in named) == (name in ("AdaTT", "CGC", "MMoE", "PLE")), gates
    if "gates" in named:
        assert len(named["gates"]["params"]) == len(gates)
    torch.optim.Adam(groups, weight_decay=0.1)


@pytest.mark.parametrize(
    "name, mixing",
    [
        ("AdaShare", ["policy_logits"]),
        ("AdaTT", ["native"]),
        ("CrossStitch", ["weight"]),
        ("LearnedBranching", ["theta"]),
        ("SNRTrans", ["log_alpha"]),
        ("Sluice", ["beta", "weight"]),
        ("SoftOrdering", ["logits"]),
        ("MMoE", []),
    ],
)
def test_mixing(name, mixing):
    network = NETWORKS[name]()
    named = {id(p): key.rsplit(".", 1)[-1] for key, p in network.named_parameters()}
    found = [g for g in param_groups(network, 1.0) if g["name"] == "mixing"]
    assert sorted({named[id(p)] for g in found for p in g["params"]}) == mixing
    assert all(g["weight_decay"] == 0 for g in found)


def test_rates_patterns_and_words_of_ones_own():
    class Head(nn.Linear):
        parameter_group = "towers"

    model = nn.ModuleDict({"trunk": nn.Linear(2, 2), "head": Head(2, 1), "other": nn.Embedding(3, 2)})
    groups = param_groups(model, 2.0, {"bottom": 3, "towers": 0}, where={"other.*": "bias_embedding"})
    assert {g["name"]: (len(g["params"]), g["lr"]) for g in groups} == {
        "bottom": (2, 6.0),
        "towers": (2, 0.0),
        "bias_embedding": (1, 2.0),
    }
    own = {g["name"]: len(g["params"]) for g in param_groups(pm.ESMM(4, (3,)), 1.0)}
    assert own == {"towers": 4}
    assert {g["name"] for g in param_groups(pm.UberNet(8, 2, [4, 4]), 1.0)} == {"bottom", "mixing"}
    tied = nn.ModuleDict({"a": model["trunk"], "b": model["trunk"]})
    assert [len(g["params"]) for g in param_groups(tied, 1.0, also=[tied])] == [2]
    assert param_groups(GradNorm(2), 1.0) == []


def test_bad_arguments():
    class Odd(nn.Linear):
        parameter_group = "odd"

    model = nn.Linear(2, 2)
    for message, options in (
        ("lr must be finite and at least 0; got -1", {"lr": -1}),
        ("multiples must name groups of sparse_embedding, .*; got 'trunk'", {"multiples": {"trunk": 1.0}}),
        (r"multiples\['bottom'\] must be finite", {"multiples": {"bottom": float("nan")}}),
        (r"where\['weight'\] must be one of", {"where": {"weight": "tower"}}),
        (r"where\['gate\*'\] matches no parameter", {"where": {"gate*": "gates"}}),
    ):
        with pytest.raises(ValueError, match=message):
            param_groups(model, **({"lr": 1.0} | options))
    with pytest.raises(ValueError, match="parameter_group of Odd must be one of"):
        param_groups(Odd(1, 1), 1.0)
