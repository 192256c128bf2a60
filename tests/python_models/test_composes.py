"""Every network under what PyTorch users put around one: compile, autocast, functional calls, copies, 16 bit, meta,
checkpointing, DistributedDataParallel."""

import copy
import io
import pickle
import socket
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from bench.papers import ARCHITECTURES, TINY

every_network = pytest.mark.parametrize("name", ARCHITECTURES)
# What draws in training draws alike where it is seeded alike.
SEED = 1


def build(name, device=None):
    torch.manual_seed(0)
    with torch.device(device or "cpu"):
        return ARCHITECTURES[name].make(TINY)


def batch(rows=TINY.B, dtype=torch.float32):
    x = torch.randn(rows, TINY.K, generator=torch.Generator().manual_seed(rows))
    return x.to(dtype)


def extras_of(name, rows=TINY.B):
    return tuple(t[:rows] for t in ARCHITECTURES[name].extras(TINY))


def call(name, network, x, extras=None):
    """One call, as the architecture's users make it; a tensor."""
    run = ARCHITECTURES[name].run
    extras = extras_of(name, len(x)) if extras is None else extras
    torch.manual_seed(SEED)
    return network(x, *extras) if run is None else run(network, x, *extras)


def seeded(function, _name, _network, x, extras):
    """`function` in place of the network's call."""
    torch.manual_seed(SEED)
    return function(x, *extras)


def step(name, network, x, extras=None, through=call):
    """Output, and the gradients of x and of every parameter, in their order."""
    x = x.detach().clone().requires_grad_()
    network.zero_grad()
    out = through(name, network, x, extras)
    out.float().square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in network.parameters() if p.requires_grad)]


def same(found, wanted, **tolerance):
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert (a is None) == (b is None), f"result {i}: one of the two has no gradient"
        if a is not None:
            torch.testing.assert_close(a, b, msg=lambda m, i=i: f"result {i}: {m}", **tolerance)


@every_network
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_graph_for_every_batch_size(name, backend):
    """In training and in evaluation: fullgraph, and no recompilation from one batch size to another."""
    network = build(name)
    run = ARCHITECTURES[name].run

    def forward(x, *extras):
        return network(x, *extras) if run is None else run(network, x, *extras)

    for training in (True, False):
        network.train(training)
        torch._dynamo.reset()
        options = {"fallback_random": True} if backend == "inductor" else None  # draws what eager mode draws
        compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend=backend, options=options)
        state = copy.deepcopy(network.state_dict())  # of running statistics each run moves its own
        for rows in (12, 9, 20):
            x, extras = batch(rows), extras_of(name, rows)
            network.load_state_dict(state)
            wanted = step(name, network, x, extras)
            network.load_state_dict(state)
            through = partial(seeded, compiled)
            with torch._dynamo.config.patch(error_on_recompile=rows != 12):
                found = step(name, network, x, extras, through)
            same(found, wanted, rtol=1e-4, atol=1e-5)


@every_network
def test_autocast(name):
    """Parameters and their gradients stay float32; outputs and gradients come near those of float32."""
    network, x = build(name), batch()
    wanted = step(name, network, x)
    state = copy.deepcopy(network.state_dict())
    network.load_state_dict(state)
    with torch.autocast("cpu", torch.bfloat16):
        found = step(name, network, x)
    assert all(g.dtype == torch.float32 for g in found[1:] if g is not None)
    out, exact = found[0].float(), wanted[0].float()
    assert out.isfinite().all() and (out - exact).norm() <= 0.1 * exact.norm()
    assert not torch.equal(out, exact)


