"""Latency of a served network: a C++ program without Python beside eager and torch.compile, 1 to 1,024 rows.

    python -m bench.latency --prepare            compiles the program and the packages, and stops
    python -m bench.latency [--record FILE]      measures, prints the table, writes JSON
    python -m bench.latency --page docs/serving.md --record FILE --again    writes a record's table into the page

The program (`bench/serve.cpp`) first makes all calls from several threads at once, and ends with an error where an
output differs by a bit from that of the call made alone. Then it and the Python variants take turns, size by size: how
far its own rounds lie apart is the control. All outputs are held to the network in float64. Medians over the rounds, in
evaluation, without gradients; a call's own threads are torch's (OMP_NUM_THREADS).
"""

import argparse
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mtlkernels as mtl
from bench import calibrate
from bench.timing import interleaved, is_noisy, summarise
from python_models import AdaTT, MMoE, MultiTaskModel, Towers

SOURCE = Path(__file__).with_name("serve.cpp")
ROWS = tuple(2**i for i in range(11))
SERVED, COMPILED, EAGER = "C++", "torch.compile", "eager"
ROUNDS = 5  # in each of which everything has its turn
TASKS, IN, DIMS = 4, 256, (256, 128)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "AdaTT": lambda: AdaTT(IN, TASKS, 2, 0, [list(DIMS)]),
    "MMoE": lambda: MMoE(IN, TASKS, 2 * TASKS, [list(DIMS)]),
}
BEGIN, END = "<!-- made by python -m bench.latency -->", "<!-- end of it -->"


def program(folder: Path) -> Path:
    """Compiles `bench/serve.cpp`."""
    torch_at, found = Path(torch.__path__[0]), folder / "serve"
    command = ["c++", "-std=c++20", "-O2", str(SOURCE), "-o", str(found), "-I", str(torch_at / "include")]
    command += ["-L", str(torch_at / "lib"), f"-Wl,-rpath,{torch_at / 'lib'}", "-Wl,--no-as-needed"]
    _run([*command, "-ltorch", "-ltorch_cpu", "-lc10", "-pthread"])
    return found


def network(name: str) -> MultiTaskModel:
    """One of `NETWORKS` under towers with a hidden layer, the same at every call."""
    torch.manual_seed(0)
    return MultiTaskModel(NETWORKS[name](), Towers(DIMS[-1], TASKS, [32])).eval()


@torch.no_grad()
def package(model: nn.Module, call: Sequence[Tensor], path: Path) -> None:
    """The model as an AOTInductor package, for any number of rows."""
    rows = torch.export.Dim("rows")
    exported = torch.export.export(model, tuple(call), dynamic_shapes=tuple({0: rows} for _ in call))
    torch._inductor.aoti_compile_and_package(exported, package_path=str(path))


def served(
    serve: Path, packaged: Path, calls: Sequence[Sequence[Tensor]], threads: int, seconds: float
) -> tuple[list[tuple[Tensor, ...]], dict[str, Any]]:
    """What the program makes of the calls, and what it prints; its environment is empty but for the threads.

    Raises RuntimeError with its words where it fails, as it does where threads got another output.
    """
    at = packaged.with_suffix("")
    asked, answered = Path(f"{at}-calls.pt"), Path(f"{at}-outputs.pt")
    torch.save(tuple(tuple(call) for call in calls), asked)
    command = [serve, mtl.build_info()["library"], packaged, asked, answered, threads, seconds]
    environment = {k: v for k, v in os.environ.items() if k == "OMP_NUM_THREADS"}
    said = _run([str(word) for word in command], env=environment)
    return torch.load(answered), json.loads(said)


def _run(command: list[str], **options: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stderr[-2000:]}{done.stdout[:200]}")
    return done.stdout


def measure(name: str, folder: Path, rows: Sequence[int], threads: int, seconds: float) -> dict[str, Any]:
    """One network's record: {network, threads, calls, rows: [{rows, ms of each variant, control}]}."""
    model, clock = network(name), Others()
    generator = torch.Generator().manual_seed(1)
    calls = [(torch.randn(n, IN, generator=generator),) for n in rows]
    packaged, serve = folder / f"{name}.pt2", folder / "serve"
    compiled = torch.compile(model, dynamic=True)
    found, at_once = served(serve, packaged, calls, threads, seconds)
    lines = []
    with torch.inference_mode():
        exact = network(name).double()
        for (x,), outputs in zip(calls, found, strict=True):
            expected = exact(x.double()).float()
            for output in (outputs[0], model(x), compiled(x)):
                torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        for (x,) in calls:
            variants = {EAGER: lambda x=x: model(x), COMPILED: lambda x=x: compiled(x)}
            medians: dict[str, list[float]] = {key: [] for key in (SERVED, *variants)}
            for _ in range(ROUNDS):
                _, alone = served(serve, packaged, [(x,)], 1, seconds / ROUNDS)
                medians[SERVED].append(summarise(alone["times"][0]).median)
                python = interleaved(variants, seconds=2 * seconds / ROUNDS, warmup_seconds=seconds / ROUNDS / 4)
                for key, timing in python.items():
                    medians[key].append(timing.median)
            ms = {key: summarise(each).as_ms() for key, each in medians.items()}
            lines.append({"rows": len(x), "ms": ms, "control": max(medians[SERVED]) / min(medians[SERVED]) - 1})
    return {"network": name, "threads": threads, "calls": at_once["calls"], "others": clock.share(), "rows": lines}


