"""What a GPU has to show: here only that every line can be measured, and that a wrong result counts for nothing."""

import dataclasses
import json
import sys

import pytest
import torch

from bench import calibrate, promises
from bench.subjects import find


@pytest.fixture(scope="module")
def here():
    ceilings = calibrate.ceilings((torch.float32,), seconds=0.0, sizes=calibrate.SMALL_SIZES)
    return promises.Setting("cpu", True, 0.0, ceilings)


@pytest.mark.parametrize("name", ["mix", "products", "fused", "served", "tuned"])
def test_every_line_can_be_measured(name, here):
    lines = list(promises.PROMISES[name](here))
    assert lines and all(line.found > 0 for line in lines)
    json.dumps([dataclasses.asdict(line) for line in lines])


def test_a_line_holds_or_not_or_was_not_found():
    line = promises.Line("x", 1.3, 1.3, {})
    assert line.holds and not dataclasses.replace(line, found=1.2).holds
    assert dataclasses.replace(line, most=True, found=1.2).holds
    assert dataclasses.replace(line, found=None).holds is None


def test_a_wrong_result_counts_for_nothing(here, monkeypatch, tmp_path):
    true = find("mix/gated")
    wrong = dataclasses.replace(true, call=lambda o: 1.1 * true.call(o))
    monkeypatch.setattr(promises.operators, "truth", lambda *args: TRUTH(true, *args[1:]))
    monkeypatch.setattr(promises, "find", lambda name: wrong)
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["promises", "--device", "cpu", "--small", "--only", "mix", "--out", str(out)])
    assert promises.main() == 1
    assert {line["holds"] for line in json.loads(out.read_text())["lines"]} == {None}


TRUTH = promises.operators.truth
