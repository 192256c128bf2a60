"""The training loop of a run: steps, evaluations, checkpoints, and going on where it was left."""

from __future__ import annotations

import inspect
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from python_models.data import Splits, TaskData
from python_models.settings import ConfigError, build, nearest
from python_models.train import balance, checkpoint, evaluation, registry
from python_models.train.checkpoint import Curve, RunError
from python_models.train.config import Config
from python_models.train.loader import Batch, Batches
from python_models.train.objective import make_objective
from python_models.train.setup import find_device, make_optimizer

CHECKPOINT, BEST, CURVE = "checkpoint.pt", "best.pt", "losses.f64"
# Of a run; the first one decides whether there is one to go on with.
FILES = (CHECKPOINT, BEST, CURVE, "config.json", "report.json", "report.html", "model.pt", "encoder.json")
_GATE_ROWS = 1024  # validation rows over which the gates' entropy is a mean


def clear(folder: Path) -> None:
    """Remove a run's files."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)


@dataclass
class Progress:
    """Where a run stands, beside its tensors."""

    step: int = 0
    best: float | None = None
    best_step: int = 0
    best_epoch: int = 0
    stale: int = 0
    seconds: float = 0.0
    stopped: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)


class Loop:
    """One run in memory, at its beginning or where its checkpoint left it.

    Args:
        config: what to run.
        splits: its data.
        folder: where its files are, which exists.
        fresh: begin anew: what the folder holds of another run is removed, once all else fits.

    Raises:
        ConfigError: naming the key that does not fit.
        RunError: a checkpoint that is damaged, or of other data.
    """

    def __init__(self, config: Config, splits: Splits, folder: Path, *, fresh: bool = False) -> None:
        self.config, self.splits, self.folder = config, splits, folder
        if not len(splits.train):
            raise ConfigError("data: has no training rows")
        valid = evaluation.valid_metrics(splits.train)
        if config.stopping.metric not in valid:
            raise ConfigError(f"stopping.metric is {config.stopping.metric!r}{nearest(config.stopping.metric, valid)}")
        if config.stopping.patience and not len(splits.validation):
            raise ConfigError("stopping.patience needs validation rows; there are none")
        self.device = find_device(config.train.device)
        self.objective = make_objective(splits.train, config.losses)
        with torch.random.fork_rng(self._devices):
            self._seed()
            self.model = registry.build(config.model, splits.train).to(self.device)
            self.balance = balance.build(config.balancing, self.objective.kinds, self.model)
            self.balancer = self.balance.module.to(self.device)
            self.random = checkpoint.random_state(self.device)
        self.optimizer = make_optimizer(config, self.model, self.balancer)
        self.batches = Batches(splits.train, config.train.batch_size, self.device, config.seed)
        self.progress = Progress()
        self.data_digest = checkpoint.digest(splits.train) + checkpoint.digest(splits.validation)
        self.width = 1 + len(splits.train.task_names)
        saved = folder / CHECKPOINT
        if fresh:
            clear(folder)
        if saved.exists():
            self._restore(saved)
        self.curve = Curve(folder / CURVE, self.width, self.progress.step)
        self._unwritten: list[Tensor] = []

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.config.train.epochs * len(self.batches)

    @property
    def _devices(self) -> list[torch.device]:
        return [self.device] if self.device.type == "cuda" else []

    def _seed(self) -> None:
        # torch.manual_seed would reach the devices that are not restored, too.
        torch.default_generator.manual_seed(self.config.seed)
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index].manual_seed(self.config.seed)

    def run(self, should_stop: Callable[[], bool] = lambda: False, report: Any = None) -> bool:
        """Train to the end; False where `should_stop` said so before. The state is on the disk afterwards.

        report: an object with ``step(loop, losses)``, after the steps that are written, and ``evaluated(loop, found)``.
        """
        config, progress = self.config, self.progress
        begin, before = time.perf_counter(), progress.seconds
        self.model.train()
        self.balancer.train()
        with torch.random.fork_rng(self._devices):
            checkpoint.set_random_state(self.random, self.device)
            interrupted = False
            while progress.step < self.steps and not progress.stopped and not interrupted:
                epoch, first = divmod(progress.step, len(self.batches))
                self.model.start_epoch(epoch, config.train.epochs)
                for batch in (feed := self.batches.epoch(epoch, first)):
                    self._unwritten.append(self._step(batch))
                    progress.step += 1
                    progress.seconds = before + time.perf_counter() - begin
                    last = progress.step % len(self.batches) == 0
                    interrupted = should_stop()
                    if last or interrupted or progress.step % config.log.every == 0:
                        losses = self._write_losses()
                        if report is not None:
                            report.step(self, losses)
                    if last:
                        self._end_epoch(epoch, report)
                    if progress.step % config.checkpoint.every == 0:
                        self.save()
                    if interrupted or progress.stopped:
                        feed.close()
                        break
            self.save()
        return not interrupted

    def _step(self, batch: Batch) -> Tensor:
        """One step; the total and the tasks' losses, float64 [1+T], on the device."""
        self.optimizer.zero_grad()
        amp = torch.autocast(self.device.type, torch.bfloat16) if self.config.train.amp else nullcontext()
        with amp:
            outputs = self.model(batch.numeric, batch.categorical, batch.domain)
        losses = self.objective(outputs, batch.labels, weights=batch.weights)
        with amp:
            helped = self.model.helped(losses, lambda out: self.objective(out, batch.labels, weights=batch.weights))
        active = self.objective.active(batch.weights)
        total = self.balance(helped, penalty=self.model.penalty(), active=active)
        self.optimizer.step()
        self.model.after_step(self.progress.step + 1)
        return torch.stack([value.detach().double() for value in (total, *losses)])

    def _write_losses(self) -> Tensor:
        """Everything since the last time goes to the curve's file. RunError where the loss is no number any more."""
        if not self._unwritten:
            return torch.empty(0, self.width, dtype=torch.float64)
        rows = torch.stack(self._unwritten).cpu()
        self._unwritten.clear()
        bad = (~rows.isfinite()).any(1).nonzero()
        if len(bad):
            step = self.progress.step - len(rows) + int(bad[0]) + 1
            task = ("total", *self.splits.train.task_names)[int((~rows[bad[0, 0]].isfinite()).nonzero()[0])]
            raise RunError(
                f"the loss ({task}) is {float(rows[bad[0, 0]].sum())} at step {step}: lower optimizer.lr, or look at "
                f"the data; what {self.folder / CHECKPOINT} holds is from before"
            )
        self.curve.append(rows)
        return rows

    def _end_epoch(self, epoch: int, report: Any) -> None:
        self.balancer.end_epoch()
        last = self.progress.step == self.steps
        if not len(self.splits.validation) or not ((epoch + 1) % self.config.stopping.every_epochs == 0 or last):
            return
        found = {"epoch": epoch + 1, "step": self.progress.step, **self.evaluate(self.splits.validation)}
        found["gate_entropy"] = self._gate_entropy()
        self.progress.history.append(found)
        metric = self.config.stopping.metric
        value = evaluation.pick(found, metric)
        progress = self.progress
        if evaluation.is_better(metric, value, progress.best, self.config.stopping.min_delta):
            progress.best, progress.best_step, progress.best_epoch, progress.stale = value, progress.step, epoch, 0
            checkpoint.save(self.folder / BEST, {"step": progress.step, "model": self.balance.deployed(self.model)})
        else:
            progress.stale += 1
            progress.stopped = 0 < self.config.stopping.patience <= progress.stale
        if report is not None:
            report.evaluated(self, found)

    @torch.no_grad()
    def evaluate(self, data: TaskData) -> dict[str, Any]:
        """Losses and metrics on rows: {loss, losses, tasks, mean}."""
        outputs = self.predict(data)
        losses = torch.stack(self.objective(outputs, data.labels, weights=data.weights)).double()
        tasks = evaluation.task_metrics(outputs, data, self.objective.kinds)
        found = {"loss": float(losses.sum()), "losses": losses.tolist(), "mean": evaluation.mean_metrics(tasks)}
        if self.model.name == "ESMM":
            clicked = data.select(data.labels[:, 0].nonzero().flatten())
            logits = self.predict(clicked, self.model.conversion_logits)
            extra = evaluation.binary_metrics(logits, clicked.labels[:, 1], group=clicked.group)
            tasks[f"{data.task_names[1]} after {data.task_names[0]}"] = extra
        return {**found, "tasks": tasks}

    @torch.no_grad()
    def predict(self, data: TaskData, call: Callable[..., Any] | None = None) -> Any:
        """The outputs for all rows, on the CPU, with the model in evaluation mode."""
        training, found = self.model.training, []
        self.model.eval()
        for rows in (
            torch.arange(len(data)).split(self.config.train.eval_batch_size) if len(data) else [torch.arange(0)]
        ):
            part = data.select(rows).to(self.device)
            inputs = (part.numeric, part.categorical)
            out = self.model(*inputs, part.domain) if call is None else call(*inputs)
            found.append({k: v.cpu() for k, v in out.items()} if isinstance(out, dict) else out.cpu())
        self.model.train(training)
        if isinstance(found[0], dict):
            return {name: torch.cat([part[name] for part in found]) for name in found[0]}
        return torch.cat(found)

    @torch.no_grad()
    def _gate_entropy(self) -> list[list[float]]:
        """Of every level's gates, on some validation rows; [] for a network without gates, or without matplotlib."""
        if "return_gates" not in inspect.signature(type(self.model.core).forward).parameters:
            return []
        try:
            from python_models.viz import gate_entropy
        except ModuleNotFoundError:
            return []  # it is only ever drawn

        part = self.splits.validation
        part = part.select(torch.arange(min(_GATE_ROWS, len(part)))).to(self.device)
        training = self.model.training
        _, gates = self.model.eval()(part.numeric, part.categorical, return_gates=True)
        self.model.train(training)
        return [level.tolist() for level in gate_entropy(gates)]

    def save(self) -> None:
        """Write the state; the losses up to it are on the disk before."""
        self._write_losses()
        self.curve.sync()
        state = {
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "balancer": self.balancer.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": checkpoint.random_state(self.device),
            "data": self.data_digest,
            "batch_size": self.config.train.batch_size,
        }
        checkpoint.save(self.folder / CHECKPOINT, state)

    def _restore(self, path: Path) -> None:
        state = checkpoint.load(path)
        try:
            if state["data"] != self.data_digest:
                raise RunError(f"{path}: the rows are others than those the run began with")
            self.progress = build(Progress, state["progress"], "progress", str(path))
            self.model.load_state_dict(state["model"])
            self.balancer.load_state_dict(state["balancer"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.random = state["random"]
        except (KeyError, ValueError, RuntimeError) as error:
            if isinstance(error, RunError):
                raise
            raise RunError(f"{path}: does not fit this configuration: {error}") from error

    def use_best(self) -> bool:
        """Make the model what is deployed: with the weights of the best evaluation, where there are any and the
        configuration wants them (True), or with the last ones, and without the method's part in it."""
        best = self._load_best()
        self.balance.deploy(self.model, best)
        return best

    def _load_best(self) -> bool:
        path = self.folder / BEST
        if not (self.config.stopping.restore_best and self.progress.best is not None and path.exists()):
            return False
        state = checkpoint.load(path)
        if state["step"] != self.progress.best_step:
            return False  # of an epoch that is not done again: the run was killed after it, and is to be shorter now
        self.model.load_state_dict(state["model"])
        self.model.start_epoch(self.progress.best_epoch, self.config.train.epochs)
        return True
