"""The commands: what they measure, print and leave; how they stop and go on."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("typer")

import torch  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from bench import cli, lines, operators, run, sweep, swept  # noqa: E402
from bench.__main__ import programs  # noqa: E402
from bench.contest import AUTOTUNED, BACKWARD, BOTH, COMPILED, FORWARD  # noqa: E402
from bench.libraries import LIBRARIES, missing  # noqa: E402


def call(*words):
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def test_every_program_is_a_command():
    printed = call("--help").output
    assert all(f"\n  {name} " in printed for name in ("run", "sweep", "profile", "plan", "pictures", *programs()))
    assert set(programs()) >= {
        "step",
        "operators",
        "architectures",
        "compare",
        "tune",
        "calibrate",
        "demo",
        "gpu_check",
    }


def test_other_programs_get_their_own_words():
    done = subprocess.run(
        [sys.executable, "-m", "bench", "compare", "--help"], capture_output=True, text=True, check=True
    )
    assert "usage: python -m bench.compare" in done.stdout and "--fail" in done.stdout


def test_a_sweep_prints_slopes_and_goes_on(tmp_path, monkeypatch):
    words = ["sweep", "--experts", "2:4", "--small", "--no-memory", "--out", tmp_path / "s.jsonl"]
    done = call(*words)
    assert done.exit_code == 0, done.output
    head, *found = lines.read(tmp_path / "s.jsonl")
    assert head["program"] == "sweep" and head["ceilings"]
    wanted = {(at, what, variant) for at in (2, 4) for what in (FORWARD, BOTH) for variant in swept.VARIANTS}
    assert {(e["at"], e["what"], e["variant"]) for e in found} == wanted
    assert all(e["check"]["ok"] and e["axis"] == "experts" for e in found)
    for text in ("slopes in log-log", "a module an expert", "experts = 2, float32, forward"):
        assert text in done.output
    monkeypatch.setattr(sweep, "measure", lambda *_, **__: pytest.fail("measured again"))
    done = call(*words)
    assert done.exit_code == 0 and "has 4 of 4 already" in done.output


def test_ctrl_c_keeps_what_was_measured(tmp_path, monkeypatch):
    measure, calls = sweep.measure, []

    def interrupted(*words, **options):
        calls.append(words)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*words, **options)

    monkeypatch.setattr(sweep, "measure", interrupted)
    words = ["sweep", "--experts", "2:4", "--small", "--no-memory", "--out", tmp_path / "s.jsonl"]
    done = call(*words)
    assert done.exit_code == 130 and "the same command goes on" in done.output
    assert len(lines.figures(lines.read(tmp_path / "s.jsonl"))) == 3
    done = call(*words)
    assert done.exit_code == 0 and "has 1 of 4 already" in done.output
    assert len(lines.figures(lines.read(tmp_path / "s.jsonl"))) == 12 and len(calls) == 5


def test_run_measures_operators_and_networks(tmp_path):
    path = tmp_path / "r.jsonl"
    words = ["--small", "--operators", "mix/gated,hard_concrete_l0", "--networks", "MMoE", "--backends", "reference"]
    done = call("run", *words, "--what", "forward,backward,step", "--out", path)
    assert done.exit_code == 0, done.output
    records = lines.read(path)
    found = lines.figures(records)
    assert {(e["subject"], e["what"]) for e in found} == {
        (subject, what) for subject in ("mix/gated", "hard_concrete_l0", "MMoE") for what in (FORWARD, BACKWARD, BOTH)
    }
    by_variant = {e["variant"]: e for e in found if e["subject"] == "mix/gated" and e["what"] == BOTH}
    assert set(by_variant) == {"ours", operators.FORMULA, "softmax + bmm", "reference"}
    assert by_variant["reference"]["ours"] and by_variant["reference"]["ratio"] > 0
    networks = [e for e in found if e["subject"] == "MMoE"]
    libraries = {name for name in LIBRARIES if missing(name) is None}
    assert {e["variant"] for e in networks} == {"ours", "plain", "batched"} | libraries
    assert all(e["check"]["ok"] for e in found)
    ours = next(e for e in networks if e["what"] == FORWARD and e["variant"] == "ours")
    shape = ours["shape"]
    rows, inputs, experts = shape["B"], shape["K"], shape["E"]
    products = experts * (inputs * shape["N"] + shape["N"] * shape["D"]) + shape["T"] * experts * inputs
    products += shape["T"] * experts * shape["D"]
    assert 2 * rows * products <= ours["flops"] < 2.2 * rows * products
    said = {e["variant"] for e in records if e["kind"] == lines.REMARK}
    assert said == set(LIBRARIES) - libraries and all(name in done.output for name in said)


def test_what_is_wrong_makes_the_command_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(swept, "expert_mix", lambda x, w, b, g: swept.batched(x, w, b, g) * 1.01)
    done = call("sweep", "--experts", "2:4", "--small", "--no-memory", "--out", tmp_path / "s.jsonl")
    assert done.exit_code == 1 and "WRONG" in done.output


@pytest.mark.parametrize(
    "words, said",
    [
        (["run", "--operators", "nonsense"], "nonsense"),
        (["run", "--networks", "MMoE,nonsense"], "nonsense"),
        (["run", "--rivals", "nonsense"], "nonsense"),
        (["run", "--what", "sideways"], "sideways"),
        (["run", "--dtype", "int8"], "int8"),
        (["sweep", "--experts", "8:4"], "8:4"),
        (["sweep", "--what", BACKWARD], "backward"),
    ],
)
def test_bad_words_are_named(tmp_path, words, said):
    done = call(*words, "--out", tmp_path / "a.jsonl")
    assert done.exit_code == 2 and said in done.output and not (tmp_path / "a.jsonl").exists()


def test_another_machines_file_is_refused(tmp_path):
    path = tmp_path / "s.jsonl"
    call("sweep", "--experts", "2:4", "--small", "--no-memory", "--what", FORWARD, "--out", path)
    head, *rest = path.read_text().splitlines()
    head = json.loads(head)
    head["machine"]["cpu"] = "another"
    path.write_text("\n".join([json.dumps(head), *rest]) + "\n")
    done = call("sweep", "--experts", "2:4", "--small", "--out", path)
    assert done.exit_code == 2 and "another" in done.output


def test_names_take_their_kin():
    there = ["mix/gated", "mix/adatt", "expert_mix"]
    assert run.chosen("mix", there, "w") == there[:2] and run.chosen("mix/adatt,expert_mix", there, "w") == there[1:]
    assert run.chosen("all", there, "w") == there and run.chosen("none", there, "w") == []
    assert cli._some(f"{AUTOTUNED},plain", run.RIVALS, "w") == ("plain", COMPILED, AUTOTUNED)[::2]


def test_compiled_rivals_of_an_operator_stand_beside(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda network, **options: seen.append(options["options"]) or network)
    monkeypatch.setattr(operators, "watched", lambda call: ("native", None))
    options = {"dtypes": ("float32",), "whats": (BOTH,), "small": True, "device": "cpu", "backends": ()}
    options |= {"seconds": 0.0, "min_rounds": 1}
    (job,) = run.operator_jobs(["mix/gated"], "default", (COMPILED, AUTOTUNED), **options)
    assert {e["variant"] for e in job.measure()} == set(job.variants) > {COMPILED, AUTOTUNED}
    assert [entry.get("max_autotune", False) for entry in seen] == [False, True]
