"""Every operator beside its plain formula and, where there is one, the natural plain way to compute the same.

    python -m bench.operators [--quick] [--only mix,expert_mix] [--dtype float32,bfloat16] [--out FILE]

Forward is without gradients, as in serving; fwd + bwd is what training pays. A time is set against ours only if output
and gradients of both agreed with float64 in the same run. "share" is the least time that the machine's measured copy
bandwidth and matrix products allow for the call, over ours. The operands rotate, so that each call finds its own
outside the L2 cache, and on a GPU what can be is replayed as a CUDA graph.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mtlkernels as mtl
from bench import calibrate, report
from bench.contest import AUTOTUNED, BACKWARD, BOTH, COMPILED, FORWARD, LIMITS, OURS, Check, compiled, relative_error
from bench.cost import floor, nbytes, watched
from bench.graphs import captured, captured_later, copies_for
from bench.memory import MIB, peak_memory
from bench.shapes import SHAPES, SWEEP, tiny
from bench.subjects import EAGER, FORMULA, SUBJECTS, Draw, Operands, Shape, Subject, available, find
from bench.timing import control_difference, interleaved

Call = Callable[[Operands], Tensor]


def on_backend(subject: Subject, name: str) -> Call:
    """The subject's call on the backend of this name."""

    def call(operands: Operands) -> Tensor:
        with mtl.use_backend(name):
            return subject.call(operands)

    return call


def variants(subject: Subject) -> dict[str, Call]:
    """Ours on the backend that auto takes, the formula of the reference backend, and the subject's rival."""
    found = {OURS: on_backend(subject, "auto"), FORMULA: on_backend(subject, "reference")}
    return found if subject.rival is None else found | {subject.rival[0]: subject.rival[1]}


def rivals_of(subject: Subject) -> tuple[str, ...]:
    """Rivals that are measured where they are asked for, beside those of `variants`."""
    return (*EAGER.get(subject.op, {}), COMPILED, AUTOTUNED)


def can_run(subject: Subject, backend: str, operands: Operands) -> bool:
    """Whether the backend takes these operands; errors other than its refusal come through."""
    try:
        with torch.no_grad():
            on_backend(subject, backend)(copied(operands))
    except ValueError as error:
        if "cannot run" in str(error):
            return False
        raise
    return True


def copied(operands: Operands, leaves: tuple[str, ...] = (), dtype: torch.dtype | None = None) -> Operands:
    """The operands with tensors of their own, floating ones in `dtype`; `leaves` want their gradients."""
    found = {}
    for name, value in operands.items():
        if isinstance(value, Tensor):
            value = value.detach().clone()
            value = value.to(dtype) if dtype is not None and value.is_floating_point() else value
            value.requires_grad_(name in leaves)
        found[name] = value
    return found


def step(call: Call, operands: Operands, leaves: tuple[str, ...], grad: Tensor, what: str) -> Callable[[], Any]:
    """One call, one call and its gradients, or the gradients of one call again and again."""
    if what == BACKWARD:
        with captured_later(grad.device):
            out = call(operands)
        wanted = [operands[name] for name in leaves]
        return lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True)

    def forward() -> Tensor:
        with torch.no_grad():
            return call(operands)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(operands), [operands[name] for name in leaves], grad)

    return forward if what == FORWARD else both


def check(call: Call, operands: Operands, grad: Tensor, expected: list[Tensor], subject: Subject) -> Check:
    """Output and gradients of `call` against `expected`, those of float64."""
    found = results(call, copied(operands, subject.leaves), grad, subject.leaves[: len(expected) - 1])
    limits = LIMITS[operands[subject.leaves[0]].dtype]
    output, *gradients = [relative_error(f, e) for f, e in zip(found, expected, strict=True)]
    worst, name = max(zip(gradients, subject.leaves, strict=False), default=(0.0, ""))
    return Check(output, worst, name, output <= limits[0] and worst <= limits[1])


def results(call: Call, operands: Operands, grad: Tensor, leaves: tuple[str, ...]) -> list[Tensor]:
    """Output, and the gradients of `leaves`; without these nothing is kept for a backward pass."""
    with torch.set_grad_enabled(bool(leaves)):
        out = call(operands)
    if not leaves:
        return [out]
    return [out, *torch.autograd.grad(out, [operands[name] for name in leaves], grad.to(out.dtype))]


def truth(subject: Subject, operands: Operands, grad: Tensor, whats: tuple[str, ...] = (FORWARD, BOTH)) -> list[Tensor]:
    """Output and, where they are measured, gradients by the plain formula in float64."""
    leaves = subject.leaves if set(whats) - {FORWARD} else ()
    exact = copied(operands, leaves, torch.float64)
    return results(on_backend(subject, "reference"), exact, grad, leaves)


