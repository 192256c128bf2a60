"""The training loop: it learns, it repeats itself exactly, and it leaves the caller's random state alone."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from python_models import AdaTT, MMoE, MultiTaskModel, Towers
from python_models.data import TableFeatures, TableModel, TaskData, make_synthetic
from python_models.train import binary_loss, evaluate, fit, predict

ROWS, FIELDS, TASKS = 600, 3, 2


def table(rows: int = ROWS, seed: int = 0) -> TaskData:
    """Labels that depend on the categories and on one number."""
    generator = torch.Generator().manual_seed(seed)
    numeric = torch.randn(rows, 2, generator=generator)
    categorical = torch.randint(0, 5, (rows, FIELDS), generator=generator)
    score = numeric[:, :1] + (categorical[:, :1] - 2) * torch.tensor([[1.0, -1.0]])
    labels = (score + 0.3 * torch.randn(rows, TASKS, generator=generator) > 0).float()
    return TaskData(numeric, categorical, labels, (5,) * FIELDS, ("a", "b"))


def network(data: TaskData, seed: int = 0, dropout: float = 0.0) -> TableModel:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        features = TableFeatures.of(data, 4)
        layers = nn.Sequential(
            nn.Linear(features.out_features, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, len(data.task_names))
        )
        return TableModel(features, layers)


def test_loss_falls_and_the_model_tells_classes_apart():
    data, held_out = table(), table(seed=1)
    model = network(data)
    losses = fit(model, data, epochs=20, batch_size=100, lr=1e-2)
    assert losses.shape == (120,) and losses[:6].mean() > 2 * losses[-6:].mean()
    for metrics in evaluate(model, held_out).values():
        assert metrics["auc"] > 0.9 and metrics["ne"] < 0.6 and metrics["log_loss"] < 0.45


def test_synthetic_tasks_are_learned():
    splits = make_synthetic((2000, 500, 500), 20, binary="median", seed=1)
    model = network(splits.train)
    fit(model, splits.train, epochs=8, batch_size=128, lr=1e-2)
    assert all(metrics["auc"] > 0.75 for metrics in evaluate(model, splits.test).values())


@pytest.mark.parametrize("name", ["AdaTT", "MMoE"])
def test_features_fusion_and_towers_are_learned_together(name):
    data, held_out = table(), table(seed=1)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        features = TableFeatures.of(data, 4)
        fusion = {
            "AdaTT": lambda k: AdaTT(k, TASKS, 2, expert_dims=[[16], [8]]),
            "MMoE": lambda k: MMoE(k, TASKS, 4, [[16], [8]]),
        }[name](features.out_features)
        model = TableModel(features, MultiTaskModel(fusion, Towers(fusion.out_features, TASKS, (8,))))
    losses = fit(model, data, epochs=15, batch_size=100, lr=1e-2)
    assert losses[:6].mean() > 1.5 * losses[-6:].mean()
    assert all(metrics["auc"] > 0.85 for metrics in evaluate(model, held_out).values())


def test_regression_uses_the_squared_error():
    splits = make_synthetic((1000, 0, 500), 10, seed=1)
    model = network(splits.train)
    before = evaluate(model, splits.test)
    fit(model, splits.train, epochs=10, batch_size=100, lr=1e-2)
    after = evaluate(model, splits.test)
    for task in ("task_1", "task_2"):
        assert set(after[task]) == {"mse"} and after[task]["mse"] < 0.5 * before[task]["mse"]


def test_same_seed_same_run_bit_by_bit_and_random_state_is_kept():
    data = table()
    runs = []
    for global_seed, seed in ((1, 7), (2, 7), (3, 8)):
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        model = network(data, dropout=0.2)
        losses = fit(model, data, epochs=3, batch_size=64, seed=seed)
        assert torch.equal(state, torch.get_rng_state())
        runs.append((losses, torch.cat([p.flatten() for p in model.parameters()])))
    assert all(torch.equal(one, two) for one, two in zip(runs[0], runs[1], strict=True))
    assert not torch.equal(runs[0][0], runs[2][0])


def test_every_row_is_seen_once_an_epoch():
    data = table(10)
    seen = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(TASKS))

        def forward(self, numeric, categorical):
            seen.append(numeric[:, 0])
            return self.weight.expand(len(numeric), TASKS)

    losses = fit(Spy(), data, epochs=2, batch_size=4)
    assert [len(batch) for batch in seen] == [4, 4, 2] * 2 and losses[0] == pytest.approx(2 * math.log(2))
    for epoch in (seen[:3], seen[3:]):
        assert torch.equal(torch.cat(epoch).sort().values, data.numeric[:, 0].sort().values)


def test_own_loss_and_optimizer():
    data = table(50)
    model = network(data)
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    losses = fit(model, data, batch_size=25, optimizer=optimizer, loss=lambda logits, labels: 0 * logits.sum() + 3)
    assert losses.tolist() == [3, 3]
    assert all(torch.equal(one, two) for one, two in zip(start, model.parameters(), strict=True))


@pytest.mark.parametrize("categories", [True, False])
def test_float64_models_keep_their_precision(categories):
    data = table(100) if categories else make_synthetic((100, 0, 0), 5, binary="median").train
    double, single = network(data).double(), network(data)
    fine, coarse = fit(double, data, epochs=2, batch_size=50), fit(single, data, epochs=2, batch_size=50)
    assert predict(double, data).dtype == torch.float64 and fine.dtype == torch.float64
    assert torch.allclose(fine, coarse, rtol=1e-5) and not torch.equal(fine, fine.float().double())


def test_predict_uses_evaluation_mode_and_batches_do_not_matter():
    data = table(30)
    model = network(data, dropout=0.5).train()
    whole, cut = predict(model, data), predict(model, data, batch_size=7)
    assert whole.shape == (30, TASKS) and torch.allclose(whole, cut, atol=1e-6) and model.training


def test_no_rows_and_progress_bar(capsys):
    empty = table(0)
    model = network(empty)
    assert fit(model, empty, epochs=3).shape == (0,)
    assert all(math.isnan(value) for metrics in evaluate(model, empty).values() for value in metrics.values())
    pytest.importorskip("rich")
    fit(model, table(50), batch_size=10, progress=True)
    assert "loss" in capsys.readouterr().out
    with pytest.raises(ValueError, match="batch_size"):
        fit(model, empty, batch_size=0)
    weighted = replace(table(50), weights=torch.ones(50, TASKS))
    with pytest.raises(ValueError, match="data: .* need a loss of their own"):
        fit(model, weighted)
    assert fit(model, weighted, loss=binary_loss).shape == (1,)


def test_features_are_one_embedding_a_field():
    data = table(20)
    features = TableFeatures(2, (5, 7, 6), 4)
    x = features(data.numeric, data.categorical)
    assert x.shape == (20, 14) and features.out_features == 14 and features.table.shape == (18, 4)
    assert torch.equal(x[:, :2], data.numeric)
    for field, begin in enumerate((0, 5, 12)):
        expected = features.table[data.categorical[:, field] + begin]
        assert torch.equal(x[:, 2 + 4 * field : 6 + 4 * field], expected)
    assert not features.table[[0, 5, 12]].any()
    assert TableFeatures(2)(data.numeric, data.categorical[:, :0]) is data.numeric
    with pytest.raises(ValueError, match="categorical"):
        features(data.numeric, data.categorical[:, :2])
    with pytest.raises(ValueError, match="vocabularies"):
        TableFeatures(2, (0,))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"categorical": torch.full((20, 3), 5)}, ValueError, "field 0 has ids 5 to 5, expected 0 to 4"),
        ({"categorical": torch.full((20, 3), -1)}, ValueError, "categorical"),
        ({"categorical": torch.zeros(20, 2, dtype=torch.int64)}, ValueError, "categorical"),
        ({"categorical": torch.zeros(20, 3)}, TypeError, "categorical"),
        ({"numeric": torch.zeros(19, 2)}, ValueError, "numeric"),
        ({"numeric": torch.full((20, 2), math.nan)}, ValueError, "numeric"),
        ({"labels": torch.full((20, 2), 2.0)}, ValueError, "labels"),
        ({"kind": "ranking"}, ValueError, "kind"),
        ({"weights": torch.full((20, 2), -1.0)}, ValueError, "weights: got a number below 0"),
        ({"domain": torch.arange(20) - 1, "num_domains": 19}, ValueError, "domain: got ids -1 to 18, expected 0 to 18"),
        ({"domain": torch.zeros(20), "num_domains": 1}, TypeError, "domain: got dtype torch.float32, expected"),
        ({"group": torch.zeros(19, dtype=torch.int64)}, ValueError, r"group: got shape \[19\], expected \[20\]"),
        ({"num_classes": (3,)}, ValueError, r"num_classes: got \(3,\), expected one number a task"),
        ({"kind": "multiclass", "num_classes": (2, 1)}, ValueError, "num_classes: task b has 1, expected 2 at least"),
        (
            {"kind": "multiclass", "num_classes": (2, 3), "labels": torch.full((20, 2), 2.0)},
            ValueError,
            "labels: task a has a class outside 0 to 1",
        ),
    ],
)
def test_rows_that_do_not_fit_are_named(change, error, message):
    data = table(20)
    fields = {name: getattr(data, name) for name in ("numeric", "categorical", "labels", "vocab_sizes", "task_names")}
    with pytest.raises(error, match=message):
        TaskData(**{**fields, **change})
