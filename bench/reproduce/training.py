"""One run: trains a setting with a seed and a rate, and says what a line of the results file holds of it."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.reproduce.plan import LOGISTIC, TUNING_SEED, Run, Setting
from bench.reproduce.rows import Rows, by_task
from python_models import metrics
from python_models.data import Splits, TaskData
from python_models.train import config
from python_models.train.checkpoint import RunError
from python_models.train.evaluation import task_metrics
from python_models.train.loop import Loop

WINDOWS = 40  # of a synthetic run's loss curve
LOGISTIC_C = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_NEVER = 10**9


def model_config(setting: Setting, train_rows: int) -> config.Model:
    """The setting's model. MRN's prior goes with the sum over rows; with their mean it is divided by the rows."""
    penalty = 1 / max(train_rows, 1) if setting.network == "MRN" else None
    towers = config.Towers(dims=setting.towers)
    return config.Model(name=setting.network, options=setting.options, towers=towers, penalty=penalty)


def train(run: Run, rows: Rows) -> dict[str, Any]:
    """What was found: validation losses of every epoch, and but for tuning runs the test metrics."""
    splits, begin = rows.splits(run.setting.data, run.seed), time.process_time()
    try:
        if run.setting.network == LOGISTIC:
            found = logistic_regression(splits)
        else:
            found = _train(run, splits, rows)
    except RunError as error:  # a loss that is no number: a result, too
        found = {"failed": str(error)}
    return {**found, "cpu_seconds": round(time.process_time() - begin, 2)}


def _train(run: Run, splits: Splits, rows: Rows) -> dict[str, Any]:
    setting, budget = run.setting, run.setting.budget
    apart = len(splits.train.task_names) == 1  # the tasks' rows one after the other
    batch = budget.batch * (splits.train.num_domains if apart else 1)
    settings = config.Config(
        seed=run.seed,
        model=model_config(setting, len(splits.train)),
        optimizer=config.Optimizer(lr=run.lr),
        train=config.Train(epochs=budget.epochs, batch_size=batch, device="cpu", progress=False),
        checkpoint=config.Checkpoint(every=_NEVER),
        log=config.Log(every=_NEVER),
    )
    with tempfile.TemporaryDirectory() as folder:
        loop = Loop(settings, splits, Path(folder))
        loop.run()
        loop.use_best()
        curve = loop.curve.read()
    history = loop.progress.history
    found: dict[str, Any] = {
        "best_epoch": loop.progress.best_epoch + 1,
        "validation_loss": [round(each["loss"], 6) for each in history],
        "parameters": sum(p.numel() for p in loop.model.parameters()),
    }
    if run.seed == TUNING_SEED:
        return found
    outputs, test = loop.predict(splits.test), splits.test
    if apart:
        test = rows.splits("census", run.seed).test
        outputs = by_task(outputs, len(test.task_names))
    found["test"] = test_metrics(outputs, test)
    if setting.data.startswith("synthetic"):
        windows = torch.tensor_split(curve[:, 1:].mean(1), min(WINDOWS, len(curve)))
        found["curve"] = [round(float(window.mean()), 6) for window in windows]
        found["steps"] = len(curve)
    return found


def test_metrics(outputs: Tensor, test: TaskData) -> dict[str, dict[str, float]]:
    """What evaluation says of every task, with as many digits as are worth keeping."""
    found = task_metrics(outputs, test)
    return {task: {name: round(value, 6) for name, value in values.items()} for task, values in found.items()}


def logistic_regression(splits: Splits) -> dict[str, Any]:
    """scikit-learn's, one a task: one-hot categories beside the scaled numbers, C chosen on the validation rows."""
    from scipy.sparse import csr_array, hstack
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import OneHotEncoder

    one_hot = OneHotEncoder(handle_unknown="ignore").fit(splits.train.categorical.numpy())
    parts = (splits.train, splits.validation, splits.test)
    train, validation, test = (
        hstack([csr_array(part.numeric.double().numpy()), one_hot.transform(part.categorical.numpy())]).tocsr()
        for part in parts
    )
    outputs, chosen, parameters = [], {}, 0
    for t, task in enumerate(splits.train.task_names):
        best, scores = float("inf"), None
        for c in LOGISTIC_C:
            model = LogisticRegression(C=c, max_iter=2000).fit(train, splits.train.labels[:, t].numpy())
            loss = metrics.log_loss(model.decision_function(validation), splits.validation.labels[:, t])
            if loss < best:
                best, scores, chosen[task] = loss, model.decision_function(test), c
        outputs.append(torch.from_numpy(scores))
        parameters += model.coef_.size + 1
    return {"test": test_metrics(torch.stack(outputs, 1), splits.test), "C": chosen, "parameters": parameters}