def prepare(subject: Subject, shape: Shape, dtype: torch.dtype, device: str) -> tuple[Operands, Tensor]:
    """Operands, and a gradient of the output's shape."""
    draw = Draw(dtype, device)
    operands = subject.make(shape, draw)
    with torch.no_grad(), mtl.use_backend("reference"):
        out = subject.call(copied(operands))
    return operands, torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device, out.dtype)


def measure(
    subject: Subject,
    shape: Shape,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seconds: float = 1.0,
    min_rounds: int = 5,
    ceilings: list[dict[str, Any]] | None = None,
    backends: tuple[str, ...] = (),
    memory: bool | tuple[str, ...] = False,
    whats: tuple[str, ...] = (FORWARD, BOTH),
    rivals: tuple[str, ...] = (),
) -> list[dict[str, Any]]:
    """One row for each of `whats`: forward, backward, or both; ValueError or TypeError where ours refuses the operands.

    backends: those of ours to measure as well, each where it can run, beside the one that auto takes. rivals: of
    `rivals_of` the subject; of these COMPILED and AUTOTUNED are the natural plain way under torch.compile, and left out
    where it cannot be compiled. memory: the peak memory of all variants, or of these.
    """
    operands, grad = prepare(subject, shape, dtype, device)
    expected = truth(subject, operands, grad, whats)
    calls = variants(subject)
    calls |= {name: on_backend(subject, name) for name in backends if can_run(subject, name, operands)}
    calls |= {name: call for name, call in EAGER.get(subject.op, {}).items() if name in rivals}
    with torch._functorch.config.patch(donated_buffer=BACKWARD not in whats):  # else they run backward once only
        calls |= _compiled(calls, rivals, operands, grad, subject)
    checks = {name: check(call, operands, grad, expected, subject) for name, call in calls.items()}
    sets = [copied(operands, subject.leaves) for _ in range(copies_for(nbytes(operands), device))]
    label = {"op": subject.op, "form": subject.form, "shape": shape, "device": device}
    label |= {"dtype": str(dtype).removeprefix("torch.")}
    weighed = [name for name in calls if memory is True or name in (memory or ())]
    rows = []
    for what in whats:
        steps, modes = {}, {}
        for name, call in calls.items():
            each = [step(call, own, subject.leaves, grad, what) for own in sets]
            steps[name], modes[name] = captured(each, device)
        times = interleaved(
            steps,
            seconds=seconds,
            warmup_seconds=seconds / 10,
            min_rounds=min_rounds,
            device=device,
            control=OURS,
            hide_launch=True,
        )
        chosen, spent = watched(step(calls[OURS], sets[0], subject.leaves, grad, what))
        least = None if ceilings is None else floor(spent, *calibrate.rates(ceilings, dtype))
        kept = expected[:1] if what == FORWARD else expected[1:]
        kept_bytes = sum(tensor.numel() for tensor in kept) * dtype.itemsize
        rows.append(
            label
            | {"what": what, "backend": chosen, "mode": modes}
            | {"check": {name: asdict(found) for name, found in checks.items()}}
            | {"ms": {name: times[name].as_ms() for name in calls}}
            | {"ratio": {name: _ratio(name, times, checks) for name in calls if name != OURS}}
            | {"control_difference": control_difference(times, OURS)}
            | {"flops": spent and spent.flops, "bytes": spent and spent.bytes}
            | {"floor_ms": least and least.ms, "floor_by": least and least.by}
            | {"share": least and least.ms / (times[OURS].median * 1e3)}
            | {"beyond_mib": {n: _beyond(subject, n, label, what, kept_bytes) for n in weighed} if weighed else None}
        )
    return rows


def _compiled(
    calls: dict[str, Call], rivals: tuple[str, ...], operands: Operands, grad: Tensor, subject: Subject
) -> dict[str, Call]:
    """The natural plain way, or else the formula, under torch.compile: compiled by a first call, where it can be."""
    found = {}
    torch._dynamo.reset()  # it would use what another shape or direction left, or give up after a few of them
    for name in (name for name in (COMPILED, AUTOTUNED) if name in rivals):
        call = compiled(subject.rival[1] if subject.rival else calls[FORMULA], name)
        try:
            results(call, copied(operands, subject.leaves), grad, subject.leaves)
        except Exception:  # no C++ compiler, a graph that Inductor does not know: whatever keeps it from working
            continue
        found[name] = call
    return found


def _ratio(name: str, times: dict, checks: dict[str, Check]) -> float | None:
    return times[name].median / times[OURS].median if checks[name].ok and checks[OURS].ok else None


