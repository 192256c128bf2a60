"""Operators under torch.func and batched gradients: the vmap rule, and Functions for functorch's transforms."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference.expert_linear import NEED_INPUT

Grads = tuple[Tensor | None, ...]


def register_vmap(op: Any) -> None:
    """Give a dispatcher op the rule that suits every one: run it on one slice after the other, stack the results.

    So a batch of gradients, such as the Jacobian of several tasks' losses, costs the fused kernel once a row.
    """

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
        def run(i: int) -> tuple[Tensor, ...] | Tensor:
            return op(*(_slice(a, dim, i) for a, dim in zip(args, in_dims, strict=True)))

        # Of an empty batch one slice runs all the same, on zeros, for the shapes.
        found = [run(i) for i in range(max(info.batch_size, 1))]
        if isinstance(found[0], Tensor):
            return torch.stack(found)[: info.batch_size], 0
        stacked = tuple(torch.stack(outputs)[: info.batch_size] for outputs in zip(*found, strict=True))
        return stacked, (0,) * len(stacked)

    torch.library.register_vmap(op._name.removesuffix(".default"), rule)


def _slice(arg: Any, dim: Any, i: int) -> Any:
    if not isinstance(arg, Tensor) or dim is None:
        return arg
    return arg.select(dim, i) if arg.shape[dim] else arg.new_zeros(arg.shape[:dim] + arg.shape[dim + 1 :])


def many_small_slices(tensor: Tensor) -> bool:
    """Whether vmap cuts the call into so many and so small slices that one batched plain form is faster than a kernel
    call a slice (30 us each): gradients of single rows, say. `tensor` is an argument as the innermost function sees it.
    """
    slices = 1
    for layer in torch._C._functorch.get_interpreter_stack() or ():
        if layer.key() == torch._C._functorch.TransformType.Vmap:
            slices *= torch._C._functorch.CVmapInterpreterPtr(layer).batchSize()
    return slices > 16 and tensor.numel() < 1 << 14


class _Rest:
    """What belongs to a call beside tensors, as one object that functorch does not look into."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


def functional(
    forward: Callable[..., tuple[Tensor, ...]],
    first_order: Callable[..., Grads],
    reference: Callable[..., tuple[Tensor, ...]],
    keep: Callable[[tuple, tuple], tuple[Tensor, ...]],
    num_tensors: int,
) -> Callable[..., Tensor]:
    """`forward` as torch.func wants it: differentiable any number of times, batched by vmap; gives the first output.

    forward      the dispatcher op, with a vmap rule and without an autograd formula. An argument of it named `save`
                 asks for the value before `activation`.
    first_order  (args, kept, needs, grad) -> gradients of the tensors, by the backward op.
    reference    gives what the kernels do not: second derivatives, and tangents of the gradients.
    """

    class Gradient(torch.autograd.Function):
        """First-order gradients by the kernel. They are functions of the forward's arguments; what was kept is not
        an argument of its own, so all that flows back through it is in theirs already."""

        generate_vmap_rule = True

        @staticmethod
        def forward(rest: _Rest, grad: Tensor, *tensors: Tensor | None) -> Grads:
            args, kept = (*tensors[:num_tensors], *rest.values), tensors[num_tensors:]
            found = first_order(args, kept, rest.needs, grad)
            return tuple(
                torch.zeros_like(t) if g is None else g
                for t, g, need in zip(args, found, rest.needs, strict=False)
                if need
            )

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Grads) -> None:
            ctx.rest, ctx.num_inputs = inputs[0], len(inputs)
            ctx.save_for_backward(*inputs[1 : 2 + num_tensors])

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Grads:
            grad, *tensors = ctx.saved_tensors
            floats = [t is not None and t.is_floating_point() for t in tensors]

            def again(grad: Tensor, *some: Tensor) -> tuple[Tensor, ...]:
                return pull_back(reference, _fill(tensors, floats, some), ctx.rest.values, ctx.rest.needs, grad)

            _, pull = torch.func.vjp(again, grad, *(t for t, is_float in zip(tensors, floats, strict=True) if is_float))
            of_grad, *some = pull(grads)
            found = _fill([None] * num_tensors, floats, some)
            return (None, of_grad, *found, *(None,) * (ctx.num_inputs - 2 - num_tensors))

    class Functional(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(rest: _Rest, *tensors: Tensor | None) -> tuple[Tensor, ...]:
            return forward(*tensors, *rest.values)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
            rest, *tensors = inputs
            ctx.values = rest.values
            ctx.save_for_backward(*tensors, *keep((*tensors, *rest.values), output))

        @staticmethod
        def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Grads:
            # Of the further outputs nobody sees any, so their gradients are zero.
            tensors = ctx.saved_tensors[:num_tensors]
            needs = tuple(ctx.needs_input_grad[1:])
            if torch.autograd.forward_ad._current_level >= 0 or many_small_slices(grad):
                found = pull_back(reference, tensors, ctx.values, needs, grad)
            else:
                found = Gradient.apply(_Rest(values=ctx.values, needs=needs), grad, *ctx.saved_tensors)
            return None, *_fill([None] * num_tensors, needs, found)

    at = {a.name: i for i, a in enumerate(forward._schema.arguments)}

    def call(*args: Any) -> Tensor:
        if "save" in at:
            # That a gradient is wanted may be known to a transform further out alone: what it needs is kept always.
            save = args[at["activation"]] in NEED_INPUT
            args = (*args[: at["save"]], save, *args[at["save"] + 1 :])
        return Functional.apply(_Rest(values=args[num_tensors:]), *args[:num_tensors])[0]

    return call


def pull_back(
    reference: Callable, tensors: Sequence[Tensor | None], values: tuple, needs: Sequence[bool], grad: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of those tensors that need one, through the plain form's first output; any transform may go over it."""

    def first(*some: Tensor) -> Tensor:
        return reference(*_fill(tensors, needs, some), *values)[0]

    _, pull = torch.func.vjp(first, *(t for t, need in zip(tensors, needs, strict=True) if need))
    return pull(grad)


def _fill(everything: Sequence, chosen: Sequence[bool], some: Sequence) -> list:
    """`everything`, with `some` in the chosen places."""
    left = iter(some)
    return [next(left) if here else one for one, here in zip(everything, chosen, strict=True)]