@every_network
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half(name, dtype):
    """``half()`` and ``bfloat16()``: everything in 16 bit, finite, near the float32 network."""
    network, x = build(name), batch()
    network.eval()
    wanted = step(name, network, x)
    small = copy.deepcopy(network).to(dtype)
    found = step(name, small, x.to(dtype))
    assert all(p.dtype == dtype for p in small.parameters())
    assert all(g.dtype == dtype for g in found[1:] if g is not None)
    assert all(g.isfinite().all() for g in found if g is not None)
    assert (found[0].float() - wanted[0]).norm() <= 0.1 * wanted[0].norm()


@every_network
def test_functional_call(name):
    """Parameters given from outside serve in place of the network's own, with gradients of theirs."""
    network, other, x = build(name), build(name), batch()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.01)
    given = {k: v.detach().clone().requires_grad_(v.requires_grad) for k, v in other.named_parameters()}
    given |= {k: v.clone() for k, v in other.named_buffers()}
    wanted = step(name, other, x)

    class Given(torch.nn.Module):
        def __getattr__(self, attribute):  # a loss of the network's own, as ESMM's
            return getattr(network, attribute)

        def __call__(self, *args):
            return torch.func.functional_call(network, given, args)

    out = call(name, Given(), x)
    out.float().square().sum().backward()
    same([out.detach()], wanted[:1])
    trained = [k for k, p in other.named_parameters() if p.requires_grad]
    same([given[k].grad for k in trained], wanted[2:])
    assert all(p.grad is None for p in network.parameters())


@every_network
def test_copies(name):
    """deepcopy, pickle, torch.save, and another network with its state_dict, strict: the same outputs and gradients."""
    network, x = build(name), batch()
    other = ARCHITECTURES[name].make(TINY)
    other.load_state_dict(network.state_dict(), strict=True)
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    saved = ARCHITECTURES[name].make(TINY)
    saved.load_state_dict(torch.load(file, weights_only=True), strict=True)
    copies = [copy.deepcopy(network), pickle.loads(pickle.dumps(network)), other, saved]
    wanted = step(name, network, x)
    for made in copies:
        same(step(name, made, x), wanted, rtol=0, atol=0)


@every_network
def test_meta(name):
    """Made on meta, brought to memory and loaded: the network made there."""
    network, empty = build(name), build(name, "meta")
    assert all(p.is_meta for p in empty.parameters())
    assert [(k, p.shape, p.dtype) for k, p in empty.named_parameters()] == [
        (k, p.shape, p.dtype) for k, p in network.named_parameters()
    ]
    real = empty.to_empty(device="cpu")
    real.load_state_dict(network.state_dict(), strict=True)
    x = batch()
    same(step(name, real.eval(), x), step(name, network.eval(), x), rtol=0, atol=0)


@every_network
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(name, reentrant):
    network, x = build(name), batch()
    state = copy.deepcopy(network.state_dict())
    wanted = step(name, network, x)
    network.load_state_dict(state)

    def through(name, network, x, extras):
        return checkpoint(lambda x: call(name, network, x, extras), x, use_reentrant=reentrant)

    same(step(name, network, x, through=through), wanted)


@pytest.fixture(scope="module")
def one_process():
    """A process group of one, which is what DistributedDataParallel needs to look for parameters without gradients."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@every_network
def test_every_parameter_has_a_gradient_under_ddp(name, one_process):
    """Two steps without find_unused_parameters: the second one fails where a parameter took no part in the first."""
    network, x = build(name), batch()
    state = copy.deepcopy(network.state_dict())
    run = ARCHITECTURES[name].run

    class Whole(torch.nn.Module):
        """What the wrapper calls: the network's loss, where that is how it is used."""

        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x, *extras):
            return self.network(x, *extras) if run is None else run(self.network, x, *extras)

    wrapped = torch.nn.parallel.DistributedDataParallel(Whole())
    extras = extras_of(name)
    first = step(name, wrapped, x, extras, partial(seeded, wrapped))
    step(name, wrapped, x, extras, partial(seeded, wrapped))
    assert all(g is not None for g in first)
    network.load_state_dict(state)
    same(first, step(name, network, x, extras))
