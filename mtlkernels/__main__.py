"""python -m mtlkernels: what this installation holds, and a self-test of a few seconds.

Every operator runs on every backend that can serve here, on each device, and is held to the reference in float64,
output and gradients. The exit status is 1 where one differs or fails.
"""

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

import mtlkernels as mtl
from mtlkernels.backend import BACKENDS, Case, _predicates

# Relative to the largest number. Gates in 16 bit are rounded twice.
_TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}


def calls() -> dict[str, tuple[list[Tensor], Callable[..., Tensor]]]:
    """Of every operator its tensors, on the CPU in float64, and a call of them that takes `backend`."""
    gen = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64)

    batch, units, experts, tasks, width, features = 37, 3, 5, 3, 19, 11
    counts = [2, 0, 3]
    x, weight, bias = draw(batch, units, features), draw(experts, width, features) / 3, draw(experts, width)
    outputs, logits, native = draw(batch, experts, width), draw(batch, tasks, experts), draw(experts)
    ids = torch.randint(4, (batch,), generator=gen)
    labels = (torch.rand(batch, tasks, generator=gen) < 0.4).double()
    gate = draw(3, 4).bfloat16().double() * (torch.rand(3, 4, generator=gen) < 0.6)
    flat, own = draw(batch, features), draw(4, width, features)
    return {
        "expert_linear": (
            [x, weight, bias],
            lambda x, w, c, **o: mtl.expert_linear(x, w, c, experts_per_unit=counts, activation="gelu", **o),
        ),
        "mix": (
            [outputs, logits, native],
            lambda h, a, v, **o: mtl.adatt_mix(h, a, v, experts_per_unit=counts, **o),
        ),
        "expert_mix": (
            [x, weight, bias, logits],
            lambda x, w, c, a, **o: mtl.expert_mix(x, w, c, a, experts_per_unit=counts, activation="tanh", **o),
        ),
        "snr_linear": (
            [draw(batch, 4, features), draw(3, 4, width, features) / 6, gate, draw(3, width)],
            lambda x, w, g, c, **o: mtl.snr_linear(x, w, g, c, activation="silu", skip_closed=True, **o),
        ),
        "star_linear": (
            [flat, draw(width, features) / 3, own, draw(width), draw(4, width)],
            lambda x, w, wp, c, cp, **o: mtl.star_linear(x, ids.to(x.device), w, wp, c, cp, activation="sigmoid", **o),
        ),
        "partitioned_norm": (
            [flat, draw(features), draw(features), draw(4, features), draw(4, features)],
            lambda x, w, b, wp, bp, **o: mtl.partitioned_norm(
                x, ids.to(x.device), w, b, wp, bp, *_running(x, 4), training=True, **o
            ),
        ),
        "hard_concrete": ([draw(6, 7)], lambda a, backend: _under(backend, lambda: mtl.hard_concrete(a))),
        "hard_concrete_l0": ([draw(6, 7)], lambda a, backend: _under(backend, lambda: mtl.hard_concrete_l0(a))),
        "esmm_loss": (
            [4 * draw(batch), 4 * draw(batch)],
            lambda a, c, **o: mtl.esmm_loss(
                a, c, labels[:, 0].to(a.device), (labels[:, 0] * labels[:, 1]).to(a.device), **o
            ),
        ),
        "masked_bce": (
            [4 * draw(batch, tasks)],
            lambda a, **o: mtl.masked_bce(a, labels.to(a.device), labels.flip(0).bool().to(a.device), **o),
        ),
    }


def _running(x: Tensor, domains: int) -> list[Tensor]:
    sums = torch.promote_types(x.dtype, torch.float32)
    return [torch.full((domains, x.shape[1]), value, dtype=sums, device=x.device) for value in (0.0, 1.0)]


def _under(backend: str, call: Callable[[], Tensor]) -> Tensor:
    with mtl.use_backend(backend):
        return call()


def results(call: Callable[..., Tensor], tensors: list[Tensor], backend: str) -> list[Tensor]:
    """Output, and the gradient of each tensor."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = call(*leaves, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def difference(call: Callable[..., Tensor], tensors: list[Tensor], backend: str, device: str) -> float:
    """The largest difference from the reference in float64, relative to the largest number (at least 1)."""
    found = results(call, [t.to(device) for t in tensors], backend)
    wanted = results(call, [t.double() for t in tensors], "reference")
    pairs = zip((t.cpu().double() for t in found), wanted, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1)) for a, b in pairs)


def tried(name: str, device: str, arch: int, backend: str) -> dict[torch.dtype, str]:
    """Of every dtype that the backend takes: "" where the operator is right, else what is wrong."""
    tensors, call = calls()[name]
    found = {}
    for dtype, tolerance in _TOLERANCE.items():
        if not _predicates[name][backend](Case(device, dtype, arch)).ok:
            continue
        try:
            error = difference(call, [t.to(dtype) for t in tensors], backend, device)
            found[dtype] = "" if error <= tolerance else f"{error:.1e} from the reference, {tolerance} is allowed"
        except Exception as problem:  # whatever a broken installation raises
            found[dtype] = f"{type(problem).__name__}: {problem}"
    return found


def main() -> int:
    """Prints what there is and what the self-test finds."""
    for name, value in mtl.build_info().items():
        print(f"{name:<14} {', '.join(value) if isinstance(value, (tuple, list)) else value}")
    began, count, problems = time.perf_counter(), 0, []
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        arch = 0
        if device == "cuda":
            major, minor = torch.cuda.get_device_capability()
            arch = 10 * major + minor
        print(f"\n{device:<18}" + "".join(f"{backend:<12}" for backend in BACKENDS))
        for name in calls():
            row = []
            for backend in BACKENDS:
                found = tried(name, device, arch, backend)
                count += len(found)
                wrong = {dtype: what for dtype, what in found.items() if what}
                problems += [f"{name}, {backend}, {device}, {dtype}: {what}" for dtype, what in wrong.items()]
                row.append("WRONG" if wrong else "ok" if found else "-")
            print(f"{name:<18}" + "".join(f"{word:<12}" for word in row))
    print(*problems, f"\n{count - len(problems)} of {count} right, {time.perf_counter() - began:.1f} s", sep="\n")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
