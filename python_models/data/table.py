"""A table of one's own, CSV or Parquet, through a short schema file.

::

    dense = ["age", "price"]          # numbers, z-scored by the training rows
    log = ["price"]                   # of these, log(1 + x) first
    categorical = ["country", "day"]  # an embedding each; the training rows make the vocabulary
    domain = "site"                   # for networks of several domains
    group = "user"                    # GAUC is the mean of the AUC within each
    weight = "importance"             # what a row counts
    missing = "error"                 # of dense columns; "mean" puts the training rows' mean

    [files]                           # beside the schema file
    train = "train.parquet"           # one file or a list
    validation = "validation.parquet"
    test = "test.parquet"             # or `all = ...` alone, split by `fractions` and the seed
    # fractions = [0.6, 0.2, 0.2]

    [tasks.click]
    kind = "binary"                   # or "regression", "multiclass"
    column = "clicked"                # the task's name if not said
    [tasks.stay]
    kind = "regression"
    mask = "clicked"                  # true where the label is there
    weight = "stay_weight"
    missing = "mask"                  # an empty label is masked too; "error" otherwise
    [tasks.topic]
    kind = "multiclass"
    classes = ["news", "sport"]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from python_models.data.table_files import TableError, TableFile
from python_models.data.task_data import UNKNOWN_ID, Splits, TaskData, split_rows
from python_models.settings import ConfigError, build, read_toml

Files = str | tuple[str, ...]


@dataclass(frozen=True)
class FileNames:
    """Where the rows are."""

    train: Files = ()
    validation: Files = ()
    test: Files = ()
    all: Files = ()
    fractions: tuple[float, float, float] = (0.6, 0.2, 0.2)


@dataclass(frozen=True)
class Task:
    """One task's label."""

    kind: Literal["binary", "regression", "multiclass"] = "binary"
    column: str = ""
    mask: str = ""
    weight: str = ""
    missing: Literal["error", "mask"] = "error"
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Schema:
    """What the columns of a table are."""

    tasks: dict[str, Any]
    files: FileNames = FileNames()
    dense: tuple[str, ...] = ()
    log: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    domain: str = ""
    group: str = ""
    weight: str = ""
    missing: Literal["error", "mean"] = "error"

    def columns(self) -> list[str]:
        """Every column that is read."""
        found = [*self.dense, *self.categorical, self.domain, self.group, self.weight]
        for name, task in self.tasks.items():
            found += [task.column or name, task.mask, task.weight]
        return [name for name in dict.fromkeys(found) if name]

    def words(self) -> list[str]:
        """The columns that are read as strings."""
        classes = [task.column or name for name, task in self.tasks.items() if task.kind == "multiclass"]
        return [*self.categorical, *(name for name in (self.domain, self.group) if name), *classes]


def read_schema(path: str | Path) -> Schema:
    """Read and check a schema file; TableError naming the file and the key."""
    path = Path(path)
    try:
        found = read_toml(path)
        tasks = found.pop("tasks", None)
        if not isinstance(tasks, Mapping) or not tasks:
            raise TableError(f"{path}: expected a [tasks.NAME] for every label")
        for name, task in tasks.items():
            if not isinstance(task, Mapping):
                raise TableError(f"{path}: tasks.{name} must be a table; got {task!r}")
        built = {name: build(Task, task, f"tasks.{name}", str(path)) for name, task in tasks.items()}
        schema = build(Schema, {"tasks": built, **found}, "", str(path))
    except ConfigError as error:
        raise TableError(str(error)) from error
    _check(schema, path)
    return schema


