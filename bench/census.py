"""Do the networks learn real data? AUC on Census-Income beside logistic regression on the same rows.

``python -m bench.census --data PATH`` trains AdaTT-sp and MMoE with several seeds on one split and prints mean and
standard deviation of the test AUC of each task. ``--tune`` instead shows the validation AUC after every epoch for a few
learning rates; it never looks at the test rows, and the defaults of ``--lr`` and ``--epochs`` were chosen from it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from python_models import AdaTT, MMoE, MultiTaskModel, Towers
from python_models.data import Splits, TableFeatures, TableModel, TaskData, load_census
from python_models.metrics import auc
from python_models.train import evaluate, fit

EXPERT_DIMS = [[128], [64]]  # two fusion levels of one-layer experts, the form of the AdaTT paper
EXPERTS = 6  # a level: all shared in MMoE, two a task in AdaTT-sp
TOWER_DIMS = (32,)
EMBEDDING_DIM = 4
BATCH = 1024
LOGISTIC_C = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

NETWORKS: dict[str, Callable[[int, int], torch.nn.Module]] = {
    "AdaTT-sp": lambda inputs, tasks: AdaTT(inputs, tasks, EXPERTS // tasks, expert_dims=EXPERT_DIMS),
    "MMoE": lambda inputs, tasks: MMoE(inputs, tasks, EXPERTS, EXPERT_DIMS),
}


def build(name: str, data: TaskData, seed: int) -> TableModel:
    """The whole model of one network, its weights fixed by the seed."""
    tasks = len(data.task_names)
    torch.manual_seed(seed)
    features = TableFeatures.of(data, EMBEDDING_DIM)
    fusion = NETWORKS[name](features.out_features, tasks)
    return TableModel(features, MultiTaskModel(fusion, Towers(fusion.out_features, tasks, TOWER_DIMS)))


def logistic_regression(splits: Splits) -> dict[str, dict[str, float]]:
    """Test AUC of scikit-learn's logistic regression, one a task: one-hot categories beside the scaled numbers.

    The regularisation is chosen for each task on the validation rows, as learning rate and epochs are for the networks.
    """
    from scipy.sparse import csr_array, hstack
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import OneHotEncoder

    one_hot = OneHotEncoder(handle_unknown="ignore").fit(splits.train.categorical.numpy())
    parts = (splits.train, splits.validation, splits.test)
    train, validation, test = (
        hstack([csr_array(part.numeric.double().numpy()), one_hot.transform(part.categorical.numpy())]).tocsr()
        for part in parts
    )
    result = {}
    for t, task in enumerate(splits.train.task_names):
        best = (-1.0, 0.0, 0.0)
        for c in LOGISTIC_C:
            model = LogisticRegression(C=c, max_iter=2000).fit(train, splits.train.labels[:, t].numpy())
            scores = [
                auc(model.decision_function(x), p.labels[:, t])
                for x, p in zip((validation, test), parts[1:], strict=True)
            ]
            best = max(best, (scores[0], scores[1], c))
        result[task] = {"auc": best[1], "validation_auc": best[0], "C": best[2]}
    return result


def tune(splits: Splits, name: str, rates: tuple[float, ...], epochs: int, seed: int) -> None:
    """Print the validation AUC of every task after each epoch, for several learning rates."""
    for lr in rates:
        model = build(name, splits.train, seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
        for epoch in range(1, epochs + 1):
            fit(model, splits.train, batch_size=BATCH, seed=1000 * seed + epoch, optimizer=optimizer)
            scores = [metrics["auc"] for metrics in evaluate(model, splits.validation).values()]
            row = "  ".join(f"{score:.4f}" for score in scores)
            print(f"{name}  lr {lr:g}  epoch {epoch:2d}  {row}  mean {statistics.mean(scores):.5f}", flush=True)


def train_networks(splits: Splits, seeds: int, epochs: int, lr: float) -> dict[str, dict]:
    """Test metrics of every network and seed: {network: {"runs": [...], "parameters": n, "seconds": s}}."""
    result = {}
    for name in NETWORKS:
        runs, begin = [], time.perf_counter()
        for seed in range(seeds):
            model = build(name, splits.train, seed)
            fit(model, splits.train, epochs=epochs, batch_size=BATCH, lr=lr, seed=seed, progress=True)
            runs.append(evaluate(model, splits.test))
            scores = "  ".join(f"{task} {metrics['auc']:.4f}" for task, metrics in runs[-1].items())
            print(f"{name}, seed {seed}, AUC: {scores}", flush=True)
        result[name] = {
            "runs": runs,
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds": (time.perf_counter() - begin) / seeds,
        }
    return result


def summary(runs: list[dict[str, dict[str, float]]], metric: str) -> dict[str, tuple[float, float]]:
    """{task: (mean, standard deviation)} over the seeds."""
    columns = {task: [run[task][metric] for run in runs] for task in runs[0]}
    return {t: (statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0) for t, v in columns.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=Path, help="census-income file (plain or .gz) or its directory")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, default=Path("bench/out/census.json"))
    parser.add_argument("--tune", nargs="+", type=float, metavar="LR", help="show validation AUC for these rates only")
    arguments = parser.parse_args()

    splits = load_census(arguments.data, seed=0)
    if arguments.tune:
        for name in NETWORKS:
            tune(splits, name, tuple(arguments.tune), arguments.epochs, seed=99)
        return

    baseline = logistic_regression(splits)
    networks = train_networks(splits, arguments.seeds, arguments.epochs, arguments.lr)
    for network in networks.values():
        network["summary"] = {metric: summary(network["runs"], metric) for metric in ("auc", "log_loss", "ne")}
    report = {
        "rows": {part: len(getattr(splits, part)) for part in ("train", "validation", "test")},
        "settings": {
            "expert_dims": EXPERT_DIMS,
            "experts_per_level": EXPERTS,
            "tower_dims": TOWER_DIMS,
            "embedding_dim": EMBEDDING_DIM,
            "batch": BATCH,
            "epochs": arguments.epochs,
            "lr": arguments.lr,
            "seeds": arguments.seeds,
        },
        "torch": torch.__version__,
        "machine": platform.machine(),
        "logistic_regression": baseline,
        "networks": networks,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1))

    tasks = splits.train.task_names
    print(f"test AUC, mean ± standard deviation of {arguments.seeds} seeds, {len(splits.test)} rows")
    print(f"{'':22s}" + "".join(f"{task:>20s}" for task in tasks))
    print(f"{'logistic regression':22s}" + "".join(f"{baseline[task]['auc']:20.4f}" for task in tasks))
    for name, network in networks.items():
        cells = [network["summary"]["auc"][task] for task in tasks]
        print(f"{name:22s}" + "".join(f"{f'{mean:.4f} ± {std:.4f}':>20s}" for mean, std in cells))
    behind = [(n, t) for n, r in networks.items() for t in tasks if r["summary"]["auc"][t][0] <= baseline[t]["auc"]]
    for name, task in behind:
        print(f"{name} does not beat logistic regression on {task}")
    raise SystemExit(bool(behind))


if __name__ == "__main__":
    main()
