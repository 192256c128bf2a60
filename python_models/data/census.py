"""Census-Income (KDD), the data of the MMoE and AdaTT papers (MMoE section 6.3.1, AdaTT section 4.3.1).

The files come from the UCI repository: ``census-income.data`` (199 523 rows) and ``census-income.test`` (99 762),
42 comma-separated fields a row, no header. Three of the fields are labels, the instance weight is no feature, and the
38 that are left are the inputs. Education and marital status are inputs of no task, because they are labels of others.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from python_models.data.task_data import UNKNOWN_ID, Splits, TaskData, split_rows

if TYPE_CHECKING:
    import pandas as pd

SOURCE = (
    'the UCI repository has the data as "Census-Income (KDD)", '
    "https://archive.ics.uci.edu/dataset/117/census+income+kdd: "
    "census-income.data (199523 rows) and census-income.test (99762 rows), plain or .gz"
)

FIELDS = (
    "age",
    "class of worker",
    "detailed industry recode",
    "detailed occupation recode",
    "education",
    "wage per hour",
    "enrolled in edu inst last week",
    "marital status",
    "major industry code",
    "major occupation code",
    "race",
    "hispanic origin",
    "sex",
    "member of a labor union",
    "reason for unemployment",
    "full or part time employment stat",
    "capital gains",
    "capital losses",
    "dividends from stocks",
    "tax filer stat",
    "region of previous residence",
    "state of previous residence",
    "detailed household and family stat",
    "detailed household summary in household",
    "instance weight",
    "migration code, change in msa",
    "migration code, change in reg",
    "migration code, move within reg",
    "live in this house 1 year ago",
    "migration prev res in sunbelt",
    "num persons worked for employer",
    "family members under 18",
    "country of birth father",
    "country of birth mother",
    "country of birth self",
    "citizenship",
    "own business or self employed",
    "fill inc questionnaire for veteran's admin",
    "veterans benefits",
    "weeks worked in year",
    "year",
    "income",
)

EDUCATION, MARITAL, WEIGHT, INCOME = 4, 7, 24, 41
NUMERIC = (0, 5, 16, 17, 18, 30, 39)
LOG_SCALED = (5, 16, 17, 18)  # money: zero for most rows, thousands for a few
CATEGORICAL = tuple(i for i in range(42) if i not in (*NUMERIC, EDUCATION, MARITAL, WEIGHT, INCOME))

# Every value a label field may take, with its label: another value is damage, and not a silent negative.
LABEL_VALUES = {
    INCOME: {"- 50000.": 0, "50000+.": 1},
    MARITAL: {
        "Never married": 1,
        "Divorced": 0,
        "Married-A F spouse present": 0,
        "Married-civilian spouse present": 0,
        "Married-spouse absent": 0,
        "Separated": 0,
        "Widowed": 0,
    },
    # "At least college": the set whose correlation with "never married" is the one the MMoE paper prints (0.2373).
    EDUCATION: {
        "Associates degree-occup /vocational": 1,
        "Associates degree-academic program": 1,
        "Bachelors degree(BA AB BS)": 1,
        "Masters degree(MA MS MEng MEd MSW MBA)": 1,
        "Prof school degree (MD DDS DVM LLB JD)": 1,
        "Doctorate degree(PhD EdD)": 1,
        "Children": 0,
        "Less than 1st grade": 0,
        "1st 2nd 3rd or 4th grade": 0,
        "5th or 6th grade": 0,
        "7th and 8th grade": 0,
        "9th grade": 0,
        "10th grade": 0,
        "11th grade": 0,
        "12th grade no diploma": 0,
        "High school graduate": 0,
        "Some college but no degree": 0,
    },
}
TASKS = {"income": INCOME, "never_married": MARITAL, "education": EDUCATION}


class CensusFileError(ValueError):
    """A Census-Income file that cannot be used; the message names the file, the line and the field, and the source."""

    def __init__(self, path: Path, problem: str, line: int | None = None) -> None:
        where = f"{path}, line {line}" if line else f"{path}"
        super().__init__(f"{where}: {problem}; {SOURCE}")


def read_census(path: str | Path) -> pd.DataFrame:
    """Read one official file, plain or .gz (told by its content, not by its name).

    Returns a frame whose columns are the field numbers, 0 to 41 without the instance weight: numeric fields as float64,
    all others as categories without the blanks around them. ``NA`` and ``?`` are categories like any other.
    Raises FileNotFoundError or CensusFileError.
    """
    import pandas as pd  # here, so that networks and synthetic data do without it

    path = Path(path)
    text, lines = _checked_lines(path)
    frame = pd.read_csv(
        BytesIO(text),
        header=None,
        names=range(len(FIELDS)),
        usecols=[i for i in range(len(FIELDS)) if i != WEIGHT],
        dtype=object,
        encoding="ascii",
        na_filter=False,
        skipinitialspace=True,
        quoting=csv.QUOTE_NONE,
        lineterminator="\n",
        low_memory=False,
    )
    for field in frame:
        codes, raw = pd.factorize(frame[field])
        values = np.array([value.strip() for value in raw], object)
        if field in NUMERIC:
            numbers = pd.to_numeric(pd.Series(values), errors="coerce").to_numpy(np.float64)
            bad, expected = ~(np.isfinite(numbers) & (numbers >= 0)), "a number of at least 0"
        elif field in LABEL_VALUES:
            bad = np.array([value not in LABEL_VALUES[field] for value in values])
            expected = "one of " + ", ".join(LABEL_VALUES[field])
        else:
            bad, expected = values == "", "a category"
        if bad.any():
            row = int(np.flatnonzero(bad[codes])[0])
            problem = f"field {field} ({FIELDS[field]}) is {values[codes[row]]!r}, expected {expected}"
            raise CensusFileError(path, problem, int(lines[row]))
        if field in NUMERIC:
            frame[field] = numbers[codes]
        else:
            unique, merged = np.unique(values, return_inverse=True)  # two spellings may differ in blanks alone
            frame[field] = pd.Categorical.from_codes(merged[codes], unique)
    return frame


def _checked_lines(path: Path) -> tuple[bytes, np.ndarray]:
    """The file's rows, without blank lines, and the line number of each; every row has 42 fields of plain text."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {SOURCE}")
    text = path.read_bytes()
    if text[:2] == b"\x1f\x8b":
        try:
            text = gzip.decompress(text)
        except (EOFError, OSError, zlib.error) as error:
            raise CensusFileError(path, f"damaged gzip file ({error})") from error
    data = np.frombuffer(text, np.uint8)
    ends = np.flatnonzero(data == ord("\n"))
    if len(data) and data[-1] != ord("\n"):
        ends = np.append(ends, len(data))
    control = (data < 32) & (data != ord("\n")) & (data != ord("\r")) & (data != ord("\t"))
    odd = np.flatnonzero(control | (data > 126))
    if len(odd):
        line = int(np.searchsorted(ends, odd[0])) + 1
        raise CensusFileError(path, f"byte 0x{data[odd[0]]:02x} is not plain text", line)
    commas = np.searchsorted(np.flatnonzero(data == ord(",")), ends)
    fields = np.diff(commas, prepend=0) + 1
    starts = np.append(0, ends[:-1] + 1) if len(ends) else ends
    blank = np.zeros(len(ends), bool)
    for i in np.flatnonzero(fields != len(FIELDS)):
        blank[i] = not text[starts[i] : ends[i]].strip()
        if not blank[i]:
            raise CensusFileError(path, f"has {fields[i]} fields, expected {len(FIELDS)}", int(i) + 1)
    if blank.all():
        raise CensusFileError(path, "has no rows")
    if blank.any():
        text = b"\n".join(text[starts[i] : ends[i]] for i in np.flatnonzero(~blank))
    return text, np.flatnonzero(~blank) + 1


