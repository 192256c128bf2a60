"""The CUDA kernels of snr_linear, executed on the host: every index, barrier, copy and order, against float64."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from emulated import Device, build, noticed
from torch import Tensor

from mtlkernels.reference.expert_linear import ACTIVATIONS, NEED_INPUT

FIELDS = (
    "type batch upper lower outputs features x x_row x_unit weight given_weight parameter_type gate gate_type skip "
    "bias grad saved activation out z dgate dbias large slice_rows"
).split()
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TYPE = {F32: 0, F16: 1, BF16: 2}


@dataclass(frozen=True)
class Case:
    """B, I, J, N, K; which gates are closed, as I * J letters ("." open, "0" closed); how it is computed."""

    batch: int
    upper: int
    lower: int
    outputs: int
    features: int
    gates: str = ""  # "": all open
    dtype: torch.dtype = F16
    activation: str = ""
    skip: bool = True
    bias: bool = True
    parameters: torch.dtype | None = None  # of weight, bias, gate and gradients; None: dtype
    strided: bool = False
    large: int = -1
    slice_rows: int = 0

    def __str__(self) -> str:
        parts = ["x".join(map(str, (self.batch, self.upper, self.lower, self.outputs, self.features))), str(self.dtype)]
        rest = ("gates", "activation", "parameters", "strided", "large", "slice_rows")
        parts += [
            f"{name}={getattr(self, name)}" for name in rest if getattr(self, name) not in ("", None, False, 0, -1)
        ]
        return "-".join([*parts, *([] if self.skip else ["all"])]).replace("torch.", "")

    @property
    def closed(self) -> Tensor:
        letters = self.gates or "." * (self.upper * self.lower)
        return torch.tensor([letter == "0" for letter in letters], dtype=torch.bool).view(self.upper, self.lower)


def make(case: Case) -> dict[str, Tensor]:
    """The tensors; with skip, NaN wherever only closed gates lead."""
    gen = torch.Generator().manual_seed(case.batch + 7 * case.outputs + 31 * case.features)
    parameters = case.parameters or case.dtype

    def draw(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=gen).to(dtype)

    scale = max(1, case.lower * case.features) ** 0.5
    found = {
        "x": draw(case.batch, case.lower, case.features, dtype=case.dtype),
        "weight": (draw(case.upper, case.lower, case.outputs, case.features, dtype=F32) / scale).to(parameters),
        "gate": draw(case.upper, case.lower, dtype=parameters).masked_fill(case.closed, 0),
        "bias": draw(case.upper, case.outputs, dtype=parameters),
        "grad": draw(case.batch, case.upper, case.outputs, dtype=case.dtype),
    }
    if case.skip:
        found["weight"][case.closed] = torch.nan
        found["x"][:, case.closed.all(0)] = torch.nan
    return found


def oracle(case: Case, inputs: dict[str, Tensor], saved: Tensor | None) -> dict[str, Tensor]:
    """z, y and the gradients in float64; those that come after an activation use the values that it left, rounded."""
    x, given, gate, bias, grad = (inputs[name].double() for name in ("x", "weight", "gate", "bias", "grad"))
    is_open = ~case.closed | (not case.skip)
    x = x.where(is_open.any(0)[:, None], 0)
    given = given.where(is_open[..., None, None], 0)
    weight = given.to(case.dtype).double()  # what the products take
    z = torch.einsum("ij,bjk,ijnk->bin", gate, x, weight) + (bias if case.bias else 0)
    dz = grad
    if case.activation:
        at = saved.double()
        if case.activation in NEED_INPUT:
            leaf = at.requires_grad_()
            (dz,) = torch.autograd.grad(ACTIVATIONS[case.activation](leaf), leaf, grad)
        else:
            dz = grad * {"relu": (at > 0).double(), "tanh": 1 - at * at, "sigmoid": at * (1 - at)}[case.activation]
    sums = torch.einsum("bin,bjk->ijnk", dz, x)
    return {
        "z": z,
        "y": ACTIVATIONS[case.activation](z),
        "dx": torch.einsum("ij,bin,ijnk->bjk", gate, dz, weight),
        "dweight": gate[..., None, None] * sums,
        "dgate": (given * sums).sum((2, 3)) * is_open,
        "dbias": dz.sum(0),
    }


def run(device: Device, case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Forward and all gradients on the emulated device; every output starts as NaN."""
    b, i, j, n, k = case.batch, case.upper, case.lower, case.outputs, case.features
    put = {name: device.put(tensor) for name, tensor in inputs.items()}
    if case.strided:  # rows of a wider buffer that starts at an odd place
        wide = device.put(torch.full((b, j, k + 3), torch.nan, dtype=case.dtype))
        put["x"] = wide[..., 1 : k + 1].copy_(inputs["x"])
    parameters = case.parameters or case.dtype
    shared = {
        **dict(type=TYPE[case.dtype], batch=b, upper=i, lower=j, outputs=n, features=k),
        **dict(x=put["x"], x_row=put["x"].stride(0), x_unit=put["x"].stride(1)),
        **dict(weight=device.put(inputs["weight"].to(case.dtype)), given_weight=put["weight"]),
        **dict(parameter_type=TYPE[parameters], gate=put["gate"], gate_type=TYPE[parameters], skip=case.skip),
        **dict(activation=list(ACTIVATIONS).index(case.activation), large=case.large, slice_rows=case.slice_rows),
    }
    found = {
        "y": device.empty(b, i, n, dtype=case.dtype),
        "z": device.empty(b, i, n, dtype=case.dtype),
        "dx": device.empty(b, j, k, dtype=case.dtype),
        "dweight": device.empty(i, j, n, k, dtype=parameters),
        "dgate": device.empty(i, j, dtype=parameters),
        "dbias": device.empty(i, n, dtype=parameters),
    }
    bias = put["bias"] if case.bias else None
    library = device.library
    device.call(library.forward, {**shared, "bias": bias, "out": found["y"], "z": found["z"]}, FIELDS)
    saved = found["z"] if case.activation in NEED_INPUT else found["y"]
    back = {**shared, "grad": put["grad"], "saved": saved if case.activation else None}
    device.call(library.input_gradient, {**back, "out": found["dx"]}, FIELDS)
    gradients = {"out": found["dweight"], "dgate": found["dgate"], "dbias": found["dbias"]}
    device.call(library.parameter_gradients, {**back, **gradients}, FIELDS)
    return found


