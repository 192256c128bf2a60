"""What has to hold on every device; each takes the device as a name, and on a CPU runs the same lines."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from bench.graphs import captured
from mtlkernels.reference.expert_linear import accumulate_dtype
from tests.ops.cases import GRAD_LAYOUTS, Outcome, agree, close, expected, layouts, outcome, same_bits

from .subjects import Subject, Tensors

# On a GPU every stride that is 1, or a multiple of 16, is another Triton kernel to compile.
TRITON_LAYOUTS = ("transposed", "every second", "expanded first", "a single number")
Grad = Callable[[Tensor], Tensor]


def moved(tensors: Tensors, device: str) -> list[Tensor | None]:
    """Copies there, of their own memory."""
    return [t if t is None else t.to(device, copy=True) for t in tensors]


def run(subject: Subject, device: str, backend: str, tensors: Tensors, grad: Grad | None = None) -> Outcome:
    """Output and gradients, on the device that the tensors lie on."""
    call = subject.bind(device)
    return outcome(lambda *t: call(*t, backend=backend), tensors, grad or subject.grad)


def right(subject: Subject, found: Outcome, tensors: Tensors, grad: Grad | None = None, floor: float = 0) -> None:
    """`found` is what the reference gives for these tensors, CPU ones, in float64."""
    wanted = expected(subject.bind("cpu"), tensors, grad or subject.grad)
    sums = accumulate_dtype(tensors[0].dtype)
    agree(home(found), wanted, tensors, max(subject.floor, floor), sums if subject.total else None)


def home(found: Outcome) -> Outcome:
    return Outcome(found.out.cpu(), [g if g is None else g.cpu() for g in found.grads])


def check_values(subject: Subject, device: str, backend: str, dtype: torch.dtype) -> None:
    """Output and every gradient; all of it on that device."""
    tensors = subject.make(dtype)
    found = run(subject, device, backend, moved(tensors, device))
    assert all(t is None or t.device.type == device for t in (found.out, *found.grads))
    right(subject, found, tensors)


def check_layouts(subject: Subject, device: str, backend: str, dtype: torch.dtype) -> None:
    """Every tensor, and the gradient from above, with other strides."""
    tensors = subject.make(dtype)
    for i, tensor in enumerate(tensors):
        if tensor is None:
            continue
        there = moved(tensors, device)
        for name, other in layouts(tensor).items():
            equal = "expanded" in name or "single" in name
            if backend == "triton" and name not in TRITON_LAYOUTS or (subject.mixes and i == 0 and equal):
                continue  # equal rows have no variance: 1 / sqrt(eps) blows up the rounding of their mean
            strided = layouts(there[i])[name]
            assert strided.stride() == other.stride()
            found = run(subject, device, backend, [*there[:i], strided, *there[i + 1 :]])
            with _saying(f"tensor {i}, {name}"):
                # Equal experts: the softmax's gradient is exactly 0, a difference of numbers of size 1.
                right(subject, found, [*tensors[:i], other, *tensors[i + 1 :]], floor=1 if equal else 0)
    for name, grad in GRAD_LAYOUTS.items():
        if not subject.total:
            with _saying(f"gradient {name}"):
                right(subject, run(subject, device, backend, moved(tensors, device), grad), tensors, grad)


class _saying:
    """Puts what was being done before the message of what failed."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, AssertionError):
            raise AssertionError(f"{self.what}: {error}") from error


def check_nan(subject: Subject, device: str, backend: str, dtype: torch.dtype) -> None:
    """NaN in one row: in the output there, or in a sum; nowhere else in output and gradient of that tensor."""
    clean = moved(subject.make(dtype), device)
    row = clean[0].shape[0] // 2
    others = torch.arange(clean[0].shape[0], device=device) != row
    hurt = [clean[0].clone(), *clean[1:]]
    hurt[0][row] = torch.nan
    found, wanted = (run(subject, device, backend, t) for t in (hurt, clean))
    assert not wanted.out.isnan().any() and torch.equal(found.grads[0][others], wanted.grads[0][others])
    if subject.total:
        assert found.out.isnan().any()
    else:
        assert found.out[row].isnan().any() and torch.equal(found.out[others], wanted.out[others])


def check_unread(subject: Subject, device: str, backend: str, dtype: torch.dtype) -> None:
    """What masks, routes, gates or ids leave out changes no bit, and gets a gradient that is a number."""
    clean = moved(subject.make(dtype), device)
    hurt = subject.unread(clean)
    assert any(t is not None and t.isnan().any() for t in hurt)
    found = run(subject, device, backend, hurt)
    assert not any(t is not None and t.isnan().any() for t in (found.out, *found.grads))
    same_bits(found, run(subject, device, backend, clean))


