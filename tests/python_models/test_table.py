"""Tables of one's own: CSV and Parquet give the same rows, and damage is named by file, row and column."""

import gzip

import numpy as np
import pytest
import torch

pd = pytest.importorskip("pandas")

from python_models.data.table import TableEncoder, load_table, read_schema  # noqa: E402
from python_models.data.table_files import TableError, TableFile  # noqa: E402

SCHEMA = """
dense = ["age", "price"]
log = ["price"]
categorical = ["country", "day"]
domain = "site"
group = "user"
weight = "importance"

[files]
{files}

[tasks.click]
[tasks.stay]
kind = "regression"
column = "seconds"
mask = "click"
weight = "stay_weight"
[tasks.topic]
kind = "multiclass"
classes = ["news", "sport", "art"]
missing = "mask"
"""


def frame(rows: int = 9, seed: int = 0) -> "pd.DataFrame":
    random = np.random.default_rng(seed)
    click = random.integers(0, 2, rows)
    topic = np.array(["news", "sport", "art", None], object)[random.integers(0, 4, rows)]
    topic[:3] = ["news", None, "art"]
    return pd.DataFrame(
        {
            "unused": ["a,b"] * rows,
            "age": random.integers(18, 90, rows),
            "price": random.random(rows) * 100,
            "country": np.array(["de", "fr", "é x", "NA"], object)[random.integers(0, 4, rows)],
            "day": random.integers(1, 8, rows),
            "site": np.array(["b", "a"], object)[np.arange(rows) % 2],
            "user": np.array(["u", "v", "w"], object)[np.arange(rows) % 3],
            "importance": random.integers(1, 4, rows) / 2,
            "click": click,
            "seconds": np.where(click == 1, random.random(rows) * 60, np.nan),
            "stay_weight": random.random(rows),
            "topic": topic,
        }
    )


def put(folder, table, name="rows.csv", files=None, schema=SCHEMA):
    """Write the table and its schema; gives the schema's path."""
    path = folder / name
    table.to_parquet(path) if name.endswith(".parquet") else table.to_csv(
        path, index=False, sep="\t" if ".tsv" in name else ","
    )
    (folder / "schema.toml").write_text(schema.format(files=files or f'train = "{name}"'))
    return folder / "schema.toml"


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz", "rows.tsv", "rows.parquet"])
def test_every_column_is_what_the_schema_says(name, tmp_path):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    table = frame()
    splits, encoder = load_table(put(tmp_path, table, name))
    data = splits.train
    age, price = table["age"].to_numpy(float), np.log1p(table["price"].to_numpy())
    expected = np.stack([(c - c.mean()) / c.std() for c in (age, price)], 1)
    np.testing.assert_allclose(data.numeric.numpy(), expected, rtol=0, atol=1e-6)
    countries = sorted(set(table["country"]))
    days = sorted({str(day) for day in table["day"]})
    assert encoder.words == {"country": countries, "day": days, "site": ["a", "b"]}
    assert data.vocab_sizes == (len(countries) + 1, len(days) + 1)
    assert data.categorical[:, 0].tolist() == [countries.index(c) + 1 for c in table["country"]]
    assert data.categorical[:, 1].tolist() == [days.index(str(d)) + 1 for d in table["day"]]
    assert data.domain.tolist() == [1, 0] * 4 + [1] and data.num_domains == 2
    assert data.group.tolist() == [0, 1, 2] * 3
    assert data.kinds == ("binary", "regression", "multiclass") and data.outputs == (1, 1, 3)
    classes = ["news", "sport", "art"]
    there = [c in classes for c in table["topic"]]
    assert data.labels[:, 0].tolist() == table["click"].tolist()
    np.testing.assert_array_equal(data.labels[:, 1], table["seconds"].fillna(0).astype(np.float32))
    assert data.labels[:, 2].tolist() == [classes.index(c) if c in classes else 0 for c in table["topic"]]
    importance = table["importance"].to_numpy()
    weights = [importance, importance * table["stay_weight"] * table["click"], importance * there]
    np.testing.assert_allclose(data.weights.numpy(), np.stack(weights, 1), rtol=1e-6)
    assert data.task_names == ("click", "stay", "topic") and not len(splits.test)
    assert TableEncoder(**encoder.to_dict()) == encoder


def test_other_files_are_read_through_what_the_training_rows_say(tmp_path):
    table, other = frame(), frame(5, 1)
    other.loc[1, "country"] = "nowhere"
    other.to_csv(tmp_path / "other.csv", index=False)
    splits, encoder = load_table(put(tmp_path, table, files='train = "rows.csv"\ntest = ["other.csv", "rows.csv"]'))
    assert len(splits.test) == 14 and not len(splits.validation)
    assert splits.test.categorical[1, 0] == 0 and splits.test.vocab_sizes == splits.train.vocab_sizes
    assert splits.test.group.tolist() == [0, 1, 2, 0, 1] + [0, 1, 2] * 3  # of both files
    assert torch.equal(splits.test.select(np.arange(5, 14)).numeric, splits.train.numeric)
    mean = (other["age"] - table["age"].mean()) / table["age"].std(ddof=0)
    np.testing.assert_allclose(splits.test.numeric[:5, 0], mean, rtol=1e-5)


