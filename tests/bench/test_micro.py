"""The microbenchmarks: what they hold against a figure, and how a regression fails them."""

import json
import os
import subprocess
import sys

import pytest
import torch

from bench import operators, record, shapes, subjects
from bench.papers import ARCHITECTURES, Sizes

pytest.importorskip("pytest_benchmark")

ONE = ["--benchmark-only", "--shapes", "tiny", "-k", "hard_concrete_l0 and forward", "--benchmark-min-rounds", "50"]


def pytest_in(*words, check=True):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    # A worker of pytest-xdist, which this may run in, takes no benchmarks.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=record.ROOT, env=alone, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def test_a_plain_pytest_leaves_them_alone():
    assert "--shapes" not in pytest_in("--help").stdout
    settings = (record.ROOT / "pyproject.toml").read_text()
    assert 'testpaths = ["tests"]' in settings


def test_a_regression_fails_the_command(tmp_path):
    """Against a run whose times are a hundredth of what they were."""
    storage = ["--benchmark-storage", f"file://{tmp_path}"]
    printed = pytest_in("bench/", *ONE, *storage, "--benchmark-save", "first").stdout
    assert "ours and its rivals in turn" in printed and "plain formula" in printed.rpartition("rivals in turn")[2]
    (saved,) = tmp_path.rglob("*_first.json")
    found = json.loads(saved.read_text())
    (one,) = found["benchmarks"]
    extra = one["extra_info"]
    assert extra["flops"] > 0 < extra["bytes"] and 0 < extra["percent_of_ceiling"] < 100 and extra["mode"] == "clock"
    assert set(extra["speed_up"]) == {"plain formula"} and extra["speed_up"]["plain formula"] > 0
    assert set(extra["ms"]) == {"ours", "plain formula"} and extra["noisy"] in (True, False)
    assert extra["peak_mib"] is None or extra["peak_mib"] >= 0
    for name in ("min", "max", "mean", "median", "q1", "q3"):
        one["stats"][name] /= 100
    saved.write_text(json.dumps(found))
    compare = ["--benchmark-compare", "0001", "--benchmark-compare-fail", "median:50%", "--no-peak"]
    done = pytest_in("bench/", *ONE, *storage, *compare, check=False)
    assert done.returncode != 0 and "Performance has regressed" in done.stdout + done.stderr


def test_a_wrong_operator_gets_no_figure(monkeypatch):
    from bench.conftest import Settings
    from bench.micro.test_operators import test_operator as run_one

    subject = subjects.find("mix/gated")
    wrong = lambda op: op(lambda operands: subject.call(operands) * 1.01)  # noqa: E731
    monkeypatch.setattr(
        operators, "variants", lambda s: {operators.OURS: wrong(lambda f: f), subjects.FORMULA: subject.call}
    )
    shape = shapes.tiny(shapes.SHAPES["mix/gated"]["MMoE 8 x 16"])
    with pytest.raises(AssertionError):
        run_one(subject, shape, "float32", operators.FORWARD, Settings("cpu", True, False, None), None)


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_the_registry_spans_recommendation(name):
    published, everything = (shapes.operator_shapes(name, which) for which in ("papers", "all"))
    assert published == shapes.SHAPES[name] and published.items() <= everything.items()
    (chosen,) = shapes.operator_shapes(name).values()
    assert chosen in published.values()
    some = next(iter(published.values()))
    if "B" in some:
        assert {shape["B"] for shape in everything.values()} >= {1, 256, 65536}
    if "E" in some:
        experts = sorted(shape["E"] for shape in everything.values())
        assert experts[0] <= 4 and experts[-1] > 4096 - 64
    if "T" in some:
        assert {shape["T"] for shape in everything.values()} >= {1, 64}
    for shape in everything.values():
        outputs = shape.get("B", 1) * max(shape.get("E", 1), shape.get("T", 1)) * shape.get("N", shape.get("D", 1))
        assert 4 * outputs < 1 << 30, shape


@pytest.mark.parametrize("name", [name for name in shapes.SHAPES if "E" in next(iter(shapes.SHAPES[name].values()))])
def test_every_shape_can_be_made(name):
    """With one row and narrow: units have equally many experts, tasks their own."""
    subject = subjects.find(name)
    for shape in shapes.operator_shapes(name, "all").values():
        narrow = shape | {letter: 1 for letter in "BKND" if letter in shape}
        operands, _ = operators.prepare(subject, narrow, torch.float32, "cpu")
        if "counts" in operands and operands["counts"] is not None:
            assert sum(operands["counts"]) == shape["E"]


@pytest.mark.parametrize("name", ["MMoE", "PLE", "SharedBottom", "BranchedMTL"])
def test_networks_come_in_the_shapes_that_matter_to_them(name):
    letters = set(ARCHITECTURES[name].parameters)
    found = shapes.network_shapes("all", letters)
    assert ("E=4096" in found) is (name == "MMoE")
    assert ("T=64" in found) is (name not in ("SharedBottom", "BranchedMTL"))
    assert {"B=1", "B=65536", "MTReclib"} <= set(found)
    assert all(Sizes(**changes) for changes in found.values())
    assert len(shapes.network_shapes()) == 1 and shapes.network_shapes("papers") == shapes.NETWORKS


def test_another_set_is_named():
    with pytest.raises(ValueError, match="'nonsense'"):
        shapes.operator_shapes("mix/gated", "nonsense")
    with pytest.raises(ValueError, match="'nonsense'"):
        shapes.network_shapes("nonsense")
