"""What goes with any network: biases of the tasks' own, auxiliary heads, rates by kind of parameter."""

from dataclasses import replace

import pytest
import torch

from python_models.data import Splits, TaskData, make_synthetic
from python_models.train import registry
from python_models.train.config import Auxiliary, ConfigError, Model
from python_models.train.loop import CURVE, Loop

from .runs import splits_for


def with_places(data: TaskData) -> TaskData:
    """A categorical column of three places."""
    place = torch.arange(len(data))[:, None] % 3
    return replace(data, categorical=place, vocab_sizes=(3,), categorical_names=("place",))


def cut_and_whole(config, splits, folder) -> list[Loop]:
    """The run at once, and put down at its fourth step."""
    found = []
    for part in ("whole", "cut"):
        (folder / part).mkdir()
        if part == "cut":
            first = Loop(config, splits, folder / part)
            assert not first.run(lambda first=first: first.progress.step == 4)
        found.append(Loop(config, splits, folder / part))
        assert found[-1].run()
    assert (folder / "whole" / CURVE).read_bytes() == (folder / "cut" / CURVE).read_bytes()
    return found


@pytest.mark.parametrize("name", ["MMoE", "UberNet", "SharedBottom"])
def test_biases_are_added(name, small, tmp_path):
    made = splits_for(name)
    splits = Splits(*(with_places(part) for part in (made.train, made.validation, made.test)))
    loop, _ = cut_and_whole(small(model={"name": name, "bias": ["place"]}), splits, tmp_path)
    model, rows = loop.model.eval(), splits.test
    bias, model.bias = model.bias, None
    without = model(rows.numeric, rows.categorical)
    model.bias = bias
    out, expected = model(rows.numeric, rows.categorical), bias.table[rows.categorical[:, 0]]
    assert expected.abs().min() > 0, "it has learned"
    for t, task in enumerate(rows.task_names):
        torch.testing.assert_close(out[:, t], without[:, t] + expected[:, t], rtol=1e-6, atol=1e-6, msg=task)
    assert {id(p) for p in bias.parameters()} <= {id(p) for p in model.task_parameters()}
    if name == "MMoE":
        assert torch.equal(model(rows.numeric, rows.categorical, return_gates=True)[0], out)


@pytest.mark.parametrize(("name", "amp"), [("MMoE", ""), ("AdaTT", "bfloat16"), ("SharedBottom", "")])
def test_auxiliary_heads_help_in_training_alone(name, amp, small, tmp_path):
    """The total is the tasks' losses and kappa times the heads'; the heads learn, and evaluation does not know them."""
    config = small(model={"name": name, "auxiliary": {"kappa": 0.3, "dims": [3]}}, train={"amp": amp})
    splits = splits_for(name)
    loop, _ = cut_and_whole(config, splits, tmp_path)
    rows = splits.train.select(torch.arange(16))
    heads = loop.model.auxiliary
    with torch.no_grad():
        outputs = loop.model.train()(rows.numeric, rows.categorical)
        (h,) = loop.model._representation
        losses, extra = (loop.objective(out, rows.labels) for out in (outputs, heads(h)))
        found = loop.model.helped(losses, lambda out: loop.objective(out, rows.labels))
    torch.testing.assert_close(torch.stack(found), torch.stack(losses) + 0.3 * torch.stack(extra))
    curve = loop.curve.read()
    assert (curve[:, 0] > 1.1 * curve[:, 1:].sum(1)).all()
    (tmp_path / "fresh").mkdir()
    fresh = Loop(config, splits, tmp_path / "fresh")
    assert all(
        not torch.equal(a, b) for a, b in zip(heads.parameters(), fresh.model.auxiliary.parameters(), strict=True)
    )
    before = loop.evaluate(splits.test)
    torch.nn.init.constant_(next(heads.parameters()), 9.0)
    assert loop.evaluate(splits.test) == before
    served, rows = loop.model.for_serving(), splits.test
    assert loop.model.auxiliary is heads and served.auxiliary is None and not served.training
    gone = {name for name, _ in loop.model.named_parameters()} - {name for name, _ in served.named_parameters()}
    assert gone == {f"auxiliary.{name}" for name, _ in heads.named_parameters()}
    inputs = rows.numeric, rows.categorical
    torch.testing.assert_close(served(*inputs), loop.model.eval()(*inputs))
    served.train()(*inputs)
    assert not served._representation


def test_rates_by_kind(small, tmp_path):
    """A pattern goes before the kind; what the balancer learns is a kind too."""
    chosen = {"lr": 0.1, "groups": {"bottom": 0.5, "gates": 3, "loss_weights": 2}, "rates": {"*gates*.bias": 4}}
    config = small(optimizer=chosen, balancing={"name": "UncertaintyWeighting"}, model={"options": {"gate_bias": True}})
    loop = Loop(config, splits_for("MMoE"), tmp_path)
    rates = {id(p): group["lr"] for group in loop.optimizer.param_groups for p in group["params"]}
    core = loop.model.core
    for part, rate in ((core.experts, 0.05), (loop.model.network.towers, 0.1), (loop.balancer, 0.2)):
        assert {rates[id(p)] for p in part.parameters()} == {rate}
    for word, rate in ((".bias", 0.4), (".weight", 0.1 * 3)):
        assert {rates[id(p)] for n, p in core.named_parameters() if "gates" in n and n.endswith(word)} == {rate}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Model(bias=("plce",)), "model.bias names 'plce', which is no categorical column; did you mean 'place'"),
        (Model(name="ESMM", bias=("place",)), "model.bias is added to one number a task: not for ESMM"),
        (Model(auxiliary=Auxiliary(-1.0)), "model.auxiliary: kappa must be finite and at least 0; got -1.0"),
        (Model(name="MRN", auxiliary=Auxiliary(0.5)), "model.auxiliary is for networks under towers; MRN has its own"),
    ],
)
def test_errors_name_the_key(model, message):
    data = with_places(splits_for(model.name).train)
    with pytest.raises(ConfigError, match=message):
        registry.build(model, data)


def test_errors_of_groups(small, tmp_path):
    splits = make_synthetic((96, 48, 48), 6)
    for groups, message in (
        ({"botom": 1}, "optimizer.groups.botom; did you mean 'bottom'"),
        ({"bottom": -1}, "optimizer.groups: multiples.'bottom'. must be finite"),
    ):
        with pytest.raises(ConfigError, match=message):
            Loop(small(optimizer={"groups": groups}), splits, tmp_path)
