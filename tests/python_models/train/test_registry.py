"""Every architecture by name: it is built from its defaults, trains, and says what data it takes."""

import inspect

import pytest
import torch

import python_models
from python_models.data import TaskData, make_synthetic
from python_models.train import registry
from python_models.train.config import ConfigError, Model, Towers
from python_models.train.loop import Loop

from .runs import clicks, splits_for, with_domain


@pytest.mark.parametrize("name", registry.names())
def test_every_architecture_trains(name, small, tmp_path):
    """Two steps: the loss is finite, and whatever the step may reach has moved."""
    splits = splits_for(name)
    loop = Loop(small(model={"name": name}), splits, tmp_path)
    before = {key: p.detach().clone() for key, p in loop.model.named_parameters()}
    assert not loop.run(lambda: loop.progress.step == 2)
    assert loop.curve.read().shape == (2, 1 + len(splits.train.task_names)) and loop.curve.read().isfinite().all()
    still = {key for key, p in loop.model.named_parameters() if torch.equal(p, before[key])}
    # Learned branching warms up in its first epoch, with all parents alike.
    assert not {key for key in still if not key.endswith("theta")}


def test_names_are_the_packages():
    assert set(registry.names()) == set(python_models.__all__) - {"MultiTaskModel", "Towers"}
    assert set(registry.DEFAULTS) == set(registry.names())


@pytest.mark.parametrize("name", registry.names())
def test_options_are_words_of_the_constructor(name):
    """Each option that is offered is taken; each size without a default has one here."""
    words = inspect.signature(getattr(python_models, name)).parameters
    for word, parameter in words.items():
        if parameter.default is inspect.Parameter.empty and parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            assert word in registry._GIVEN or word in registry.DEFAULTS[name] or word == "partitions"
    options = registry.options(name)
    assert not {"in_features", "num_tasks", "device", "dtype", "expert", "gate"} & set(options)
    assert ("gate_bias" in options) == ("gate_dims" in options)
    if "dropout" in options:
        registry.build(Model(name=name, options={"dropout": 0.1}), splits_for(name).train)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Model(name="MMOE"), "model.name is 'MMOE'; did you mean 'MMoE'"),
        (Model(name="Perceptron"), "model.name is 'Perceptron'; expected one of CGC, ESMM"),
        (Model(options={"num_expert": 3}), "model.options.num_expert of MMoE; did you mean 'num_experts'"),
        (Model(options={"expert_dims": [3]}), "model.options of MMoE: expert_dims"),
        (Model(options={"in_features": 3}), "unknown key model.options.in_features"),
        (Model(name="SNRAver", options={"gate_bias": False}), "unknown key model.options.gate_bias"),
        (Model(towers=Towers(activation="rely")), "model.towers: activation must be"),
        (Model(penalty=0.1), "model.penalty is for MRN.*MMoE has no penalty"),
        (Model(name="STAR"), "STAR needs a domain"),
        (Model(name="ESMM"), "task_1 as click, task_2 as conversion: conversion must be 0 where click is 0; row"),
    ],
)
def test_errors_name_the_key(model, message):
    data = make_synthetic((50, 0, 0), 5, binary="bernoulli").train
    with pytest.raises(ConfigError, match=message):
        registry.build(model, data)


def test_data_that_does_not_fit():
    data = make_synthetic((50, 0, 0), 5).train
    with pytest.raises(ConfigError, match=r"ESMM needs two binary tasks.*task_1 \(regression\)"):
        registry.build(Model(name="ESMM", options={}), data)
    two = TaskData(data.numeric, data.categorical, data.labels, (), ("a", "b"), kind="regression", num_domains=1)
    two = two.__class__(**{**vars(two), "domain": torch.zeros(50, dtype=torch.int64)})
    with pytest.raises(ConfigError, match="STAR has one output.*a, b"):
        registry.build(Model(name="STAR"), two)
    nothing = TaskData(data.numeric[:, :0], data.categorical, data.labels, (), ("a", "b"), kind="regression")
    with pytest.raises(ConfigError, match="the data has no inputs"):
        registry.build(Model(), nothing)


def test_esmm_sees_both_on_all_rows():
    data = clicks(make_synthetic((50, 0, 0), 5, binary="bernoulli").train)
    model = registry.build(Model(name="ESMM"), data).eval()
    logits = model.network(data.numeric)
    out = model(data.numeric, data.categorical)
    assert torch.equal(out, torch.stack((logits["pCTR"], logits["pCTCVR"]), 1))
    assert torch.equal(model.conversion_logits(data.numeric, data.categorical), logits["pCVR"])


def test_mrn_learns_its_covariances_every_hundred_steps():
    data = make_synthetic((50, 0, 0), 5, binary="bernoulli").train
    model = registry.build(Model(name="MRN", penalty=0.1), data)
    before = model.core.task_correlation().clone()
    model.after_step(99)
    assert torch.equal(model.core.task_correlation(), before)
    model.after_step(100)
    assert not torch.equal(model.core.task_correlation(), before)


def test_star_reads_the_domain():
    data = with_domain(make_synthetic((50, 0, 0), 5, binary="bernoulli").train)
    model = registry.build(Model(name="STAR"), data).eval()
    with torch.no_grad():
        for p in model.network.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)
    one, other = (model(data.numeric, data.categorical, torch.full((50,), d)) for d in (0, 2))
    assert one.shape == (50, 1) and not torch.allclose(one, other)


@pytest.mark.parametrize("name", ["MMoE", "UberNet", "MRN"])
def test_tasks_of_several_classes(name, small, tmp_path):
    """A dictionary of outputs goes through losses, metrics and checkpoints."""
    made = make_synthetic((96, 48, 48), 6, binary="bernoulli")

    def classes(data):
        labels = torch.stack((data.labels[:, 0], data.labels.sum(1)), 1)
        kinds = ("binary", "multiclass")
        return TaskData(data.numeric, data.categorical, labels, (), ("click", "topic"), kind=kinds, num_classes=(1, 3))

    splits = type(made)(*(classes(part) for part in (made.train, made.validation, made.test)))
    config = small(model={"name": name}, stopping={"metric": "topic.accuracy"})
    loop = Loop(config, splits, tmp_path)
    assert loop.run()
    found = loop.progress.history[-1]["tasks"]
    assert set(found["click"]) == {"auc", "log_loss", "ne", "calibration"}
    assert set(found["topic"]) == {"accuracy", "log_loss"}
    assert Loop(config, splits, tmp_path).progress.step == loop.steps