def test_one_file_is_split(tmp_path):
    path = put(tmp_path, frame(40), files='all = "rows.csv"\nfractions = [0.5, 0.25, 0.25]')
    splits, encoder = load_table(path, seed=1)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [20, 10, 10]
    # Numbers are scaled by the training rows alone.
    assert abs(float(splits.train.numeric.mean())) < 1e-6 and abs(float(splits.test.numeric.mean())) > 1e-3
    ages = frame(40)["age"].to_numpy()
    seen = torch.cat([part.numeric[:, 0] for part in (splits.train, splits.validation, splits.test)]).double()
    back = (seen * encoder.std["age"] + encoder.mean["age"]).round().numpy()
    assert sorted(back) == sorted(ages)
    again, _ = load_table(path, seed=1)
    assert torch.equal(again.test.labels, splits.test.labels)
    assert not torch.equal(load_table(path, seed=2)[0].test.numeric, splits.test.numeric)


@pytest.mark.parametrize(
    ("column", "row", "value", "message"),
    [
        ("age", 2, "old", "row 3, column 'age': got 'old', expected a finite number"),
        ("age", 2, "", "row 3, column 'age': got nothing, expected a number"),
        ("price", 0, "inf", "row 1, column 'price': got 'inf', expected a finite number"),
        ("price", 8, "-3", "row 9, column 'price': got '-3', expected a number of at least 0"),
        ("click", 1, "2", "row 2, column 'click': got '2', expected a label from 0 to 1"),
        ("importance", 4, "-1", "row 5, column 'importance': got '-1', expected a weight of at least 0"),
        ("stay_weight", 4, "", "row 5, column 'stay_weight': got nothing, expected a number"),
        ("topic", 5, "opera", "row 6, column 'topic': got 'opera', expected one of news, sport, art"),
    ],
)
def test_damage_is_named(column, row, value, message, tmp_path):
    table = frame().astype(object)
    table.loc[row, column] = value
    with pytest.raises(TableError, match=f"rows.csv, {message}"):
        load_table(put(tmp_path, table))


def test_more_damage(tmp_path):
    table = frame()
    clicked = int(table["click"].to_numpy().nonzero()[0][0])
    broken = table.copy()
    broken.loc[clicked, "seconds"] = np.nan
    with pytest.raises(TableError, match=f"row {clicked + 1}, column 'seconds': got nothing, expected a label"):
        load_table(put(tmp_path, broken))
    table.assign(site="c").to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(TableError, match=r"other.csv, row 1, column 'site': got 'c', expected a domain.*\(9 rows in"):
        load_table(put(tmp_path, table, files='train = "rows.csv"\ntest = "other.csv"'))
    with pytest.raises(TableError, match="rows.csv: has no column 'price'; its columns are unused, age, country"):
        load_table(put(tmp_path, table.drop(columns="price")))
    with pytest.raises(TableError, match="rows.csv: has no rows"):
        load_table(put(tmp_path, table.iloc[:0]))
    with pytest.raises(TableError, match="gone.csv: no such file"):
        load_table(put(tmp_path, table, files='train = "gone.csv"'))
    (tmp_path / "rows.xls").write_bytes(b"")
    with pytest.raises(TableError, match=r"rows.xls: expected a file named \*.csv"):
        load_table(put(tmp_path, table, files='train = "rows.xls"'))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "No columns"),
        (b"a,b\n1,2\n3,4,5\n", "Expected 2 fields in line 3, saw 3"),
        (b"a,b\n1,2,3\n3,4,5\n", "rows have more fields than the header, 2"),
        (b"a,b\n\xff,2\n", "decode"),
        (b"a,c\n1,2\n", "has no column 'b'; its columns are a, c"),
        (b"a,b,a\n1,2,3\n", "has several columns named 'a'"),
        (gzip.compress(b"a,b\n1,2\n", mtime=0)[:15], "not a table"),
    ],
)
def test_no_table(content, message, tmp_path):
    path = tmp_path / ("x.csv.gz" if content[:2] == b"\x1f\x8b" else "x.csv")
    path.write_bytes(content)
    with pytest.raises(TableError, match=message):
        TableFile(path, ["a", "b"])


def test_flags(tmp_path):
    (tmp_path / "x.csv").write_text("a\nTrue\n0\n1\nfalse\n")
    assert TableFile(tmp_path / "x.csv", ["a"]).flags("a").tolist() == [True, False, True, False]
    (tmp_path / "x.csv").write_text("a\nTrue\nmaybe\n")
    with pytest.raises(TableError, match="x.csv, row 2, column 'a': got 'maybe', expected true, false, 1 or 0"):
        TableFile(tmp_path / "x.csv", ["a"]).flags("a")


