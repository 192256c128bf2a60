"""The papers' experiments: what is trained, that it goes on where it was cut off, and what the page makes of lines."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch

pytest.importorskip("pandas")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

import python_models
from bench.reproduce import __main__ as command
from bench.reproduce import claims, page, plan, results
from bench.reproduce.plan import STUDIES, TABLE, TUNING_SEED, Budget, Run
from bench.reproduce.rows import Rows, by_domain, by_task, funnel
from bench.reproduce.summary import Difference, Summary
from bench.reproduce.training import model_config, train
from python_models.train import registry
from tests.python_models.test_census import sample_rows, write


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Small budgets, few networks, and a file in the official format; the arguments of the command."""
    monkeypatch.setattr(plan, "CENSUS", Budget(2, 64, (1e-3, 1e-2), 2))
    monkeypatch.setattr(plan, "SYNTHETIC", Budget(1, 64, (1e-3,), 2))
    kept, runs = ("logistic regression", "SharedBottom", "STAR", "ESMM", "OMoE 0.5", "MMoE 0.5"), plan.runs
    monkeypatch.setattr(plan, "runs", lambda *given: (run for run in runs(*given) if run.name in kept))
    monkeypatch.setattr(command, "Rows", lambda path: Rows(path, (256, 64, 64)))
    data = write(tmp_path / "census-income.test.gz", sample_rows(400))
    return ["--data", str(data), "--only", "table,synthetic,funnel", "--results", str(tmp_path / "found.jsonl")]


def lines_of(path):
    lines = results.read(path)
    return sorted(({k: v for k, v in line.items() if k != "cpu_seconds"} for line in lines), key=lambda x: x["key"])


def test_a_run_that_was_cut_off_goes_on(small, tmp_path, monkeypatch, capsys):
    path, calls = tmp_path / "found.jsonl", []

    def counted(run, rows):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append((run.name, run.seed, run.lr))
        return train(run, rows)

    monkeypatch.setattr(command, "train", counted)
    assert command.main(small) == 130
    assert len(results.read(path)) == 4 and "the same command goes on" in capsys.readouterr().err
    with open(path, "ab") as file:
        file.write(b'{"key": "torn')  # a crash while a line was written
    monkeypatch.setattr(
        command, "train", lambda run, rows: calls.append((run.name, run.seed, run.lr)) or train(run, rows)
    )
    assert command.main(small) == 0
    expected = 1 + 2 * (2 + 2) + 2 * (1 + 2) + 2 * (2 + 2)
    assert len(calls) == len(results.read(path)) == expected
    assert len({line["key"] for line in results.read(path)}) == expected
    assert f"{expected}/{expected}" in capsys.readouterr().err

    written = (tmp_path / "found.md").read_bytes()
    assert command.main(small) == 0
    assert len(calls) == expected and (tmp_path / "found.md").read_bytes() == written
    assert command.main(["--render", "--results", str(path)]) == 0 and (tmp_path / "found.md").read_bytes() == written

    at_once = tmp_path / "at_once.jsonl"
    assert command.main([*small[:-1], str(at_once)]) == 0
    assert lines_of(at_once) == lines_of(path)

    text = written.decode()
    for name in ("SharedBottom", "STAR", "logistic regression", "ESMM"):
        assert f"\n| {name} | 0." in text
    assert "Runs that are missing" in text and "not run" in text
    for picture in ("table", "synthetic"):
        assert f"(reproduce-{picture}.png)" in text and (tmp_path / f"reproduce-{picture}.png").stat().st_size > 5000
    tuned = [line for line in results.read(path) if line["seed"] == TUNING_SEED]
    assert tuned and not any("test" in line for line in tuned)  # the test rows choose nothing


@pytest.mark.parametrize(
    ("change", "said"), [(["--only", "tables"], "no tables"), (["--data", "nowhere.gz"], "nowhere")]
)
def test_bad_arguments(change, said, capsys, tmp_path):
    arguments = ["--data", "nowhere.gz", "--results", str(tmp_path / "x.jsonl"), *change]
    try:
        status = command.main(arguments)
    except SystemExit as end:
        status = end.code
    assert status == 2 and said in capsys.readouterr().err


def test_every_architecture_is_in_a_study():
    used = {setting.network for settings in STUDIES.values() for setting in settings.values()}
    assert used - {plan.LOGISTIC} == set(python_models.__all__) - {"MultiTaskModel", "Towers"}


