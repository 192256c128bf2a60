"""What came out of a run: report.json for programs, report.html, one file with its pictures in it, for people."""

from __future__ import annotations

import html
import json
import math
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from python_models.train import registry
from python_models.train.checkpoint import write_atomic

if TYPE_CHECKING:
    from python_models.train.loop import Loop

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } th, td { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #ddd; }
th { text-align: left; font-weight: 600; } td.n { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; height: auto; } pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: 13px; }
"""


def write(loop: Loop) -> dict[str, Any]:
    """Evaluate on the validation and test rows, write both files, and return what report.json holds.

    The weights are those of the best evaluation where the configuration restores them; they go to model.pt too.
    Without matplotlib the page has no pictures, and says so.
    """
    best = loop.use_best()
    found = collect(loop, best)
    write_atomic(loop.folder / "model.pt", lambda file: torch.save(loop.model.state_dict(), file))
    text = json.dumps(without_nan(found), indent=1, allow_nan=False)
    write_atomic(loop.folder / "report.json", lambda file: file.write(text.encode()))
    page = render(loop, found)
    write_atomic(loop.folder / "report.html", lambda file: file.write(page.encode()))
    return found


def collect(loop: Loop, best: bool) -> dict[str, Any]:
    """Everything, as JSON holds it but for NaN."""
    progress, config = loop.progress, loop.config
    parts = {"validation": loop.splits.validation, "test": loop.splits.test}
    device = torch.cuda.get_device_name(loop.device) if loop.device.type == "cuda" else platform.machine()
    machine = {"torch": torch.__version__, "python": platform.python_version(), "device": f"{loop.device} {device}"}
    return {
        "architecture": config.model.name,
        "balancing": config.balancing.name,
        "tasks": dict(zip(loop.splits.train.task_names, loop.splits.train.kinds, strict=True)),
        "rows": {name: len(getattr(loop.splits, name)) for name in ("train", "validation", "test")},
        "parameters": sum(p.numel() for p in loop.model.parameters()),
        "steps": progress.step,
        "steps_planned": loop.steps,
        "stopped_early": progress.stopped,
        "weights_of_step": progress.best_step if best else progress.step,
        "seconds": progress.seconds,
        "metrics": {name: loop.evaluate(data) for name, data in parts.items() if len(data)},
        "history": progress.history,
        "config": config.to_dict(),
        "sizes": {**registry.DEFAULTS.get(config.model.name, {}), **config.model.options},
        "machine": machine,
    }


def render(loop: Loop, found: dict[str, Any]) -> str:
    """The page."""
    title = f"{found['architecture']} on {loop.config.data.source}, {found['balancing']}"
    parts = [f"<h1>{html.escape(title)}</h1>", _summary(found)]
    for name in ("test", "validation"):
        if name in found["metrics"]:
            parts += [f"<h2>{name.capitalize()} rows</h2>", _metrics(found["metrics"][name])]
    try:
        from python_models.train.pictures import all_pictures, embedded

        pictures = all_pictures(loop)
    except ModuleNotFoundError as error:
        parts.append(f"<p>No pictures: {html.escape(str(error))}.</p>")
        pictures = {}
    for name, figure in pictures.items():
        parts += [f"<h2>{html.escape(name)}</h2>", f'<img alt="{html.escape(name)}" src="{embedded(figure)}">']
    text = html.escape(json.dumps(without_nan(found["config"]), indent=1))
    parts += ["<h2>Configuration</h2>", f"<pre>{text}</pre>"]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _summary(found: dict[str, Any]) -> str:
    rows = found["rows"]
    ended = "stopped early" if found["stopped_early"] else "as planned"
    if found["steps"] < found["steps_planned"] and not found["stopped_early"]:
        ended = "not finished"
    sentences = [
        f"{rows['train']:,} training, {rows['validation']:,} validation and {rows['test']:,} test rows",
        f"{found['parameters']:,} parameters",
        f"{found['steps']:,} of {found['steps_planned']:,} steps in {found['seconds']:.1f} s ({ended})",
        f"weights of step {found['weights_of_step']:,}",
        f"seed {found['config']['seed']}",
        f"torch {found['machine']['torch']} on {found['machine']['device']}",
    ]
    return "<p>" + html.escape("; ".join(sentences)) + ".</p>"


def _metrics(found: dict[str, Any]) -> str:
    names = list(dict.fromkeys(name for values in found["tasks"].values() for name in values))
    losses = dict(zip(found["tasks"], found["losses"], strict=False))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("task", "loss", *names))
    lines = []
    for task, values in found["tasks"].items():
        cells = [losses.get(task), *(values.get(name) for name in names)]
        numbers = "".join(f'<td class="n">{"" if v is None else f"{v:.5g}"}</td>' for v in cells)
        lines.append(f"<tr><td>{html.escape(task)}</td>{numbers}</tr>")
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(folder: Path) -> dict[str, Any]:
    """A run's report.json."""
    return json.loads((folder / "report.json").read_text())
