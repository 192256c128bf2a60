"""What every operator shares: its dispatcher ops, its fake kernels and its autograd.

An operator is a forward and a backward dispatcher op with the same schema in two namespaces: ``mtlkernels`` (the C++
library) and ``mtlkernels_triton``. Under compile and export the op itself is called, and the autograd formula
registered on it serves. That formula runs in Python and costs 8 us a call, and stepping below it with a guard 1 us; so
eager mode calls a twin, ``<name>_eager``, the same kernel without a formula, from an autograd.Function that is left
out when no gradient is wanted. Under torch.func's transforms those of :mod:`._functional` serve.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _library, backend
from ._functional import Grads, functional, many_small_slices, register_vmap

# Other types, FakeTensor and DTensor among them, take the long way.
_PLAIN = frozenset((Tensor, torch.nn.Parameter))


class Operator:
    """One operator over its backends. Its forward op takes `num_tensors` tensors (or None), then plain values.

    schemas    of forward and backward, for the namespaces that Python defines.
    fakes      shape functions of both.
    keep       (args, outputs) -> the outputs that backward needs, as a tuple.
    gradients  (backward_op, args, kept, needs, grad_outputs) -> one gradient for each tensor argument; kept is what
               `keep` gave, and the gradient of an output that nothing used is None.
    reference  the plain torch form, with the forward op's arguments and outputs.
    predicates which backend can run, in the order of ``auto``.
    remember   (eager_op) -> the forward of an autograd.Function over it: `keep` spelled out, for speed. Optional.

    For :func:`mtlkernels.explain`:

    public     the functions that call it, where their names are not its own.
    autocast   whether it follows autocast, which takes a float32 first argument to 16 bit.
    sizes      from the arguments of a public function, by name, the sizes that its predicates look at, if they do.
    """

    all: ClassVar[dict[str, "Operator"]] = {}
    # What :mod:`mtlkernels.sharding` does with a call on DTensors: (operator, which, wants_grad, args) -> the result,
    # or None for a call on other tensors.
    distributed: ClassVar[Callable[..., Tensor | None] | None] = None

    def __init__(
        self,
        name: str,
        *,
        num_tensors: int,
        schemas: tuple[str, str],
        fakes: tuple[Callable, Callable],
        keep: Callable[[tuple, tuple], tuple[Tensor, ...]],
        gradients: Callable[..., Grads],
        reference: Callable[..., tuple[Tensor, ...]],
        predicates: dict[str, backend.Predicate],
        remember: Callable[[Callable], Callable[..., Tensor]] | None = None,
        public: tuple[str, ...] | None = None,
        autocast: bool = False,
        sizes: Callable[..., backend.Sizes] | None = None,
    ) -> None:
        self.name, self.num_tensors, self.reference = name, num_tensors, reference
        self.public, self.autocast, self.sizes = (name,) if public is None else public, autocast, sizes
        self.all[name] = self
        self._keep, self._gradients, self._remember = keep, gradients, remember
        self._forward: dict[str, Callable] = {}
        self._eager: dict[str, Callable] = {}
        self._differentiable: dict[str, Callable[..., Tensor]] = {}
        self._functional: dict[str, Callable[..., Tensor]] = {}
        self.kernel: Callable[..., Tensor]  # of the C++ library, for goes_straight; its first output
        self.differentiable: Callable[..., Tensor]
        backend.register(name, predicates)
        if _library.loaded():
            self._add("native", torch.ops.mtlkernels, fakes)
        if importlib.util.find_spec("triton") is not None:
            self._define_triton(schemas)
            self._add("triton", torch.ops.mtlkernels_triton, fakes)

    def __call__(self, which: str, wants_grad: bool, *args: Any, ruled: bool = False) -> Tensor:
        """The first output of backend `which`'s forward op; `wants_grad`: one of the tensors requires a gradient.
        `ruled`: DTensors among args lie so that sharding rules serve."""
        if self.distributed is not None and not ruled:
            found = self.distributed(self, which, wants_grad, args)
            if found is not None:
                return found
        if torch.compiler.is_compiling():
            # Nor does the compiler know operators' rules for torch.func's transforms; it has the plain form's.
            plain = which == "reference" or torch._C._are_functorch_transforms_active()
            return self.reference(*args)[0] if plain else self._forward[which](*args)[0]
        # The kernels know no tangents: where forward-mode derivatives are being taken, they would be lost silently.
        if which == "reference" or forward_ad._current_level >= 0:
            return self.reference(*args)[0]
        if torch._C._are_functorch_transforms_active():
            return self.reference(*args)[0] if many_small_slices(args[0]) else self._functional[which](*args)
        if wants_grad and torch.is_grad_enabled():
            return self._differentiable[which](*args)
        return self._eager[which](*args)[0]

    def goes_straight(self, tensor: Any, which: str | None) -> bool:
        """Whether a call on `tensor`, its first one, may go to the CPU's C++ kernel at once: to `kernel`, or with a
        gradient to `differentiable`.

        Plain tensors may, outside of autocast and of transforms (and of the compiler, which is for the caller to see),
        once the kernel has been chosen for one like this. It checks its arguments itself, except that all are on the
        CPU; so the public function's checks, a quarter of a small call, need to run only where it refused.
        """
        return (
            type(tensor) in _PLAIN
            and tensor.is_cpu
            and not torch._C._is_any_autocast_enabled()
            and not torch._C._are_functorch_transforms_active()
            and forward_ad._current_level < 0
            and backend.chosen_for_cpu(self.name, which, tensor.dtype) == "native"
        )

    def _add(self, which: str, ops: Any, fakes: tuple[Callable, Callable]) -> None:
        forward, eager, backward = (getattr(ops, self.name + suffix).default for suffix in ("", "_eager", "_backward"))
        for op, fake in zip((forward, eager, backward), (fakes[0], *fakes), strict=True):
            torch.library.register_fake(op._name.removesuffix(".default"), fake)
            register_vmap(op)
        num_tensors, keep, gradients, reference = self.num_tensors, self._keep, self._gradients, self.reference
        num_outputs = len(forward._schema.returns)

        def save(ctx: Any, inputs: tuple, output: tuple) -> None:
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*inputs[:num_tensors], *keep(inputs, output))
            ctx.values = inputs[num_tensors:]

        def differentiate(ctx: Any, *grads: Tensor | None) -> Grads:
            saved = ctx.saved_tensors
            tensors, kept = saved[:num_tensors], saved[num_tensors:]
            needs = ctx.needs_input_grad[:num_tensors]
            return (*gradients(backward, (*tensors, *ctx.values), kept, needs, grads), *(None for _ in ctx.values))

        torch.library.register_autograd(forward._name.removesuffix(".default"), differentiate, setup_context=save)

        def remember(ctx: Any, *args: Any) -> Tensor:
            # The first output alone goes back: every further one costs another microsecond.
            out = kernel(*args)
            ctx.save_for_backward(*args[:num_tensors], *keep(args, out))
            ctx.values = args[num_tensors:]
            return out[0]

        kernel = getattr(eager, "_op", eager)  # what calling it calls: a Python frame less

        class Eager(torch.autograd.Function):
            forward = staticmethod(self._remember(kernel) if self._remember else remember)

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Grads:
                grads = (grad, *(None,) * (num_outputs - 1))
                # What the kernel does not know, gradients of gradients and their tangents, and what it is slow at.
                if torch.is_grad_enabled() or forward_ad._current_level >= 0 or many_small_slices(grad):
                    found = _plain_gradients(
                        reference,
                        ctx.saved_tensors[:num_tensors],
                        ctx.values,
                        ctx.needs_input_grad[:num_tensors],
                        grads,
                    )
                    return (*found, *(None for _ in ctx.values))
                return differentiate(ctx, *grads)

        def first_order(args: tuple, kept: tuple, needs: tuple, grad: Tensor) -> Grads:
            return gradients(backward, args, kept, needs, (grad, *(None,) * (num_outputs - 1)))

        self._functional[which] = functional(eager, first_order, reference, keep, num_tensors)
        Eager.__name__ = Eager.__qualname__ = f"{self.name}_{which}"
        self._forward[which], self._eager[which] = forward, kernel
        # The base class's apply: what Function's own adds is for transforms, and costs four microseconds.
        self._differentiable[which] = super(torch.autograd.Function, Eager).apply
        if which == "native":
            self.differentiable = self._differentiable[which]
            only = getattr(ops, f"{self.name}_only", None)
            self.kernel = (
                (lambda *args: kernel(*args)[0]) if only is None else getattr(only.default, "_op", only.default)
            )

    def _define_triton(self, schemas: tuple[str, str]) -> None:
        self._library = torch.library.Library("mtlkernels_triton", "FRAGMENT")  # definitions live as long as this
        forward, backward = schemas
        for suffix, schema in (("", forward), ("_eager", forward), ("_backward", backward)):
            name = self.name + suffix
            self._library.define(name + schema)
            for key in ("CUDA", "CPU"):
                self._library.impl(name, _launcher(self.name, name.removesuffix("_eager")), key)


def _launcher(module: str, function: str) -> Callable:
    @functools.cache
    def launcher() -> Callable[..., tuple[Tensor, ...]]:
        # Imported at the first call: importing triton takes a second that most CPU users need not spend.
        return getattr(importlib.import_module(f"mtlkernels.triton.{module}"), function)

    def launch(*args: Any) -> tuple[Tensor, ...]:
        return launcher()(*args)

    return launch


def _plain_gradients(
    reference: Callable, tensors: Sequence[Tensor | None], values: tuple, needs: Sequence[bool], grads: Grads
) -> list[Tensor | None]:
    """Backward through the plain form, which torch can differentiate or batch once more (create_graph, vmap)."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        outputs = reference(*tensors, *values)
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
    wanted = [t for t, need in zip(tensors, needs, strict=True) if need]
    found = iter(
        torch.autograd.grad(
            [o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=create_graph, allow_unused=True
        )
    )
    return [next(found) if need else None for need in needs]
