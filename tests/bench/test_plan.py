"""plan: a step on paper is the step that runs, and slices of it fit and give the same gradients."""

import json

import pytest

pytest.importorskip("typer")

import torch  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from bench import cli, planned, watch  # noqa: E402
from bench.target import load  # noqa: E402

RATES = 100.0, 10.0


def options(name, **more):
    return {"name": name, "dtype": "float32", "device": "cpu"} | more


def call(*words):
    return CliRunner().invoke(cli.app, ["plan", *map(str, words)])


@pytest.mark.parametrize(
    "about",
    [
        options("MMoE", small=True),
        options("PLE", small=True),  # its constructor looks at numbers
        options("MMoE", small=True, plain=True),
        options("MMoE", small=True, dtype="float64"),
        options("tests/bench/own.py:MMoE", inputs=["33,12"], arguments={"experts": 4}),
        options("tests/bench/own.py:embedded", inputs=["33,4:50"]),
    ],
)
def test_paper_is_what_runs(about):
    found = planned.plan(about, *RATES)
    target = load(**about)
    target.step()
    target.release()
    step = watch.watch(target.network, target.step, before=(*target.inputs, *target.above))
    assert sum(found.flops) == sum(op.flops for op in step.ops) > 0
    assert sum(found.bytes) == sum(op.bytes for op in step.ops)
    assert (found.peak, found.kept) == (step.peak(), step.kept())
    assert sum(found.seconds) == pytest.approx(sum(op.floor(*RATES) for op in step.ops))
    there = (*target.network.parameters(), *target.network.buffers())
    assert found.parameters == sum(t.numel() * t.element_size() for t in there)
    assert found.rows == target.rows


def test_what_does_not_fit_takes_no_memory():
    found = planned.plan(options("MMoE", sizes={"B": 1 << 20, "E": 4096, "K": 64, "N": 64, "D": 64}), *RATES)
    assert found.kept > 2**40 and found.total > found.peak > found.kept  # more than a TiB
    assert torch.get_default_dtype() == torch.float32


def test_slices_fit_and_are_the_most_that_do():
    about = options("MMoE", sizes={"B": 1000, "E": 16, "K": 8, "N": 8, "D": 4})
    whole = planned.plan(about, *RATES)
    room = whole.total // 3
    part = planned.slice_rows(about, whole, room, *RATES)
    assert part.rows in (500, 250, 125) and part.parameters + 2 * whole.inputs + part.peak <= room
    double = planned.plan(about, *RATES, rows=2 * part.rows)
    assert double.parameters + 2 * whole.inputs + double.peak > room
    assert planned.slice_rows(about, whole, whole.parameters, *RATES) is None


def test_a_step_in_slices_is_the_step():
    about = options("MMoE", small=True, dtype="float64")
    target = load(**about)
    found = []
    for rows in (target.rows, 7):
        planned.step_of(target, rows)()
        found.append([target.inputs[0].grad, *(p.grad for p in target.network.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-13)


def test_the_command_measures_too(ceilings):
    done = call("MMoE", "--small", "--ceilings", ceilings)
    assert done.exit_code == 0, done.output
    for text in (
        "operations, GFLOP",
        "kept for backward, MiB",
        "fits in",
        "measured peak",
        "of what the machine can do",
    ):
        assert text in done.output


def test_the_command_runs_in_slices(ceilings, monkeypatch):
    monkeypatch.setattr(planned, "peak_memory", lambda target, words, **_: float(words["rows"]))  # no other process
    about = ["MMoE", "--sizes", "B=4096,E=16,K=8,N=8,D=8,T=2", "--ceilings", ceilings, "--seconds", 0.0]
    whole = planned.plan(options("MMoE", sizes={"B": 4096, "E": 16, "K": 8, "N": 8, "D": 8, "T": 2}), *RATES)
    done = call(*about, "--memory", whole.total / 3 / 2**30)
    assert done.exit_code == 0, done.output
    assert "DOES NOT FIT" in done.output and "one of 4 slices, 1024 rows" in done.output
    assert "backward_in_slices(loss, ..., rows=1024)" in done.output and "measured peak 1024 MiB" in done.output
    done = call(*about, "--memory", whole.parameters / 2**30)
    assert done.exit_code == 1 and "not even one row fits" in done.output


def test_another_machine_is_planned_and_not_measured(ceilings):
    found = json.loads(ceilings.read_text())
    found["machine"] |= {"cpu": "another", "threads": 64}
    found["ceilings"][0]["threads"] = 64
    ceilings.write_text(json.dumps(found))
    done = call("MMoE", "--small", "--ceilings", ceilings)
    assert done.exit_code == 0 and "not measured: these are the ceilings of another, 64 threads" in done.output


def test_bad_words(ceilings, tmp_path):
    done = call("STAR", "--plain", "--small", "--ceilings", ceilings)
    assert done.exit_code == 2 and "looks at numbers while it runs" in done.output
    done = call("MMoE", "--ceilings", tmp_path / "none.json")
    assert done.exit_code == 2 and "holds no ceilings" in " ".join(done.output.split())
    done = call("MMoE", "--dtype", "float16", "--ceilings", tmp_path / "none.json")
    assert done.exit_code == 2
