"""What a run shows while it goes: a progress bar or lines, and TensorBoard's files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from python_models.settings import ConfigError

if TYPE_CHECKING:
    from python_models.train.loop import Loop


class Log:
    """Told of steps and evaluations by the loop; a context manager.

    Args:
        loop: which knows where it begins.
        bar: whether to draw a bar; a line an evaluation is printed either way.

    Raises ConfigError where TensorBoard is wanted and not installed.
    """

    def __init__(self, loop: Loop, bar: bool) -> None:
        self.bar = self.writer = None
        if loop.config.log.tensorboard:
            self.writer = _writer(loop.folder / "tensorboard", loop.progress.step)
        if bar and loop.steps:
            try:
                from rich.console import Console
                from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
            except ModuleNotFoundError:
                return  # lines are enough
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self.bar = Progress(*columns, console=Console(file=sys.stderr))
            self.task = self.bar.add_task("", total=loop.steps, completed=loop.progress.step)

    def __enter__(self) -> Log:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.writer is not None:
            self.writer.close()

    def step(self, loop: Loop, losses: Tensor) -> None:
        """Losses [n, 1+T] of the steps since the last call."""
        if not len(losses):
            return
        step = loop.progress.step
        mean = losses.mean(0).tolist()
        if self.bar is not None:
            epoch = min(loop.config.train.epochs, (step - 1) // len(loop.batches) + 1)
            text = f"epoch {epoch}/{loop.config.train.epochs}  loss {mean[0]:.4f}"
            self.bar.update(self.task, completed=step, description=text)
        if self.writer is not None:
            for name, value in zip(("total", *loop.splits.train.task_names), mean, strict=True):
                self.writer.add_scalar(f"loss/{name}", value, step)

    def evaluated(self, loop: Loop, found: dict[str, Any]) -> None:
        """What an evaluation found."""
        words = "  ".join(f"{name} {value:.4f}" for name, value in found["mean"].items())
        mark = "  best" if loop.progress.best_step == found["step"] else ""
        line = f"epoch {found['epoch']}  step {found['step']}  validation loss {found['loss']:.4f}  {words}{mark}"
        if self.bar is not None:
            self.bar.console.print(line, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)
        if self.writer is not None:
            self.writer.add_scalar("validation/loss", found["loss"], found["step"])
            for task, values in found["tasks"].items():
                for name, value in values.items():
                    self.writer.add_scalar(f"validation/{name}/{task}", value, found["step"])
            self.writer.flush()


def _writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ConfigError(f"log.tensorboard needs the package tensorboard, pip install tensorboard: {error}") from error
    # What was logged of the steps that are done again is hidden; all of it, where no checkpoint was written yet.
    return SummaryWriter(str(folder), purge_step=step + 1)
