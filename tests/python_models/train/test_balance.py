"""Every balancing method by name: it trains, goes on bit by bit, and gets what it asks of a model."""

from dataclasses import replace

import pytest
import torch

from python_models.data import Splits, make_synthetic
from python_models.train import balance, checkpoint, registry
from python_models.train.config import Balancing, ConfigError, Model
from python_models.train.loop import BEST, CURVE, Loop
from python_models.train.registry import build

from .runs import splits_for

NETWORKS = {"RotoGrad": "SharedBottom"}  # which has the one representation that it turns


@pytest.mark.parametrize("network", registry.names())
@pytest.mark.parametrize("name", balance.names())
def test_every_method_trains_every_network(name, network, small, tmp_path):
    """A few steps: losses that are numbers, and parameters that move. Or the key that the pair leaves open."""
    config = small(balancing={"name": name}, model={"name": network}, train={"epochs": 1})
    splits = splits_for(network)
    none = splits.train.select(torch.arange(0))
    try:
        loop = Loop(config, Splits(splits.train, none, none), tmp_path)
    except ConfigError as error:
        assert name in balance.ON_REPRESENTATION
        other = name == "RotoGrad" and network != "SharedBottom"
        assert ("balancing.name RotoGrad" if other else "balancing.representation must name") in str(error)
        return
    before = {key: p.detach().clone() for key, p in loop.model.named_parameters()}
    assert not loop.run(lambda: loop.progress.step == 3)
    assert loop.curve.read().isfinite().all() and len(loop.curve.read()) == 3
    # Learned branching warms up in its first epoch, with all parents alike.
    still = [key for key, p in loop.model.named_parameters() if torch.equal(before[key], p)]
    assert not [key for key in still if not key.endswith("theta")]


@pytest.mark.parametrize("name", balance.names())
def test_every_method_goes_on(name, small, tmp_path):
    """Two epochs at once, and with a stop in the first: the same curve."""
    network = NETWORKS.get(name, "MMoE")
    config, splits = small(balancing={"name": name}, model={"name": network}), splits_for(network)
    curves = []
    for part, stop in (("whole", None), ("cut", 4)):
        folder = tmp_path / part
        folder.mkdir()
        if stop:
            cut = Loop(config, splits, folder)
            assert not cut.run(lambda cut=cut: cut.progress.step == 4)
        loop = Loop(config, splits, folder)
        assert loop.run()
        assert loop.curve.read().isfinite().all() and len(loop.curve.read()) == 12
        curves.append((folder / CURVE).read_bytes())
    assert curves[0] == curves[1]


@pytest.mark.parametrize("name", [n for n in balance.names() if n not in balance.names(weightings=True)])
def test_a_weighting_under_it(name, small, tmp_path):
    network = NETWORKS.get(name, "MMoE")
    config = small(balancing={"name": name, "weighting": "UncertaintyWeighting"}, model={"name": network})
    loop = Loop(config, splits_for(network), tmp_path)
    assert loop.run() and loop.curve.read().isfinite().all()


def test_what_tasks_share():
    data = make_synthetic((20, 0, 0), 5, binary="bernoulli").train
    for name in ("MMoE", "AdaTT", "MRN", "UberNet"):
        model = build(Model(name=name), data)
        shared = {id(p) for p in balance.shared_parameters(Balancing(), model)}
        own = {id(p) for p in model.task_parameters()}
        assert shared and own and not shared & own
        assert shared | own == {id(p) for p in model.parameters()}
        bank = balance.last_bank(model)
        assert bank is not None and {id(p) for p in bank.parameters()} <= shared
    model = build(Model(), data)
    chosen = balance.shared_parameters(Balancing(shared=("network.fusion.experts.*",)), model)
    assert chosen == list(model.core.experts.parameters())
    alone = build(Model(name="ESMM"), replace(data, labels=torch.zeros(20, 2)))
    assert balance.shared_parameters(Balancing(), alone) == list(alone.parameters())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Balancing(name="FixWeights"), "balancing.name is 'FixWeights'; did you mean 'FixedWeights'"),
        (Balancing(options={"wights": 1}), "unknown key balancing.options.wights of FixedWeights"),
        (Balancing(weighting_options={"alpha": 1}), "weighting_options need a balancing.weighting"),
        (Balancing(weighting="Foo"), "balancing.weighting is 'Foo'"),
        (Balancing(weighting="FixedWeights"), "goes with a method that works on gradients; FixedWeights weighs by"),
        (Balancing(options={"weights": [1.0]}), "balancing.options of FixedWeights: weights"),
        (Balancing(shared=("x.*",)), r"balancing.shared 'x.\*' matches no parameter"),
        (Balancing(representation="network.fusio"), "representation is 'network.fusio'; did you mean 'network.fusion'"),
    ],
)
def test_errors_name_the_key(config, message):
    data = make_synthetic((20, 0, 0), 5, binary="bernoulli").train
    with pytest.raises(ConfigError, match=message):
        balance.build(config, data.kinds, build(Model(), data))


def test_what_is_learned_has_no_weight_decay(small, tmp_path):
    options = {"weight_decay": 0.1}
    config = small(balancing={"name": "UncertaintyWeighting"}, optimizer={"name": "AdamW", "options": options})
    loop = Loop(config, splits_for("MMoE"), tmp_path)
    assert [group["weight_decay"] for group in loop.optimizer.param_groups] == [0.1, 0.0]
    assert loop.optimizer.param_groups[1]["params"] == list(loop.balancer.parameters())
    before = loop.balancer.log_variance.detach().clone()
    assert loop.run() and not torch.equal(before, loop.balancer.log_variance)


@pytest.mark.parametrize("restore", [True, False])
def test_rotations_end_in_the_towers(restore, small, tmp_path):
    """What is saved needs no RotoGrad, and says what the run's last (or best) evaluation said."""
    config = small(balancing={"name": "RotoGrad"}, model={"name": "SharedBottom"}, stopping={"restore_best": restore})
    splits = splits_for("SharedBottom")
    loop = Loop(config, splits, tmp_path)
    assert loop.run()
    loop.balancer.skew.data.add_(torch.randn_like(loop.balancer.skew))
    wanted = loop.predict(splits.validation)
    if restore:
        checkpoint.save(tmp_path / BEST, {"step": loop.progress.best_step, "model": loop.balance.deployed(loop.model)})
    assert loop.use_best() == restore
    torch.testing.assert_close(loop.predict(splits.validation), wanted, rtol=1e-4, atol=1e-5)
    plain = build(config.model, splits.train)
    plain.load_state_dict(loop.model.state_dict())
    part = splits.validation
    torch.testing.assert_close(plain.eval()(part.numeric, part.categorical), wanted, rtol=1e-4, atol=1e-5)
