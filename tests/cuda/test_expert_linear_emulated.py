"""The CUDA kernels of expert_linear, executed on the host: every index, barrier, copy and thread order against float64."""

import ctypes
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from emulated import Device, build
from torch import Tensor

FIELDS = (
    "type batch units outputs features experts x x_row x_unit weight bias bias_type grad saved activation out z dbias "
    "parameter_type large slice_rows"
).split()
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
TYPE = {F32: 0, F16: 1, BF16: 2}
ACTIVATIONS = ["", "relu", "gelu", "silu", "tanh", "sigmoid"]
FUNCTIONS = {
    "": lambda z: z, "relu": torch.relu, "gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu,
    "tanh": torch.tanh, "sigmoid": torch.sigmoid,
}  # fmt: skip
NEEDS_INPUT = ("gelu", "silu")


@dataclass(frozen=True)
class Case:
    """B, N, K; experts of each unit; how it is computed."""

    batch: int
    outputs: int
    features: int
    counts: tuple[int, ...] = (2,)
    dtype: torch.dtype = F16
    activation: str = ""
    bias: bool = True
    parameters: torch.dtype | None = None  # of bias and gradients; None: dtype
    strided: bool = False
    large: int = -1
    slice_rows: int = 0

    def __str__(self) -> str:
        parts = [f"{self.batch}x{self.outputs}x{self.features}", str(self.dtype)]
        rest = ("counts", "activation", "parameters", "strided", "large", "slice_rows")
        parts += [f"{name}={getattr(self, name)}" for name in rest if getattr(self, name) not in ("", None, False, 0)]
        return "-".join(parts).replace("torch.", "").replace(" ", "")


def make(case: Case) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(case.batch + 7 * case.outputs + 31 * case.features)
    experts = sum(case.counts)

    def draw(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=gen).to(dtype)

    return {
        "x": draw(case.batch, len(case.counts), case.features, dtype=case.dtype),
        "weight": (draw(experts, case.outputs, case.features, dtype=F32) / max(1, case.features) ** 0.5).to(case.dtype),
        "bias": draw(experts, case.outputs, dtype=case.parameters or case.dtype),
        "grad": draw(case.batch, experts, case.outputs, dtype=case.dtype),
    }


def oracle(case: Case, inputs: dict[str, Tensor], saved: Tensor | None) -> dict[str, Tensor]:
    """z, y and the gradients in float64; those that come after an activation use the values that it left, rounded."""
    x, weight, bias, grad = (inputs[name].double() for name in ("x", "weight", "bias", "grad"))
    unit = torch.repeat_interleave(torch.arange(len(case.counts)), torch.tensor(case.counts))
    wide = x[:, unit]
    z = torch.einsum("bek,enk->ben", wide, weight) + (bias if case.bias else 0)
    dz = grad
    if case.activation:
        at = saved.double()
        if case.activation in NEEDS_INPUT:
            leaf = at.requires_grad_()
            (dz,) = torch.autograd.grad(FUNCTIONS[case.activation](leaf), leaf, grad)
        else:
            slope = {"relu": (at > 0).double(), "tanh": 1 - at * at, "sigmoid": at * (1 - at)}
            dz = grad * slope[case.activation]
    dx = torch.zeros_like(x).index_add_(1, unit, torch.einsum("ben,enk->bek", dz, weight))
    return {
        "z": z,
        "y": FUNCTIONS[case.activation](z),
        "dx": dx,
        "dweight": torch.einsum("ben,bek->enk", dz, wide),
        "dbias": dz.sum(0),
    }


