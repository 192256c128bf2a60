"""Batched gradients and torch.func on Triton: the kernels run, once a slice, and agree with the reference."""

import pytest
import torch

pytest.importorskip("triton")

from tests.ops.cases import SOME, close, random_grad, tiny_call, tiny_inputs  # noqa: E402


@pytest.mark.parametrize("name", SOME)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the cases lie on the CPU, for the interpreter")
def test_batched_gradients_and_vmap_over_grad(name):
    def both(backend):
        call, inputs = tiny_call(name, backend), tiny_inputs(name, torch.float32)
        out = call(*inputs)
        grads = random_grad(torch.stack([out, out]))
        batched = torch.autograd.grad(out, inputs, grads, is_grads_batched=True)
        argnums = tuple(range(len(inputs)))
        rows = [torch.stack([t, -t]).detach() for t in inputs]
        rowwise = torch.func.vmap(torch.func.grad(lambda *t: call(*t).square().sum(), argnums))(*rows)
        return [*batched, *rowwise]

    for found, wanted in zip(both("triton"), both("reference"), strict=True):
        close(found, wanted)
