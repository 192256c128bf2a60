"""Long and crowded runs: no growth of memory, many threads, workers made by fork and by spawn."""

import ctypes
import gc
import multiprocessing
import os
import sys
import threading

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import mtlkernels as mtl
from python_models import AdaTT, MultiTaskModel, Towers
from tests.gpu.subjects import USUAL
from tests.ops.cases import native_only, outcome


def network() -> MultiTaskModel:
    torch.manual_seed(0)
    return MultiTaskModel(AdaTT(16, 3, 2, expert_dims=[[24], [12]]), Towers(12, 3, (8,)))


def resident() -> int:
    """MiB of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


def train(steps: int) -> tuple[int, int]:
    """Memory after a tenth of the steps and after all of them, MiB. Batches of many sizes, small ones and large."""
    model, early = network(), 0
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for i in range(steps):
        rows = (7, 64, 33, 256)[i % 4] if i % 100 else 20_000
        x, y = torch.randn(rows, 16), torch.rand(rows, 3).round()
        loss = mtl.masked_bce(model(x), y, torch.rand(rows, 3) < 0.9).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if i == steps // 10:
            gc.collect()
            early = resident()
    gc.collect()
    assert loss.isfinite()
    return early, resident()


@native_only
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("steps", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_steps(steps):
    context = multiprocessing.get_context("spawn")  # what other tests left in this process is not looked at
    with context.Pool(1) as pool:
        early, late = pool.apply(train, (steps,))
    assert late <= early + 8, f"{early} MiB after {steps // 10} steps, {late} after {steps}"


class MallocInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks".split()]
    _fields_ += [(name, ctypes.c_size_t) for name in "uordblks fordblks keepcost".split()]


def allocated():
    """The function that says how many bytes malloc has handed out, or None where the C library has none."""
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if ask:
        ask.restype = MallocInfo
    return ask and (lambda: ask().uordblks)


@native_only
@pytest.mark.skipif(not allocated(), reason="glibc 2.33 has mallinfo2")
@pytest.mark.parametrize("name", USUAL)
def test_no_call_leaves_a_byte(name):
    """Forward and backward: a leak of one string a call (32 bytes and more) is seen, which resident memory hides."""
    subject = USUAL[name]
    call, tensors, used_bytes = subject.bind("cpu"), subject.make(torch.float32), allocated()
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    used, calls, growth = [t for t in leaves if t is not None], 100, []
    grad = subject.grad(call(*leaves))
    for _ in range(4):  # the first for what is allocated once; of the others the best, for other threads allocate too
        before = used_bytes()
        for _ in range(calls):
            torch.autograd.grad(call(*leaves), used, grad)
        gc.collect()
        growth.append((used_bytes() - before) / calls)
    assert min(growth[1:]) < 16, f"bytes a call: {growth}"


@pytest.mark.parametrize("name", USUAL)
def test_many_threads(name):
    """64 at once, each with rows of its own: what one alone gives, bit for bit."""
    subject = USUAL[name]
    call, tensors = subject.bind("cpu"), subject.make(torch.float32)
    inputs = [[None if t is None else t * (1 + k / 64) for t in tensors] for k in range(64)]
    with torch.no_grad():
        wanted = [call(*given) for given in inputs]
    found, failed = [None] * 64, []

    def serve(k):
        try:
            with torch.no_grad():
                for _ in range(4):
                    found[k] = call(*inputs[k])
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=serve, args=(k,)) for k in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def outputs(_: int) -> list[list[float]]:
    with torch.no_grad():
        return network().eval()(torch.linspace(-1, 1, 160).view(10, 16)).tolist()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers(method):
    """Made after this process has run kernels on several threads; the numbers are this process's."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    wanted = outputs(0)
    with multiprocessing.get_context(method).Pool(2) as pool:
        found = pool.map_async(outputs, range(4)).get(120)
    for one in found:
        torch.testing.assert_close(torch.tensor(one), torch.tensor(wanted), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", USUAL)
def test_a_graph_kept_gives_the_same_again(name):
    """retain_graph: two backward passes over one forward; and a hook on every tensor sees its gradient."""
    subject = USUAL[name]
    call, tensors = subject.bind("cpu"), subject.make(torch.float64)
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    used, seen = [t for t in leaves if t is not None], []
    for t in used:
        t.register_hook(lambda grad: seen.append(grad.shape))
    out = call(*leaves)
    grad = subject.grad(out)
    first = torch.autograd.grad(out, used, grad, retain_graph=True)
    second = torch.autograd.grad(out, used, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len(seen) == 2 * len(used)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", USUAL)
def test_a_checkpoint_computes_the_same_again(name, reentrant):
    subject = USUAL[name]
    call, tensors = subject.bind("cpu"), subject.make(torch.float32)
    plain = outcome(call, tensors, subject.grad)
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out = checkpoint(call, *leaves, use_reentrant=reentrant)
    out.backward(subject.grad(out))
    assert torch.equal(out, plain.out)
    for leaf, wanted in zip(leaves, plain.grads, strict=True):
        assert leaf is wanted is None or torch.equal(leaf.grad, wanted)


def test_module_hooks():
    """Forward and full backward hooks on every module run once a call, and change nothing."""
    x, plain = torch.randn(10, 16, requires_grad=True), network()
    plain(x).square().sum().backward()
    hooked, before, after, back = network(), [], [], []
    for module in hooked.modules():
        module.register_forward_pre_hook(lambda module, _: before.append(module))
        module.register_forward_hook(lambda module, *_: after.append(module))
        module.register_full_backward_hook(lambda module, *_: back.append(module))
    hooked(x).square().sum().backward()
    assert before and sorted(map(id, before)) == sorted(map(id, after)) == sorted(map(id, back))
    for p, q in zip(plain.parameters(), hooked.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


W, SHARED = torch.randn(3, 6, 4), torch.randn(2, 3)
P, MASK = torch.randn(3, 4), torch.tensor([[True, False, True], [True, True, True]])
# Of every operator a call of b rows, by their values alone.
OF_ROWS = {
    "expert_linear": lambda x: mtl.expert_linear(x, W, activation="gelu"),
    "mix": lambda x: mtl.mix(x[:, None] * P, x[:, None, :3] * SHARED, SHARED, mask=MASK),
    "adatt_mix": lambda x: mtl.adatt_mix(x[:, None] * P, x[:, None, :3] * SHARED, P[0, :2], experts_per_unit=[1, 1, 1]),
    "linear_mix": lambda x: mtl.linear_mix(x[:, None] * P, SHARED),
    "expert_mix": lambda x: mtl.expert_mix(x, W, None, x[:, None, :3] * SHARED, mask=MASK),
    "snr_linear": lambda x: mtl.snr_linear(x[:, None] * P, W.expand(2, 3, 6, 4), SHARED),
    "star_linear": lambda x: mtl.star_linear(x, (x[:, 0] > 0).long(), W[0], W),
    "partitioned_norm": lambda x: mtl.partitioned_norm(
        x, (x[:, 0] > 0).long(), P[0], P[1], P, P, torch.zeros(3, 4), torch.ones(3, 4), training=True
    ),
    "hard_concrete": lambda x: mtl.hard_concrete(x, x.sigmoid()),
    "hard_concrete_l0": lambda x: mtl.hard_concrete_l0(x),
    "esmm_loss": lambda x: mtl.esmm_loss(x[:, 0], x[:, 1], x[:, 2] > 0, (x[:, 2] > 0) & (x[:, 3] > 0)),
    "masked_bce": lambda x: mtl.masked_bce(x[:, :2], x[:, 2:] > 0, x[:, 1:3] > 0),
}


@pytest.mark.parametrize("name", OF_ROWS)
def test_few_recompiles(name):
    """Batches of many sizes, compiled by the defaults: one graph of the first size, one of any, one each of 1 and 0."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(OF_ROWS[name], backend=counter, fullgraph=True)
    for rows in (7, 12, 3, 64, 1, 129, 40, 0, 2, 33, 1, 65, 0, 300, 12):
        x = torch.randn(rows, 4, requires_grad=True)
        found, wanted = compiled(x), OF_ROWS[name](x)
        torch.testing.assert_close(found, wanted)
        grads = [torch.autograd.grad(out, x, torch.ones_like(out))[0] for out in (found, wanted)]
        torch.testing.assert_close(*grads)
    assert 2 <= counter.frame_count <= 4
    torch._dynamo.reset()
