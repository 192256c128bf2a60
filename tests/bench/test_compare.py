"""Two results files side by side."""

import copy

import pytest

from bench import compare, record


def ms(median, spread=0.01):
    return {"median": median, "q20": median * (1 - spread), "q80": median * (1 + spread), "samples": 9}


def tile(values, median):
    return {"tile": values, "ms": ms(median)}


@pytest.fixture
def results():
    operator = {"op": "mix", "form": "gated", "shape": {"B": 4}, "dtype": "float32", "what": "forward"}
    operator |= {"ms": {"ours": ms(1.0), "plain formula": ms(2.0)}, "beyond_mib": {"ours": 3.0, "plain formula": None}}
    task = {"network": "AdaTT", "tasks": 4, "experts_per_task": 2, "batch": 8, "dtype": "float32"}
    tuned = {"kernel": "mix forward", "shape_name": "s", "dtype": "float32", "usual": [1, 2], "best": [2, 2]}
    tuned["rows"] = [tile([1, 2], 3.0), tile([2, 2], 2.0), tile([4, 2], 5.0)]
    parts = {
        "ceilings": {
            "ceilings": [{"threads": 1, "copy_gb_s": 10.0, "gemm": {"float32": [{"gflops": 100.0}], "x": []}}]
        },
        "operators": {"rows": [operator]},
        "step": {"step": [{"task": task, "rows": [{"variant": "ours", "ms": ms(7.0)}]}]},
        "tune": {"rows": [tuned]},
        "tests": {"bad": {"a::x": "boom"}},
    }
    entries = {name: {"status": "passed", "sources": "s", "result": result} for name, result in parts.items()}
    return {"format": record.FORMAT, "machine": {"gpu": "G", "driver": "1"}, "parts": entries}


def test_every_part_gives_its_figures(results):
    found = compare.figures(results)
    assert {name: figure.value for name, figure in found.items()} == {
        "ceilings: 1 threads, copy": 10.0,
        "ceilings: 1 threads, float32 products": 100.0,
        "operators: mix/gated, B=4, float32, forward, ours": 1.0,
        "operators: mix/gated, B=4, float32, forward, ours, memory": 3.0,
        "operators: mix/gated, B=4, float32, forward, plain formula": 2.0,
        "step: AdaTT, 4 x 2, B=8, float32, ours": 7.0,
        "tune: mix forward, s, float32, usual tile": 3.0,
        "tune: mix forward, s, float32, best tile": 2.0,
    }
    assert compare.figures({"parts": {"step": {"status": "failed", "result": None}}}) == {}


@pytest.mark.parametrize(
    "after, expected",
    [((1.2, 1.15, 1.25), True), ((1.2, 0.9, 1.3), False), ((1.02, 1.02, 1.02), False), ((0.5, 0.5, 0.5), True)],
)
def test_a_change_is_more_than_noise(after, expected):
    before = compare.Figure(1.0, 0.99, 1.01, "ms")
    assert compare.changed(before, compare.Figure(*after, "ms")) is expected


def test_remarks_name_what_is_no_figure(results):
    other = copy.deepcopy(results)
    assert compare.remarks(results, other) == []
    other["machine"]["driver"] = "2"
    other["parts"]["step"] |= {"status": "failed", "sources": "t"}
    other["parts"]["tests"]["result"]["bad"] = {"b::y": "bang"}
    assert compare.remarks(results, other) == [
        "driver: 1 -> 2",
        "part step: passed -> failed",
        "the parts of the second file were measured on 2 versions of the sources",
        "now fails: b::y: bang",
        "fails no more: a::x",
    ]


def test_the_command_prints_what_changed(results, tmp_path, capsys):
    other = copy.deepcopy(results)
    other["parts"]["operators"]["result"]["rows"][0]["ms"]["ours"] = ms(2.0)
    other["parts"]["ceilings"]["result"]["ceilings"][0]["copy_gb_s"] = 20.0
    paths = []
    for name, found in (("a", results), ("b", other)):
        paths.append(tmp_path / name)
        record.merge(paths[-1], found["machine"], found["parts"])
    assert compare.main([str(p) for p in paths]) == 0
    printed = capsys.readouterr().out
    assert "2 of 8 figures changed" in printed and "worse" in printed and "better" in printed
    assert compare.main([*(str(p) for p in paths), "--all"]) == 0
    assert capsys.readouterr().out.count("same") == 6
    paths[0].write_text("{}")
    assert compare.main([str(p) for p in paths]) == 2
    assert "expected" in capsys.readouterr().err
