"""The Census-Income loader: the official format, its labels and columns, and what it says of a damaged file."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("pandas")

from python_models.data import CensusEncoder, CensusFileError, load_census, read_census, split_rows
from python_models.data.census import CATEGORICAL, FIELDS, LABEL_VALUES, NUMERIC

COLLEGE = [name for name, label in LABEL_VALUES[4].items() if label]


def row(**changes: str) -> list[str]:
    """One row in the order of the official files; keyword f7="Widowed" sets field 7."""
    fields = ["Not in universe"] * 42
    for i in NUMERIC:
        fields[i] = "0"
    fields[4], fields[7], fields[24], fields[41] = "High school graduate", "Widowed", "1602.75", "- 50000."
    for name, value in changes.items():
        fields[int(name[1:])] = value
    return fields


def write(path: Path, rows: list[list[str]]) -> Path:
    text = "".join(", ".join(fields) + "\n" for fields in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def sample_rows(count: int, seed: int = 0) -> list[list[str]]:
    rng = np.random.default_rng(seed)
    incomes, colleges = ["- 50000.", "50000+."], list(LABEL_VALUES[4])
    return [
        row(
            f0=str(rng.integers(0, 91)),
            f4=colleges[rng.integers(len(colleges))],
            f5=str(rng.integers(0, 2) * rng.integers(0, 9999)),
            f7=list(LABEL_VALUES[7])[rng.integers(7)],
            f11=["NA", "All other", "Cuban"][rng.integers(3)],
            f24=str(rng.random()),
            f25=["?", "MSA to MSA"][rng.integers(2)],
            f35=["Foreign born- Not a citizen of U S ", "Native"][rng.integers(2)],
            f41=incomes[rng.integers(2)],
        )
        for _ in range(count)
    ]


def test_columns_are_the_38_inputs():
    assert len(NUMERIC) == 7 and len(CATEGORICAL) == 31
    assert not {4, 7, 24, 41} & {*NUMERIC, *CATEGORICAL}
    assert [FIELDS[i] for i in (4, 7, 24, 41)] == ["education", "marital status", "instance weight", "income"]


def test_plain_and_gzip_files_read_alike_and_blanks_do_not_matter(tmp_path):
    rows = sample_rows(30)
    plain, packed = read_census(write(tmp_path / "a.data", rows)), read_census(write(tmp_path / "b.gz", rows))
    text = "\r\n".join(",".join(fields) for fields in rows) + "\r\n\n"
    (tmp_path / "c").write_text(text, newline="")
    tight = read_census(tmp_path / "c")
    assert plain.equals(packed) and plain.equals(tight)
    assert len(plain) == 30 and 24 not in plain and plain[41].iloc[0] == rows[0][41]


def test_labels(tmp_path):
    rows = (
        [row(f4=name) for name in LABEL_VALUES[4]] + [row(f7=name) for name in LABEL_VALUES[7]] + [row(f41="50000+.")]
    )
    frame = read_census(write(tmp_path / "x", rows))
    data = CensusEncoder.fit(frame).transform(frame)
    assert data.task_names == ("income", "never_married", "education")
    income, never_married, education = data.labels.T
    assert income.tolist() == [0.0] * 24 + [1.0]
    assert [rows[i][7] for i in range(25) if never_married[i]] == ["Never married"]
    assert [rows[i][4] for i in range(25) if education[i]] == COLLEGE and len(COLLEGE) == 6
    chosen = CensusEncoder.fit(frame).transform(frame, ("education", "income"))
    assert chosen.task_names == ("education", "income") and torch.equal(chosen.labels, data.labels[:, [2, 0]])
    with pytest.raises(ValueError, match="tasks"):
        CensusEncoder.fit(frame).transform(frame, ("wealth",))


def test_inputs_come_from_the_training_rows(tmp_path):
    train = [row(f0="20", f5="0", f11="NA"), row(f0="40", f5="99", f11="Cuban", f21="?")]
    later = [row(f0="60", f5="9", f11="Cuban", f21="Utah"), row(f11="Not seen before")]
    frame = read_census(write(tmp_path / "x", train + later))
    encoder = CensusEncoder.fit(frame.iloc[:2])
    data = encoder.transform(frame)
    assert data.numeric.dtype == torch.float32 and data.categorical.dtype == torch.int64
    assert data.numeric.shape == (4, 7) and data.categorical.shape == (4, 31)
    assert data.numeric_names[:2] == ("age", "wage per hour")
    assert data.numeric[:3, 0].tolist() == [-1, 1, 3]
    assert data.numeric[:3, 1].tolist() == pytest.approx([-1, 1, 0])  # log1p: 0, log 100, log 10
    assert not data.numeric[:, 2:].any()  # a constant column has no deviation to divide by
    hispanic, state = data.categorical_names.index("hispanic origin"), CATEGORICAL.index(21)
    assert data.categorical[:, hispanic].tolist() == [2, 1, 1, 0] and data.vocab_sizes[hispanic] == 3
    assert encoder.categories[11] == ("Cuban", "NA")
    assert data.categorical[:, state].tolist() == [2, 1, 0, 2] and encoder.categories[21] == ("?", "Not in universe")


def test_single_file_is_cut_60_20_20_by_seed(tmp_path):
    path = write(tmp_path / "census-income.test.gz", sample_rows(101))
    first, again, directory = load_census(path, seed=5), load_census(path, seed=5), load_census(tmp_path, seed=5)
    other = load_census(path, seed=6)
    assert [len(part) for part in (first.train, first.validation, first.test)] == [60, 20, 21]
    for same in (again, directory):
        assert torch.equal(first.train.numeric, same.train.numeric) and torch.equal(first.test.labels, same.test.labels)
    assert not torch.equal(first.train.labels, other.train.labels)


def test_official_pair_trains_on_data_and_halves_test(tmp_path):
    train, held_out = sample_rows(40, seed=1), sample_rows(21, seed=2)
    write(tmp_path / "census-income.data", train), write(tmp_path / "census-income.test.gz", held_out)
    splits = load_census(tmp_path, seed=3)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [40, 10, 11]
    assert splits.train.labels[:, 0].tolist() == [float(fields[41] == "50000+.") for fields in train]
    expected = [float(fields[41] == "50000+.") for fields in held_out]
    first, second = split_rows(21, (0.5, 0.5), seed=3)
    assert splits.validation.labels[:, 0].tolist() == [expected[i] for i in first]
    assert splits.test.labels[:, 0].tolist() == [expected[i] for i in second]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (row()[:-1], "line 3: has 41 fields, expected 42"),
        ([*row(), "more"], "line 3: has 43 fields, expected 42"),
        (row(f0="old"), r"line 3: field 0 \(age\) is 'old', expected a number"),
        (row(f18="nan"), r"line 3: field 18 \(dividends from stocks\) is 'nan'"),
        (row(f5="-1"), r"line 3: field 5 \(wage per hour\) is '-1'"),
        (row(f8=""), r"line 3: field 8 \(major industry code\) is ''"),
        (row(f41="50000"), r"line 3: field 41 \(income\) is '50000', expected one of - 50000., 50000\+."),
        (row(f7="Wedded"), r"line 3: field 7 \(marital status\) is 'Wedded'"),
        (row(f4="Kindergarten"), r"line 3: field 4 \(education\) is 'Kindergarten'"),
        (row(f10="Wh\0te"), "line 3: byte 0x00 is not plain text"),
        (row(f10="Wh\u00eete"), "line 3: byte 0xc3 is not plain text"),
    ],
)
def test_damage_is_named_by_line_and_field(tmp_path, line, message):
    path = write(tmp_path / "bad", [row(), row(), line, row()])
    with pytest.raises(CensusFileError, match=message) as error:
        read_census(path)
    assert str(path) in str(error.value) and "UCI repository" in str(error.value)


def test_line_numbers_count_blank_lines(tmp_path):
    good = ", ".join(row())
    (tmp_path / "x").write_text(f"\n{good}\n  \n\r\n{good}\n{', '.join(row(f0='x'))}\n", newline="")
    with pytest.raises(CensusFileError, match="line 6: field 0"):
        read_census(tmp_path / "x")


def test_unusable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file.*UCI repository"):
        load_census(tmp_path / "missing.data")
    with pytest.raises(FileNotFoundError, match="no census-income.data.*UCI repository"):
        load_census(tmp_path)
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(CensusFileError, match="no rows"):
        read_census(tmp_path / "empty")
    whole = gzip.compress("\n".join(", ".join(row()) for _ in range(50)).encode())
    for name, damaged in (("cut", whole[: len(whole) // 2]), ("flipped", whole[:20] + b"\xff\xff" + whole[22:])):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(CensusFileError, match="damaged gzip file"):
            read_census(tmp_path / name)
    write(tmp_path / "one", [row()])
    with pytest.raises(CensusFileError, match="too few"):
        load_census(tmp_path / "one")


def test_split_rows_is_a_partition():
    parts = split_rows(10, seed=1)
    assert [len(part) for part in parts] == [6, 2, 2] and sorted(np.concatenate(parts)) == list(range(10))
    assert [len(part) for part in split_rows(99_762)] == [59_857, 19_952, 19_953]
    with pytest.raises(ValueError, match="fractions"):
        split_rows(10, (0.5, 0.6))


def test_the_official_test_file():
    """Counts and correlations of the real rows; CENSUS_INCOME names the file where it lies elsewhere."""
    default = Path(__file__).resolve().parents[2] / "../shared/data/census-income.test.gz"
    path = Path(os.environ.get("CENSUS_INCOME", default))
    if not path.is_file():
        pytest.skip("needs census-income.test")
    splits = load_census(path)
    parts = (splits.train, splits.validation, splits.test)
    labels = torch.cat([part.labels for part in parts]).double()
    assert labels.sum(0).tolist() == [6_186, 43_143, 19_456]
    correlation = torch.corrcoef(labels.T)
    # The MMoE paper prints 0.1768 and 0.2373 over 10 000 rows.
    assert abs(correlation[0, 1]) == pytest.approx(0.1787, abs=2e-4)
    assert abs(correlation[1, 2]) == pytest.approx(0.2376, abs=2e-4)
    assert [len(part) for part in parts] == [59_857, 19_952, 19_953]
    assert splits.train.numeric.mean(0).abs().max() < 1e-6
    assert (splits.train.categorical > 0).all()
    assert [int((part.categorical == 0).sum()) for part in parts] == [0, 1, 3]
