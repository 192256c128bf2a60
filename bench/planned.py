"""A step on paper: operations, bytes, memory and time of a configuration on a machine, before anything is computed.

    python -m bench plan MMoE --sizes E=4096,B=65536 [--ceilings FILE] [--memory GIB] [--no-measure]

The step runs on torch's fake tensors, which have shapes and no numbers, so that what does not fit is planned all the
same. Its time on paper is the sum over its operators of the larger of operations / rate and bytes / bandwidth. Where
the step does not fit, the rows of a slice are found that do; it is then measured in such slices, with
`mtlkernels.slices.backward_in_slices`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from bench.memory import peak_memory
from bench.style import nice
from bench.tables import Table
from bench.target import Target, load
from bench.timing import interleaved
from bench.watch import Step, watch
from mtlkernels.slices import backward_in_slices

_GIB = 2**30
TOO_LARGE = (
    "not even one row fits: the parameters with their gradients are too large, or one row's work is. Of a bank of "
    "experts, mtlkernels.slices.mix_in_slices keeps the activations of a few at a time"
)


@dataclass
class Plan:
    """A step of `rows` rows on paper.

    Attributes:
        flops, bytes: of forward and backward.
        seconds: (forward, backward) on paper; arithmetic: what part of them arithmetic sets, the rest is memory's.
        parameters, inputs: bytes of what is there before the step; a gradient each comes on top.
        kept: bytes alive when backward begins; peak: the most alive beyond what was there before, gradients included.
    """

    rows: int
    flops: tuple[int, int]
    bytes: tuple[int, int]
    seconds: tuple[float, float]
    arithmetic: float
    parameters: int
    inputs: int
    kept: int
    peak: int

    @property
    def total(self) -> int:
        """Bytes of all that is alive at the peak."""
        return self.parameters + self.inputs + self.peak


def plan(options: dict[str, Any], gflops: float, gb_s: float, rows: int | None = None) -> Plan:
    """The step of the target `load(**options)`, with these rows, by default its own."""
    step, target = _on_paper(options, rows)
    halves = [[op for op in step.ops if op.backward == b] for b in (False, True)]
    floors = [[op.floor(gflops, gb_s) for op in half] for half in halves]
    arithmetic = sum(op.floor(gflops, gb_s) for op in step.ops if op.flops / gflops > op.bytes / gb_s)
    seconds = sum(floors[0]), sum(floors[1])
    return Plan(
        rows=target.rows,
        flops=tuple(sum(op.flops for op in half) for half in halves),
        bytes=tuple(sum(op.bytes for op in half) for half in halves),
        seconds=seconds,
        arithmetic=arithmetic / (sum(seconds) or 1.0),
        parameters=_size(target.network),
        inputs=sum(t.numel() * t.element_size() for t in target.inputs),
        kept=step.kept(),
        peak=step.peak(),
    )


def _size(network: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers()))


def _on_paper(options: dict[str, Any], rows: int | None) -> tuple[Step, Target]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with mode, _made_as(options):
            target = load(**options)
    except DataDependentOutputException:  # its constructor looks at numbers
        target = load(**options)
        for module in target.network.modules():
            for held in (module._parameters, module._buffers):
                held.update({name: _faked(mode, t) for name, t in held.items() if t is not None})
        target.inputs = tuple(_faked(mode, t) for t in target.inputs)
    with mode:
        if rows is not None:
            target = _first(target, rows)
        try:
            target.step()  # makes what comes from above
            target.release()
            return watch(target.network, target.step, before=(*target.inputs, *target.above)), target
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ValueError(
                f"{target.name} looks at numbers while it runs ({error}): profile can, plan cannot"
            ) from None


def _faked(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    found = mode.from_tensor(tensor.detach()).requires_grad_(tensor.requires_grad)
    return nn.Parameter(found, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else found


@contextmanager
def _made_as(options: dict[str, Any]) -> Iterator[None]:
    """Modules are made in the dtype, on the device, where they will be."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, options["dtype"]))
    try:
        with torch.device(options["device"]):
            yield
    finally:
        torch.set_default_dtype(before)


def _first(target: Target, rows: int) -> Target:
    """With the first rows alone."""
    inputs = tuple(t.detach()[:rows].clone().requires_grad_(t.requires_grad) for t in target.inputs)
    return Target(target.name, target.network, inputs, target.run)


