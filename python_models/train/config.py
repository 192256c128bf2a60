"""The configuration of a run: what a TOML file may say, and errors that name the key and the nearest valid one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from python_models.settings import ConfigError, build, nearest, parse_toml, read_toml


@dataclass(frozen=True)
class SyntheticData:
    """Freshly drawn tasks; see :func:`python_models.data.make_synthetic`.

    A number as correlation is that of every two of the `num_tasks` tasks; a matrix [T,T] says T itself.
    """

    source: str = "synthetic"
    rows: tuple[int, int, int] = (20_000, 5_000, 5_000)
    in_features: int = 100
    num_tasks: int = 2
    correlation: float | tuple[tuple[float, ...], ...] = 0.8
    scale: float = 0.3
    num_sines: int = 5
    noise: float = 0.1
    seed: int = 0
    binary: Literal["", "median", "bernoulli"] = ""
    sharpness: float = 1.0


@dataclass(frozen=True)
class CensusData:
    """Census-Income; see :func:`python_models.data.load_census`."""

    source: str = "census"
    path: str = ""
    tasks: tuple[str, ...] = ("income", "never_married", "education")
    seed: int = 0


@dataclass(frozen=True)
class TableData:
    """A CSV or Parquet table of one's own; see :mod:`python_models.data.table`."""

    source: str = "table"
    schema: str = ""
    seed: int = 0


@dataclass(frozen=True)
class Towers:
    """The towers on a network that has none of its own."""

    dims: tuple[int, ...] = (32,)
    activation: str = "relu"
    dropout: float = 0.0
    norm: Literal["", "batch", "layer"] = ""


@dataclass(frozen=True)
class Auxiliary:
    """Second heads that help in training alone; kappa 0 is none."""

    kappa: float = 0.0
    dims: tuple[int, ...] = ()


@dataclass(frozen=True)
class Model:
    """Features, network and towers.

    `penalty` is the weight of the network's own penalty, where it has one; `bias` names categorical columns whose
    categories have a bias of each task's own.
    """

    name: str = "MMoE"
    embedding_dim: int = 4
    options: dict[str, Any] = field(default_factory=dict)
    towers: Towers = Towers()
    auxiliary: Auxiliary = Auxiliary()
    bias: tuple[str, ...] = ()
    penalty: float | None = None


@dataclass(frozen=True)
class Balancing:
    """How the tasks' losses become one step. `shared` and `representation` are for the methods that need them."""

    name: str = "FixedWeights"
    options: dict[str, Any] = field(default_factory=dict)
    weighting: str = ""
    weighting_options: dict[str, Any] = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    representation: str = ""


@dataclass(frozen=True)
class Optimizer:
    """An optimizer of torch.optim.

    `groups` multiplies `lr` for kinds of parameters (`python_models.balancing.param_groups`), 1 for those not said;
    `rates` for those whose names match a pattern, which goes before the kind.
    """

    name: str = "Adam"
    lr: float = 1e-3
    options: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    rates: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Train:
    """The loop."""

    epochs: int = 10
    batch_size: int = 1024
    eval_batch_size: int = 8192
    device: str = "auto"
    amp: Literal["", "bfloat16"] = ""
    progress: bool = True


@dataclass(frozen=True)
class Stopping:
    """Evaluations on the validation rows, and when to stop: `patience` evaluations without a better one; 0 never.

    metric: "loss", or a metric's name for its mean over the tasks that have it, or "task.metric".
    """

    metric: str = "loss"
    patience: int = 0
    min_delta: float = 0.0
    every_epochs: int = 1
    restore_best: bool = True


@dataclass(frozen=True)
class Checkpoint:
    """`every` steps the whole state is written."""

    every: int = 500


@dataclass(frozen=True)
class Log:
    """`every` steps the losses are written."""

    every: int = 20
    tensorboard: bool = False


@dataclass(frozen=True)
class Config:
    """One run."""

    out: str = "runs/default"
    seed: int = 0
    data: SyntheticData | CensusData | TableData = SyntheticData()
    model: Model = Model()
    balancing: Balancing = Balancing()
    losses: dict[str, Any] = field(default_factory=dict)
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    stopping: Stopping = Stopping()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: lists for tuples."""
        return plain(asdict(self))


SOURCES = {"synthetic": SyntheticData, "census": CensusData, "table": TableData}
# Keys that may differ when a run goes on: they change nothing of what was computed.
FREE = ("out", "train.epochs", "train.progress", "checkpoint", "log")
_LOW = {
    "data.num_tasks": 1,
    "model.embedding_dim": 0,
    "optimizer.lr": 0,
    "train.epochs": 0,
    "train.batch_size": 1,
    "train.eval_batch_size": 1,
    "stopping.patience": 0,
    "stopping.min_delta": 0,
    "stopping.every_epochs": 1,
    "checkpoint.every": 1,
    "log.every": 1,
}


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The file's configuration with ``a.b=value`` overrides; ConfigError for whatever does not fit."""
    found = read_toml(Path(path))
    for override in overrides:
        set_key(found, override)
    return make(found, str(path))


def make(found: Mapping[str, Any], origin: str = "config") -> Config:
    """A configuration from what a TOML file holds."""
    found = dict(found)
    data = found.pop("data", {})
    if not isinstance(data, Mapping):
        raise ConfigError(f"{origin}: data must be a table; got {data!r}")
    source = data.get("source", "synthetic")
    if source not in SOURCES:
        raise ConfigError(f"{origin}: data.source is {source!r}{nearest(source, SOURCES)}")
    rest = build(Config, found, "", origin)
    config = Config(**{**_shallow(rest), "data": build(SOURCES[source], data, "data", origin)})
    for key, low in _LOW.items():
        value = _get(config, key)
        if value is not None and not value >= low:  # nor NaN
            raise ConfigError(f"{origin}: {key} must be at least {low}; got {value}")
    for key, name in (("path", "the census file or its folder"), ("schema", "the schema file")):
        if getattr(config.data, key, None) == "":
            raise ConfigError(f"{origin}: data.{key} must name {name}")
    return config


def set_key(found: dict[str, Any], override: str) -> None:
    """Put ``a.b=value`` into the tables; the value is TOML, or a bare word."""
    key, equals, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise ConfigError(f"--set {override}: expected a.b=value")
    try:
        value = parse_toml(f"value = {text}", override)["value"]
    except ConfigError:
        value = text.strip()  # a word without its quotes
    for i, part in enumerate(parts[:-1]):
        found = found.setdefault(part, {})
        if not isinstance(found, dict):
            raise ConfigError(f"--set {override}: {'.'.join(parts[: i + 1])} is not a table")
    found[parts[-1]] = value


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Keys, as ``a.b``, in which two configurations as dictionaries differ, but for those of FREE."""
    found = []
    for name in sorted({*old, *new}):
        key, a, b = prefix + name, old.get(name), new.get(name)
        if a == b or key in FREE:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, key + ".")
        else:
            found.append(f"{key} was {a!r}, is {b!r}")
    return found


def plain(value: Any) -> Any:
    """Tuples as lists, all the way down."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _shallow(config: Any) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in fields(config)}


def _get(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part, None)
    return config