def _beyond(subject: Subject, variant: str, label: dict[str, Any], what: str, kept: int) -> float | None:
    """MiB at the peak of a call beyond its operands and what it returns, `kept` bytes."""
    names = {name: label[name] for name in ("shape", "dtype", "device")}
    names |= {"subject": subject.name, "variant": variant, "what": what}
    peak = peak_memory("bench.operators:build_step", names, device=label["device"])
    return None if peak is None else max(0.0, peak - kept / MIB)


def build_step(
    subject: str, variant: str, what: str, shape: Shape, dtype: str, device: str
) -> tuple[Callable, Callable]:
    """A step and its release, for `bench.memory`."""
    found = find(subject)
    operands, grad = prepare(found, shape, getattr(torch, dtype), device)
    if variant in (COMPILED, AUTOTUNED):
        call = compiled(found.rival[1] if found.rival else on_backend(found, "reference"), variant)
    else:
        calls = variants(found) | EAGER.get(found.op, {})
        call = calls.get(variant) or on_backend(found, variant)
    return step(call, copied(operands, found.leaves), found.leaves, grad, what), lambda: None


def plan(only: list[str] | None, small: bool) -> Iterator[tuple[Subject, str, Shape]]:
    """Every operator and shape to measure, those of `only` (an op, or op/form) where given."""
    for subject in available():
        if only is None or subject.op in only or subject.name in only:
            for name, shape in SHAPES[subject.name].items():
                yield subject, name, tiny(shape) if small else shape


def main() -> int:
    """Measures, prints tables, writes JSON; 1 where ours failed or was wrong somewhere, else 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.operators", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds: for a look, not for a figure to keep")
    parser.add_argument("--small", action="store_true", help="shapes of a few numbers: a dry run of the whole path")
    parser.add_argument("--only", help="operators, as in mix/gated,expert_mix (default: all there are)")
    parser.add_argument("--dtype", default="float32", help="comma-separated (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backends", default="", help="of ours beside the one chosen, as in native,triton")
    parser.add_argument("--memory", action="store_true", help="peak memory of every call, not of the sweep alone")
    parser.add_argument("--no-sweep", action="store_true", help="without expert_mix over the number of experts")
    parser.add_argument("--out", type=Path, default=Path("bench/out/operators.json"))
    args = parser.parse_args()
    console, began = report.console(), time.perf_counter()
    dtypes = [getattr(torch, name) for name in args.dtype.split(",")]
    seconds = 0.0 if args.small else 0.2 if args.quick else 1.0
    sizes = calibrate.SMALL_SIZES if args.small else None
    dtypes_once = tuple(dict.fromkeys([torch.float32, *dtypes]))
    ceilings = calibrate.ceilings(dtypes_once, args.device, seconds=seconds / 5, sizes=sizes)
    only = args.only.split(",") if args.only else None
    backends = tuple(filter(None, args.backends.split(",")))
    there = {subject.op for subject in available()}
    missing = sorted({subject.op for subject in SUBJECTS} - there)
    result: dict[str, Any] = {"machine": calibrate.machine(), "quick": args.quick, "ceilings": ceilings}
    result |= {"not there": missing, "refused": [], "failed": [], "rows": []}
    todo = [(s, name, shape, args.memory, (FORWARD, BOTH)) for s, name, shape in plan(only, args.small)]
    if not args.no_sweep and "expert_mix" in there and (only is None or "expert_mix" in only):
        sweep = [(find("expert_mix"), name, tiny(shape) if args.small else shape) for name, shape in SWEEP.items()]
        todo += [(*entry, not args.small or args.memory, (FORWARD,)) for entry in sweep]
    for dtype, (subject, name, shape, memory, whats) in itertools.product(dtypes, todo):
        options = {"seconds": seconds, "min_rounds": 2 if args.small else 5, "backends": backends, "whats": whats}
        try:
            rows = measure(subject, shape, dtype=dtype, device=args.device, ceilings=ceilings, memory=memory, **options)
        except (TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            kind = "failed" if isinstance(error, RuntimeError) else "refused"
            result[kind].append({"op": subject.name, "shape": name, "dtype": str(dtype), "reason": reason})
            console.print(f"{subject.name}, {name}, {dtype}: {kind}: {reason}", markup=False)
            continue
        result["rows"] += [{"name": name, **row} for row in rows]
        _write(args.out, result)  # after each: a run that is cut off leaves what it has
    wrong = [row for row in result["rows"] if not row["check"][OURS]["ok"]]
    for dtype in args.dtype.split(","):
        console.print(report.operator_table([row for row in result["rows"] if row["dtype"] == dtype], dtype))
    if missing:
        console.print(f"not there yet: {', '.join(missing)}")
    result["seconds"] = time.perf_counter() - began
    _write(args.out, result)
    console.print(f"{args.out}, {result['seconds']:.0f} s")
    return 1 if wrong or result["failed"] else 0


def _write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
