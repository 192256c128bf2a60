"""What both operators share: gradients of gradients, batched gradients, threads, processes."""

import multiprocessing
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mtlkernels.ops import _functional, _operator

from .cases import (
    FORMS,
    LINEAR,
    MIX,
    SHAPES,
    SOME,
    TINY,
    close,
    each_backend,
    native_only,
    outcome,
    over,
    random_grad,
    tiny_call,
    tiny_inputs,
)

each_tiny = pytest.mark.parametrize("name", TINY)
some = pytest.mark.parametrize("name", SOME)


@each_backend
@each_tiny
def test_gradcheck(name, backend):
    torch.autograd.gradcheck(tiny_call(name, backend), tiny_inputs(name), check_batched_grad=True)


@each_backend
@pytest.mark.parametrize("activation", [None, "gelu", "tanh", "sigmoid"])
def test_gradcheck_of_activations(activation, backend):
    call = tiny_call("expert_linear units", backend, activation)
    inputs = tiny_inputs("expert_linear units")
    torch.autograd.gradcheck(call, inputs)
    torch.autograd.gradgradcheck(call, inputs)


@each_backend
@each_tiny
def test_double_backward(name, backend):
    torch.autograd.gradgradcheck(tiny_call(name, backend), tiny_inputs(name))


@native_only
@each_tiny
def test_gradient_penalty(name):
    """The gradient of a squared gradient, as the reference gives it."""

    def penalty(backend):
        inputs = tiny_inputs(name)
        grads = torch.autograd.grad(tiny_call(name, backend)(*inputs).square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    for found, wanted in zip(penalty("native"), penalty("reference"), strict=True):
        close(found, wanted)


@native_only
@each_tiny
def test_retain_graph(name):
    """A second backward through the same graph gives the same again; without retain_graph torch refuses it."""
    inputs = tiny_inputs(name, torch.float32)
    out = tiny_call(name, "native")(*inputs)
    grad = random_grad(out)
    first = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    second = torch.autograd.grad(out, inputs, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, inputs, grad)


@native_only
@each_tiny
def test_an_input_changed_in_between_is_noticed(name):
    inputs = tiny_inputs(name)
    out = tiny_call(name, "native")(*inputs)
    with torch.no_grad():
        inputs[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@each_backend
@each_tiny
def test_batched_gradients(name, backend):
    """Jacobian rows in one backward pass: is_grads_batched, vmap over a vjp, jacrev."""
    call, inputs = tiny_call(name, backend), tiny_inputs(name)
    out = call(*inputs)
    grads = torch.stack([random_grad(out), torch.ones_like(out), torch.zeros_like(out)]).detach()
    singly = [torch.autograd.grad(out, inputs, g, retain_graph=True) for g in grads]
    wanted = [torch.stack(g) for g in zip(*singly, strict=True)]
    plain = [t.detach() for t in inputs]
    _, pullback = torch.func.vjp(call, *plain)
    for found in (
        torch.autograd.grad(out, inputs, grads, is_grads_batched=True),
        torch.func.vmap(pullback)(grads),
    ):
        for a, b in zip(found, wanted, strict=True):
            close(a, b)
    jacobians = torch.func.jacrev(call, argnums=tuple(range(len(plain))))(*plain)
    for jacobian, b in zip(jacobians, wanted, strict=True):
        close(torch.tensordot(grads, jacobian, out.dim()), b)


@each_backend
@each_tiny
def test_torch_func(name, backend):
    """grad, per-row gradients by vmap over grad, jvp; values equal autograd's."""
    call = tiny_call(name, backend)
    inputs = tiny_inputs(name)
    wanted = torch.autograd.grad(call(*inputs).square().sum(), inputs)
    plain = [t.detach() for t in inputs]
    found = torch.func.grad(lambda *t: call(*t).square().sum(), argnums=tuple(range(len(plain))))(*plain)
    for a, b in zip(found, wanted, strict=True):
        close(a, b)
    rows = torch.func.vmap(torch.func.grad(lambda *t: call(*t).square().sum()), in_dims=(0, *(None for _ in plain[1:])))
    several = torch.stack([plain[0], 2 * plain[0]])
    assert torch.allclose(rows(several, *plain[1:])[0], wanted[0])
    out, along = torch.func.jvp(call, tuple(plain), tuple(torch.ones_like(t) for t in plain))
    step = 1e-6
    ahead = [call(*(t + s * step for t in plain)) for s in (1, -1)]
    close(along, (ahead[0] - ahead[1]) / (2 * step), 1e-7)


class Ran(TorchDispatchMode):
    """Counts the kernels that run inside, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mtlkernels":
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_reference(monkeypatch):
    """The plain form is out of bounds: only the kernels may answer."""

    def refuse(*_, **__):
        raise AssertionError("the reference ran")

    for name in ("expert_linear", "mix"):
        op = sys.modules[f"mtlkernels.ops.{name}"].OPERATOR
        monkeypatch.setattr(op, "reference", refuse)
    monkeypatch.setattr(_operator, "_plain_gradients", refuse)
    monkeypatch.setattr(_functional, "pull_back", refuse)


def of_func(name, backend, how):
    """One answer of torch.func or of batched gradients, as a list of tensors."""
    call, inputs = tiny_call(name, backend), tiny_inputs(name)
    plain = [t.detach() for t in inputs]
    argnums = tuple(range(len(plain)))

    def loss(*t):
        return call(*t).square().sum()

    rows = [torch.stack([t, 2 * t, t.cos()], -1) for t in plain]
    if how == "is_grads_batched":
        out = call(*inputs)
        return torch.autograd.grad(out, inputs, random_grad(torch.stack([out] * 3)), is_grads_batched=True)
    if how == "vmap over a vjp":
        out, pull = torch.func.vjp(call, *plain)
        return torch.func.vmap(pull)(random_grad(torch.stack([out] * 3)))
    if how == "grad":
        return torch.func.grad(loss, argnums)(*plain)
    if how == "jacrev":
        return torch.func.jacrev(call, argnums)(*plain)
    if how == "vmap over grad":
        return torch.func.vmap(torch.func.grad(loss, argnums), -1)(*rows)
    if how == "vmap of one tensor over grad":
        return torch.func.vmap(torch.func.grad(loss, argnums), (-1, *(None,) * (len(plain) - 1)))(rows[0], *plain[1:])
    if how == "grad over vmap":
        every = torch.func.grad(lambda *t: torch.func.vmap(call, -1)(*t).square().sum(), argnums)(*rows)
        return every
    if how == "autograd over vmap":
        leaves = [t.requires_grad_() for t in rows]
        return torch.autograd.grad(torch.func.vmap(call, -1)(*leaves).square().sum(), leaves)
    if how == "vmap over vmap":
        two = [torch.stack([t, t + 1]) for t in rows]
        return [torch.func.vmap(torch.func.vmap(call, -1))(*two)]
    if how == "vmap of nothing":
        return torch.func.vmap(torch.func.grad(loss, argnums), -1)(*(t[..., :0] for t in rows))
    seconds = {
        "hessian by jacrev": torch.func.jacrev(torch.func.jacrev(loss, argnums), argnums),
        "hessian by jacfwd": torch.func.jacfwd(torch.func.jacrev(loss, argnums), argnums),
        "vmap over grad over grad": torch.func.vmap(
            torch.func.grad(lambda *t: sum(g.square().sum() for g in torch.func.grad(loss, argnums)(*t)), argnums), -1
        ),
    }
    if how in seconds:
        found = seconds[how](*(rows if how.startswith("vmap") else plain))
        return [g for row in found for g in (row if isinstance(row, tuple) else (row,))]
    assert how == "jvp of a vjp"
    out, pull = torch.func.vjp(call, *plain)
    return torch.func.jvp(pull, (torch.ones_like(out),), (random_grad(out),))[1]


BY_KERNEL = ["is_grads_batched", "vmap over a vjp", "grad", "jacrev", "vmap over grad", "vmap of one tensor over grad",
             "grad over vmap", "autograd over vmap", "vmap over vmap", "vmap of nothing"]  # fmt: skip
BY_REFERENCE = ["hessian by jacrev", "hessian by jacfwd", "vmap over grad over grad", "jvp of a vjp"]


@native_only
@some
@pytest.mark.parametrize("how", BY_KERNEL)
def test_transforms_run_the_kernels(name, how, no_reference):
    with Ran() as ran:
        of_func(name, "native", how)
    op = name.split()[0]
    assert ran.counts[f"{op}_eager"] >= 1 and ran.counts.keys() <= {f"{op}_eager", f"{op}_backward"}
    assert ran.counts[f"{op}_backward"] >= 1 or how == "vmap over vmap"


@native_only
@some
@pytest.mark.parametrize("how", BY_KERNEL + BY_REFERENCE)
def test_transforms_agree_with_the_reference(name, how):
    """First order by the kernels, what lies beyond through the plain form."""
    for found, wanted in zip(of_func(name, "native", how), of_func(name, "reference", how), strict=True):
        close(found, wanted)


@native_only
@some
def test_many_small_slices_go_in_one_piece(name):
    """Gradients of single rows: a kernel call for each would take longer than the plain form for all of them."""
    call, inputs = tiny_call(name, "native"), tiny_inputs(name)
    argnums = tuple(range(len(inputs)))
    rows = [torch.stack([t.detach() * i for i in range(17)]) for t in inputs]
    out = call(*inputs)
    grads = random_grad(torch.stack([out] * 17))
    _, pull = torch.func.vjp(call, *(t.detach() for t in inputs))
    gradient = torch.func.grad(lambda *t: call(*t).square().sum(), argnums)
    with Ran() as ran:
        rowwise = torch.func.vmap(gradient)(*rows)
        batched = torch.vmap(lambda g: torch.autograd.grad(out, inputs, g, retain_graph=True))(grads)
        pulled = torch.func.vmap(pull)(grads)
    assert not ran.counts
    for i in (0, 7, 16):
        single = torch.autograd.grad(out, inputs, grads[i], retain_graph=True)
        for j, wanted in enumerate(gradient(*(t[i] for t in rows))):
            close(rowwise[j][i], wanted)
            close(batched[j][i], single[j])
            close(pulled[j][i], single[j])


@native_only
@pytest.mark.parametrize("name", ["expert_linear", "mix both packed"])
def test_compiled_transforms(name):
    """The compiler traces torch.func's transforms into the plain form."""
    for how in ("vmap over grad", "grad over vmap"):
        torch._dynamo.reset()
        found = torch.compile(of_func, backend="aot_eager")(name, "native", how)
        for a, b in zip(found, of_func(name, "native", how), strict=True):
            close(a, b)


@native_only
@some
def test_tangents_of_gradients_are_not_lost(name):
    """Backward under dual numbers: the gradient's tangent is the linear map's, applied to the tangent."""
    inputs = tiny_inputs(name)
    out = tiny_call(name, "native", "tanh")(*inputs)
    along = random_grad(out)
    wanted = torch.autograd.grad(out, inputs, along, retain_graph=True)
    with forward_ad.dual_level():
        found = torch.autograd.grad(out, inputs, forward_ad.make_dual(torch.ones_like(out), along))
        for dual, tangent in zip(found, wanted, strict=True):
            close(forward_ad.unpack_dual(dual).tangent, tangent)


@each_backend
@each_tiny
def test_vmap(name, backend):
    """An ensemble: vmap over every tensor at once."""
    call = tiny_call(name, backend)
    two = [torch.stack([t.detach(), t.detach().flip(0)]) for t in tiny_inputs(name)]
    found = torch.func.vmap(call)(*two)
    for i in range(2):
        close(found[i], call(*(t[i] for t in two)))


@native_only
@each_tiny
def test_checkpoint(name):
    inputs = tiny_inputs(name)
    call = tiny_call(name, "native")
    wanted = torch.autograd.grad(call(*inputs).square().sum(), inputs)
    for reentrant in (False, True):
        out = checkpoint(call, *inputs, use_reentrant=reentrant)
        if reentrant:
            for t in inputs:
                t.grad = None
            out.square().sum().backward()
            found = [t.grad for t in inputs]
        else:
            found = torch.autograd.grad(out.square().sum(), inputs)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@each_backend
@each_tiny
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode(name, requires_grad, backend):
    """Dual numbers outside torch.func: tangents are right, never lost."""
    call = tiny_call(name, backend)
    inputs = [t.detach().requires_grad_(requires_grad) for t in tiny_inputs(name)]
    ones = tuple(torch.ones_like(t) for t in inputs)
    _, wanted = torch.func.jvp(tiny_call(name, "reference"), tuple(t.detach() for t in inputs), ones)
    with forward_ad.dual_level():
        out = call(*(forward_ad.make_dual(t, one) for t, one in zip(inputs, ones, strict=True)))
        tangent = forward_ad.unpack_dual(out).tangent
        assert tangent is not None
        close(tangent.detach(), wanted)


@native_only
@each_tiny
def test_saved_tensors_hooks_and_inference_mode(name):
    """What is saved for backward can be moved away and back; inference mode gives the same values."""
    inputs, call, saved = tiny_inputs(name), tiny_call(name, "native"), []
    wanted = torch.autograd.grad(call(*inputs).square().sum(), inputs)

    def pack(t):
        saved.append(t)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call(*inputs)
    found = torch.autograd.grad(out.square().sum(), inputs)
    assert saved and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    with torch.inference_mode():
        assert torch.equal(call(*inputs), out)


@each_tiny
def test_meta_tensors(name):
    """Shapes alone: on the meta device the call says what would come out."""
    inputs = [t.detach().to("meta").requires_grad_() for t in tiny_inputs(name)]
    case = TINY[name]
    on_meta = {}
    if getattr(case, "mask", None) is not None:
        on_meta["mask"] = case.mask.to("meta")
    if getattr(case, "routes", None) is not None:
        on_meta["routes"] = case.routes.to("meta")
    given = iter(inputs)
    tensors = [next(given) if t is not None else None for t in case.tensors()]
    out = (case._replace(**on_meta) if on_meta else case)(*tensors)
    assert out.is_meta and out.shape == tiny_call(name, "reference")(*tiny_inputs(name)).shape
    out.sum().backward()
    assert all(t.grad.shape == t.shape for t in inputs)


@native_only
@some
def test_many_threads_at_once(name):
    """Python threads share nothing that they could hurt in each other's calls."""
    call = tiny_call(name, "native")
    big = MIX["both, over two blocks"]
    wide = LINEAR["over a batch block"]

    def work(i):
        small = torch.autograd.grad(call(*inputs).square().sum(), inputs)
        mixed = outcome(lambda *t: big(*t, backend="native"), big.tensors(torch.float32))
        linear = outcome(lambda *t: wide(*t, activation="gelu", backend="native"), wide.tensors(torch.bfloat16))
        return [*small, mixed.out, *mixed.grads, linear.out, *linear.grads]

    inputs = tiny_inputs(name)
    wanted = work(0)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(work, range(24)):
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@native_only
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_fork_after_use():
    """A child forked after the kernels ran, as data loaders fork, gives the same."""
    case = MIX["both, over two blocks"]
    linear = LINEAR["over a batch block"]

    def work():
        return [
            *(outcome(lambda *t: case(*t, backend="native"), case.tensors(torch.float32)).grads),
            *(outcome(lambda *t: linear(*t, activation="gelu", backend="native"), linear.tensors(torch.float32)).grads),
        ]

    wanted = work()

    def child():
        torch.set_num_threads(1)
        same = all(torch.equal(a, b) for a, b in zip(work(), wanted, strict=True))
        sys.exit(0 if same else 3)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(30)
    stuck = process.is_alive()
    if stuck:
        process.kill()
        process.join()
    assert not stuck and process.exitcode == 0
    assert all(torch.equal(a, b) for a, b in zip(work(), wanted, strict=True))


def test_the_table_is_whole():
    """Every form meets every shape that allows it."""
    missing = {f"{form}, {shape}" for form in FORMS for shape in SHAPES} - MIX.keys()
    assert all(name.startswith("unit native") for name in missing), missing
    assert over(TINY) and len(TINY) == len(FORMS) + 2
