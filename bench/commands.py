"""The commands profile, plan and pictures."""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench import calibrate, report, run
from bench.target import Target, keywords, load

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

    target = _target(name, sizes, inputs, arguments, plain, small, dtype, device)
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


def _target(
    name: str, sizes: str, inputs: list[str] | None, arguments: str, plain: bool, small: bool, dtype: str, device: str
) -> Target:
    try:
        if dtype not in ("float32", "bfloat16", "float16", "float64"):
            raise ValueError(f"--dtype: got {dtype!r}, expected float32, bfloat16, float16 or float64")
        options: dict[str, Any] = {"sizes": keywords(sizes, "--sizes"), "inputs": tuple(inputs or ())}
        options |= {"arguments": keywords(arguments, "--arguments"), "plain": plain, "small": small}
        return load(name, **options, dtype=getattr(torch, dtype), device=device)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


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
