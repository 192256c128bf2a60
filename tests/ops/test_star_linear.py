"""star_linear on every backend of a CPU: values, gradients, identities, bad input."""

import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mtlkernels as mtl
from mtlkernels import backend as _backend

from .cases import (
    GRAD_LAYOUTS,
    agree,
    close,
    each_backend,
    each_dtype,
    expected,
    layouts,
    native_only,
    outcome,
    over,
    random_grad,
    same_bits,
)

ACTIVATIONS = [None, "relu", "gelu", "silu", "tanh", "sigmoid"]


class Star(NamedTuple):
    """Sizes of a star_linear. spread: "even", "skewed" (nine rows of ten in one domain), "sorted", "one each"."""

    batch: int
    domains: int
    outputs: int
    features: int
    spread: str = "even"

    def tensors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """x, weight, domain_weight, bias, domain_bias."""
        gen = torch.Generator().manual_seed(sum(self[:4]))
        batch, domains, outputs, features = self[:4]
        shapes = (batch, features), (outputs, features), (domains, outputs, features), (outputs,), (domains, outputs)
        x, weight, *rest = (torch.randn(s, generator=gen, dtype=torch.float64) for s in shapes)
        return tuple(t.to(dtype) for t in (x, weight / max(1, features) ** 0.5, *rest))

    @property
    def domain(self) -> Tensor:
        gen = torch.Generator().manual_seed(self.batch)
        if self.spread == "one each":
            return torch.randperm(self.domains, generator=gen)[: self.batch]
        ids = torch.randint(self.domains, (self.batch,), generator=gen)
        if self.spread == "skewed":
            ids = torch.where(torch.rand(self.batch, generator=gen) < 0.9, self.domains // 2, ids)
        return ids.sort().values if self.spread == "sorted" else ids

    def __call__(
        self, x, weight, domain_weight, bias=None, domain_bias=None, *, activation=None, backend=None
    ) -> Tensor:
        return mtl.star_linear(
            x, self.domain, weight, domain_weight, bias, domain_bias, activation=activation, backend=backend
        )


# The kernel: tiles of 6 or 12 rows and 8 to 32 columns, blocks of rows below 500, S in blocks of 256 rows and 96
# outputs, and in lanes of 512 rows and more, among which large domains are cut.
CASES = {
    "one": Star(1, 1, 1, 1),
    "one row": Star(1, 3, 5, 4),
    "one domain": Star(25, 1, 9, 33),
    "odd": Star(7, 3, 5, 11),
    "one row each": Star(17, 17, 6, 5, "one each"),
    "more domains than rows": Star(5, 40, 7, 9),
    "over a tile": Star(70, 3, 35, 34),
    "sorted": Star(70, 3, 33, 20, "sorted"),
    "over a block": Star(600, 3, 9, 17),
    "cut among lanes": Star(1500, 3, 10, 6, "skewed"),
    "many lanes": Star(5000, 2, 3, 2),
    "a domain over all lanes": Star(4500, 1, 5, 3),
    "over a gradient block": Star(40, 2, 200, 5),
    "over two gradient blocks": Star(700, 4, 110, 7, "skewed"),
    "deep": Star(60, 3, 4, 900, "skewed"),
    "wide": Star(3, 2, 700, 3),
    "no rows": Star(0, 3, 4, 5),
    "no outputs": Star(6, 2, 0, 5),
    "no features": Star(6, 2, 4, 0),
}
SMALL = {name: case for name, case in CASES.items() if case.batch * case.outputs * case.features < 5000}
MIDDLE = Star(290, 5, 19, 21, "skewed")
TINY = Star(4, 4, 2, 3)


def loop(x, domain, weight, domain_weight, bias, domain_bias, activation):
    """The definition, one number at a time."""
    acts = {
        None: lambda z: z,
        "relu": lambda z: max(z, 0.0),
        "gelu": lambda z: z * 0.5 * (1 + math.erf(z / math.sqrt(2))),
        "silu": lambda z: z / (1 + math.exp(-z)),
        "tanh": math.tanh,
        "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
    }
    x, weight, domain_weight = x.numpy(), weight.numpy(), domain_weight.numpy()
    y = np.empty((len(x), len(weight)))
    for b, n in np.ndindex(y.shape):
        p = int(domain[b])
        z = sum(float(x[b, k] * weight[n, k] * domain_weight[p, n, k]) for k in range(x.shape[1]))
        z += 0.0 if bias is None else float(bias[n])
        z += 0.0 if domain_bias is None else float(domain_bias[p, n])
        y[b, n] = acts[activation](z)
    return torch.from_numpy(y)


def loop_over_domains(domain, x, weight, domain_weight, bias, domain_bias, activation=None):
    """How it is written without this operator, in the caller's dtype throughout."""
    rows = [(domain == p).nonzero()[:, 0] for p in range(len(domain_weight))]
    parts = [F.linear(x[r], weight * w, bias + b) for r, w, b in zip(rows, domain_weight, domain_bias, strict=True)]
    z = torch.cat(parts)[torch.argsort(torch.cat(rows))]
    return z if activation is None else getattr(F, activation, getattr(torch, activation, None))(z)


@pytest.mark.parametrize("case", over(SMALL))
def test_the_reference_is_the_definition(case):
    x, weight, domain_weight, *biases = case.tensors()
    some_biases = itertools.product((biases[0], None), (biases[1], None))
    for activation, (bias, domain_bias) in itertools.product(ACTIVATIONS, some_biases):
        found = case(x, weight, domain_weight, bias, domain_bias, activation=activation, backend="reference")
        wanted = loop(x, case.domain, weight, domain_weight, bias, domain_bias, activation)
        close(found, wanted, 1e-14)


@native_only
@each_dtype
@pytest.mark.parametrize("case", over(CASES))
def test_shapes(case, dtype):
    tensors = case.tensors(dtype)
    for activation in ("relu", "gelu"):
        found = outcome(lambda *t, a=activation: case(*t, activation=a, backend="native"), tensors)
        # A column's sum over all rows may cancel: its terms count.
        agree(found, expected(case, tensors, activation=activation), tensors, floor=1)


@each_dtype
@pytest.mark.parametrize("case", over(SMALL))
def test_shapes_of_the_reference(case, dtype):
    """Its gradients against those of a loop over the domains, in float64."""
    tensors = case.tensors(dtype)
    found = outcome(lambda *t: case(*t, activation="tanh", backend="reference"), tensors)
    doubles = [t.double() for t in tensors]
    grad = random_grad(found.out).double()
    wanted = outcome(lambda *t: loop_over_domains(case.domain, *t, "tanh"), doubles, lambda _: grad)
    agree(found, wanted, tensors, floor=1)


@each_backend
@each_dtype
@pytest.mark.parametrize("with_biases", list(itertools.product([True, False], repeat=2)))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, with_biases, dtype, backend):
    *tensors, bias, domain_bias = MIDDLE.tensors(dtype)
    tensors += [bias if with_biases[0] else None, domain_bias if with_biases[1] else None]
    found = outcome(lambda *t: MIDDLE(*t, activation=activation, backend=backend), tensors)
    agree(found, expected(MIDDLE, tensors, activation=activation), tensors, floor=1)