def _check(schema: Schema, path: Path) -> None:
    files = schema.files
    if bool(files.all) == bool(files.train):
        raise TableError(f"{path}: files must have train, or all, and not both")
    if files.all and (files.validation or files.test):
        raise TableError(f"{path}: files.all is split; validation and test go with files.train")
    if min(files.fractions) < 0 or abs(sum(files.fractions) - 1) > 1e-9:
        raise TableError(f"{path}: files.fractions must be at least 0 and sum to 1; got {list(files.fractions)}")
    inputs = [*schema.dense, *schema.categorical]
    if not inputs:
        raise TableError(f"{path}: expected dense or categorical columns")
    for name in inputs:
        if inputs.count(name) > 1:
            raise TableError(f"{path}: column {name!r} is an input twice")
    for name in schema.log:
        if name not in schema.dense:
            raise TableError(f"{path}: log names {name!r}, which is not in dense")
    for name, task in schema.tasks.items():
        if (task.column or name) in inputs:
            raise TableError(f"{path}: column {task.column or name!r} is the label of {name} and an input")
        if (task.kind == "multiclass") != bool(task.classes) or len(task.classes) == 1:
            raise TableError(f"{path}: tasks.{name}.classes must list two or more classes if, and only if, multiclass")


@dataclass(frozen=True)
class TableEncoder:
    """What the training rows say: the words of each category and domain, mean and deviation of each number."""

    words: dict[str, list[str]] = field(default_factory=dict)
    mean: dict[str, float] = field(default_factory=dict)
    std: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it, and as ``TableEncoder(**d)`` takes it: what serving needs beside the weights."""
        return asdict(self)


def load_table(path: str | Path, *, seed: int = 0) -> tuple[Splits, TableEncoder]:
    """Training, validation and test rows of the table that a schema file describes, and how they were encoded.

    Files are named relative to the schema file. A category that the training rows lack has the id 0. Raises TableError
    naming the file, the row (from 1, without the header) and the column.
    """
    path = Path(path)
    schema = read_schema(path)
    parts = [_open(schema, path.parent, names) for names in (schema.files.train or schema.files.all,)]
    if schema.files.all:
        rows = sum(len(file) for file in parts[0])
        chosen = split_rows(rows, schema.files.fractions, seed=seed)
        if not len(chosen[0]):
            raise TableError(f"{path}: files.fractions leave no training rows of {rows}")
        encoder = _learn(schema, parts[0], chosen[0])
        whole = _encode(schema, parts[0], encoder)
        return Splits(*(whole.select(part) for part in chosen)), encoder
    encoder = _learn(schema, parts[0])
    train = _encode(schema, parts[0], encoder)
    others = (_open(schema, path.parent, names) for names in (schema.files.validation, schema.files.test))
    none = np.empty(0, np.int64)
    return Splits(train, *(_encode(schema, p, encoder) if p else train.select(none) for p in others)), encoder


def _open(schema: Schema, folder: Path, names: Files) -> list[TableFile]:
    names = [names] if isinstance(names, str) else list(names)
    return [TableFile(folder / name, schema.columns(), schema.words()) for name in names]


def _numbers(schema: Schema, file: TableFile, column: str) -> np.ndarray:
    numbers = file.numbers(column, missing=schema.missing == "mean")
    if column in schema.log:
        file.refuse(numbers < 0, column, "a number of at least 0, for its logarithm")
        return np.log1p(numbers)
    return numbers


def _learn(schema: Schema, files: Sequence[TableFile], rows: np.ndarray | None = None) -> TableEncoder:
    """From the training rows alone, so that nothing of the other rows leaks into the inputs."""
    encoder = TableEncoder()
    for column in schema.dense:
        numbers = np.concatenate([_numbers(schema, file, column) for file in files])
        numbers = numbers if rows is None else numbers[rows]
        known = numbers[~np.isnan(numbers)]
        encoder.mean[column] = float(known.mean()) if len(known) else 0.0
        encoder.std[column] = float(known.std()) if len(known) and known.std() > 0 else 1.0
    for column in [*schema.categorical, *([schema.domain] if schema.domain else [])]:
        begin, found = 0, set()
        for file in files:
            codes, names = file.strings(column)
            if rows is not None:
                codes = codes[rows[(rows >= begin) & (rows < begin + len(file))] - begin]
            begin += len(file)
            found |= set(names[np.unique(codes)].tolist())
        encoder.words[column] = sorted(found)
    return encoder


def _encode(schema: Schema, files: Sequence[TableFile], encoder: TableEncoder) -> TaskData:
    columns = [_encode_file(schema, file, encoder) for file in files]
    numeric, ids, labels, weights, domain, group = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    kinds = tuple(task.kind for task in schema.tasks.values())
    return TaskData(
        numeric=torch.from_numpy(numeric),
        categorical=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        vocab_sizes=tuple(len(encoder.words[column]) + 1 for column in schema.categorical),
        task_names=tuple(schema.tasks),
        numeric_names=schema.dense,
        categorical_names=schema.categorical,
        kind=kinds[0] if len(set(kinds)) == 1 else kinds,
        weights=None if (weights == 1).all() else torch.from_numpy(weights),
        domain=torch.from_numpy(domain) if schema.domain else None,
        num_domains=len(encoder.words[schema.domain]) if schema.domain else 0,
        group=torch.from_numpy(np.unique(group, return_inverse=True)[1].reshape(-1)) if schema.group else None,
        num_classes=tuple(max(1, len(task.classes)) for task in schema.tasks.values()),
    )


def _encode_file(schema: Schema, file: TableFile, encoder: TableEncoder) -> tuple[np.ndarray, ...]:
    rows = len(file)
    numeric = np.empty((rows, len(schema.dense)), np.float32)
    for j, column in enumerate(schema.dense):
        scaled = (_numbers(schema, file, column) - encoder.mean[column]) / encoder.std[column]
        numeric[:, j] = np.where(np.isnan(scaled), 0, scaled)
    ids = np.empty((rows, len(schema.categorical)), np.int64)
    for j, column in enumerate(schema.categorical):
        ids[:, j] = _known(file, column, encoder.words[column]) + 1
    domain = np.zeros(rows, np.int64)
    if schema.domain:
        domain = _known(file, schema.domain, encoder.words[schema.domain])
        file.refuse(domain < 0, schema.domain, "a domain that the training rows have")
    whole = np.ones(rows)
    if schema.weight:
        whole = _weights(file, schema.weight)
    labels = np.zeros((rows, len(schema.tasks)), np.float32)
    weights = np.empty((rows, len(schema.tasks)), np.float32)
    for t, (name, task) in enumerate(schema.tasks.items()):
        labels[:, t], there = _labels(file, task.column or name, task)
        weights[:, t] = whole * there * (_weights(file, task.weight) if task.weight else 1)
    group = np.zeros(rows, object)  # words here, that several files may have in common
    if schema.group:
        file.refuse(file.missing(schema.group), schema.group, "a group")
        codes, names = file.strings(schema.group)
        group = names[codes]
    return numeric, ids, labels, weights, domain, group


def _known(file: TableFile, column: str, words: Sequence[str]) -> np.ndarray:
    """Each row's place among the words, -1 for another word."""
    codes, names = file.strings(column)
    place = {word: i for i, word in enumerate(words)}
    return np.array([place.get(name, UNKNOWN_ID - 1) for name in names], np.int64)[codes]


def _weights(file: TableFile, column: str) -> np.ndarray:
    weights = file.numbers(column)
    file.refuse(weights < 0, column, "a weight of at least 0")
    return weights


def _labels(file: TableFile, column: str, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Labels [N], 0 where there is none, and whether there is one, bool [N]."""
    there = file.flags(task.mask) if task.mask else np.ones(len(file), bool)
    empty = file.missing(column)
    if task.missing == "mask":
        there = there & ~empty
    file.refuse(there & empty, column, "a label")
    if task.kind == "multiclass":
        labels = _known(file, column, task.classes)
        file.refuse(there & (labels < 0), column, "one of " + ", ".join(task.classes))
    elif task.kind == "binary":
        labels = np.where(there, file.numbers(column, missing=True), 0)
        file.refuse(there & ~((labels >= 0) & (labels <= 1)), column, "a label from 0 to 1")
    else:
        labels = file.numbers(column, missing=True)
    return np.where(there, labels, 0).astype(np.float32), there