class Others:
    """How much of the processors other programs take from now on, where /proc says so."""

    def __init__(self) -> None:
        self._wall, self._busy, self._own = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float]:
        own = os.times()
        try:
            words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return time.perf_counter(), 0.0, sum(own[:4])
        user, nice, system, _, _, interrupts, soft, stolen = map(float, words)
        busy = (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy, sum(own[:4])

    def share(self) -> float:
        """Of all cores together, 0 to 1, since the start."""
        wall, busy, own = (b - a for a, b in zip((self._wall, self._busy, self._own), self._read(), strict=True))
        return max(0.0, busy - own) / (wall * (os.cpu_count() or 1))


def table(record: dict[str, Any]) -> str:
    """The record in Markdown: a table a network, in microseconds."""
    machine, parts = record["machine"], []
    for part in record["networks"]:
        parts.append(
            f"{part['network']}, microseconds; {machine['cpu']}, {machine['threads']} threads, torch "
            f"{machine['torch']}. {part['calls']:,} calls from {part['threads']} threads at once equalled those made "
            f"alone, bit for bit. Other programs took {part['others']:.0%} of the processors.\n"
        )
        parts.append(f"| rows | {SERVED} | `{COMPILED}` | {EAGER} |\n|---:|---:|---:|---:|")
        for line in part["rows"]:
            ours, noisy = line["ms"][SERVED]["median"], "~" if is_noisy(line["control"]) else ""
            cells = [f"{noisy}{1e3 * ours:,.0f}"]
            for name in (COMPILED, EAGER):
                other = line["ms"][name]["median"]
                cells.append(f"{1e3 * other:,.0f} ({other / ours:.2f}x)")
            parts.append(f"| {line['rows']:,} | {' | '.join(cells)} |")
        parts.append("")
    parts.append("`~`: the program's runs, in turns with the others, lay more than 5 % apart.")
    return "\n".join(parts)


def put(page: Path, text: str) -> None:
    """Replaces what stands between the page's two marks."""
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


def main() -> None:
    """Compiles, measures, prints the table, writes JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.latency", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("bench/out/latency"), help="for the program and packages")
    parser.add_argument("--prepare", action="store_true", help="compile them and stop")
    parser.add_argument("--prepared", action="store_true", help="they are there: only measure")
    parser.add_argument("--small", action="store_true", help="a few rows and calls: a dry run of the whole path")
    parser.add_argument("--networks", default=",".join(NETWORKS), help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=4, help="that call the program's network at once")
    parser.add_argument("--seconds", type=float, default=0.25, help="of timing for each size and variant")
    parser.add_argument("--record", type=Path, default=Path("bench/out/latency.json"))
    parser.add_argument("--again", action="store_true", help="read --record instead of measuring")
    parser.add_argument("--page", type=Path, help="the page whose table to replace")
    args = parser.parse_args()
    names = args.networks.split(",")
    if args.again:
        record = json.loads(args.record.read_text())
    else:
        if not shutil.which("c++") or not mtl.build_info()["loaded"]:
            parser.error("needs a C++ compiler, c++, and the compiled operators")
        args.folder.mkdir(parents=True, exist_ok=True)
        if not args.prepared:
            program(args.folder)
            for name in names:
                package(network(name), [torch.zeros(8, IN)], args.folder / f"{name}.pt2")
            if args.prepare:
                return
        rows, seconds = ((1, 3), 0.01) if args.small else (ROWS, args.seconds)
        parts = [measure(name, args.folder, rows, args.threads, seconds) for name in names]
        record = {"machine": calibrate.machine(), "seconds": seconds, "networks": parts}
        args.record.parent.mkdir(parents=True, exist_ok=True)
        args.record.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))
    if args.page:
        put(args.page, table(record))


if __name__ == "__main__":
    main()
