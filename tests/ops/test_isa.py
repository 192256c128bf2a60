"""Every instruction set that the library was compiled for and this processor has, not only the best one."""

import pytest
import torch

from mtlkernels import _library

from .cases import DTYPES, LINEAR, ODD_MIX, agree, expected, native_only, outcome, over

ISAS = ("generic", "avx2", "avx512", "avx512bf16")

pytestmark = native_only


def here() -> list[str]:
    """The instruction sets of this processor, plainest first."""
    return ISAS[: ISAS.index(torch.ops.mtlkernels.cpu_isa("")) + 1] if _library.loaded() else []


@pytest.fixture(params=here())
def isa(request):
    before = torch.ops.mtlkernels.cpu_isa("")
    assert torch.ops.mtlkernels.cpu_isa(request.param) == request.param
    yield request.param
    torch.ops.mtlkernels.cpu_isa(before)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("case", over(LINEAR))
def test_expert_linear(case, activation, isa):
    for dtype in DTYPES:
        tensors = case.tensors(dtype)
        found = outcome(lambda *t: case(*t, activation=activation, backend="native"), tensors)
        agree(found, expected(case, tensors, activation=activation), tensors)


@pytest.mark.parametrize("case", over(ODD_MIX))
def test_mix(case, isa):
    for dtype in DTYPES:
        tensors = case.tensors(dtype)
        agree(outcome(lambda *t: case(*t, backend="native"), tensors), expected(case, tensors), tensors)


def test_unknown():
    with pytest.raises(RuntimeError, match="generic, avx2, avx512 or avx512bf16; got sse"):
        torch.ops.mtlkernels.cpu_isa("sse")
