"""A short training loop over rows in memory, and the metrics of what came out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from python_models.data.task_data import TaskData
from python_models.train.evaluation import task_metrics

Loss = Callable[[Tensor, Tensor], Tensor]


def binary_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over the tasks of the mean cross-entropy: logits and labels [B, T] -> scalar."""
    logits = _wide(logits)
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").mean(0).sum()


def squared_loss(predictions: Tensor, labels: Tensor) -> Tensor:
    """Sum over the tasks of the mean squared error: predictions and labels [B, T] -> scalar."""
    return (_wide(predictions) - labels).square().mean(0).sum()


def fit(
    model: nn.Module,
    data: TaskData,
    *,
    epochs: int = 1,
    batch_size: int = 1024,
    lr: float = 1e-3,
    seed: int = 0,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    progress: bool = False,
) -> Tensor:
    """Train ``model(numeric, categorical) -> [B, T]`` with Adam and return the loss of every step, float64 [steps].

    Rows are shuffled anew each epoch; the last batch may be short. ``seed`` fixes the shuffles and dropout, so that the
    same model and seed give the same run bit by bit; the caller's random state is left as it was. ``loss`` and
    ``optimizer`` take the place of the summed cross-entropy (or squared error) and of Adam at rate ``lr``.
    """
    if batch_size < 1 or epochs < 0:
        raise ValueError(f"got batch_size {batch_size} and epochs {epochs}, expected at least 1 and at least 0")
    if loss is None and (data.kind not in ("binary", "regression") or data.weights is not None):
        raise ValueError(
            "data: tasks of several kinds or classes, or labels with weights, need a loss of their own, or the command "
            "python -m python_models.train"
        )
    numeric, categorical, labels = _move(model, data)
    device = labels.device
    loss = loss or (binary_loss if data.kind == "binary" else squared_loss)
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    steps = epochs * -(-len(data) // batch_size)
    losses = torch.zeros(steps, dtype=torch.float64, device=device)
    step = 0
    model.train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), _bar(steps, progress) as report:
        # torch.manual_seed would reach the devices that are not restored, too.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.default_generators[device.index].manual_seed(seed)
        shuffles = torch.Generator().manual_seed(seed)
        for epoch in range(epochs):
            order = torch.randperm(len(data), generator=shuffles).to(device)
            for rows in order.split(batch_size) if len(data) else ():
                optimizer.zero_grad()
                logits = model(numeric.index_select(0, rows), categorical.index_select(0, rows))
                value = loss(logits, labels.index_select(0, rows))
                value.backward()
                optimizer.step()
                losses[step] = value.detach()
                step += 1
                if progress and (step % 20 == 0 or step == steps):  # reading the loss waits for a GPU
                    recent = float(losses[max(0, step - 20) : step].mean())
                    report(step, f"epoch {epoch + 1}/{epochs}  loss {recent:.4f}")
    return losses.cpu()


@torch.no_grad()
def predict(model: nn.Module, data: TaskData, *, batch_size: int = 8192) -> Tensor:
    """Logits (or regression values) [N, T] of every row, on the CPU, with the model in evaluation mode."""
    numeric, categorical, _ = _move(model, data)
    training = model.training
    model.eval()
    batches = zip(numeric.split(batch_size), categorical.split(batch_size), strict=True)
    outputs = torch.cat([model(*batch) for batch in batches]).cpu()
    model.train(training)
    return outputs


def evaluate(model: nn.Module, data: TaskData, *, batch_size: int = 8192) -> dict[str, dict[str, float]]:
    """``{task: {auc, log_loss, ne, calibration}}`` for binary tasks, ``{task: {mse}}`` for regression."""
    return task_metrics(predict(model, data, batch_size=batch_size), data)


def _wide(outputs: Tensor) -> Tensor:
    """Losses are taken in float32 at least."""
    return outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs


def _move(model: nn.Module, data: TaskData) -> tuple[Tensor, Tensor, Tensor]:
    """numeric in the parameters' dtype, categorical and labels, all on the parameters' device."""
    parameter = next(model.parameters())
    data = data.to(parameter.device)
    return data.numeric.to(parameter.dtype), data.categorical, data.labels


@contextmanager
def _bar(steps: int, show: bool) -> Iterator[Callable[[int, str], None]]:
    """A callable that takes the steps done and a text: a progress bar, or nothing."""
    if not show:
        yield lambda done, text: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn  # needed for the bar alone

    columns = (BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}")) as bar:
        task = bar.add_task("", total=steps)
        yield lambda done, text: bar.update(task, completed=done, description=text)
