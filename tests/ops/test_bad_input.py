"""The bad input table: every operator, every tensor of it, every way to spoil one; a named error on every backend."""

import contextlib
import inspect
import re
import warnings

import pytest
import torch

import mtlkernels as mtl
from tests.fuzz.agreement import EMULATED, emulated
from tests.gpu.subjects import USUAL
from tests.ops.cases import BACKENDS, native_only
from tests.ops.norms import make

warnings.filterwarnings("ignore", message=".*(nested|sparse|Sparse).*")
SPOILS = {
    "wrong rank": lambda t: t.unsqueeze(0),
    "one dimension less": lambda t: t[0],
    "complex": lambda t: t.detach().to(torch.complex64),
    "int64": lambda t: t.detach().long(),
    "bool": lambda t: t.detach() > 0,
    "float8": lambda t: t.detach().to(torch.float8_e4m3fn),
    "sparse": lambda t: t.detach().to_sparse(),
    "sparse compressed": lambda t: t.detach().reshape(-1, t.shape[-1]).to_sparse_csr(),
    "nested": lambda t: torch.nested.nested_tensor([t.detach(), t.detach()]),
    "another device": lambda t: t.detach().to("meta"),
    "quantized": lambda t: torch.quantize_per_tensor(t.detach().float(), 0.1, 0, torch.qint8),
    "a list": lambda t: t.tolist(),
    "a number": lambda t: 1.5,
}
OF_SHAPE = ("wrong rank", "one dimension less")  # which of the arguments is wrong cannot always be told
TENSORS = {
    "expert_linear": ("x", "weight", "bias"),
    "mix": ("experts", "logits", "static"),
    "expert_mix": ("x", "weight", "bias", "logits", "static"),
    "snr_linear": ("x", "weight", "gate", "bias"),
    "star_linear": ("x", "weight", "domain_weight", "bias", "domain_bias"),
    "partitioned_norm": ("x", "weight", "bias", "domain_weight", "domain_bias"),
    "hard_concrete": ("log_alpha",),
    "hard_concrete_l0": ("log_alpha",),
    "esmm_loss": ("ctr_logit", "cvr_logit"),
    "masked_bce": ("logits",),
}
CALLS = [
    (name, i) for name, subject in USUAL.items() for i, t in enumerate(subject.make(torch.float32)) if t is not None
]


@pytest.fixture(params=["reference", *(pytest.param(name, marks=native_only) for name in ("native", EMULATED))])
def backend(request):
    """The backends of a call; the emulated device is what "auto" means inside."""
    with emulated() if request.param == EMULATED else contextlib.nullcontext():
        yield "auto" if request.param == EMULATED else request.param


def words(name: str) -> set[str]:
    """The names of the arguments of the functions that an operator has."""
    op = USUAL[name].op
    public = {"mix": ("mix", "adatt_mix", "gated_mix", "linear_mix")}.get(op, (op,))
    return {word for function in public for word in inspect.signature(getattr(mtl, function)).parameters}


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("name,i", CALLS, ids=lambda v: str(v))
def test_a_spoilt_tensor(backend, name, i, spoil):
    tensors, op = list(USUAL[name].make(torch.float32)), USUAL[name].op
    if spoil == "one dimension less" and tensors[i].dim() == 0:
        pytest.skip("a scalar has no dimension to lose")
    if op == "hard_concrete_l0" and spoil in OF_SHAPE:
        pytest.skip("any shape is right")
    if op == "hard_concrete_l0" and spoil == "another device":
        pytest.skip("alone on its device, as it may be")
    tensors[i] = SPOILS[spoil](tensors[i])
    call = USUAL[name].bind("cpu")
    with pytest.raises((TypeError, ValueError)) as refused:
        call(*tensors, backend=backend)
    spoilt = "native" if (name, i) == ("mix, native", 2) else TENSORS[op][i]
    named = words(name) if spoil in OF_SHAPE else {spoilt}
    assert any(re.search(rf"\b{word}\b", str(refused.value)) for word in named), f"{spoilt}: {refused.value}"


def test_a_refused_call_writes_nothing(backend):
    """Running statistics are what a call changes in place."""
    case = make(13, 7, 3)
    running = case.running(torch.float32)
    before = [t.clone() for t in running]
    tensors = case.tensors(torch.float32)
    ids = case.domain.clone()
    ids[4] = 99
    spoilt = [
        *([(tensors, ids)] if backend != "auto" else []),  # a GPU makes that row NaN
        ([*tensors[:3], tensors[3][:, :-1], tensors[4]], case.domain),
        ([tensors[0][:, :-1], *tensors[1:]], case.domain),
        ([tensors[0].long(), *tensors[1:]], case.domain),
    ]
    for (x, *rest), domain in spoilt:
        with pytest.raises((TypeError, ValueError)):
            mtl.partitioned_norm(x, domain, *rest, *running, training=True, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(running, before, strict=True))
    wide = torch.ones(1, 7).expand(3, 7)
    with pytest.raises(ValueError, match="running_var must not be expanded"):
        mtl.partitioned_norm(tensors[0], case.domain, *tensors[1:], running[0], wide, training=True, backend=backend)
    assert torch.equal(running[0], before[0])


@pytest.mark.parametrize("counts", [[2, -1], [3], [1, 1, 0], "12", [1.0, 1.0], 2, [[1], [1]]], ids=str)
def test_counts(backend, counts):
    x, weight = torch.randn(3, 2, 4), torch.randn(2, 5, 4)
    with pytest.raises((TypeError, ValueError), match="experts_per_unit"):
        mtl.expert_linear(x, weight, experts_per_unit=counts, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)  # a GPU makes such a row NaN
@pytest.mark.parametrize("wrong", [-1, 3, 2**31, -(2**62)])
def test_domains(backend, wrong):
    ids = torch.tensor([0, wrong, 2])
    x, weight, own = torch.randn(3, 4), torch.randn(5, 4), torch.randn(3, 5, 4)
    with pytest.raises(ValueError, match="domain"):
        mtl.star_linear(x, ids, weight, own, backend=backend)
    case = make(13, 7, 3)
    ids = case.domain.clone()
    ids[4] = wrong
    with pytest.raises(ValueError, match="domain"):
        case._replace(domain=ids)(*case.tensors(torch.float32), backend=backend)


def test_labels(backend):
    logits = torch.randn(4, 2, requires_grad=True)
    labels, mask = torch.rand(4, 2), torch.ones(4, 2, dtype=torch.bool)
    mask[1] = False
    broken = labels.clone()
    broken[1] = torch.nan
    same = [mtl.masked_bce(logits, y, mask, backend=backend) for y in (labels, broken)]
    assert torch.equal(*same) and same[0].isfinite().all()
    with pytest.raises(ValueError, match="labels requires a gradient"):
        mtl.masked_bce(logits, labels.requires_grad_(), mask, backend=backend)
    with pytest.raises((TypeError, ValueError), match="labels"):
        mtl.masked_bce(logits, labels[:2].detach(), mask, backend=backend)
    with pytest.raises((TypeError, ValueError), match="mask"):
        mtl.masked_bce(logits, labels.detach(), mask[:, :1], backend=backend)


class Own(torch.Tensor):
    """A subclass without a behaviour of its own."""


@pytest.mark.parametrize("name", USUAL)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_subclass_is_a_tensor(backend, name):
    call, tensors = USUAL[name].bind("cpu"), USUAL[name].make(torch.float32)
    found = call(*(t if t is None else t.as_subclass(Own) for t in tensors), backend=backend)
    torch.testing.assert_close(found.as_subclass(torch.Tensor), call(*tensors, backend=backend))
