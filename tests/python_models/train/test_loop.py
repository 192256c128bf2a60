"""The loop: what it repeats, where it goes on after being stopped or killed, and when it stops by itself."""

import json
import multiprocessing
import random
import signal
import time
from dataclasses import replace

import pytest
import torch

from python_models.data import Splits, make_synthetic
from python_models.train import checkpoint, loop, registry
from python_models.train.__main__ import load_data, train
from python_models.train.checkpoint import RunError
from python_models.train.config import ConfigError
from python_models.train.loop import BEST, CHECKPOINT, CURVE, Loop

from .runs import lethal, splits_for


def curve(folder) -> bytes:
    return (folder / CURVE).read_bytes()


def run(config, splits, folder, stop_after=()):
    """A run that is put down after each of these steps and taken up again by a new Loop."""
    folder.mkdir(exist_ok=True)
    for step in stop_after:
        part = Loop(config, splits, folder)
        assert not part.run(lambda part=part, step=step: part.progress.step == step)
        torch.rand(3)  # what happens between does not matter
    whole = Loop(config, splits, folder)
    assert whole.run()
    return whole


def test_the_loss_falls_and_the_curve_is_its_record(small, tmp_path):
    config = small(
        data={"rows": [2000, 500, 500], "binary": "median"},
        optimizer={"lr": 0.01},
        train={"epochs": 5, "batch_size": 100},
    )
    splits, _ = load_data(config)
    whole = run(config, splits, tmp_path)
    rows = whole.curve.read()
    assert rows.shape == (100, 3) and rows[:10, 0].mean() > rows[-10:, 0].mean() + 0.05
    torch.testing.assert_close(rows[:, 0], rows[:, 1:].sum(1))  # equal weights, no penalty
    assert [each["step"] for each in whole.progress.history] == [20, 40, 60, 80, 100]
    assert whole.progress.history[-1]["mean"]["auc"] > 0.6


@pytest.mark.parametrize("name", [*registry.names(), "MMoE with dropout"])
def test_a_run_that_goes_on_is_the_same_run(name, small, tmp_path):
    """Bit by bit: the curve and the weights, stopped within an epoch, at its end, and between two checkpoints."""
    name, _, dropout = name.partition(" ")
    model = {"name": name, "options": {"dropout": 0.3} if dropout else {}}
    config = small(model=model, train={"epochs": 3}, checkpoint={"every": 4}, log={"every": 3})
    splits = splits_for(name)
    ours, theirs = run(config, splits, tmp_path / "whole"), run(config, splits, tmp_path / "cut", (2, 6, 11))
    assert curve(tmp_path / "whole") == curve(tmp_path / "cut") and ours.progress.step == 18
    for key, value in ours.model.state_dict().items():
        assert torch.equal(value, theirs.model.state_dict()[key]), key
    strip = [{**vars(each.progress), "seconds": 0} for each in (ours, theirs)]
    assert strip[0] == strip[1]
    best = [checkpoint.load(tmp_path / part / BEST)["model"] for part in ("whole", "cut")]
    assert all(torch.equal(best[0][key], best[1][key]) for key in best[0])


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "Adagrad", "RMSprop"])
def test_every_optimizer_goes_on(optimizer, small, tmp_path):
    options = {"momentum": 0.9} if optimizer == "SGD" else {}
    config = small(optimizer={"name": optimizer, "lr": 0.01, "options": options})
    splits = splits_for("MMoE")
    run(config, splits, tmp_path / "whole")
    run(config, splits, tmp_path / "cut", (5,))
    assert curve(tmp_path / "whole") == curve(tmp_path / "cut")


def test_seeds(small, tmp_path):
    splits = splits_for("MMoE")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    curves = []
    for i, seed in enumerate((0, 0, 1)):
        run(small(seed=seed), splits, tmp_path / str(i))
        curves.append(curve(tmp_path / str(i)))
        assert torch.equal(state, torch.get_rng_state())
        torch.rand(1)
        state = torch.get_rng_state()
    assert curves[0] == curves[1] != curves[2]