def check_repeats(subject: Subject, device: str, backend: str, dtype: torch.dtype) -> None:
    """Two runs agree bit for bit, in other memory."""
    tensors = moved(subject.make(dtype), device)
    first = run(subject, device, backend, tensors)
    same_bits(run(subject, device, backend, moved(tensors, device)), first)


def check_compiled(subject: Subject, device: str, backend: str, dtype: torch.dtype) -> None:
    """One graph, with eager's bits from kernels, and the right numbers."""
    tensors, call = subject.make(dtype), subject.bind(device)
    there = moved(tensors, device)
    torch._dynamo.reset()
    try:
        # Inductor takes seconds a case: where it is there, in one dtype.
        below = "inductor" if device == "cuda" and dtype == torch.float32 else "aot_eager"
        compiled = torch.compile(lambda *t: call(*t, backend=backend), fullgraph=True, backend=below)
        found = outcome(compiled, there, subject.grad)
    finally:
        torch._dynamo.reset()
    right(subject, found, tensors)
    if backend != "reference":
        same_bits(found, run(subject, device, backend, there))


def _two(subject: Subject, dtype: torch.dtype, device: str) -> list[list[Tensor | None]]:
    """The tensors, and others of the same shapes."""
    tensors = moved(subject.make(dtype), device)
    return [tensors, [t if t is None else t.flip(0) for t in tensors]]


def check_graph(subject: Subject, device: str, backend: str, dtype: torch.dtype) -> None:
    """Forward and backward captured in a CUDA graph, replayed on new values: eager's bits. On a CPU, called again."""
    values = _two(subject, dtype, device)
    wanted = [run(subject, device, backend, tensors) for tensors in values]
    grad, static = subject.grad(wanted[0].out), moved(values[0], device)
    call, kept = subject.bind(device), []

    def step() -> None:
        kept[:] = [outcome(lambda *t: call(*t, backend=backend), static, lambda _: grad)]

    replay, how = captured([step], device)
    assert how == ("graph" if device == "cuda" else "clock"), how
    for which in (1, 0, 1):
        for place, value in zip(static, values[which], strict=True):
            if place is not None:
                place.copy_(value)
        for outcomes in kept:  # none on a CPU, where nothing has run yet
            for t in (outcomes.out, *outcomes.grads):
                if t is not None:
                    t.fill_(torch.nan)
        replay()
        same_bits(kept[0], wanted[which])


def check_streams(subject: Subject, device: str, backend: str, dtype: torch.dtype) -> None:
    """Two streams at once, on values that come late: a launch on another stream would read NaN."""
    values = _two(subject, dtype, device)
    wanted = [run(subject, device, backend, tensors) for tensors in values]
    grad = subject.grad(wanted[0].out)
    on_gpu = device == "cuda"
    streams = [torch.cuda.Stream() for _ in values] if on_gpu else [None, None]
    call, found = subject.bind(device), []
    for _ in range(3):
        for stream, tensors in zip(streams, values, strict=True):
            late = [t if t is None else torch.full_like(t, torch.nan) for t in tensors]
            if on_gpu:
                stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream) if on_gpu else nullcontext():
                if on_gpu:
                    torch.cuda._sleep(5_000_000)  # cycles, a few milliseconds
                for place, value in zip(late, tensors, strict=True):
                    if place is not None:
                        place.copy_(value)
                found.append((late, outcome(lambda *t: call(*t, backend=backend), late, lambda _: grad)))
    if on_gpu:
        torch.cuda.synchronize()
    for (_, got), want in zip(found, wanted * 3, strict=True):
        same_bits(got, want)


def check_broken(subject: Subject, whole: Subject, bad: Tensor, device: str, backend: str, dtype: torch.dtype) -> None:
    """Rows with an id out of range are NaN, and everything else is as if they were not there."""
    tensors = subject.make(dtype)
    found = home(run(subject, device, backend, moved(tensors, device)))
    known = torch.ones(len(tensors[0]), dtype=torch.bool).index_fill(0, bad, False)
    left = [tensors[0][known], *tensors[1:]]
    wanted = expected(whole.bind("cpu"), left, lambda _: subject.grad(found.out)[known])
    assert found.out[bad].isnan().all() and (found.grads[0][bad] == 0).all()
    close(found.out[known], wanted.out, floor=subject.floor)
    for got, want in zip((found.grads[0][known], *found.grads[1:]), wanted.grads, strict=True):
        close(got, want, floor=subject.floor)
