"""The torch glue of the CUDA partitioned_norm (sort, strides, empty tensors, outputs), run over the emulated device."""

import pytest
import torch
from emulated import build
from torch import Tensor

from mtlkernels.reference import partitioned_norm as plain

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


@pytest.fixture(scope="module")
def ops():
    torch.ops.load_library(str(build("operators")))
    return torch.ops.mtlkernels_emulated


@pytest.fixture(autouse=True)
def rows_of_no_domain(monkeypatch):
    monkeypatch.setattr(plain, "_can_look", lambda domain: False)


def make(batch: int, width: int, domains: int, dtype=F32, affine=F32, running=F32) -> list[Tensor]:
    random = torch.Generator().manual_seed(batch + width + domains)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    parameters = [draw(width), draw(width), draw(domains, width), draw(domains, width)]
    ids = torch.randint(-1, domains + 1, (batch,), generator=random)  # some of them no domain's
    statistics = draw(domains, width), draw(domains, width).abs() + 0.5
    return [draw(batch, width).to(dtype), ids, *(t.to(affine) for t in parameters),
            *(t.to(running) for t in statistics)]  # fmt: skip


def strided() -> list[Tensor]:
    x, ids, weight, bias, own_weight, own_bias, mean, var = make(30, 12, 3)
    x = torch.cat([x, x], 1)[:, 5:17]
    weight, own_weight, mean = torch.stack([weight, weight], 1)[:, 0], own_weight.t().contiguous().t(), mean[:1]
    return [x, torch.stack([ids, ids], 1)[:, 1], weight, bias, own_weight, own_bias, mean.expand_as(var), var]


CALLS = {
    "plain": lambda: make(40, 8, 3),
    "bfloat16": lambda: make(40, 16, 2, BF16),
    "mixed": lambda: make(40, 5, 2, BF16, BF16, F64),
    "int32": lambda: [t.int() if i == 1 else t for i, t in enumerate(make(20, 4, 3))],
    "strided": strided,
    "last stride": lambda: [t.t().contiguous().t() if i == 0 else t for i, t in enumerate(make(20, 4, 3))],
    "no rows": lambda: make(0, 4, 3),
    "no columns": lambda: make(5, 0, 3),
}


@pytest.mark.parametrize("grad_kind", ["plain", "expanded", "transposed"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CALLS)
def test_against_reference(ops, name: str, training: bool, grad_kind: str) -> None:
    args = CALLS[name]()
    x = args[0]
    found = ops.partitioned_norm(*args, training, 1e-3)
    leaves = [t.double() if t.is_floating_point() else t for t in args]
    inputs = [leaves[i].requires_grad_() for i in (0, 2, 3, 4, 5)]
    want = plain.partitioned_norm(*leaves, training, 1e-3)
    for got, wanted, dtype in zip(found, want, (x.dtype, F32, F32, torch.int64), strict=True):
        assert got.dtype == dtype and got.is_contiguous()
        tolerance = dict(rtol=2**-8, atol=1e-2) if dtype == BF16 else dict(rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(got.double(), wanted.double(), equal_nan=True, **tolerance)

    grad = {
        "plain": lambda: torch.randn(x.shape, generator=torch.Generator().manual_seed(1)),
        "expanded": lambda: torch.ones(()).expand(x.shape),
        "transposed": lambda: torch.randn(x.shape[::-1], generator=torch.Generator().manual_seed(1)).t(),
    }[grad_kind]().to(x.dtype)
    wanted = torch.autograd.grad(want[0], inputs, grad.double())
    back = grad, *args[:3], args[4], *found[1:], training, 1e-3
    for i, source in enumerate((x, *args[2:6])):
        for needs in (1 << i, 31):
            got = ops.partitioned_norm_backward(*back, needs)
            assert [t.shape == (0,) for j, t in enumerate(got) if not needs >> j & 1] == [True] * (
                5 - needs.bit_count()
            )
            assert got[i].dtype == source.dtype
            tolerance = dict(rtol=2**-8, atol=1e-2) if source.dtype == BF16 else dict(rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(got[i].double(), wanted[i], **tolerance)


X, IDS, W, T = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long), torch.zeros(3), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, X.double(), "x: .*float64"),
        (0, W, "x: "),
        (1, IDS[:3], "domain: "),
        (1, IDS.short(), "domain: int64 or int32"),
        (2, W[:2], "weight: "),
        (2, W.long(), "weight: "),
        (3, W[:2], "bias: "),
        (4, W, "domain_weight: "),
        (4, T.double(), "domain_weight: weight's dtype"),
        (5, T[:1], "domain_bias: "),
        (5, T.double(), "domain_bias: weight's dtype"),
        (6, T[:, :2], "running_mean: "),
        (7, T.double(), "running_var: running_mean's dtype"),
    ],
)
def test_errors_name_the_argument(ops, place: int, value: Tensor, message: str) -> None:
    args = [X, IDS, W, W, T, T, T, T, True, 1e-5]
    ops.partitioned_norm(*args)
    args[place] = value
    with pytest.raises(RuntimeError, match=message):
        ops.partitioned_norm(*args)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [(0, X[:, :2], "grad: "), (0, X.double(), "grad: "), (5, T[:1], "mean: "), (6, T.double(), "mean, var: float32"),
     (7, IDS[:1], "count: "), (7, IDS[:2].int(), "count: ")],
)  # fmt: skip
def test_errors_of_backward(ops, place: int, value: Tensor, message: str) -> None:
    args = [X, X, IDS, W, T, T, T, IDS[:2], True, 1e-5, 31]
    ops.partitioned_norm_backward(*args)
    args[place] = value
    with pytest.raises(RuntimeError, match=message):
        ops.partitioned_norm_backward(*args)