@each_backend
@pytest.mark.parametrize("which", range(5), ids=["x", "weight", "domain_weight", "bias", "domain_bias"])
def test_layouts(which, backend):
    case = Star(40, 3, 9, 10)
    for dtype in (torch.float32, torch.bfloat16):
        tensors = list(case.tensors(dtype))
        for name, other in layouts(tensors[which]).items():
            strided = [*tensors[:which], other, *tensors[which + 1 :]]
            found = outcome(lambda *t: case(*t, activation="tanh", backend=backend), strided)
            dense = outcome(lambda *t: case(*t, activation="tanh", backend=backend), [t.contiguous() for t in strided])
            try:
                agree(found, expected(case, strided, activation="tanh"), strided, floor=1)
                if backend == "native":
                    same_bits(found, dense)
            except AssertionError as error:
                raise AssertionError(name) from error


@each_backend
@pytest.mark.parametrize("grad", over(GRAD_LAYOUTS))
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradient_layouts(grad, activation, backend):
    for dtype in (torch.float64, torch.bfloat16):
        tensors = MIDDLE.tensors(dtype)
        found = outcome(lambda *t: MIDDLE(*t, activation=activation, backend=backend), tensors, grad)
        agree(found, expected(MIDDLE, tensors, grad, activation=activation), tensors, floor=1)


@each_backend
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_each_gradient_alone(activation, backend):
    tensors = MIDDLE.tensors(torch.float32)

    def call(*t):
        return MIDDLE(*t, activation=activation, backend=backend)

    every = outcome(call, tensors)
    for needs in itertools.product((False, True), repeat=5):
        if any(needs):
            same_bits(outcome(call, tensors, needs=needs), every)
    with torch.no_grad():
        plain = call(*(t.requires_grad_() for t in tensors))
    assert not plain.requires_grad and torch.equal(plain, every.out)


