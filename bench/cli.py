"""The commands run and sweep, and the list of all others."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from bench import calibrate, commands, jobs, report, run, sweep, swept
from bench.__main__ import pass_on, programs
from bench.contest import BACKWARD, BOTH, FORWARD
from bench.lines import REMARK, Lines
from bench.papers import ARCHITECTURES
from bench.record import ResultsFileError
from bench.subjects import available

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="What is measured, and how.",
    rich_markup_mode=None,
    context_settings={"max_content_width": 120},
)
_ROWS = 12  # of the live table


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


Dtypes = Annotated[str, typer.Option(help="Comma-separated.")]
Whats = Annotated[str, typer.Option(help="Of forward, backward (of run) and step, comma-separated.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Seconds = Annotated[float, typer.Option(help="Of timing for each shape and direction; five rounds at least.")]
Memory = Annotated[bool, typer.Option(help="Peak memory, in a process of its own on a CPU.")]
Small = Annotated[bool, typer.Option("--small", help="Tiny shapes: a dry run of the whole path.")]
Again = Annotated[bool, typer.Option("--again", help="Begin the file anew instead of going on with it.")]


@app.command("run")
def run_command(
    operators: Annotated[str, typer.Option(help="As in mix,expert_mix or mix/gated; none for none.")] = "all",
    networks: Annotated[str, typer.Option(help="As in MMoE,PLE; none for none.")] = "all",
    backends: Annotated[str, typer.Option(help="Of ours beside the one chosen, as in native,reference.")] = "",
    shapes: Annotated[
        str, typer.Option(help="default, papers, all, or how a shape's name begins, as in E=.")
    ] = "default",
    rivals: Annotated[
        str, typer.Option(help=f"Beside the plain way: eager, all, or some of {', '.join(map(repr, run.RIVALS))}.")
    ] = "eager",
    dtype: Dtypes = "float32",
    what: Whats = "forward,step",
    device: Device = DEVICE,
    seconds: Seconds = 1.0,
    memory: Memory = False,
    small: Small = False,
    again: Again = False,
    out: Annotated[Path, typer.Option(help="The file of lines.")] = Path("bench/out/run.jsonl"),
) -> None:
    """Operators and networks beside their rivals, with a live table."""
    try:
        taken = run.chosen(operators, [subject.name for subject in available()], "--operators")
        nets = run.chosen(networks, list(ARCHITECTURES), "--networks")
        wanted = {"eager": run.EAGER, "all": run.RIVALS}.get(rivals) or _some(rivals, run.RIVALS, "--rivals")
        whats, dtypes = _whats(what, (FORWARD, BACKWARD, BOTH)), _dtypes(dtype)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    lines = _lines(out, "run", dtypes, device, seconds, small, again)
    common = {"device": device, "memory": memory, "ceilings": lines.ceilings, "dtypes": dtypes, "whats": whats}
    common |= {"seconds": 0.0 if small else seconds, "min_rounds": 2 if small else 5, "small": small}
    own = tuple(filter(None, backends.split(",")))
    todo = list(run.operator_jobs(taken, shapes, wanted, backends=own, **common))
    todo += run.network_jobs(nets, shapes, wanted, **common)
    status = _watch(todo, lines, lambda: run.table(_of(todo, lines), _ROWS))
    report.console().print(run.table(_of(todo, lines)))
    raise typer.Exit(_end(status, todo, lines))


@app.command("sweep")
def sweep_command(
    experts: Annotated[str, typer.Option(help="8:1024 doubles, 8:1024:4 quadruples, 8,32 takes two; 32 stays.")] = "",
    tasks: Annotated[str, typer.Option(help="As --experts.")] = "",
    batch: Annotated[str, typer.Option(help="As --experts.")] = "",
    width: Annotated[str, typer.Option(help="Outputs of an expert, as --experts.")] = "",
    features: Annotated[int, typer.Option(help="Inputs.")] = sweep.BASE["K"],
    backends: Annotated[str, typer.Option(help="Of ours beside the one chosen, as in native,reference.")] = "",
    rivals: Annotated[
        str, typer.Option(help=f"modules, all, or some of {', '.join(map(repr, swept.ALL[2:]))}.")
    ] = "modules",
    dtype: Dtypes = "float32",
    what: Whats = "forward,step",
    device: Device = DEVICE,
    seconds: Seconds = 1.0,
    memory: Memory = True,
    small: Small = False,
    again: Again = False,
    out: Annotated[Path, typer.Option(help="The file of lines.")] = Path("bench/out/sweep.jsonl"),
) -> None:
    """Time and memory against the numbers of experts, tasks and rows, and against the width."""
    given = {"experts": experts, "tasks": tasks, "batch": batch, "width": width}
    try:
        axes = {axis: sweep.points(text, f"--{axis}") for axis, text in given.items() if text}
        if all(len(ats) == 1 for ats in axes.values()):
            axes["experts"] = sweep.points("8:1024", "--experts")
        others = {"modules": (swept.MODULES,), "all": swept.ALL[2:]}.get(rivals) or _some(rivals, swept.ALL, "--rivals")
        whats, dtypes = _whats(what, (FORWARD, BOTH)), _dtypes(dtype)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    ours = swept.VARIANTS[:2]
    variants = (
        ours + tuple(f"{name}, {backend}" for backend in filter(None, backends.split(",")) for name in ours) + others
    )
    base = sweep.BASE | {"K": features}
    if small:
        base, axes = {"B": 24, "T": 2, "E": 4, "K": 12, "N": 8}, {axis: ats[:3] for axis, ats in axes.items()}
    lines = _lines(out, "sweep", dtypes, device, seconds, small, again)
    options = {"dtypes": dtypes, "device": device, "whats": whats, "memory": memory}
    options |= {"seconds": 0.0 if small else seconds, "min_rounds": 2 if small else 5}
    rates = lambda dtype: calibrate.rates(lines.ceilings, dtype)  # noqa: E731
    todo = list(sweep.jobs(sweep.plan(base, axes), variants, rates=rates, **options))
    status = _watch(todo, lines, lambda: _sweep_tables(_of(todo, lines)))
    console, found = report.console(), _of(todo, lines)
    console.print(_sweep_tables(found))
    for name in dict.fromkeys(entry["dtype"] for entry in found):
        own = [entry for entry in found if entry["dtype"] == name]
        console.print(sweep.growth_table(own))
        crossed = sweep.crossover_lines(own) or ["no variant overtakes another within what was swept"]
        for sentence in sweep.each_lines(own) + crossed:
            console.print(sentence, markup=False, highlight=False)
    raise typer.Exit(_end(status, todo, lines))


def _sweep_tables(figures: list[dict[str, Any]]) -> Group:
    pairs = dict.fromkeys((entry["axis"], entry["what"], entry["dtype"]) for entry in figures)
    return Group(*(sweep.table([e for e in figures if e["dtype"] == dtype], *pair) for *pair, dtype in pairs))


def _of(todo: list[jobs.Job], lines: Lines) -> list[dict[str, Any]]:
    """The figures of these jobs: the file may hold others."""
    wanted = [(job.about, job.variants) for job in todo]
    return [
        entry
        for entry in lines.figures
        if any(entry["variant"] in variants and about.items() <= entry.items() for about, variants in wanted)
    ]


def _watch(todo: list[jobs.Job], lines: Lines, draw: Callable[[], Any]) -> int:
    """Works the jobs off under a live table; without a terminal, a line a job."""
    console, began = Console(), time.perf_counter()
    left = [job for job in todo if not job.done(lines)]
    if len(left) < len(todo):
        print(f"{lines.path} has {len(todo) - len(left)} of {len(todo)} already")
    if not console.is_terminal:
        return jobs.work_off(todo, lines, lambda title: print(title, flush=True) if title else None)
    with Live(console=console, auto_refresh=False, transient=True) as live:  # no thread beside what is timed

        def show(title: str) -> None:
            done = sum(job.done(lines) for job in todo)
            at = f"{done} of {len(todo)}, {time.perf_counter() - began:.0f} s: {title}"
            live.update(Group(draw(), Text(at)), refresh=True)

        return jobs.work_off(todo, lines, show)


def _end(status: int, todo: Iterable[jobs.Job], lines: Lines) -> int:
    """Says what is missing, and where the rest is; 1 where ours is wrong or failed."""
    about = [job.about for job in todo]
    said = [
        entry for entry in lines.records if entry["kind"] == REMARK and any(a.items() <= entry.items() for a in about)
    ]
    noted = [(entry["variant"], entry["text"]) for entry in said]
    noted += [(entry["variant"], entry["note"]) for entry in lines.figures if entry.get("note")]
    for variant, text in dict.fromkeys(noted):
        print(f"{variant}: {text}")
    if status == jobs.STOPPED:
        print("stopped: what was measured is kept, and the same command goes on")
    print(lines.path)
    failed = [entry for entry in said if entry["variant"] in ("ours", swept.EXPERT_MIX)]
    wrong = [entry for entry in lines.figures if entry["ours"] and not entry["check"]["ok"]]
    return status or (1 if failed or wrong else 0)


def _lines(
    out: Path, program: str, dtypes: tuple[str, ...], device: str, seconds: float, small: bool, again: bool
) -> Lines:
    seconds = 0.0 if small else seconds
    try:
        return Lines(out, program, calibrate.machine(), lambda: run.ceilings(dtypes, device, seconds, small), again)
    except ResultsFileError as error:
        raise typer.BadParameter(str(error)) from None


def _some(words: str, there: tuple[str, ...], option: str) -> tuple[str, ...]:
    """Those of `there` that are named. A name may hold a comma itself."""
    rest, found = words, set()
    for name in sorted(there, key=len, reverse=True):  # one may begin as another does
        if name in rest:
            found.add(name)
            rest = rest.replace(name, "")
    if rest.strip(", ") or not found:
        raise ValueError(f"{option}: got {words!r}, expected some of {', '.join(there)}")
    return tuple(name for name in there if name in found)


def _whats(words: str, there: tuple[str, ...]) -> tuple[str, ...]:
    return _some(words.replace("step", BOTH), there, "--what")


def _dtypes(words: str) -> tuple[str, ...]:
    return _some(words, ("float32", "bfloat16", "float16", "float64"), "--dtype")


def _add(name: str, what: str) -> None:
    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

    @app.command(name, help=what, context_settings=settings)
    def program(context: typer.Context) -> None:
        pass_on(name, context.args)


for _command in (commands.profile, commands.plan, commands.pictures):
    app.command()(_command)
for _name, _what in programs().items():
    _add(_name, _what)
