"""The command: from a file to a report, with Ctrl-C in between, and errors without a traceback."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from python_models.train.__main__ import main
from python_models.train.loop import CHECKPOINT, CURVE

typer_testing = pytest.importorskip("typer.testing")
ROOT = Path(__file__).resolve().parents[3]

CONFIG = """
out = "{out}"
[data]
rows = [192, 48, 48]
in_features = 6
[model]
name = "SharedBottom"
[train]
epochs = 3
batch_size = 16
device = "cpu"
"""


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(CONFIG.format(out=tmp_path / "run"))
    return path


def command(*words):
    import typer

    app = typer.Typer()
    app.command()(main)
    return typer_testing.CliRunner().invoke(app, [str(word) for word in words])


def test_a_run_and_what_it_leaves(config, tmp_path):
    done = command(config, "--set", "train.epochs=2", "--set", "model.options.dims=[8]")
    assert done.exit_code == 0, done.output
    assert "validation loss" in done.output and "test  task_2  mse" in done.output and "report.html" in done.output
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["steps"] == 24 and report["sizes"] == {"dims": [8]}
    names = {path.name for path in (tmp_path / "run").iterdir()}
    written = {"best.pt", "checkpoint.pt", "config.json", "losses.f64", "model.pt", "report.html", "report.json"}
    assert written <= names and not any(name.endswith(".tmp") for name in names)


def test_a_folder_that_holds_a_run(config, tmp_path):
    assert command(config).exit_code == 0
    whole = (tmp_path / "run" / CURVE).read_bytes()
    again = command(config)
    assert again.exit_code == 2 and "--resume goes on with it, --overwrite begins anew" in again.output
    other = command(config, "--resume", "--set", "seed=1", "--set", "train.batch_size=8")
    assert other.exit_code == 2 and "seed was 0, is 1; train.batch_size was 16, is 8" in other.output
    more = command(config, "--resume", "--set", "train.epochs=4")
    longer = (tmp_path / "run" / CURVE).read_bytes()
    assert more.exit_code == 0 and longer.startswith(whole) and len(longer) * 3 == len(whole) * 4
    assert command(config, "--overwrite").exit_code == 0
    assert (tmp_path / "run" / CURVE).read_bytes() == whole
    typo = command(config, "--overwrite", "--set", "model.options.dims=[-8]")
    assert typo.exit_code == 2 and (tmp_path / "run" / CURVE).read_bytes() == whole, "a slip costs no run"
    assert command(config, "--resume").exit_code == 0
    both = command(config, "--overwrite", "--resume")
    assert both.exit_code == 2 and "exclude each other" in both.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "train.epoch=2"], "unknown key train.epoch; did you mean 'epochs'?"),
        (["--set", "model.name=SharedBotom"], "did you mean 'SharedBottom'"),
        (["--set", "data.in_features=1"], "data: in_features: got 1, expected at least the correlation's rank, 2"),
        (["--set", "data.correlation=2"], "data: correlation: got"),
        (["--set", "out=/dev/null/run"], "error: [Errno 20] Not a directory: '/dev/null/run'"),
        (["--set", "data={source='census', path='nowhere'}"], "data: nowhere: no such file; the UCI repository"),
        (["--set", "data={source='table', schema='nowhere.toml'}"], "data: nowhere.toml: No such file"),
        (["--set", "balancing.name=PCGrat"], "balancing.name is 'PCGrat'; "),
    ],
)
def test_errors_are_one_line(config, words, message):
    done = command(config, *words)
    assert done.exit_code == 2 and message in done.output and "Traceback" not in done.output
    assert len(done.output.strip().splitlines()) == 1


def test_lists_and_the_example(tmp_path):
    shown = command("--list").output
    assert "  AdaTT: task_experts = 2, shared_experts = 1" in shown and "FixedWeights" in shown
    (tmp_path / "example.toml").write_text(command("--example").output)
    small = ["--set", f"out={tmp_path / 'out'}", "--set", "data.rows=[64, 16, 16]", "--set", "train.device=cpu"]
    assert command(tmp_path / "example.toml", *small).exit_code == 0
    other = ("--set", "model.name=PLE", "--set", "balancing.name=PCGrad", "--overwrite")  # as the README has it
    assert command(tmp_path / "example.toml", *small, *other).exit_code == 0
    nothing = command()
    assert nothing.exit_code == 2 and "--example" in nothing.output


def start(config, *words):
    line = [sys.executable, "-m", "python_models.train", str(config), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(line, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.timeout(120)
def test_ctrl_c_saves_and_says_how_to_go_on(config, tmp_path):
    """And the whole is bit for bit the run without the interruption."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    many = ["--set", "train.epochs=400", "--set", "checkpoint.every=1000000", "--set", "log.every=1"]
    process = start(config, *many)
    folder = tmp_path / "run"
    until = time.monotonic() + 60
    while time.monotonic() < until and not ((folder / CURVE).exists() and (folder / CURVE).stat().st_size > 2000):
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted; everything is saved" in errors and "Traceback" not in errors
    steps = torch.load(folder / CHECKPOINT, weights_only=True)["progress"]["step"]
    assert 0 < steps < 4800 and (folder / CURVE).stat().st_size == 24 * steps
    said = shlex.split(errors.strip().splitlines()[-1])
    assert said[:3] == ["python", "-m", "python_models.train"] and said[-1] == "--resume"
    # What it says is done, to a nearer end.
    epochs = steps // 12 + 2
    assert command(*said[3:], "--set", f"train.epochs={epochs}").exit_code == 0
    straight = command(config, *many, "--set", f"train.epochs={epochs}", "--set", f"out={tmp_path / 'straight'}")
    torch.set_num_threads(threads)
    assert straight.exit_code == 0
    assert (folder / CURVE).read_bytes() == (tmp_path / "straight" / CURVE).read_bytes()


def test_tensorboard(config, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert command(config, "--set", "log.tensorboard=true", "--set", "log.every=6").exit_code == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"loss/total", "loss/task_1", "validation/loss", "validation/mse/task_2"} <= tags
    assert [event.step for event in events.Scalars("loss/total")] == [6, 12, 18, 24, 30, 36]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    without = command(config, "--overwrite", "--set", "log.tensorboard=true")
    assert without.exit_code == 2 and "pip install tensorboard" in without.output


def test_the_bar(config, monkeypatch):
    pytest.importorskip("rich")
    from python_models.train import config as configs
    from python_models.train.__main__ import train

    found = train(configs.load(config), overwrite=True, bar=True)
    assert found["steps"] == 36
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    assert train(configs.load(config), overwrite=True, bar=True)["steps"] == 36


def test_census(config):
    """The real rows, where they are."""
    path = ROOT / "../shared/data/census-income.test.gz"
    if not path.exists():
        pytest.skip("needs census-income.test")
    words = [f"data={{source='census', path='{path}'}}", "train.epochs=0"]
    done = command(config, *(word for each in words for word in ("--set", each)))
    assert done.exit_code == 0 and "test  never_married  auc" in done.output, done.output