def test_every_run_is_one_and_a_setting_is_tuned_before_it_is_used():
    seen, tuned = set(), {}
    for run in plan.runs(list(STUDIES)):
        key = json.dumps([asdict(run.setting), run.seed, run.lr], sort_keys=True)
        assert key not in seen
        seen.add(key)
        name = json.dumps(asdict(run.setting), sort_keys=True)
        if run.seed == TUNING_SEED:
            tuned.setdefault(name, set()).add(run.lr)
        elif run.setting.network != plan.LOGISTIC:
            assert tuned[name] == set(run.setting.budget.rates)


def test_a_key_tells_every_part_of_a_run_apart(monkeypatch):
    run = Run("table", "MMoE", TABLE["MMoE"], 0, 1e-3)
    others = [replace(run, seed=1), replace(run, lr=2e-3), replace(run, setting=TABLE["PLE"])]
    keys = {each.key("data") for each in (run, *others)} | {run.key("other data")}
    monkeypatch.setattr(plan, "CENSUS", replace(plan.CENSUS, epochs=9))
    assert len(keys | {run.key("data")}) == 6
    assert replace(run, study="experts", name="6").key("data") == run.key("data")  # a study is no part of it


def test_the_models_are_of_the_papers_sizes(tmp_path):
    data = Rows(write(tmp_path / "x", sample_rows(60))).splits("census", 0).train
    inputs, size = None, {}
    for name in ("SharedBottom", "MMoE", "AdaTT-sp", "AdaTT", "PLE"):
        model = registry.build(model_config(TABLE[name], len(data)), data)
        inputs = model.features.out_features
        size[name] = sum(p.numel() for p in model.network.parameters())
    towers = 3 * (64 * 32 + 32 + 32 + 1)
    experts = 6 * ((inputs + 1) * 128 + 129 * 64)
    assert size["SharedBottom"] == experts // 6 + towers
    assert size["MMoE"] == experts + 3 * 6 * (inputs + 1) + towers
    assert size["AdaTT-sp"] == experts + 3 * 6 * (inputs + 1 + 129) + 2 * 6 + towers


def test_rows_by_domain_and_of_a_funnel(tmp_path):
    rows = Rows(write(tmp_path / "x", sample_rows(60)))
    census, apart = rows.splits("census", 0).test, rows.splits("census by domain", 0).test
    assert torch.equal(by_task(apart.labels, 3), census.labels)
    assert torch.equal(by_task(apart.domain[:, None], 3), torch.arange(3).expand(len(census), 3))
    assert torch.equal(apart.numeric, census.numeric.repeat(3, 1))
    labels = funnel(census).labels
    assert torch.equal(labels[:, 0], census.labels[:, 2]) and (labels[:, 1] <= labels[:, 0]).all()
    assert torch.equal(by_domain(census).labels[: len(census), 0], census.labels[:, 0])
    assert rows.fingerprint("funnel") == rows.fingerprint("census") != Rows(None).fingerprint("synthetic 0.5")


def test_a_run_whose_loss_is_no_number_is_a_result(small, tmp_path):
    found = train(
        Run("table", "SharedBottom", TABLE["SharedBottom"], 0, 1e30), Rows(tmp_path / "census-income.test.gz")
    )
    assert "the loss" in found["failed"] and "test" not in found


def line(setting, seed, lr=2e-3, **more):
    budget = setting.budget
    parts = {"key": f"{seed}{lr}", "study": "table", "name": "x", "setting": json.loads(json.dumps(asdict(setting)))}
    parts |= {"seed": seed, "lr": lr, "epochs": budget.epochs, "batch": budget.batch, "data": "d", "cpu_seconds": 1.0}
    return parts | {"torch": "2", "cpu": "c", "threads": 1, "parameters": 5} | more


def scored(setting, values, rates=(2e-3, 5e-3)):
    tuning = [line(setting, TUNING_SEED, lr, validation_loss=[1 + lr]) for lr in rates]
    tests = [
        {"test": {task: {"auc": v, "ne": 0.5} for task in ("income", "never_married", "education")}} for v in values
    ]
    return [*tuning, *(line(setting, seed, **test) for seed, test in enumerate(tests))]


def test_the_rate_is_the_one_of_the_least_validation_loss():
    setting = TABLE["PLE"]
    slow = line(setting, TUNING_SEED, 2e-3, validation_loss=[0.9, 0.5, 0.7])
    assert results.rate([slow], setting, "d") is None
    fast = line(setting, TUNING_SEED, 5e-3, validation_loss=[0.6, 0.55, 0.4])
    assert results.rate([slow, fast], setting, "d") == 5e-3
    assert results.rate([slow, line(setting, TUNING_SEED, 5e-3, failed="nan")], setting, "d") == 2e-3
    assert (
        results.rate([slow, fast], setting, "other") is None and results.rate([slow, fast], TABLE["MMoE"], "d") is None
    )


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    results.append(path, {"a": 1})
    path.write_bytes(path.read_bytes() + b"{no\n" + b'{"b": 2}\n')
    with pytest.raises(results.ResultsError, match=r"x.jsonl, line 2: is no JSON"):
        results.read(path)
    assert results.read(tmp_path / "missing") == []