# Where a life ends, and at which arrival there: half of a checkpoint is written; all of it, under no name yet; it has
# its name; half of a row of the losses is written. The first of all has no checkpoint to go on from.
DEATHS = [("torn", 1), ("torn", 3), ("unnamed", 5), ("named", 4), ("curve", 6), ("torn", 4), ("curve", 1)]


@pytest.mark.timeout(120)
def test_a_run_that_is_killed_goes_on_without_loss(small, tmp_path):
    """SIGKILL in the middle of each kind of writing, then at random moments: the curve and report as without."""
    config = small(
        train={"epochs": 15, "batch_size": 8},
        model={"options": {"dropout": 0.2}},
        checkpoint={"every": 7},
        log={"every": 3},
    )
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([lethal.__module__, "python_models.train.pictures", "python_models.viz"])
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = train(replace(config, out=str(tmp_path / "whole")))
    torch.set_num_threads(torch_threads)
    folder, chance = tmp_path / "killed", random.Random(0)
    killed = replace(config, out=str(folder))

    def live(*end) -> multiprocessing.Process:
        process = processes.Process(target=lethal, args=(killed, *end))
        process.start()
        return process

    for end in DEATHS:
        process = live(*end)
        process.join()
        assert process.exitcode == -signal.SIGKILL, end
        if end[0] == "torn":
            left = next(folder.glob("*.pt.tmp"))
            with pytest.raises(RunError, match="not a checkpoint"):
                checkpoint.load(left)
    kills = 0
    for kills in range(20):
        size, process = (folder / CURVE).stat().st_size, live()
        while kills < 3 and process.is_alive():
            # Every process adds something to what those before it had; the rest of its life is chance.
            if (folder / CURVE).stat().st_size > size:
                time.sleep(chance.random() * 0.03)
                process.kill()
            time.sleep(0.0005)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert process.exitcode == 0 and kills
    assert curve(folder) == curve(tmp_path / "whole")
    report = json.loads((folder / "report.json").read_text())
    assert report["metrics"]["test"]["losses"] == expected["metrics"]["test"]["losses"]
    weights = [checkpoint.load(f / "model.pt") for f in (folder, tmp_path / "whole")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not list(folder.glob("*.tmp"))


def test_a_checkpoint_is_whole_or_the_old_one(small, tmp_path, monkeypatch):
    """Killed while it writes: the file under its name is the one before."""
    path = tmp_path / CHECKPOINT
    checkpoint.save(path, {"a": torch.ones(3)})

    def torn(state, file):
        file.write(b"half of")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, {"a": torch.zeros(3)})
    assert torch.equal(checkpoint.load(path)["a"], torch.ones(3))


def test_early_stopping_keeps_the_best(small, tmp_path):
    """A rate that soon makes it worse: it stops `patience` evaluations after the best, whose weights come back."""
    config = small(train={"epochs": 50}, optimizer={"lr": 0.05}, stopping={"patience": 3})
    splits = splits_for("MMoE")
    whole = run(config, splits, tmp_path)
    progress = whole.progress
    losses = [each["loss"] for each in progress.history]
    assert progress.stopped and len(losses) < 50 and progress.best == min(losses)
    assert losses.index(min(losses)) == len(losses) - 4 and progress.best_step == 6 * (len(losses) - 3)
    assert whole.evaluate(splits.validation)["loss"] == losses[-1]
    assert whole.use_best() and whole.evaluate(splits.validation)["loss"] == min(losses)
    again = Loop(config, splits, tmp_path)
    assert again.run() and again.progress.step == progress.step


def test_a_best_of_steps_that_are_not_done_again(small, tmp_path):
    """Killed after the best was written, and taken up with fewer epochs: those weights are of no step of this run."""
    whole = run(small(train={"epochs": 3}), splits_for("MMoE"), tmp_path)
    assert whole.use_best()
    state = checkpoint.load(tmp_path / BEST)
    checkpoint.save(tmp_path / BEST, state | {"step": whole.progress.best_step + 6})
    weights = {name: value.clone() for name, value in whole.model.state_dict().items()}
    assert not whole.use_best()
    assert all(torch.equal(value, weights[name]) for name, value in whole.model.state_dict().items())