def assert_right(case: Case, got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Within float32 sums of operands of the dtype (dz is rounded to it), and one rounding at the store."""
    unit = {F32: 2e-6, BF16: 2.0**-8, F16: 2.0**-11}
    for name, reference in want.items():
        tensor = got[name]
        scale = reference.abs().max().item() if reference.numel() else 1.0
        rounded_dz = name.startswith("d") and case.activation and case.dtype != F32
        atol = scale * (2e-6 + (unit[case.dtype] if rounded_dz else 0))
        torch.testing.assert_close(
            tensor.double(), reference, rtol=unit[tensor.dtype], atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
    if case.skip:
        assert (got["dweight"][case.closed] == 0).all() and (got["dgate"][case.closed] == 0).all()


CASES = [
    Case(1, 1, 1, 1, 1),
    Case(5, 2, 3, 7, 9, "0...0.", F32, "relu"),
    Case(70, 2, 3, 33, 40, ".0..00", F16, "gelu"),
    Case(130, 1, 3, 24, 136, "0.0", BF16, "relu"),
    Case(67, 2, 2, 40, 64, "...0", BF16, "silu", parameters=F32),
    Case(64, 2, 2, 64, 64, "0..0", F16, skip=False),
    Case(140, 2, 2, 72, 130, ".0..", F16, "tanh", large=1),
    Case(129, 1, 2, 136, 72, ".0", BF16, "sigmoid", large=1, parameters=F32),
    Case(130, 3, 2, 30, 20, ".000.0", F32, "gelu", slice_rows=64),
    Case(170, 3, 2, 40, 24, "000..0", F16, "relu", slice_rows=96),
    Case(200, 1, 2, 16, 8, "", BF16, "", parameters=F32, large=1, slice_rows=64),
    Case(33, 2, 2, 17, 35, ".0..", F16, "sigmoid", strided=True, bias=False),
    Case(20, 2, 2, 6, 18, "0.0.", F32, "tanh", strided=True, skip=False),
    Case(9, 2, 2, 3, 300, "0000", BF16, "silu"),
    Case(3, 2, 2, 4, 0, "", F16, "relu"),
    Case(40, 2, 0, 4, 8, "", F16, "tanh"),
    Case(4, 0, 2, 4, 8, "", F16),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: Case) -> None:
    inputs, results = make(case), []
    for order in ("forward", "reverse", "shuffled"):
        device = Device(build("snr_linear"), order, seed=3)
        got = run(device, case, inputs)
        assert_right(case, got, oracle(case, inputs, got["z" if case.activation in NEED_INPUT else "y"]))
        assert device.library.bank_conflicts() == 0
        results.append(got)
    for got in results[1:]:
        for name, first in results[0].items():
            assert torch.equal(got[name], first), f"{name} depends on the order of threads"


@pytest.mark.parametrize("wanted", [("out",), ("dgate",), ("dbias",), ("dgate", "dbias")], ids="-".join)
@pytest.mark.parametrize("slice_rows", [0, 32])
def test_each_parameter_gradient_alone(wanted: tuple[str, ...], slice_rows: int) -> None:
    """What is not wanted is null; dbias alone reads neither x nor the weight. The same bits as all together."""
    case = Case(70, 2, 3, 20, 24, "0..000", F16, "", slice_rows=slice_rows)
    inputs = make(case)
    every = run(Device(build("snr_linear")), case, inputs)
    device = Device(build("snr_linear"))
    put = {name: device.put(tensor) for name, tensor in inputs.items()}
    found = {
        "out": device.empty(2, 3, 20, 24, dtype=F16), "dgate": device.empty(2, 3, dtype=F16),
        "dbias": device.empty(2, 20, dtype=F16),
    }  # fmt: skip
    alone = wanted == ("dbias",)
    fields = dict(type=TYPE[F16], batch=70, upper=2, lower=3, outputs=20, features=0 if alone else 24)
    fields |= dict(x=None if alone else put["x"], x_row=72, x_unit=24, given_weight=None if alone else put["weight"])
    fields |= dict(parameter_type=TYPE[F16], gate=put["gate"], gate_type=TYPE[F16], skip=1, grad=put["grad"], large=-1)
    fields |= {name: found[name] for name in wanted} | dict(slice_rows=slice_rows)
    device.call(device.library.parameter_gradients, fields, FIELDS)
    for name in wanted:
        assert torch.equal(found[name], every["dweight" if name == "out" else name])


def test_a_gate_that_is_nan_is_not_closed() -> None:
    case = Case(5, 2, 2, 6, 8, "0.0.")
    inputs = make(case)
    clean = run(Device(build("snr_linear")), case, inputs)
    inputs["gate"][1, 1] = torch.nan
    got = run(Device(build("snr_linear")), case, inputs)
    assert got["y"][:, 1].isnan().all() and torch.equal(got["y"][:, 0], clean["y"][:, 0])
    assert got["dweight"][1, 1].isnan().all() and not got["dweight"][:, 0].isnan().any()


# Five steps of 32 rows in a slice, so that the last panels lie where the sums of a block go; more than one warp and
# tile; pairs that sum dbias and pairs that do not; three steps to a pair of forward, two to one of dx.
SENSITIVE = Case(300, 2, 3, 40, 72, "0....0", F16, "relu", slice_rows=160)


def check(case: Case) -> Callable[[Device], None]:
    inputs = make(case)

    def on(device: Device) -> None:
        got = run(device, case, inputs)
        assert_right(case, got, oracle(case, inputs, got["y"]))

    return on


def test_every_barrier_and_every_wait_matters() -> None:
    """The wait for copies and a barrier in each step, two around a block's <W, S>, one among partial sums, and that of
    expert_linear's column sums, which comes first."""
    library = build("snr_linear")
    device = Device(library).library
    own = range(device.first_barrier(), device.barriers())
    assert len(own) == 5
    assert not noticed(check(SENSITIVE), library)
    for barrier in (0, *own):
        assert noticed(check(SENSITIVE), library, skipped_barrier=barrier), f"barrier {barrier} may go without notice"


SMALL = Case(100, 2, 3, 36, 72, "0..000", F16, slice_rows=64)
WRONG = {
    "a stage too few": ("gemm_pipeline.cuh", "stage_of(step + kGemmStages - 1)", "stage_of(step + kGemmStages)"),
    "the gate of the next pair": ("snr_linear.cuh", "const float gate = gate_of(q);",
                                  "const float gate = gate_of(q + 1 < pairs ? q + 1 : q);"),
    "sums that go on into the next pair": ("snr_linear.cuh", "product[i][j][k] = 0.0f;", ""),
    "x or dz of the pair before": ("gemm_pipeline.cuh", "left = LeftLoader(left_of(ahead));", ""),
    "weights of the pair before": ("gemm_pipeline.cuh", "right = RightLoader(right_of(ahead));", ""),
    "a closed pair is read": ("snr_linear.cuh", "return !(a.skip && gate == 0.0f);", "return true;"),
    "the block of another pair": ("snr_linear.cuh", "(upper * a.lower + lower)", "(lower * a.upper + upper)"),
    "a slice's sums over another's": ("snr_linear.cuh", "static_cast<int64_t>(part.tile.slice) * (across * down)",
                                      "0 * static_cast<int64_t>(part.tile.slice) * (across * down)"),
    "a tile's product left out": ("snr_linear.cuh", "product += warps[warp];", "product += 0;"),
    "nobody sums dz where all are closed": ("snr_linear.cuh", "part.lower == (first < a.lower ? first : 0);",
                                            "part.lower == first;"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_index_is_noticed(wrong: str) -> None:
    assert noticed(check(SMALL), build("snr_linear", WRONG[wrong], "FLOAT16_ONLY"))


def plan(product: int, batch: int, outputs: int, features: int, upper: int, lower: int, tensor_cores: bool = True):
    """large, slices, rows of a slice."""
    found = (ctypes.c_int64 * 3)()
    sizes = [ctypes.c_int64(n) for n in (batch, outputs, features, upper, lower)]
    Device(build("snr_linear")).library.plan(product, *sizes, int(tensor_cores), found)
    return tuple(found)


def test_plan() -> None:
    """Large tiles where they fill a GPU without waste; slices of the batch for the parameters' gradients alone."""
    assert plan(0, 16384, 64, 256, 8, 4) == (1, 1, 16384) and plan(1, 16384, 256, 64, 4, 8) == (1, 1, 16384)
    assert plan(0, 16384, 64, 256, 1, 4)[0] == 0  # 128 large tiles
    assert plan(1, 16384, 64, 256, 1, 4)[0] == 1  # dx has more
    assert plan(0, 130, 64, 256, 80, 4)[0] == 0  # a quarter of the large tiles would be past the batch
    assert plan(0, 16384, 64, 256, 8, 4, tensor_cores=False)[0] == 0
    large, slices, rows = plan(2, 16384, 128, 128, 4, 4)
    assert large == 1 and slices == 16 and rows * slices == 16384
    assert plan(2, 4096, 64, 64, 4, 4) == (0, 8, 512)
    assert plan(2, 4096, 64, 64, 4, 0)[1] == 8  # dbias alone is left to do


def test_the_same_without_skipping() -> None:
    """Gates that are closed add zeros: skipping them changes no bit of the outputs."""
    case = Case(40, 2, 3, 20, 24, "0..0.0", F16, "tanh", skip=False)
    inputs = make(case)
    every, skipping = (run(Device(build("snr_linear")), c, inputs) for c in (case, replace(case, skip=True)))
    for name in ("y", "z", "dx", "dweight", "dbias"):
        assert torch.equal(every[name], skipping[name]), name
    assert (every["dgate"][case.closed] != 0).all()