def slice_rows(options: dict[str, Any], whole: Plan, room: float, gflops: float, gb_s: float) -> Plan | None:
    """The rows whose step fits into `room` bytes beside the whole inputs and their gradients, halved until they do.

    None where not even one row fits: then the parameters with their gradients are what does not.
    """
    rows = whole.rows
    beside = 2 * whole.inputs
    while rows > 1:
        rows = -(-rows // 2)
        found = plan(options, gflops, gb_s, rows)
        if found.parameters + beside + found.peak <= room:
            return found
    return None


def build_step(options: dict[str, Any], rows: int | None = None) -> tuple[Callable[[], Any], Callable[[], None]]:
    """A step and its release, for `bench.memory`."""
    target = load(**options)
    return step_of(target, rows), target.release


def step_of(target: Target, rows: int | None) -> Callable[[], None]:
    """The step of a target, whole or in slices of `rows`; gradients begin anew every time."""

    def whole() -> None:
        target.release()
        target.step()

    def sliced() -> None:
        target.release()
        backward_in_slices(lambda *part: _squares(target, part), *target.inputs, rows=rows, reduction="sum")

    return whole if rows is None else sliced


def _squares(target: Target, part: tuple[Tensor, ...]) -> Tensor:
    """A loss with a gradient that is no constant, and knows nothing of other rows."""
    return sum(t.square().sum() for t in target.outputs(*part))


@dataclass
class Measured:
    """What a step took: seconds, and bytes at the peak beyond what stays between steps (None where not measured)."""

    seconds: float
    peak: float | None


def measure(options: dict[str, Any], rows: int | None, seconds: float, memory: bool = True) -> Measured:
    """Times the step, whole or in slices, and weighs it, on a CPU in a process of its own."""
    target, device = load(**options), options["device"]
    step = step_of(target, rows)
    timing = {"seconds": seconds, "warmup_seconds": 0.0, "min_rounds": 3}
    times = interleaved({"step": step}, **timing, device=device)
    target.release()
    del target, step  # before another process needs the room
    if not memory:
        return Measured(times["step"].median, None)
    words = {"options": options, "rows": rows}
    peak = peak_memory("bench.planned:build_step", words, device=device, timeout=600)
    return Measured(times["step"].median, None if peak is None else peak * 2**20)


def table(name: str, found: Plan, gflops: float, gb_s: float, room: float, where: str) -> Table:
    """The plan in lines."""
    made = Table(title=f"{name}, {found.rows} rows, on paper", caption=where)
    for head, side in (("", "left"), ("forward", "right"), ("backward", "right"), ("step", "right")):
        made.add_column(head, justify=side, no_wrap=True)
    pair = lambda values, scale: [nice(v / scale) for v in (*values, sum(values))]  # noqa: E731
    made.add_row("operations, GFLOP", *pair(found.flops, 1e9))
    made.add_row("bytes moved, GB", *pair(found.bytes, 1e9))
    made.add_row(f"time at {gflops:.0f} GFLOP/s and {gb_s:.1f} GB/s, ms", *pair(found.seconds, 1e-3))
    made.add_row("  of it set by arithmetic", "", "", f"{found.arithmetic:.0%}")
    made.add_row("parameters, MiB", "", "", nice(found.parameters / 2**20))
    made.add_row("inputs, MiB", "", "", nice(found.inputs / 2**20))
    made.add_row("kept for backward, MiB", nice(found.kept / 2**20), "", "")
    made.add_row("peak beyond parameters and inputs, MiB", "", "", nice(found.peak / 2**20))
    verdict = "fits" if found.total <= room else "DOES NOT FIT"
    made.add_row("all at the peak, GiB", "", "", f"{nice(found.total / _GIB)}, {verdict} in {nice(room / _GIB)}")
    return made


def against(found: Plan, measured: Measured, slices: int = 1, beside: int = 0) -> list[str]:
    """How far the measurement is from the plan of a slice: sentences. beside: bytes that slices share."""
    paper, peak = sum(found.seconds) * slices, found.peak + beside
    said = [
        f"measured {nice(measured.seconds * 1e3)} ms, {measured.seconds / paper:.2f} times the {nice(paper * 1e3)} ms "
        f"on paper: {paper / measured.seconds:.0%} of what the machine can do"
    ]
    if measured.peak is not None:
        ratio = measured.peak / max(peak, 1)
        said.append(
            f"measured peak {nice(measured.peak / 2**20)} MiB, {ratio:.2f} times the {nice(peak / 2**20)} MiB on paper"
        )
    return said
