"""Configurations: what they may say, and what they are told when they say something else."""

import sys

import pytest

from python_models import settings
from python_models.train import config, registry
from python_models.train.__main__ import EXAMPLE, correlations
from python_models.train.config import ConfigError


def test_the_example_says_the_defaults():
    """Whatever stands in it behind a # too: so that another architecture's name alone makes a run of it."""
    shown, default = config.load(EXAMPLE), config.Config()
    assert config.differences(shown.to_dict(), default.to_dict()) == []
    for name, value in registry.DEFAULTS["MMoE"].items():
        assert f"# {name} = {value}" in EXAMPLE.read_text()
    assert shown.out == default.out and shown.log == default.log and shown.checkpoint == default.checkpoint


def test_the_example_has_every_key():
    text = EXAMPLE.read_text()
    table = [settings.read_toml(EXAMPLE)]

    def missing(fields, found, prefix=""):
        for name, value in fields.items():
            if isinstance(value, dict) and name in found:
                yield from missing(value, found[name], f"{prefix}{name}.")
            elif name not in found and f"# {name} = " not in text:
                yield prefix + name

    assert list(missing(config.Config().to_dict(), table[0])) == []


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"trian": {}}, "unknown key trian; did you mean 'train'"),
        ({"train": {"epoch": 3}}, "unknown key train.epoch; did you mean 'epochs'"),
        ({"model": {"towers": {"dim": [3]}}}, "unknown key model.towers.dim; did you mean 'dims'"),
        ({"data": {"sorce": "census"}}, "unknown key data.sorce; did you mean 'source'"),
        ({"data": {"source": "censsus"}}, "data.source is 'censsus'; did you mean 'census'"),
        (
            {"data": {"source": "census", "rows": [1, 2, 3]}},
            "unknown key data.rows; expected one of source",
        ),
        ({"data": {"source": "census"}}, "data.path must name the census file"),
        ({"data": {"source": "table"}}, "data.schema must name the schema file"),
        ({"data": 3}, "data must be a table; got 3"),
        ({"data": {"rows": [1, 2]}}, r"data.rows must be a list of 3; got \[1, 2\]"),
        ({"data": {"binary": "mean"}}, "data.binary must be one of '', 'median', 'bernoulli'; got 'mean'"),
        ({"train": {"epochs": "3"}}, "train.epochs must be a whole number; got '3'"),
        ({"train": {"epochs": True}}, "train.epochs must be a whole number; got True"),
        ({"train": {"epochs": -1}}, "train.epochs must be at least 0; got -1"),
        ({"train": {"batch_size": 0}}, "train.batch_size must be at least 1; got 0"),
        ({"train": {"progress": 1}}, "train.progress must be true or false; got 1"),
        (
            {"data": {"correlation": [[1, "a"], [1, 1]]}},
            "data.correlation must be a number or a list, each entry a list",
        ),
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr must be at least 0; got nan"),
        ({"optimizer": {"lr": "fast"}}, "optimizer.lr must be a number; got 'fast'"),
        ({"balancing": {"shared": "x"}}, "balancing.shared must be a list; got 'x'"),
        ({"model": {"options": 1}}, "model.options must be a table; got 1"),
        ({"model": {"towers": 1}}, "model.towers must be a table; got 1"),
        ({"model": {"penalty": "much"}}, "model.penalty must be a number or nothing; got 'much'"),
    ],
)
def test_errors_name_the_key(table, message):
    with pytest.raises(ConfigError, match="my.toml: " + message):
        config.make(table, "my.toml")


def test_files_and_overrides(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('out = "a"\n[train]\nepochs = 3\n')
    found = config.load(path, ["train.epochs=7", "out=b/c", "model.options.expert_dims = [[8], [4]]", "optimizer.lr=1"])
    assert (found.train.epochs, found.out, found.optimizer.lr) == (7, "b/c", 1.0)
    assert found.model.options == {"expert_dims": [[8], [4]]}
    for override, message in (
        ("train.epochs", "expected a.b=value"),
        ("=3", "expected a.b=value"),
        ("out.x=3", "out is not a table"),
        ("train.epoch=3", "did you mean 'epochs'"),
    ):
        with pytest.raises(ConfigError, match=message):
            config.load(path, [override])
    with pytest.raises(ConfigError, match="missing.toml: No such file"):
        config.load(tmp_path / "missing.toml")
    path.write_text("out = \n")
    with pytest.raises(ConfigError, match="run.toml: not a TOML file.*line 1"):
        config.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="run.toml: not a TOML file"):
        config.load(path)


def test_tomli_stands_in_for_tomllib(monkeypatch):
    """Python 3.10 has no tomllib."""
    import importlib

    stand_in = type(sys)("tomli")
    stand_in.loads, stand_in.TOMLDecodeError = (lambda text: {"text": text}), ValueError
    monkeypatch.setitem(sys.modules, "tomllib", None)
    monkeypatch.setitem(sys.modules, "tomli", stand_in)
    spec = importlib.util.find_spec("python_models.settings")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.parse_toml("a", "here") == {"text": "a"}


def test_one_correlation_serves_any_number_of_tasks():
    made = correlations(config.make({"data": {"num_tasks": 3, "correlation": 0.5}}).data)
    assert made == [[1, 0.5, 0.5], [0.5, 1, 0.5], [0.5, 0.5, 1]]
    matrix = [[1.0, 0.2], [0.2, 1.0]]
    assert correlations(config.make({"data": {"correlation": matrix}}).data) == matrix


def test_what_may_change_when_a_run_goes_on():
    base = config.Config().to_dict()
    free = config.make({"out": "x", "train": {"epochs": 99, "progress": False}, "checkpoint": {"every": 1}}).to_dict()
    assert config.differences(base, free) == []
    other = config.make({"seed": 1, "model": {"options": {"a": 1}}}).to_dict()
    assert config.differences(base, other) == ["model.options.a was None, is 1", "seed was 0, is 1"]