@dataclass(frozen=True)
class CensusEncoder:
    """What the training rows say about the inputs: categories of each field, mean and deviation of each number."""

    categories: dict[int, tuple[str, ...]]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def fit(cls, frame: pd.DataFrame) -> CensusEncoder:
        """Learn from training rows only, so that nothing of the validation and test rows leaks into the inputs."""
        numbers = cls._numbers(frame)
        std = numbers.std(0)
        return cls(
            categories={i: tuple(sorted(frame[i].unique())) for i in CATEGORICAL},
            mean=tuple(numbers.mean(0).tolist()),
            std=tuple(np.where(std > 0, std, 1.0).tolist()),
        )

    def transform(self, frame: pd.DataFrame, tasks: Sequence[str] = tuple(TASKS)) -> TaskData:
        """Encode rows: numbers z-scored, categories as ids from 1 on, a category never seen in training as 0."""
        unknown = [task for task in tasks if task not in TASKS]
        if unknown or not tasks:
            raise ValueError(f"tasks: got {tuple(tasks)}, expected some of {tuple(TASKS)}")
        numeric = (self._numbers(frame) - np.asarray(self.mean)) / np.asarray(self.std)
        ids = np.empty((len(frame), len(CATEGORICAL)), np.int64)
        for j, field in enumerate(CATEGORICAL):
            known = {name: i + 1 for i, name in enumerate(self.categories[field])}
            table = np.array([known.get(name, UNKNOWN_ID) for name in frame[field].cat.categories], np.int64)
            ids[:, j] = table[frame[field].cat.codes]
        labels = np.empty((len(frame), len(tasks)), np.float32)
        for j, task in enumerate(tasks):
            column = frame[TASKS[task]]
            table = np.array([LABEL_VALUES[TASKS[task]][name] for name in column.cat.categories], np.float32)
            labels[:, j] = table[column.cat.codes]
        return TaskData(
            numeric=torch.from_numpy(numeric.astype(np.float32)),
            categorical=torch.from_numpy(ids),
            labels=torch.from_numpy(labels),
            vocab_sizes=tuple(len(self.categories[i]) + 1 for i in CATEGORICAL),
            task_names=tuple(tasks),
            numeric_names=tuple(FIELDS[i] for i in NUMERIC),
            categorical_names=tuple(FIELDS[i] for i in CATEGORICAL),
        )

    @staticmethod
    def _numbers(frame: pd.DataFrame) -> np.ndarray:
        columns = [np.log1p(frame[i]) if i in LOG_SCALED else frame[i] for i in NUMERIC]
        return np.stack([np.asarray(c, np.float64) for c in columns], 1)


