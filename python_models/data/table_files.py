"""CSV and Parquet files as columns of numbers and strings, with errors that name the file, the row and the column."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet", ".pq")


class TableError(ValueError):
    """A table or a schema that cannot be used; the message names the file and, where it can, the row and the column."""


class TableFile:
    """One file's columns. Rows are counted from 1, without a CSV file's header.

    Raises TableError for a file that is no table, or lacks one of the columns.
    """

    def __init__(self, path: str | Path, columns: Iterable[str], strings: Iterable[str] = ()) -> None:
        self.path = Path(path)
        wanted = list(dict.fromkeys(columns))
        if not self.path.is_file():
            raise TableError(f"{self.path}: no such file")
        if not self.path.name.lower().endswith(SUFFIXES):
            raise TableError(f"{self.path}: expected a file named {', '.join('*' + s for s in SUFFIXES)}")
        self._is_text = not self.path.name.lower().endswith((".parquet", ".pq"))
        self.frame = self._read_text(wanted, set(strings)) if self._is_text else self._read_parquet(wanted)
        if not len(self.frame):
            raise TableError(f"{self.path}: has no rows")

    def __len__(self) -> int:
        return len(self.frame)

    def _read_text(self, wanted: list[str], strings: set[str]) -> pd.DataFrame:
        import pandas as pd  # here, so that networks and synthetic data do without it

        options: dict[str, Any] = {"sep": "\t" if ".tsv" in self.path.name.lower() else ",", "encoding": "utf-8"}
        try:
            # As a row: of a name that is there twice, pandas' header would have a second spelling.
            header = pd.read_csv(self.path, header=None, nrows=1, dtype=str, keep_default_na=False, **options)
            header = header.iloc[0].tolist()
            self._check_columns(wanted, header)
            dtype = {name: str for name in strings}
            # An empty field is missing; "NA" is a word like any other.
            options |= {"keep_default_na": False, "na_values": [""], "skip_blank_lines": False, "low_memory": False}
            with warnings.catch_warnings():
                # Without an index column, fields beyond the header are a warning, and lost.
                warnings.simplefilter("error", pd.errors.ParserWarning)
                frame = pd.read_csv(self.path, dtype=dtype, index_col=False, **options)
        except pd.errors.ParserWarning:
            raise TableError(f"{self.path}: rows have more fields than the header, {len(header)}") from None
        except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, OSError, EOFError) as error:
            raise TableError(f"{self.path}: not a table of comma-separated values: {str(error).strip()}") from error
        return frame[wanted]

    def _read_parquet(self, wanted: list[str]) -> pd.DataFrame:
        import pyarrow
        import pyarrow.parquet

        try:
            self._check_columns(wanted, pyarrow.parquet.read_schema(self.path).names)
            return pyarrow.parquet.read_table(self.path, columns=wanted).to_pandas()
        except (pyarrow.ArrowException, OSError) as error:
            raise TableError(f"{self.path}: not a Parquet file: {error}") from error

    def _check_columns(self, wanted: Sequence[str], there: Sequence[str]) -> None:
        twice = {name for name in wanted if list(there).count(name) > 1}
        if twice:
            raise TableError(f"{self.path}: has several columns named {sorted(twice)[0]!r}")
        for name in wanted:
            if name not in there:
                raise TableError(f"{self.path}: has no column {name!r}; its columns are {', '.join(there)}")

    def missing(self, column: str) -> np.ndarray:
        """Where the column is empty, bool [N]."""
        return self.frame[column].isna().to_numpy()

    def numbers(self, column: str, *, missing: bool = False) -> np.ndarray:
        """A column as float64 [N]; NaN where it is empty, which is an error unless `missing` allows it."""
        import pandas as pd

        values = self.frame[column]
        numbers = pd.to_numeric(values, errors="coerce").to_numpy(np.float64, na_value=np.nan)
        empty = values.isna().to_numpy()
        self.refuse(~np.isfinite(numbers) & ~empty, column, "a finite number")
        if not missing:
            self.refuse(empty, column, "a number")
        return numbers

    def strings(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """A column as codes int64 [N] into its distinct values, strings; an empty field is the string ''."""
        import pandas as pd

        codes, unique = pd.factorize(self.frame[column])
        names = np.array([_word(value) for value in unique] + [""], object)
        merged, inverse = np.unique(names, return_inverse=True)  # 1 and 1.0 are one word
        return inverse.reshape(-1)[codes], merged  # code -1, an empty field, is the last name

    def flags(self, column: str) -> np.ndarray:
        """A column of yes and no as bool [N]: true, false, 1, 0."""
        codes, names = self.strings(column)
        table = np.array([{"1": 1, "true": 1, "0": 0, "false": 0}.get(str(name).lower(), -1) for name in names])
        self.refuse(table[codes] < 0, column, "true, false, 1 or 0")
        return table[codes].astype(bool)

    def refuse(self, bad: np.ndarray, column: str, expected: str) -> None:
        """TableError naming the first row where `bad`."""
        rows = np.flatnonzero(bad)
        if not len(rows):
            return
        row = int(rows[0])
        value = self.frame[column].iloc[row]
        got = "nothing" if self.missing(column)[row] else repr(_word(value))
        more = f" ({len(rows)} rows in all)" if len(rows) > 1 else ""
        raise TableError(f"{self.path}, row {row + 1}, column {column!r}: got {got}, expected {expected}{more}")


def _word(value: Any) -> str:
    """A value as a word: 3 for 3.0 too, which is what a whole number becomes beside an empty field."""
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return str(int(value))
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return str(value).strip()