@pytest.mark.parametrize(
    ("difference", "expected"),
    [
        (Difference(1.0, 0.2, 5), claims.CLEAR),
        (Difference(-1.0, 0.2, 5), claims.AGAINST),
        (Difference(1.0, 0.4, 5), claims.NOISE),  # 2.776 * 0.4 is more than 1
        (Difference(1.0, math.inf, 1), claims.NOISE),
        (None, claims.MISSING),
    ],
)
def test_verdicts(difference, expected):
    assert claims.verdict(difference) == expected


def test_the_page_is_what_the_lines_say(tmp_path):
    known = {
        "SharedBottom": [0.90, 0.92, 0.91],
        "MMoE": [0.91, 0.93, 0.92],
        "AdaTT-sp": [0.95, 0.97, 0.96],
        "PLE": [0.98, 0.99, 0.985],
    }
    lines = [each for name, values in known.items() for each in scored(TABLE[name], values)]
    lines += [line(TABLE["PLE"], 3, 5e-3, test={"income": {"auc": 0.0}})]  # of a rate that was not chosen
    lines += [line(TABLE["CGC"], 0, failed="the loss is nan")]
    summary = Summary(lines)
    assert summary.lr(TABLE["PLE"]) == 2e-3 and summary.column(TABLE["PLE"]) == pytest.approx([0.98, 0.99, 0.985])
    page.write(summary, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    rows = [row for row in text.splitlines() if row.startswith("| ")]
    table = [row.split(" | ")[0][2:] for row in rows if row.endswith("| 0.5000 | 0.002 | 5 |")]
    assert table == ["PLE", "AdaTT-sp", "MMoE", "SharedBottom"]
    mmoe = next(row for row in rows if row.startswith("| MMoE | 0.9200 ± 0.0100"))
    assert "| +100.0 ± 0.0 |" in mmoe
    assert "* The other way round: AdaTT-sp above PLE." in text
    assert "AdaTT-sp above SharedBottom" in text.split("* As in the paper:")[1].split("\n\n")[0]
    assert "**A run failed.** x, seed 0" in text and "1 come\nout the other way" in text.replace(
        " come out", " come\nout"
    )
    assert all(len(row) <= 120 for row in text.splitlines() if not row.startswith(("|", "**A run")))


def test_claims_of_errors_are_of_their_logarithm():
    claim = next(c for c in claims.CLAIMS if (c.study, c.better, c.worse) == ("bent", "MMoE 0.5", "OMoE 0.5"))
    assert claim.ordering == "MMoE below OMoE at 0.5, weights 1.0"
    lines = []
    for name, errors in (("MMoE 0.5", [0.01, 0.03]), ("OMoE 0.5", [0.02, 0.09])):
        setting = STUDIES["bent"][name]
        lines += [line(setting, TUNING_SEED, lr, validation_loss=[lr]) for lr in setting.budget.rates]
        lines += [
            line(setting, s, 1e-3, test={"task_1": {"mse": 0.0}, "task_2": {"mse": 2 * e}})
            for s, e in enumerate(errors)
        ]
    found = claim.difference(Summary(lines))
    assert found.mean == pytest.approx((math.log(2) + math.log(3)) / 2)
    assert found.error == pytest.approx((math.log(3) - math.log(2)) / 2)
    assert {c.study for c in claims.CLAIMS} == {*STUDIES} - {"funnel"}
    for each in claims.CLAIMS:
        assert each.difference(Summary([])) is None and " None" not in each.ordering


def test_tasks_of_longer_weights():
    rows = Rows(None, (4000, 10, 10))
    straight, bent = (rows.splits(kind, 0).train.labels for kind in ("synthetic 0.5", "synthetic 0.5 1.0"))
    assert bent.std() > 1.5 * straight.std()
    assert rows.fingerprint("synthetic 0.5") == "drawn (4000, 10, 10)"


def test_the_page_that_is_kept_is_that_of_the_lines_that_are_kept(tmp_path):
    page.write(Summary(results.read(command.RESULTS)), tmp_path / "reproduce.md")
    assert (tmp_path / "reproduce.md").read_text() == command.PAGE.read_text()
