"""Every architecture's training step beside the same network as people write it.

    python -m bench.architectures [--quick] [--only MMoE,PLE] [--dtype float32,bfloat16] [--sizes T=8,B=1024]
        [--compile] [--repository] [--markdown]

Forward and backward, x [B,K] with gradient, without the optimizer and without the architectures' penalties; ESMM with
its loss. Both have the same weights and data. A ratio is shown only where output, gradient of x and gradients of all
parameters of both agreed, in the same run, with the plain network in float64. The number of parameters has to be that
of the formula, which is computed as it is printed.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench import adatt_repo, calibrate, contest, libraries, record, report
from bench.contest import AUTOTUNED, BACKWARD, BOTH, COMPILED, OURS, Contestant
from bench.cost import all_flops, floor, watched
from bench.libraries import LIBRARIES
from bench.memory import peak_memory
from bench.papers import ADATT_REPOSITORY, ARCHITECTURES, TINY, Sizes, about
from bench.rivals import Batched, levels_of, value
from bench.subjects import BATCHED, PLAIN
from bench.timing import AGAIN, control_difference, interleaved

SEED = 1  # of what is drawn in the step that is checked
# facebookresearch/AdaTT's structures, and the same over unbind (`bench.adatt_repo`).
REPOSITORY = {"AdaTT repo": adatt_repo.SLICES, "AdaTT repo, unbind": adatt_repo.UNBIND}


def rivals_of(name: str) -> tuple[str, ...]:
    """Every rival there is of an architecture; a library may be missing here (`bench.libraries.missing`)."""
    more = {"MMoE": (BATCHED, *LIBRARIES), "AdaTT-sp": (BATCHED,)}
    repository = REPOSITORY if name in ADATT_REPOSITORY else ()
    return (PLAIN, COMPILED, AUTOTUNED, *more.get(name, ()), *repository)


def contestants(
    name: str, sizes: Sizes, dtype: torch.dtype, device: str, rivals: tuple[str, ...] = ()
) -> dict[str, Contestant]:
    """Ours, the plain network and these `rivals` of it, with equal weights and data.

    Raises ValueError for a rival that the architecture does not have.
    """
    if unknown := set(rivals) - set(rivals_of(name)):
        raise ValueError(f"rivals: got {', '.join(sorted(unknown))}, expected some of {', '.join(rivals_of(name))}")
    found = ARCHITECTURES[name]
    torch.manual_seed(0)
    ours = found.make(sizes)
    with torch.no_grad():
        for parameter in ours.parameters():  # what starts at 0 or 1 would let a wrong network pass
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    ours.to(device, dtype)
    rival = found.rival(ours)
    extras = tuple(t.to(device) for t in found.extras(sizes))
    x = torch.randn(sizes.B, sizes.K).to(device, dtype)
    run = found.run or nn.Module.__call__
    with torch.no_grad():
        grad = torch.randn_like(run(ours, x, *extras))
    exact = copy.deepcopy(rival).double()
    x, grad = away_from_kinks(lambda x: exact(x.double(), *extras), x, grad)
    calls = {OURS: (ours, lambda x: run(ours, x, *extras)), PLAIN: (rival, lambda x: rival(x, *extras))}
    torch._dynamo.reset()
    for who in rivals:
        if who in (COMPILED, AUTOTUNED):
            network = copy.deepcopy(rival)
            fast = contest.compiled(network, who)
            calls[who] = (network, lambda x, fast=fast: fast(x, *extras))
        elif who in REPOSITORY:
            network = adatt_repo.build(ours, REPOSITORY[who])
            calls[who] = (network, network)
        elif who != PLAIN:
            levels = levels_of(ours, value)
            network = Batched(levels) if who == BATCHED else libraries.build(who, levels[0])
            calls[who] = (network, network)
    return {who: Contestant(network, call, x.clone().requires_grad_(), grad) for who, (network, call) in calls.items()}


class Kinks(TorchDispatchMode):
    """Notes the rows in which what a ReLU reads is nearer to zero than rounding in float32 may move it."""

    def __init__(self, rows: int, margin: float = 1e-5) -> None:
        super().__init__()
        self.near, self.margin, self.picked = torch.zeros(rows, dtype=torch.bool), margin, None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten.index_select.default:
            self.picked = args[2]  # of a network that takes a domain's rows at a time
        if func is torch.ops.aten.relu.default:
            near = (args[0].abs() < self.margin).any(-1).cpu()
            if len(near) % len(self.near):
                self.near[self.picked.cpu()] |= near
            else:
                self.near |= near.view(-1, len(self.near)).any(0)
        return func(*args, **kwargs or {})


def away_from_kinks(network: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """x and grad, with no gradient from above for rows near a ReLU's kink, where it is there or not as rounding falls.

    Where grad is that of a loss, these rows of x are copies of others.
    """
    torch.manual_seed(SEED)
    with torch.no_grad(), Kinks(len(x)) as kinks:
        network(x)
    near = kinks.near.to(x.device)
    if grad.dim():
        return x, grad.masked_fill(near.view(-1, *[1] * (grad.dim() - 1)), 0)
    x = x.clone()
    x[near] = x[~near][: int(near.sum())]
    return x, grad


def results(contestant: Contestant) -> dict[str, Tensor]:
    """Output and gradients of a step. Those of the parameters are sorted: no two networks lay them out alike."""
    torch.manual_seed(SEED)
    out = contestant.step().detach()
    gradients = [p.grad.flatten() for p in contestant.network.parameters() if p.requires_grad]
    found = {"output": out, "x": contestant.x.grad, "parameters": torch.cat(gradients).double().sort().values}
    contestant.release()
    return found


def truth(name: str, sizes: Sizes, of: Contestant) -> dict[str, Tensor]:
    """The results of the plain network `of` in float64."""
    network = copy.deepcopy(of.network).double()
    extras = tuple(t.to(of.x.device) for t in ARCHITECTURES[name].extras(sizes))
    x = of.x.detach().double().requires_grad_()
    return results(Contestant(network, lambda x: network(x, *extras), x, of.grad.double()))


def measure(
    name: str,
    sizes: Sizes = Sizes(),  # noqa: B008 - frozen
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seconds: float = 8.0,
    min_rounds: int = 5,
    rivals: tuple[str, ...] = (),
    what: str = BOTH,
    ceilings: list[dict[str, Any]] | None = None,
    memory: bool | tuple[str, ...] = False,
) -> dict[str, Any]:
    """Checks and times one architecture: {architecture, dtype, what, ms, ratio, check, first_step_s, parameters, ...}.

    A ratio is a rival's time over ours, None unless both checks are green, of output and gradients whatever `what` is.
    flops and bytes are those of ours; of the bytes, those of our operators alone, which do nearly all there is.
    """
    with torch._functorch.config.patch(donated_buffer=what != BACKWARD):  # else Inductor's backward runs once only
        found = contestants(name, sizes, dtype, device, rivals)
        expected = truth(name, sizes, found[PLAIN])
        first = contest.first_steps(found, name)
        checks = {who: contest.compare(results(contestant), expected, dtype) for who, contestant in found.items()}
        steps = {who: contestant.work(what) for who, contestant in found.items()}
        timing = {"seconds": seconds, "warmup_seconds": seconds / 10, "min_rounds": min_rounds, "device": device}
        times = interleaved(steps, **timing, control=OURS)
    chosen, spent = watched(steps[OURS])
    spent = spent and spent._replace(flops=all_flops(steps[OURS]))
    least = None if ceilings is None else floor(spent, *calibrate.rates(ceilings, dtype))
    counted = (OURS, PLAIN, *(who for who in rivals if who in REPOSITORY))
    counts = {who: sum(p.numel() for p in found[who].network.parameters()) for who in counted}
    green = {who: checks[who].ok and checks[OURS].ok for who in found}
    weighed = [who for who in found if memory is True or who in (memory or ())]
    label = {"name": name, "sizes": asdict(sizes), "dtype": str(dtype).removeprefix("torch."), "device": device}
    return {
        "architecture": name,
        "dtype": label["dtype"],
        "device": device,
        "sizes": label["sizes"],
        "what": what,
        "backend": chosen,
        "ms": {who: timing.as_ms() for who, timing in times.items() if not who.endswith(AGAIN)},
        "ratio": {w: times[w].median / times[OURS].median if green[w] else None for w in found if w != OURS},
        "check": {who: asdict(check) for who, check in checks.items()},
        "first_step_s": first,
        "control_difference": control_difference(times, OURS),
        "parameters": counts | {"formula": ARCHITECTURES[name].count(sizes)},
        "flops": spent and spent.flops,
        "bytes": spent and spent.bytes,
        "floor_ms": least and least.ms,
        "floor_by": least and least.by,
        "share": least and least.ms / (times[OURS].median * 1e3),
        "peak_mib": {who: step_memory(label, who, what) for who in weighed} if weighed else None,
    }


def step_memory(label: dict[str, Any], who: str, what: str) -> float | None:
    """MiB at the peak of one call, above what stays between calls. label: name, sizes, dtype and device."""
    words = label | {"who": who, "what": what}
    return peak_memory("bench.architectures:build_step", words, device=label["device"], timeout=600)


def build_step(
    name: str, sizes: dict[str, int], dtype: str, device: str, who: str, what: str
) -> tuple[Callable[[], Any], Callable[[], None]]:
    """A step and its release, for `bench.memory`."""
    rivals = () if who in (OURS, PLAIN) else (who,)
    with torch._functorch.config.patch(donated_buffer=what != BACKWARD):
        found = contestants(name, Sizes(**sizes), getattr(torch, dtype), device, rivals)[who]
        work = found.work(what)
        work()
    return work, found.release


def sizes_of(words: str, sizes: Sizes) -> Sizes:
    """`sizes` with the letters of "T=8,B=1024" changed; ValueError for another letter or no number of at least 1."""
    changes = {}
    for word in filter(None, words.split(",")):
        letter, _, size = word.partition("=")
        if letter not in asdict(sizes) or not size.isdigit() or int(size) < 1:
            raise ValueError(f"--sizes: got {word!r}, expected one of {', '.join(asdict(sizes))} and a number, as T=8")
        changes[letter] = int(size)
    return replace(sizes, **changes)


def main() -> int:
    """Measures, prints a table, writes JSON; 1 where a check failed or a number of parameters is wrong, else 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.architectures", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds: for a look, not for a figure to keep")
    parser.add_argument("--small", action="store_true", help="networks of a few numbers: a dry run of the whole path")
    parser.add_argument("--only", help="comma-separated (default: all there are)")
    parser.add_argument("--dtype", default="float32", help="comma-separated (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the plain network too")
    parser.add_argument(
        "--repository", action="store_true", help="the structures of facebookresearch/AdaTT alone, and ours beside them"
    )
    parser.add_argument("--sizes", default="", help="letters of the sizes that differ from the default, as T=8,B=1024")
    parser.add_argument("--seconds", type=float, default=8.0, help="for each network (default: %(default)s)")
    parser.add_argument("--markdown", action="store_true", help="print the README's table too")
    parser.add_argument("--out", type=Path, default=Path("bench/out/architectures.json"))
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(ADATT_REPOSITORY if args.repository else ARCHITECTURES)
    if unknown := sorted(set(names) - set(ARCHITECTURES)):
        parser.error(f"no {', '.join(unknown)}; there are {', '.join(ARCHITECTURES)}")
    if args.repository and (unknown := sorted(set(names) - set(ADATT_REPOSITORY))):
        parser.error(f"facebookresearch/AdaTT has no {', '.join(unknown)}; it has {', '.join(ADATT_REPOSITORY)}")
    try:
        sizes = sizes_of(args.sizes, TINY if args.small else Sizes())
    except ValueError as error:
        parser.error(str(error))
    console, began = report.console(), time.perf_counter()
    rivals = ((COMPILED,) if args.compile else ()) + (tuple(REPOSITORY) if args.repository else ())
    options = {"device": args.device, "rivals": rivals, "sizes": sizes}
    options |= {"seconds": 0.0 if args.small else 1.0 if args.quick else args.seconds}
    options |= {"min_rounds": 2 if args.small or args.quick else 5}
    result: dict[str, Any] = {"machine": calibrate.machine(), "quick": args.quick, **record.sources(), "rows": []}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for dtype in args.dtype.split(","):
        for name in names:
            result["rows"].append(measure(name, dtype=getattr(torch, dtype), **options) | {"about": about(name)})
            args.out.write_text(json.dumps(result, indent=1) + "\n")  # a run that is cut off leaves what it has
        shown = tuple(REPOSITORY) if args.repository else (PLAIN, COMPILED)
        console.print(report.architecture_table([row for row in result["rows"] if row["dtype"] == dtype], shown))
    if args.markdown:
        tables = [report.architecture_markdown(result["rows"])]
        if args.repository:
            tables = [report.repository_markdown(result["rows"], tuple(REPOSITORY))]
        print(*tables, sizes.legend, sep="\n\n")
    console.print(f"{args.out}, {time.perf_counter() - began:.0f} s")
    rows = result["rows"]
    wrong = [row for row in rows if not all(check["ok"] for check in row["check"].values())]
    return 1 if wrong or any(len(set(row["parameters"].values())) > 1 for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
