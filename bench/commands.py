"""The commands profile, plan and pictures."""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench import calibrate, report, run, sweep
from bench.target import keywords, load

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Name = Annotated[
    str, typer.Argument(help="A network, as in MMoE, or a module of your own: package.module:thing or file.py:thing.")
]
SizesOf = Annotated[str, typer.Option(help="Of a network by name: letters of bench.papers.Sizes, as in E=64,B=1024.")]
Inputs = Annotated[
    list[str] | None,
    typer.Option(help="Of your own module: shape of an input, as in 512,64; 512,8:1000 for whole numbers below 1000."),
]
Arguments = Annotated[str, typer.Option(help="Of your own class or function, as in experts=64,width=32.")]
Plain = Annotated[bool, typer.Option("--plain", help="Of a network by name: the modules that people write.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Small = Annotated[bool, typer.Option("--small", help="Tiny shapes: a dry run of the whole path.")]
Ceilings = Annotated[
    Path | None, typer.Option(help="What calibrate --out wrote, or a file of lines; measured anew without it.")
]


def profile(
    name: Name,
    sizes: SizesOf = "",
    inputs: Inputs = None,
    arguments: Arguments = "",
    plain: Plain = False,
    dtype: Dtype = "float32",
    device: Device = DEVICE,
    ceilings: Ceilings = None,
    seconds: Annotated[float, typer.Option(help="Of timing whole steps.")] = 1.0,
    small: Small = False,
    out: Annotated[Path | None, typer.Option(help="Folder; bench/out/profile-NAME without it.")] = None,
) -> None:
    """One step: trace, roofline of every operator, memory along it, and what to change."""
    from bench import profiled

    options = _options(sizes, inputs, arguments, plain, small, dtype)
    try:
        target = load(name, **options, device=device)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    _, rates = _rates(ceilings, dtype, device, 0.0 if small else 0.5, small)
    found = profiled.profile(target, *rates, seconds=0.0 if small else seconds, rounds=2 if small else 5)
    console = report.console()
    console.print(profiled.table(found))
    print("\nWhat to change\n")
    for i, advice in enumerate(found.advice):
        print(f"{i + 1}. {profiled.words(advice)}\n")
    if not found.advice:
        print("Nothing stands out.\n")
    label = "".join(c if c.isalnum() else "-" for c in Path(target.name).name.replace(", ", "-"))
    for path in profiled.write(found, calibrate.machine(), out or Path(f"bench/out/profile-{label}")):
        print(path)


def pictures(
    paths: Annotated[list[Path], typer.Argument(help="Files of lines, of run or sweep.")],
    out: Annotated[Path, typer.Option(help="Folder.")] = Path("bench/out/report"),
) -> None:
    """Rooflines, bars against rivals, time and memory against experts: PNGs, and one page with all of them."""
    from bench import pictured

    try:
        for path in pictured.write(paths, out):
            print(path)
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from None


def plan(
    name: Name,
    sizes: SizesOf = "",
    inputs: Inputs = None,
    arguments: Arguments = "",
    plain: Plain = False,
    dtype: Dtype = "float32",
    device: Device = DEVICE,
    ceilings: Ceilings = None,
    memory: Annotated[float, typer.Option(help="GiB that a step may take; 0.7 of what is free without it.")] = 0.0,
    rows: Annotated[int, typer.Option(help="Of a slice; found where the step does not fit.")] = 0,
    measure: Annotated[bool, typer.Option(help="Run it too, in slices where it does not fit.")] = True,
    seconds: Annotated[float, typer.Option(help="Of timing.")] = 1.0,
    small: Small = False,
) -> None:
    """Operations, bytes, memory and time of a step on paper, how far it is measured from that, and slices that fit."""
    from bench import planned

    options = _options(sizes, inputs, arguments, plain, small, dtype) | {"name": name, "device": device}
    machine, rates = _rates(ceilings, dtype, device, 0.0 if small else 0.5, small)
    here = calibrate.machine()
    room = memory * 2**30 or 0.7 * sweep.free_bytes(device)
    try:
        whole = planned.plan(options, *rates)
        fits, part = whole.total <= room, None
        if rows or not fits:
            part = planned.plan(options, *rates, rows) if rows else planned.slice_rows(options, whole, room, *rates)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    where = f"{machine['gpu'] if device == 'cuda' else machine['cpu']}, {machine['threads']} threads"
    console = report.console()
    console.print(planned.table(name, whole, *rates, room, where))
    slices = 1
    if part is not None:
        slices = -(-whole.rows // part.rows)
        console.print(planned.table(f"{name}, one of {slices} slices", part, *rates, room, where))
        print(f"\nbackward_in_slices(loss, ..., rows={part.rows})  # mtlkernels.slices: the same gradients")
    elif not fits:
        print(f"\n{planned.TOO_LARGE}")
        raise typer.Exit(1)
    same = all(machine.get(word) == here.get(word) for word in ("gpu", "cpu", "threads"))
    if not measure or not same:
        print("\nnot measured" + ("" if same else f": these are the ceilings of {where}"))
        return
    found = planned.measure(options, part and part.rows, 0.0 if small else seconds)
    print()
    for sentence in planned.against(part or whole, found, slices, whole.inputs if part else 0):
        print(sentence)


def _options(
    sizes: str, inputs: list[str] | None, arguments: str, plain: bool, small: bool, dtype: str
) -> dict[str, Any]:
    """What `load` takes, checked as far as it goes without loading."""
    try:
        if dtype not in ("float32", "bfloat16", "float16", "float64"):
            raise ValueError(f"--dtype: got {dtype!r}, expected float32, bfloat16, float16 or float64")
        options = {"sizes": keywords(sizes, "--sizes"), "arguments": keywords(arguments, "--arguments")}
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return options | {"inputs": inputs or [], "plain": plain, "small": small, "dtype": dtype}


def _rates(
    path: Path | None, dtype: str, device: str, seconds: float, small: bool
) -> tuple[dict[str, Any], tuple[float, float]]:
    """The machine that the ceilings are of, and its GFLOP/s and GB/s."""
    if path is None:
        machine, rows = calibrate.machine(), run.ceilings((dtype,), device, seconds, small)
    else:
        try:
            with path.open() as file:
                text = file.readline() if path.suffix == ".jsonl" else file.read()
            found = json.loads(text)
            machine, rows = found["machine"], found["ceilings"]
        except (OSError, ValueError, KeyError) as error:
            raise typer.BadParameter(f"--ceilings: {path} holds no ceilings: {type(error).__name__} {error}") from None
    try:
        return machine, calibrate.rates(rows, getattr(torch, dtype), machine["threads"])
    except (StopIteration, ValueError, KeyError):
        raise typer.BadParameter(
            f"--ceilings: {path} has no rate of {dtype} with {machine['threads']} threads"
        ) from None
