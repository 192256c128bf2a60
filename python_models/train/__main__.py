"""``python -m python_models.train CONFIG.toml``: a run from its configuration to its report."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
except ModuleNotFoundError as missing:
    sys.exit(f"python -m python_models.train needs the package typer: pip install 'mtlkernels[train]' ({missing})")

from python_models.data import Splits, load_census, make_synthetic
from python_models.settings import ConfigError
from python_models.train import balance, checkpoint, registry, report
from python_models.train.checkpoint import RunError
from python_models.train.config import Config, SyntheticData, differences, load
from python_models.train.log import Log
from python_models.train.loop import CHECKPOINT, Loop

EXAMPLE = Path(__file__).with_name("example.toml")
INTERRUPTED = 130


def load_data(config: Config) -> tuple[Splits, dict[str, Any] | None]:
    """The rows that a configuration names, and how a table was encoded. ConfigError where they cannot be had."""
    data = config.data
    try:
        if data.source == "census":
            return load_census(data.path, tasks=data.tasks, seed=data.seed), None
        if data.source == "table":
            from python_models.data.table import load_table  # needs pandas

            splits, encoder = load_table(data.schema, seed=data.seed)
            return splits, encoder.to_dict()
        return make_synthetic(
            data.rows,
            data.in_features,
            correlations(data),
            scale=data.scale,
            num_sines=data.num_sines,
            noise=data.noise,
            seed=data.seed,
            binary=data.binary or None,
            sharpness=data.sharpness,
        ), None
    except (ValueError, OSError) as error:
        raise ConfigError(f"data: {error}") from error
    except ModuleNotFoundError as error:
        raise ConfigError(f"data.source {data.source!r} needs a package that is not installed: {error}") from error


def correlations(data: SyntheticData) -> Any:
    """The matrix [T,T]: the one that is written, or one with the same number between every two tasks."""
    if not isinstance(data.correlation, float):
        return [list(row) for row in data.correlation]
    rows = range(data.num_tasks)
    return [[1.0 if i == j else data.correlation for j in rows] for i in rows]


def check_folder(folder: Path, config: Config, resume: bool) -> None:
    """RunError where the folder holds a run that is not to be gone on with, or of another configuration."""
    if not (folder / CHECKPOINT).exists():
        return
    if not resume:
        raise RunError(
            f"{folder} holds a run: --resume goes on with it, --overwrite begins anew, or name another `out`"
        )
    there = folder / "config.json"
    if there.exists():
        changed = differences(json.loads(there.read_text()), config.to_dict())
        if changed:
            raise RunError(f"{folder} holds a run of another configuration: {'; '.join(changed)}")


def write_json(path: Path, found: Any) -> None:
    text = json.dumps(found, indent=1)
    checkpoint.write_atomic(path, lambda file: file.write(text.encode()))


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM are noted in the list, and heeded after the step; the second one ends at once."""
    seen: list[int] = []

    def note(number: int, _: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(config: Config, *, resume: bool = False, overwrite: bool = False, bar: bool = False) -> dict[str, Any] | None:
    """Run a configuration in this process: what report.json holds, or None where it was interrupted, and saved.

    Raises ConfigError and RunError.
    """
    splits, encoder = load_data(config)
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    with checkpoint.Lock(folder):
        if not overwrite:
            check_folder(folder, config, resume)
        loop = Loop(config, splits, folder, fresh=overwrite)
        write_json(folder / "config.json", config.to_dict())
        if encoder is not None:
            write_json(folder / "encoder.json", encoder)
        with interrupts() as seen, Log(loop, bar) as log:
            finished = loop.run(lambda: bool(seen), log)
        return report.write(loop) if finished else None


def main(
    config: Annotated[Path | None, typer.Argument(help="a TOML file; --example prints one")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="instead of the file's")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on where the run's folder was left")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="begin anew in the run's folder")] = False,
    example: Annotated[bool, typer.Option("--example", help="print a configuration with every key")] = False,
    list_: Annotated[bool, typer.Option("--list", help="print architectures and methods with their options")] = False,
) -> None:
    """Train a multi-task network as CONFIG says: checkpoints, exact resume, early stopping, and a report."""
    if example or list_:
        print(EXAMPLE.read_text() if example else listing(), end="")
        return
    if config is None:
        raise typer.BadParameter("a configuration file is needed; --example prints one", param_hint="CONFIG")
    if resume and overwrite:
        raise typer.BadParameter("--resume and --overwrite exclude each other")
    sets = [word for each in set_ or () for word in ("--set", each)]
    again = shlex.join(["python", "-m", "python_models.train", str(config), *sets, "--resume"])
    try:
        chosen = load(config, set_ or ())
        bar = chosen.train.progress and sys.stderr.isatty()
        found = train(chosen, resume=resume, overwrite=overwrite, bar=bar)
    except (ConfigError, RunError, OSError) as error:  # OSError: a folder that cannot be written, a full disk
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:  # before the first step, in the report, or pressed twice
        print(f"interrupted at once; what the last checkpoint holds is safe. To go on:\n  {again}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    if found is None:
        print(f"interrupted; everything is saved in {chosen.out}. To go on:\n  {again}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED)
    for part in found["metrics"]:
        for task, values in found["metrics"][part]["tasks"].items():
            print(f"{part}  {task}  " + "  ".join(f"{name} {value:.4f}" for name, value in values.items()))
    print(f"report: {Path(chosen.out) / 'report.html'}")


def listing() -> str:
    """Every architecture and method with the options a file may give it."""
    lines = ["model.name, and what model.options may say (the sizes are defaults):"]
    for name in registry.names():
        sizes = ", ".join(f"{key} = {value}" for key, value in registry.DEFAULTS.get(name, {}).items())
        rest = [option for option in registry.options(name) if option not in registry.DEFAULTS.get(name, {})]
        lines += [f"  {name}: {sizes}", f"      {', '.join(rest)}"]
    lines.append("balancing.name, and what balancing.options may say:")
    lines += [f"  {name}: {', '.join(balance.options(name)) or 'no options'}" for name in balance.names()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app(prog_name="python -m python_models.train")