@each_backend
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_types_of_ids(dtype, backend):
    x, weight, domain_weight, *biases = MIDDLE.tensors(torch.float32)
    wanted = MIDDLE(x, weight, domain_weight, *biases, backend=backend)
    ids = MIDDLE.domain.to(dtype)
    for domain in (ids, torch.stack([ids, ids + 1], 1)[:, 0]):
        found = mtl.star_linear(x, domain, weight, domain_weight, *biases, backend=backend)
        assert torch.equal(found, wanted)


@each_backend
def test_more_domains_than_a_short_id_can_name(backend):
    """P=300 with uint8 ids: 300 must not be taken for 300 - 256."""
    x, weight, domain_weight, *biases = Star(9, 300, 3, 4).tensors()
    ids = torch.tensor([0, 1, 43, 44, 45, 128, 200, 254, 255])
    found = mtl.star_linear(x, ids.to(torch.uint8), weight, domain_weight, *biases, backend=backend)
    close(found, loop(x, ids, weight, domain_weight, *biases, None))


@each_backend
def test_neutral_domains_are_a_linear_layer(backend):
    """domain_weight = 1 and domain_bias = 0, or one domain alone: F.linear, forward and backward."""
    x, weight, domain_weight, bias, domain_bias = MIDDLE.tensors()
    ones, zeros = torch.ones_like(domain_weight), torch.zeros_like(domain_bias)
    wanted = outcome(F.linear, [x, weight, bias])
    found = outcome(lambda x, w, b: MIDDLE(x, w, ones, b, zeros, backend=backend), [x, weight, bias])
    for a, b in zip((found.out, *found.grads), (wanted.out, *wanted.grads), strict=True):
        close(a, b)
    one = Star(290, 1, 19, 21)
    found = outcome(lambda x, w, b: one(x, w, ones[:1], b, backend=backend), [x, weight, bias])
    for a, b in zip((found.out, *found.grads), (wanted.out, *wanted.grads), strict=True):
        close(a, b)


@each_backend
@pytest.mark.parametrize("bad", [3, -1, 2**32, 2**32 + 1])
def test_ids_out_of_range_are_named(bad, backend):
    x, weight, domain_weight, *_ = Star(8, 3, 5, 4).tensors()
    domain = torch.tensor([0, 1, 2, 0, bad, 1, 2, 0])
    with pytest.raises(ValueError, match=rf"domain must hold ids from 0 to P-1 = 2; got {bad}"):
        mtl.star_linear(x, domain, weight, domain_weight, backend=backend)
    if backend == "native":
        with pytest.raises(RuntimeError, match=f"got {bad} in row 4"):
            torch.ops.mtlkernels.star_linear(x, domain, weight, domain_weight, None, None, "", False)
        grad, none = torch.zeros(8, 5), torch.zeros(0)
        with pytest.raises(RuntimeError, match=f"got {bad} in row 4"):
            torch.ops.mtlkernels.star_linear_backward(
                grad.double(), x, domain, weight, domain_weight, none.double(), "", 31
            )


def test_where_ids_cannot_be_checked_such_rows_are_nan():
    """What the reference does on a GPU: NaN in the row alone, no part in any gradient."""
    from mtlkernels.reference.star_linear import star_linear as plain

    case = Star(12, 3, 5, 4)
    tensors, ids = case.tensors(), case.domain
    bad = torch.tensor([3, 7])
    known = torch.tensor([b not in bad for b in range(12)])
    broken = ids.clone()
    broken[bad] = torch.tensor([3, -(2**40)])
    hurt = tensors[0].clone()
    hurt[bad] = math.nan
    for x in (tensors[0], hurt):
        found = outcome(lambda x, w, v, *b: plain(x, broken, w, v, *b, "tanh"), [x, *tensors[1:]])
        grad = random_grad(found.out)[known]
        wanted = outcome(
            lambda x, w, v, *b: plain(x, ids[known], w, v, *b, "tanh"),
            [tensors[0][known], *tensors[1:]],
            lambda _, g=grad: g,
        )
        assert found.out[bad].isnan().all() and (found.grads[0][bad] == 0).all()
        close(found.out[known], wanted.out)
        for a, b in zip((found.grads[0][known], *found.grads[1:]), wanted.grads, strict=True):
            close(a, b)


