"""Metrics by kind of task: scikit-learn's values, and which direction is better."""

from dataclasses import replace

import pytest
import torch

from python_models.data import TaskData
from python_models.train.evaluation import binary_metrics, is_better, pick, task_metrics, valid_metrics

sklearn_metrics = pytest.importorskip("sklearn.metrics")


def rows() -> tuple[dict[str, torch.Tensor], TaskData]:
    """Outputs with ties, and labels of three kinds with weights, some of them 0."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.stack([torch.randint(0, n, (60,), generator=draw).float() for n in (2, 9, 3)], 1)
    outputs = {
        "click": torch.randn(60, 1, generator=draw).mul(2).round(),
        "stay": torch.randn(60, 1, generator=draw),
        "topic": torch.randn(60, 3, generator=draw),
    }
    weights = torch.randint(0, 3, (60, 3), generator=draw).float()
    kinds, group = ("binary", "regression", "multiclass"), torch.arange(60) % 4
    none = torch.empty(60, 0)
    return outputs, TaskData(
        none, none.long(), labels, (), tuple(outputs), kind=kinds, weights=weights, num_classes=(1, 1, 3), group=group
    )


def test_agrees_with_scikit_learn():
    outputs, data = rows()
    found = task_metrics(outputs, data)
    out = {name: values.double().squeeze(1).numpy() for name, values in outputs.items()}
    (click, stay, topic), weights = data.labels.double().numpy().T, data.weights.double().numpy().T
    chance = 1 / (1 + torch.from_numpy(-out["click"]).exp()).numpy()
    rate = (weights[0] * click).sum() / weights[0].sum()
    loss = sklearn_metrics.log_loss(click, chance, sample_weight=weights[0])
    base = sklearn_metrics.log_loss(click, 0 * chance + rate, sample_weight=weights[0])
    in_groups = [data.group.numpy() == g for g in range(4)]
    each = [sklearn_metrics.roc_auc_score(click[g], out["click"][g], sample_weight=weights[0][g]) for g in in_groups]
    sizes = [weights[0][g].sum() for g in in_groups]
    several = torch.from_numpy(out["topic"]).softmax(1).numpy()
    expected = {
        "click": {
            "auc": sklearn_metrics.roc_auc_score(click, out["click"], sample_weight=weights[0]),
            "log_loss": loss,
            "ne": loss / base,
            "calibration": (weights[0] * chance).sum() / (weights[0] * click).sum(),
            "gauc": sum(a * s for a, s in zip(each, sizes, strict=True)) / sum(sizes),
        },
        "stay": {"mse": sklearn_metrics.mean_squared_error(stay, out["stay"], sample_weight=weights[1])},
        "topic": {
            "accuracy": sklearn_metrics.accuracy_score(topic, several.argmax(1), sample_weight=weights[2]),
            "log_loss": sklearn_metrics.log_loss(topic, several, sample_weight=weights[2]),
        },
    }
    assert {task: set(values) for task, values in found.items()} == {t: set(v) for t, v in expected.items()}
    for task, values in expected.items():
        assert found[task] == pytest.approx(values, rel=1e-12)


def test_what_may_be_asked_for():
    _, data = rows()
    names = ["loss", "auc", "gauc", "log_loss", "ne", "calibration", "mse", "accuracy"]
    found = valid_metrics(data)
    assert found[: len(names)] == names and {"click.gauc", "stay.mse", "topic.accuracy"} <= set(found)
    assert "gauc" not in valid_metrics(replace(data, group=None))
    evaluation = {"loss": 3.0, "mean": {"auc": 2.0}, "tasks": {"a.b": {"auc": 1.0}}}
    assert [pick(evaluation, metric) for metric in ("loss", "auc", "a.b.auc")] == [3.0, 2.0, 1.0]


@pytest.mark.parametrize(
    ("metric", "better", "worse"),
    [("loss", 1.0, 2.0), ("t.mse", 1.0, 2.0), ("auc", 0.7, 0.6), ("t.gauc", 0.7, 0.6), ("t.calibration", 0.9, 1.2)],
)
def test_which_is_better(metric, better, worse):
    assert is_better(metric, better, worse, 0.0) and not is_better(metric, worse, better, 0.0)
    assert is_better(metric, worse, None, 0.0) and not is_better(metric, better, better, 0.0)
    assert not is_better(metric, better, worse, 5.0)
    assert not is_better(metric, float("nan"), None, 0.0)


def test_labels_between_have_no_order():
    logits, labels = torch.randn(9), torch.rand(9)
    found = binary_metrics(logits, labels, group=torch.zeros(9, dtype=torch.int64))
    assert found["auc"] != found["auc"] and found["gauc"] != found["gauc"] and found["ne"] > 0