def run(device: Device, case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Forward and both gradients on the emulated device; every output starts as NaN."""
    b, experts, n, k, units = case.batch, sum(case.counts), case.outputs, case.features, len(case.counts)
    put = {name: device.put(tensor) for name, tensor in inputs.items()}
    if case.strided:  # rows of a wider buffer that starts at an odd place
        wide = device.put(torch.full((b, units, k + 3), torch.nan, dtype=case.dtype))
        put["x"] = wide[..., 1 : k + 1].copy_(inputs["x"])
    parameters = case.parameters or case.dtype
    counts = torch.tensor(case.counts, dtype=torch.int64)
    shared = {
        **dict(type=TYPE[case.dtype], batch=b, units=units, outputs=n, features=k, experts=counts),
        **dict(x=put["x"], x_row=put["x"].stride(0), x_unit=put["x"].stride(1), weight=put["weight"]),
        **dict(activation=ACTIVATIONS.index(case.activation), parameter_type=TYPE[parameters]),
        **dict(large=case.large, slice_rows=case.slice_rows),
    }
    found = {
        "y": device.empty(b, experts, n, dtype=case.dtype),
        "z": device.empty(b, experts, n, dtype=case.dtype),
        "dx": device.empty(b, units, k, dtype=case.dtype),
        "dweight": device.empty(experts, n, k, dtype=parameters),
        "dbias": device.empty(experts, n, dtype=parameters),
    }
    bias = dict(bias=put["bias"], bias_type=TYPE[parameters]) if case.bias else {}
    device.call(device.library.forward, {**shared, **bias, "out": found["y"], "z": found["z"]}, FIELDS)
    saved = found["z"] if case.activation in NEEDS_INPUT else found["y"]
    back = {**shared, "grad": put["grad"], "saved": saved if case.activation else None}
    device.call(device.library.input_gradient, {**back, "out": found["dx"]}, FIELDS)
    device.call(
        device.library.weight_gradient, {**back, "out": found["dweight"], "dbias": found["dbias"]}, FIELDS
    )
    return found


def assert_right(case: Case, got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Within float32 sums of operands of the dtype (dz is rounded to it), and one rounding at the store."""
    unit = {F32: 2e-6, BF16: 2.0**-8, F16: 2.0**-11}
    for name, reference in want.items():
        tensor = got[name]
        assert tensor.dtype == (case.parameters or case.dtype) or name in ("y", "z", "dx")
        scale = reference.abs().max().item() if reference.numel() else 1.0
        rounded_dz = name.startswith("d") and case.activation and case.dtype != F32
        atol = scale * (2e-6 + (unit[case.dtype] if rounded_dz else 0))
        torch.testing.assert_close(
            tensor.double(), reference, rtol=unit[tensor.dtype], atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


CASES = [
    Case(1, 1, 1, (1,)),
    Case(5, 7, 9, (3,), F32, "relu"),
    Case(70, 33, 40, (1, 2), F16, "gelu"),
    Case(130, 24, 136, (2, 0, 3), BF16, "relu"),
    Case(67, 40, 64, (2,), BF16, "silu", parameters=F32),
    Case(64, 64, 64, (1, 1), F16),
    Case(140, 72, 130, (2,), F16, "tanh", large=1),
    Case(129, 136, 72, (1, 0, 1), BF16, "sigmoid", large=1, parameters=F32),
    Case(96, 128, 128, (1,), BF16, "", large=1),
    Case(300, 12, 20, (3, 1), F32, "gelu", slice_rows=64),
    Case(330, 40, 24, (2, 1), F16, "relu", slice_rows=96),
    Case(200, 16, 8, (1,), BF16, "", parameters=F32, large=1, slice_rows=64),
    Case(33, 17, 35, (2, 1), F16, "sigmoid", strided=True, bias=False),
    Case(20, 6, 18, (0, 2), F32, "tanh", strided=True),
    Case(9, 3, 300, (2,), BF16, "silu", bias=False),
    Case(3, 4, 0, (1, 1), F16, "relu"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: Case) -> None:
    inputs, results = make(case), []
    for order in ("forward", "reverse", "shuffled"):
        device = Device(build("expert_linear"), order, seed=3)
        got = run(device, case, inputs)
        assert_right(case, got, oracle(case, inputs, got["z" if case.activation in NEEDS_INPUT else "y"]))
        assert device.library.bank_conflicts() == 0
        results.append(got)
    for got in results[1:]:
        for name, first in results[0].items():
            assert torch.equal(got[name], first), f"{name} depends on the order of threads"