def test_the_better_direction(small, tmp_path):
    config = small(train={"epochs": 6}, stopping={"metric": "task_1.auc"})
    whole = run(config, splits_for("MMoE"), tmp_path)
    assert whole.progress.best == max(each["tasks"]["task_1"]["auc"] for each in whole.progress.history)


def test_labels_that_are_missing_do_not_matter(small, tmp_path):
    """With a weight of 0 the label may be anything, and a task without any label in a batch is left alone."""
    made = make_synthetic((96, 48, 48), 6, binary="bernoulli")
    weights = torch.ones(96, 2)
    weights[::2, 1] = 0
    curves = []
    for i, other in enumerate((0.0, 1.0)):
        labels = torch.where(weights == 0, torch.tensor(other), made.train.labels)
        splits = Splits(replace(made.train, labels=labels, weights=weights), made.validation, made.test)
        run(small(), splits, tmp_path / str(i))
        curves.append(curve(tmp_path / str(i)))
    assert curves[0] == curves[1]
    nothing = replace(made.train, weights=torch.tensor([[1.0, 0.0]]).expand(96, 2).contiguous())
    whole = run(small(), Splits(nothing, made.validation, made.test), tmp_path / "nothing")
    assert not whole.curve.read()[:, 2].any() and whole.curve.read()[:, 1].all()


def test_a_loss_that_is_no_number_stops_the_run(small, tmp_path):
    config = small(optimizer={"name": "SGD", "lr": 1e30}, checkpoint={"every": 1}, log={"every": 1})
    whole = Loop(config, splits_for("MMoE"), tmp_path)
    with pytest.raises(RunError, match=r"the loss \((total|task_\d)\) is (nan|inf) at step \d+: lower optimizer.lr"):
        whole.run()
    kept = Loop(config, splits_for("MMoE"), tmp_path)
    assert kept.progress.step == len(kept.curve.read()) < whole.progress.step


def test_what_a_run_goes_on_with_is_what_it_began_with(small, tmp_path):
    config, splits = small(), splits_for("MMoE")
    run(config, splits, tmp_path)
    other = splits.train.select(torch.arange(95, -1, -1))
    with pytest.raises(RunError, match="the rows are others"):
        Loop(config, Splits(other, splits.validation, splits.test), tmp_path)
    with pytest.raises(RunError, match="does not fit this configuration"):
        Loop(replace(config, model=replace(config.model, options={"num_experts": 5})), splits, tmp_path)
    with open(tmp_path / CURVE, "r+b") as file:
        file.truncate(100)
    with pytest.raises(RunError, match="holds 4 steps, the checkpoint 12"):
        Loop(config, splits, tmp_path)
    (tmp_path / CHECKPOINT).write_bytes(b"nonsense")
    with pytest.raises(RunError, match="not a checkpoint"):
        Loop(config, splits, tmp_path)


def test_errors_name_the_key(small, tmp_path):
    splits = splits_for("MMoE")
    none = replace(splits, validation=splits.train.select(torch.arange(0)))
    for over, data, message in (
        ({"stopping": {"metric": "acu"}}, splits, "stopping.metric is 'acu'; did you mean 'auc'"),
        ({"stopping": {"patience": 1}}, none, "stopping.patience needs validation rows"),
        ({"train": {"device": "gpu"}}, splits, "train.device is 'gpu'"),
        ({"optimizer": {"name": "adam"}}, splits, "optimizer.name is 'adam'; did you mean 'Adam'"),
        ({"optimizer": {"options": {"beta": 1}}}, splits, "optimizer.options.beta of Adam; did you mean 'betas'"),
        ({"optimizer": {"options": {"eps": -1}}}, splits, "optimizer.options of Adam"),
        ({"optimizer": {"rates": {"x.*": 2}}}, splits, r"optimizer.rates.x.\* matches no parameter"),
        ({"optimizer": {"rates": {"*": -2}}}, splits, r"optimizer.rates.\* must be a number"),
    ):
        with pytest.raises(ConfigError, match=message):
            Loop(small(**over), data, tmp_path)
    with pytest.raises(ConfigError, match="no training rows"):
        Loop(small(), replace(splits, train=none.validation), tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="torch sees no GPU"):
            Loop(small(train={"device": "cuda"}), splits, tmp_path)