def load_census(path: str | Path, *, tasks: Sequence[str] = tuple(TASKS), seed: int = 0) -> Splits:
    """Training, validation and test rows of Census-Income.

    path: one official file, split 60/20/20 by ``seed``; or a directory. Where a directory holds both official files,
    ``census-income.data`` is the training part and ``census-income.test`` is split 1:1 into validation and test, as
    in the papers; where it holds one of them, that one is split 60/20/20.
    Vocabularies and scaling come from the training rows alone. Raises FileNotFoundError, CensusFileError, ValueError.
    """
    files = _official_files(Path(path))
    frames = [read_census(file) for file in files]
    if len(frames) == 2:
        train, held_out = frames
        first, second = split_rows(len(held_out), (0.5, 0.5), seed=seed)
        parts = (train, held_out.iloc[first], held_out.iloc[second])
    else:
        parts = tuple(frames[0].iloc[rows] for rows in split_rows(len(frames[0]), seed=seed))
    if not len(parts[0]):
        raise CensusFileError(files[0], f"has {len(frames[0])} row, too few to leave one for training")
    encoder = CensusEncoder.fit(parts[0])
    return Splits(*(encoder.transform(part, tasks) for part in parts))


def _official_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = []
    for name in ("census-income.data", "census-income.test"):
        found += [file for file in (path / name, path / f"{name}.gz") if file.is_file()][:1]
    if not found:
        raise FileNotFoundError(f"{path}: no census-income.data and no census-income.test in this directory; {SOURCE}")
    return found
