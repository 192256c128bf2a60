"""The torch glue of the CUDA losses (shapes, strides, dtypes, empty tensors), run over the emulated device."""

import pytest
import torch
from emulated import build
from torch import Tensor

from mtlkernels.reference.esmm_loss import esmm_loss as plain_esmm
from mtlkernels.reference.masked_bce import masked_bce as plain_bce

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@pytest.fixture(scope="module")
def ops():
    torch.ops.load_library(str(build("operators")))
    return torch.ops.mtlkernels_emulated


def draw(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def bits(*shape: int, dtype: torch.dtype = torch.bool) -> Tensor:
    return (draw(*shape) > 0).to(dtype)


def close(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == F32 and found.is_contiguous()
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=1e-6)


ESMM = {
    "plain": lambda: (draw(7), draw(7), bits(7), bits(7)),
    "16 bit": lambda: (draw(7, dtype=BF16), draw(7, dtype=BF16), bits(7, dtype=torch.int64), bits(7, dtype=F64)),
    "half": lambda: (draw(7, dtype=F16), draw(7, dtype=F16), bits(7, dtype=torch.uint8), bits(7, dtype=torch.int32)),
    "bfloat16 labels": lambda: (draw(7), draw(7), bits(7, dtype=BF16), bits(7, dtype=BF16)),
    "strided": lambda: (draw(7, 2)[:, 1], draw(1).expand(7), bits(7, 3, dtype=F16)[:, 1], bits(1).expand(7)),
    "empty": lambda: (draw(0), draw(0), draw(0), draw(0)),
}
BCE = {
    "plain": lambda: (draw(6, 3), bits(6, 3), None),
    "mask": lambda: (draw(6, 3, dtype=BF16), bits(6, 3, dtype=torch.int64), bits(6, 3)),
    "weights": lambda: (draw(6, 3, dtype=F16), bits(6, 3, dtype=F64), draw(6, 3).abs()),
    "strided": lambda: (draw(3, 6).T, bits(6, 1, dtype=torch.int32).expand(6, 3), bits(6, 6)[:, ::2]),
    "all masked": lambda: (draw(6, 3), bits(6, 3), torch.zeros(6, 3)),
    "no rows": lambda: (draw(0, 3), draw(0, 3), draw(0, 3)),
    "no rows, no mask": lambda: (draw(0, 3), draw(0, 3), None),
    "no tasks": lambda: (draw(6, 0), draw(6, 0), draw(6, 0)),
}


@pytest.mark.parametrize("name", ESMM)
def test_esmm(ops, name: str) -> None:
    a, c, y, z = ESMM[name]()
    z = z * y
    loss, dctr, dcvr = ops.esmm_loss(a, c, y, z, 0.7)
    leaves = [t.double().requires_grad_() for t in (a, c)]
    want = plain_esmm(*leaves, y, z, 0.7)[0]
    grads = torch.autograd.grad(want * 3, leaves)
    close(loss, want)
    assert loss.shape == ()
    for found, wanted in zip(ops.esmm_loss_backward(torch.tensor(3.0), dctr, dcvr), grads, strict=True):
        close(found, wanted)


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("name", BCE)
def test_bce(ops, name: str, expanded: bool) -> None:
    x, y, mask = BCE[name]()
    loss, dlogits = ops.masked_bce(x, y, mask)
    leaf = x.double().requires_grad_()
    want = plain_bce(leaf, y, mask)[0]
    grad = torch.tensor(2.0).expand(x.shape[1]) if expanded else draw(x.shape[1])
    close(loss, want)
    close(ops.masked_bce_backward(grad, dlogits), torch.autograd.grad(want, leaf, grad.double())[0])


B4, M = draw(4), draw(4, 2)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("esmm_loss", (B4.double(), B4.double(), B4, B4, 1.0), "ctr_logit: "),
        ("esmm_loss", (M, M, M, M, 1.0), "ctr_logit: "),
        ("esmm_loss", (B4, B4.half(), B4, B4, 1.0), "cvr_logit: "),
        ("esmm_loss", (B4, B4, B4[:3], B4, 1.0), "click"),
        ("esmm_loss", (B4, B4, B4, B4.to(torch.int16), 1.0), "conversion: "),
        ("esmm_loss_backward", (B4, B4, B4), "grad: "),
        ("esmm_loss_backward", (B4[0], B4, B4[:3]), "dctr, dcvr: "),
        ("masked_bce", (M.double(), M, None), "logits: "),
        ("masked_bce", (B4, B4, None), "logits: "),
        ("masked_bce", (M, M.T, None), "labels: "),
        ("masked_bce", (M, M, M[:3]), "mask: "),
        ("masked_bce", (M, M.to(torch.int8), None), "labels: "),
        ("masked_bce_backward", (B4, M), "grad: "),
        ("masked_bce_backward", (M[0], M.double()), "dlogits: "),
    ],
)
def test_errors_name_the_argument(ops, name: str, args: tuple, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, name)(*args)