def test_no_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(TableError, match="x.parquet: not a Parquet file"):
        TableFile(tmp_path / "x.parquet", ["a"])


def test_missing_numbers_may_be_the_mean(tmp_path):
    table = frame().astype({"age": float})
    table.loc[4, "age"] = np.nan
    splits, encoder = load_table(put(tmp_path, table, schema='missing = "mean"\n' + SCHEMA))
    assert splits.train.numeric[4, 0] == 0 and encoder.mean["age"] == pytest.approx(table["age"].mean())


def test_a_whole_number_is_one_category_with_and_without_a_gap(tmp_path):
    """pandas makes 3 to 3.0 where a field of the column is empty."""
    pytest.importorskip("pyarrow")
    pd.DataFrame({"a": [1, 2, None]}).to_parquet(tmp_path / "x.parquet")
    codes, names = TableFile(tmp_path / "x.parquet", ["a"]).strings("a")
    assert names[codes].tolist() == ["1", "2", ""]
    pd.DataFrame({"a": [True, False]}).to_parquet(tmp_path / "y.parquet")
    assert TableFile(tmp_path / "y.parquet", ["a"]).flags("a").tolist() == [True, False]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ('dens = ["a"]\n[files]\ntrain = "x.csv"\n[tasks.t]', "unknown key dens; did you mean 'dense'"),
        ('dense = ["a"]\n[files]\ntrain = "x.csv"', r"expected a \[tasks.NAME\]"),
        ('dense = ["a"]\n[files]\ntrain = "x.csv"\n[tasks]\nt = 3', "tasks.t must be a table"),
        ('dense = ["a"]\n[files]\ntrain = "x.csv"\n[tasks.t]\nkind = "rank"', "tasks.t.kind must be one of 'binary'"),
        ('dense = ["a"]\n[files]\ntrain = "x.csv"\n[tasks.t]\nmaks = "m"', "unknown key tasks.t.maks; did you mean"),
        ('dense = ["a"]\n[tasks.t]', "files must have train, or all"),
        ('dense = ["a"]\n[files]\nall = "x"\ntest = "y"\n[tasks.t]', "files.all is split"),
        ('dense = ["a"]\n[files]\nall = "x"\nfractions = [1.0, 1.0, 1.0]\n[tasks.t]', "files.fractions must be"),
        ('[files]\ntrain = "x"\n[tasks.t]', "expected dense or categorical columns"),
        ('dense = ["a"]\ncategorical = ["a"]\n[files]\ntrain = "x"\n[tasks.t]', "column 'a' is an input twice"),
        ('dense = ["a"]\nlog = ["b"]\n[files]\ntrain = "x"\n[tasks.t]', "log names 'b'"),
        ('dense = ["t"]\n[files]\ntrain = "x"\n[tasks.t]', "column 't' is the label of t and an input"),
        ('dense = ["a"]\n[files]\ntrain = "x"\n[tasks.t]\nkind = "multiclass"', "tasks.t.classes must list two"),
        ("dense = [", "not a TOML file"),
    ],
)
def test_schemas_that_cannot_be(schema, message, tmp_path):
    (tmp_path / "schema.toml").write_text(schema)
    with pytest.raises(TableError, match="schema.toml: " + message):
        read_schema(tmp_path / "schema.toml")


def test_the_schema_of_the_documentation(tmp_path):
    import inspect
    import textwrap

    from python_models.data import table

    text = inspect.getdoc(table).partition("::\n")[2]
    (tmp_path / "schema.toml").write_text(textwrap.dedent(text))
    assert set(read_schema(tmp_path / "schema.toml").tasks) == {"click", "stay", "topic"}


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet"])
def test_the_command_trains_on_it(name, tmp_path):
    """Masks, weights, domain, three kinds of task; and STAR on one of them."""
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    pytest.importorskip("typer")
    from python_models.train.__main__ import train
    from python_models.train.config import make

    table = frame(120)
    path = put(tmp_path, table, name, files=f'all = "{name}"')
    small = {
        "train": {"epochs": 2, "batch_size": 16, "device": "cpu"},
        "data": {"source": "table", "schema": str(path)},
    }
    found = train(make({"out": str(tmp_path / "a"), **small}))
    assert {task: set(values) for task, values in found["metrics"]["test"]["tasks"].items()} == {
        "click": {"auc", "log_loss", "ne", "calibration", "gauc"},
        "stay": {"mse"},
        "topic": {"accuracy", "log_loss"},
    }
    assert (tmp_path / "a" / "encoder.json").exists()
    one = SCHEMA.partition("[tasks.stay]")[0]
    put(tmp_path, table, name, files=f'all = "{name}"', schema=one)
    found = train(make({"out": str(tmp_path / "b"), "model": {"name": "STAR"}, **small}))
    assert 0 <= found["metrics"]["test"]["tasks"]["click"]["auc"] <= 1