def test_rates_of_their_own(small, tmp_path):
    whole = Loop(small(optimizer={"rates": {"*gates*": 10}}), splits_for("MMoE"), tmp_path)
    rates = {group["lr"]: len(group["params"]) for group in whole.optimizer.param_groups}
    gates = [name for name, _ in whole.model.named_parameters() if "gates" in name]
    assert rates == {0.001: len(list(whole.model.parameters())) - len(gates), 0.01: len(gates)}


def test_autocast_and_no_validation_rows(small, tmp_path):
    splits = splits_for("MMoE")
    splits = replace(splits, validation=splits.train.select(torch.arange(0)))
    whole = run(small(train={"amp": "bfloat16"}), splits, tmp_path)
    assert whole.curve.read().isfinite().all() and not whole.progress.history and not whole.use_best()
    exact = run(small(), splits, tmp_path / "exact")
    assert 0 < (whole.curve.read() - exact.curve.read()).abs().max() < 0.05


def test_one_process_a_run(tmp_path):
    with checkpoint.Lock(tmp_path):
        with pytest.raises(RunError, match="another process is at this run"):
            checkpoint.Lock(tmp_path)
    with checkpoint.Lock(tmp_path):
        pass


def test_only_data_of_ours_is_loaded(tmp_path):
    """A checkpoint is no program: pickled code is refused."""
    torch.save({"a": loop.find_device}, tmp_path / "x.pt")
    with pytest.raises(RunError, match="not a checkpoint"):
        checkpoint.load(tmp_path / "x.pt")


def test_losses_of_ones_choice(small, tmp_path):
    """Each is its formula; a loss of another kind, or of no task, is named."""
    splits = make_synthetic((96, 48, 48), 6)
    whole = Loop(small(data={"binary": ""}, losses={"task_2": "huber"}), splits, tmp_path)
    outputs, labels = 3 * torch.randn(50, 2), torch.randn(50, 2)
    weights = torch.rand(50, 2)
    distance = (outputs - labels).double()
    huber = torch.where(distance.abs() < 1, distance.square() / 2, distance.abs() - 0.5)
    each = torch.stack((distance[:, 0].square(), huber[:, 1]), 1)
    found = torch.stack(whole.objective(outputs, labels)).double()
    torch.testing.assert_close(found, each.mean(0), rtol=1e-6, atol=0)
    found = torch.stack(whole.objective(outputs, labels, weights=weights)).double()
    torch.testing.assert_close(found, (weights * each).sum(0) / weights.double().sum(0), rtol=1e-6, atol=0)
    for losses, message in (
        ({"task_3": "huber"}, "losses.task_3: there is no such task; did you mean"),
        ({"task_1": "binary"}, "losses.task_1 is 'binary', of a regression task; expected one of mse, huber"),
        ({"task_1": {"name": "huber", "dleta": 2}}, "unknown key losses.task_1.dleta; did you mean 'delta'"),
        ({"task_1": {"name": "huber", "delta": 0}}, "losses.task_1.delta must be positive"),
        ({"task_1": "watch_time"}, "losses.task_1 is 'watch_time', whose labels are times; some are below 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            Loop(small(losses=losses), splits, tmp_path)


def test_watch_time(small, tmp_path):
    """A task that predicts a time: its loss is the weighted logistic one, its error that of exp(output)."""
    made = make_synthetic((96, 48, 48), 6)
    times = [replace(p, labels=p.labels.clamp_min(0)) for p in (made.train, made.validation, made.test)]
    losses = {"task_1": "watch_time", "task_2": {"name": "huber", "delta": 0.25}}
    loop = Loop(small(losses=losses), Splits(*times), tmp_path)
    assert loop.run() and loop.objective.delta[1] == 0.25
    found, rows = loop.evaluate(times[2]), times[2]
    out, labels = loop.predict(rows)[:, 0].double(), rows.labels[:, 0].double()
    softplus = torch.nn.functional.softplus
    loss = torch.where(labels > 0, labels * softplus(-out), softplus(out)).mean()
    assert found["losses"][0] == pytest.approx(float(loss), rel=1e-5)
    assert found["tasks"]["task_1"]["mse"] == pytest.approx(float((out.exp() - labels).square().mean()), rel=1e-6)
