"""The commands that train, measure and draw, with a few numbers: what they leave, and what a fault gives."""

import functools
import json
import sys

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from bench import balancing, demo, operators, parts, report, step
from bench.contest import OURS, Task

TINY = {"tasks": 2, "batch": 32, "in_features": 16, "dims": (16, 8)}


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs a main with words; gives what it wrote to --out and its exit status."""

    def run(main, *words: str, out: str = "out.json"):
        monkeypatch.setattr(sys, "argv", ["bench", *words, "--out", str(tmp_path / out)])
        status = main()
        path = tmp_path / out
        return json.loads(path.read_text()) if path.is_file() else path, status

    return run


def test_step(command):
    found, _ = command(step.main, "--small")
    (record,) = found["step"]
    assert [row["variant"] for row in record["rows"]] == [OURS, "unbind", "batched"]
    assert all(row["check"]["ok"] and row["ms"]["median"] > 0 for row in record["rows"])
    record["rows"][1]["check"]["ok"] = False
    assert "unbind is not the same network" in report.step_table(record).caption


def test_parts(monkeypatch):
    monkeypatch.setattr(parts, "MIX_SHAPES", ((2, 4),))
    rows = parts.measure_mix(batch=8, width=4, seconds=0.0)
    assert [(row["mix"], row["what"], row["check"]) for row in rows] == [
        (mix, what, True) for mix in ("gated_mix", "adatt_mix") for what in ("forward", "fwd + bwd")
    ]
    rows[0]["ratio"] = None
    assert "check FAILED" in list(report.mix_table(rows).columns[-1].cells)[0]
    monkeypatch.setattr(parts, "per_call", functools.partial(parts.per_call, calls=2, blocks=1))
    rows = parts.measure_overhead(seconds=0.0)
    assert all(0 < row["us"] and 0 < row["us_with_gradient"] for row in rows)
    assert report.overhead_table(rows).row_count == len(rows) == 6


def test_parts_see_a_wrong_mix(monkeypatch):
    right = parts.mixes("gated_mix", 2, 4)
    wrong = right | {OURS: lambda leaves: right[OURS](leaves) * 1.01}
    leaves, grad = parts.mix_operands(8, 2, 4, 4, parts.torch.float32, "cpu", False)
    agree = [parts._agrees(call, right[parts.PLAIN], leaves, grad) for call in (right[OURS], wrong[OURS])]
    assert agree == [True, False]


def test_balancing(command, monkeypatch):
    found, _ = command(balancing.main, "--seconds", "0", "--tasks", "2", "--batch", "16")
    assert len(found["results"]) == 9 and all(row["check"] for row in found["results"])
    made = balancing.Step(2, 16)
    assert not balancing.check(made, "half", lambda: [p.grad.mul_(0.5) for p in made.model.parameters()])


def test_operators(command, monkeypatch):
    found, status = command(operators.main, "--small", "--only", "masked_bce", "--no-sweep")
    assert status == 0 and found["rows"] and not found["failed"] and not found["refused"]

    def fails(*_, **__):
        raise RuntimeError("for a test")

    monkeypatch.setattr(operators, "measure", fails)
    found, status = command(operators.main, "--small", "--only", "masked_bce", "--no-sweep")
    assert status == 1 and found["failed"][0]["reason"] == "for a test"


def test_demo(command, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "SYNTHETIC_ROWS", (200, 20, 100))
    monkeypatch.setattr(demo, "Task", functools.partial(Task, experts_per_task=2, **TINY))
    monkeypatch.setattr(demo, "STEP_VARIANTS", (OURS, "unbind"))
    brief = functools.partial(demo.measure_step, memory=False)
    monkeypatch.setattr(demo, "measure_step", lambda task, **k: brief(task, **k | {"seconds": 0.0, "min_rounds": 2}))
    folder, status = command(demo.main, "--epochs", "1", out="demo")
    found = json.loads((folder / "demo.json").read_text())
    assert status == 0 and set(found["networks"]) == set(demo.NETWORKS) and len(found["step"]) == 2
    assert all(0 < task["auc"] < 1 for net in found["networks"].values() for task in net["test"].values())
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    _, status = command(demo.main, "--data", str(tmp_path / "nowhere"), out="demo")
    assert status == 2 and "nowhere" in capsys.readouterr().err
