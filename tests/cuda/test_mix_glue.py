"""The torch glue of the CUDA mix (shapes, strides, empty tensors, outputs), run over the emulated device."""

import functools

import pytest
import torch
from emulated import build
from torch import Tensor

from mtlkernels.reference.mix import mix as reference

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


@pytest.fixture(scope="module")
def ops():
    torch.ops.load_library(str(build("operators")))
    return torch.ops.mtlkernels_emulated


def draw(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


MASK = torch.tensor([[True, False, True], [False, False, False]])
COLUMNS = torch.tensor([[0, -1, 2], [-1, 1, -1]], dtype=torch.int32)
# experts, logits, static, mask, columns, native
CALLS = {
    "dense": lambda: (draw(5, 3, 8), draw(5, 2, 3), None, None, None, None),
    "strided": lambda: (
        draw(3, 5, 9)[:, :, 1:].transpose(0, 1),
        draw(5, 3, 2).transpose(1, 2),
        draw(3, 2).T,
        MASK,
        None,
        None,
    ),
    "last stride": lambda: (draw(5, 8, 3).transpose(1, 2), None, draw(2, 3), None, None, None),
    "packed": lambda: (draw(5, 3, 8, dtype=BF16), draw(5, 4), draw(4, dtype=F64), None, COLUMNS, None),
    "native": lambda: (draw(5, 4, 8), draw(5, 2, 4), draw(3), None, None, [1, 2, 1]),
    "ones": lambda: (draw(5, 3, 8), draw(5, 2, 3, dtype=BF16), None, MASK, None, [1, 1, 1]),
    "channel": lambda: (draw(5, 3, 8, dtype=BF16), None, draw(2, 3, 8, dtype=BF16), None, None, None),
    "channel empty": lambda: (draw(0, 3, 8), None, draw(2, 3, 8), None, None, None),
    "no rows": lambda: (draw(0, 3, 8), draw(0, 2, 3), draw(2, 3), None, None, None),
    "no tasks": lambda: (draw(5, 3, 8), draw(5, 0, 3), None, None, None, None),
    "no experts": lambda: (draw(5, 0, 8), draw(5, 2, 0), draw(2, 0), None, None, None),
    "no width": lambda: (draw(5, 3, 0), draw(5, 2, 3), draw(2, 3), None, None, None),
    "no columns used": lambda: (draw(5, 3, 8), draw(5, 0), None, None, torch.full_like(COLUMNS, -1), None),
}


@pytest.mark.parametrize("grad_kind", ["plain", "expanded", "transposed"])
@pytest.mark.parametrize("name", CALLS)
def test_against_reference(ops, name: str, grad_kind: str) -> None:
    experts, logits, static, mask, columns, native = CALLS[name]()
    out, lse = ops.mix(experts, logits, static, mask, columns, native)
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in (experts, logits, static)]
    want, want_lse = reference(*leaves, mask, columns, native)
    close = functools.partial(torch.testing.assert_close, check_dtype=False, equal_nan=False)
    fine, coarse = dict(rtol=1e-5, atol=2e-5), dict(rtol=2**-8, atol=1e-2)
    close(out.double(), want, **(coarse if experts.dtype == BF16 else fine))
    close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    assert out.dtype == experts.dtype and lse.dtype == F32 and out.is_contiguous()

    b, t, d = out.shape
    grad = {
        "plain": lambda: draw(b, t, d),
        "expanded": lambda: torch.ones(()).expand(b, t, d),
        "transposed": lambda: draw(d, t, b).permute(2, 1, 0),
    }[grad_kind]().to(experts.dtype)
    used = [x for x in leaves if x is not None]
    gradients = iter(torch.autograd.grad(want, used, grad.double(), allow_unused=True))
    # float32 logits and weights keep their precision beside 16-bit experts, in which only the sum is rounded.
    for bit, (leaf, source) in enumerate(zip(leaves, (experts, logits, static), strict=True)):
        expected = None if leaf is None else next(gradients)
        for needs in (1 << bit, 7):
            got = ops.mix_backward(grad, None, experts, logits, static, mask, columns, native, lse, needs)
            assert [x.numel() == 0 for i, x in enumerate(got) if not needs >> i & 1] == [True] * (3 - needs.bit_count())
            if leaf is None:
                assert got[bit].shape == (0,)
            else:
                assert got[bit].dtype == source.dtype
                expected = torch.zeros_like(leaf) if expected is None else expected
                close(got[bit].double(), expected, **(coarse if source.dtype == BF16 else fine))


def test_gradient_of_lse(ops) -> None:
    experts, logits = draw(5, 3, 8), draw(5, 2, 3)
    _, lse = ops.mix(experts, logits, None, None, None, None)
    grad_lse = draw(5, 2)
    grad = torch.zeros(5, 2, 8)
    _, dlogits, _ = ops.mix_backward(grad, grad_lse, experts, logits, None, None, None, None, lse, 2)
    torch.testing.assert_close(dlogits, torch.softmax(logits, 2) * grad_lse[..., None])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(experts=draw(2, 3, 4, dtype=F64)), "experts: .*float64"),
        (dict(mask=torch.ones(2, 3)), "mask: bool"),
        (dict(logits=draw(2, 2, 5)), "logits: "),
        (dict(static=draw(2, 4)), "static: "),
        (dict(native=[2, 2, 2]), "native: "),
        (dict(native=[1]), "native: "),
        (dict(experts=draw(2, 3)), "experts: "),
        (dict(logits=draw(2, 3)), "logits: "),
        (dict(mask=torch.ones(3, 3, dtype=torch.bool)), "mask"),
        (dict(columns=torch.zeros(2, 3, dtype=torch.int64), logits=draw(2, 3)), "columns: int32"),
    ],
)
def test_errors_name_the_argument(ops, change: dict, message: str) -> None:
    call = dict(experts=draw(2, 3, 4), logits=draw(2, 2, 3), static=None, mask=None, columns=None, native=None) | change
    with pytest.raises(RuntimeError, match=message):
        ops.mix(*call.values())
