"""The CUDA kernels of expert_linear, executed on the host: every index, barrier, copy and order, against float64."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from emulated import Device, assert_every_barrier_matters, build, noticed
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
    device.call(device.library.weight_gradient, {**back, "out": found["dweight"], "dbias": found["dbias"]}, FIELDS)
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


def test_more_units_than_a_launch_holds() -> None:
    case = Case(4, 2, 8, (1,) * 300, F16, "relu")
    inputs = make(case)
    got = run(Device(build("expert_linear")), case, inputs)
    assert_right(case, got, oracle(case, inputs, got["y"]))


# Five steps of 32 rows in a slice, so that the last panels lie where the bias's sums go; more than one warp and tile.
SENSITIVE = Case(300, 40, 72, (2,), F16, "relu", slice_rows=160)


def check(case: Case) -> Callable[[Device], None]:
    inputs = make(case)

    def compare(device: Device) -> None:
        got = run(device, case, inputs)
        assert_right(case, got, oracle(case, inputs, got["y"]))

    return compare


def test_every_barrier_and_every_wait_matters() -> None:
    """One barrier and the wait for copies in each step, two barriers around the bias's sums."""
    assert_every_barrier_matters(check(SENSITIVE), build("expert_linear"), range(4))


WRONG = {
    "a fragment's matrices exchanged": (
        "gemm_tile.cuh", "A::chunk(a, depth + matrix / 2 * 8 + line, row / 8 + matrix % 2)",
        "A::chunk(a, depth + matrix % 2 * 8 + line, row / 8 + matrix / 2)"),
    "past the end of the depth": ("gemm_tile.cuh", "return columns - c < kVec ? columns - c : kVec;", "return kVec;"),
    "every slice reads the first rows of x": (
        "expert_linear.cuh", "const int64_t row = p.slice * a.slice_rows;", "const int64_t row = 0;"),
    "a stage too few": ("expert_linear.cuh", "const int next = step + kGemmStages - 1;",
                        "const int next = step + kGemmStages;"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_index_is_noticed(wrong: str) -> None:
    library = build("expert_linear", WRONG[wrong], "FLOAT16_ONLY")
    assert noticed(check(Case(170, 36, 52, (2,), F16, slice_rows=160)), library)


@pytest.mark.parametrize("transposed", [0, 1])
def test_fragments(transposed: int) -> None:
    """ldmatrix and mma as the manual describes their lanes, for operands stored either way: c = a b."""
    gen = torch.Generator().manual_seed(1)
    a, b = (torch.randint(-8, 8, shape, generator=gen).half() for shape in ((16, 16), (16, 8)))
    c = torch.full((16, 8), torch.nan)
    device = Device(build("expert_linear"), "shuffled", seed=2)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (a, b, c)]
    device.library.matrix_product(*pointers, transposed)
    assert device.library.last_error() == b"" and device.library.bank_conflicts() == 0
    assert torch.equal(c, a.float() @ b.float())


def test_copies_arrive_no_sooner_than_they_must() -> None:
    """Out of order a copy is there after the wait for its group alone; bytes past its length are zero."""
    numbers = torch.arange(1, 9, dtype=torch.int16)
    source = numbers[torch.arange(8)].clone()
    assert source.data_ptr() % 16 == 0
    for order, waits, there in (("shuffled", 1, True), ("shuffled", 0, False), ("forward", 0, True)):
        for count in (8, 3, 0):
            found = torch.zeros(8, dtype=torch.int16)
            device = Device(build("expert_linear"), order)
            pointers = ctypes.c_void_p(source.data_ptr()), ctypes.c_void_p(found.data_ptr())
            device.library.copy_through(pointers[0], 2 * count, pointers[1], waits)
            want = numbers * (torch.arange(8) < count) if there else torch.full_like(numbers, -1)
            assert device.library.last_error() == b"" and torch.equal(found, want)


def test_shared_memory_has_to_be_asked_for() -> None:
    library = Device(build("expert_linear")).library
    for asked, allowed, fits in ((48, 0, True), (49, 0, False), (64, 64, True), (100, 200, False)):
        library.ask_for_shared(1024 * asked, 1024 * allowed)
        assert (library.last_error() == b"") == fits, (asked, allowed)


def plan(product: int, batch: int, outputs: int, features: int, experts: list[int], tensor_cores: bool = True):
    """large, slices, rows of a slice."""
    found = (ctypes.c_int64 * 3)()
    counts = (ctypes.c_int64 * len(experts))(*experts)
    sizes = [ctypes.c_int64(n) for n in (batch, outputs, features)]
    library = Device(build("expert_linear")).library
    library.plan(product, *sizes, counts, ctypes.c_int64(len(experts)), int(tensor_cores), found)
    return tuple(found)


def test_plan() -> None:
    """Large tiles where they fill a GPU without waste; slices of the batch for dweight alone, as many as fill it."""
    assert plan(0, 16384, 256, 512, [2] * 8) == (1, 1, 16384)
    assert plan(0, 16384, 6, 512, [1] * 8)[0] == 0  # six columns of a tile
    assert plan(0, 16384, 64, 512, [1] * 8)[0] == 0  # half of a large tile would be idle
    assert plan(0, 256, 256, 512, [2] * 8)[0] == 0  # 64 large tiles
    assert plan(0, 16384, 256, 512, [2] * 8, tensor_cores=False)[0] == 0
    large, slices, rows = plan(2, 16384, 256, 512, [2] * 8)
    assert large == 1 and slices == 2 and rows * slices == 16384
    large, slices, rows = plan(2, 16384, 6, 512, [1])
    assert large == 0 and slices == 32 and rows == 512
    for batch in (0, 1, 511, 512, 1000, 12345, 1 << 20):
        for product in range(3):
            _, slices, rows = plan(product, batch, 48, 80, [3, 0, 1])
            assert slices * rows >= batch and (slices - 1) * rows < max(batch, 1) and rows % 32 == 0
            assert slices == 1 or product == 2 and rows >= 512
