"""A regression planted on purpose, a second pass over the experts, is caught by compare."""

from pathlib import Path

import pytest

from bench import compare, lines, swept
from tests.bench import planted

RECORDED = Path(__file__).parent / "recorded"


def compared(*names, limit=()):
    return compare.main([*(str(RECORDED / f"{name}.jsonl") for name in names), "--fail", *limit])


def test_what_was_recorded_of_it_fails(capsys):
    assert compared("before", "twice") == 1
    printed = capsys.readouterr().out
    assert printed.count("worse") == 4 and "5 of 8 figures changed" in printed
    first, second = (compare.read(RECORDED / f"{name}.jsonl") for name in ("before", "twice"))
    found = compare.worse(first, second)
    assert len(found) == 4 and all(name.endswith(f", {swept.EXPERT_MIX}") for name in found)


def test_the_same_measured_again_passes(capsys):
    assert compared("before", "again") == 0
    assert compared("twice", "before") == 0 and "better" in capsys.readouterr().out
    assert compared("twice", "before", limit=["5"]) == 1  # two processes on a quiet machine: 44.3 ms and 41.9
    assert compared("before", "twice", limit=["150"]) == 0


def test_a_rivals_regression_is_none_of_ours(capsys):
    first, second = (compare.read(RECORDED / f"{name}.jsonl") for name in ("before", "twice"))
    for entry in (e for results in (first, second) for e in results["parts"]["lines"]["result"]["figures"]):
        entry["ours"] = False
    assert compare.worse(first, second) == []


def test_a_check_that_fails_now_is_a_regression(tmp_path, capsys):
    text = (RECORDED / "again.jsonl").read_text()
    path = tmp_path / "wrong.jsonl"
    path.write_text(text.replace('"ok": true', '"ok": false', 1))
    assert compare.main([str(RECORDED / "before.jsonl"), str(path), "--fail"]) == 1
    assert "now fails" in capsys.readouterr().out


@pytest.mark.slow
def test_it_is_caught_where_it_is_measured(tmp_path):
    """Twice the work is far from noise, on any machine that is not drowned in other work."""
    first, second = (planted.measured(tmp_path / f"{p}.jsonl", 1.0, planted=p) for p in (False, True))
    assert all(entry["check"]["ok"] for entry in lines.figures(lines.read(second)))
    assert compare.main([str(first), str(second), "--fail"]) == 1