@native_only
def test_explain_says_what_there_is():
    lines = mtl.explain("star_linear", torch.zeros(2, 3)).splitlines()
    assert lines[0] == "star_linear on cpu, float32: native"
    assert next(line for line in lines[1:] if "native" in line).endswith("C++ kernel")
    assert mtl.explain("star_linear", x=torch.zeros(2, 3).double()).startswith("star_linear on cpu, float64: native")
    predicates = _backend._predicates["star_linear"]
    assert list(predicates) == ["triton", "native", "reference"]
    built = torch._C._dispatch_has_kernel_for_dispatch_key("mtlkernels::star_linear", "CUDA")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        on_gpu = _backend.Case("cuda", dtype, 90)
        ok, reason = predicates["native"](on_gpu)
        assert ok == (built and dtype != torch.float64) and predicates["reference"](on_gpu).ok
        wanted = "built without nvcc" if not built else "CUDA C++ kernel" if ok else "no CUDA kernel for torch.float64"
        assert wanted in reason


X, IDS, W, V = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), torch.zeros(5, 4), torch.zeros(3, 5, 4)
C, D = torch.zeros(5), torch.zeros(3, 5)
BAD = {
    "x no tensor": (TypeError, "x must be a tensor; got list", ([[1.0]], IDS, W, V), {}),
    "domain no tensor": (TypeError, "domain must be a tensor; got list", (X, [0, 0], W, V), {}),
    "weight no tensor": (TypeError, "weight must be a tensor", (X, IDS, None, V), {}),
    "domain_weight no tensor": (TypeError, "domain_weight must be a tensor", (X, IDS, W, 1.0), {}),
    "bias no tensor": (TypeError, "bias must be a tensor", (X, IDS, W, V, 1.0), {}),
    "domain_bias no tensor": (TypeError, "domain_bias must be a tensor", (X, IDS, W, V, C, 1.0), {}),
    "x one dimension": (ValueError, r"x must be \[B,K\]; got shape \(4,\)", (X[0], IDS, W, V), {}),
    "weight one dimension": (ValueError, r"weight must be \[N,K\]", (X, IDS, W[0], V), {}),
    "K": (ValueError, r"weight must be \[N,K\] with x's K=3; got shape \(5, 4\)", (X[:, :3], IDS, W, V), {}),
    "domain_weight two dimensions": (ValueError, r"domain_weight must be \[P,N,K\]", (X, IDS, W, V[0]), {}),
    "N": (ValueError, r"domain_weight.*N=5, K=4 of weight; got shape \(3, 2, 4\)", (X, IDS, W, V[:, :2]), {}),
    "no domains": (ValueError, "domain_weight.*got P=0", (X, IDS, W, V[:0]), {}),
    "domain shape": (ValueError, r"domain must be \[B\].*2 rows; got \(1,\)", (X, IDS[:1], W, V), {}),
    "domain two dimensions": (ValueError, r"domain must be \[B\]", (X, IDS[:, None], W, V), {}),
    "domain float": (TypeError, "domain must be of an integer type; got torch.float32", (X, X[:, 0], W, V), {}),
    "domain bool": (TypeError, "domain must be of an integer type; got torch.bool", (X, IDS.bool(), W, V), {}),
    "x int": (TypeError, "x must be float64.*int64", (X.long(), IDS, W.long(), V.long()), {}),
    "weight double": (TypeError, "weight is torch.float64", (X, IDS, W.double(), V), {}),
    "x half": (TypeError, "x is torch.float16", (X.half(), IDS, W, V), {}),
    "domain_weight dtype": (TypeError, "domain_weight is torch.float64", (X, IDS, W, V.double()), {}),
    "bias dtype": (TypeError, "bias is torch.float64", (X, IDS, W, V, C.double()), {}),
    "domain_bias dtype": (TypeError, "domain_bias is torch.float64", (X, IDS, W, V, C, D.double()), {}),
    "domain elsewhere": (ValueError, "domain is on meta", (X, IDS.to("meta"), W, V), {}),
    "domain_weight elsewhere": (ValueError, "domain_weight is on meta", (X, IDS, W, V.to("meta")), {}),
    "bias shape": (ValueError, r"bias must be \[N\] = \(5,\); got shape \(3, 5\)", (X, IDS, W, V, D), {}),
    "domain_bias shape": (ValueError, r"domain_bias must be \[P,N\] = \(3, 5\)", (X, IDS, W, V, None, C), {}),
    "activation": (ValueError, "activation must be None or.*'swish'", (X, IDS, W, V), {"activation": "swish"}),
    "backend": (ValueError, "backend must be one of.*'cuda'", (X, IDS, W, V), {"backend": "cuda"}),
}


@pytest.mark.parametrize("error, match, args, options", [pytest.param(*v, id=k) for k, v in BAD.items()])
def test_bad_input(error, match, args, options):
    with pytest.raises(error, match=match):
        mtl.star_linear(*args, **options)
