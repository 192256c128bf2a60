"""Every task's own gradient of what all tasks share, and what becomes of them together."""

from collections.abc import Callable, Iterable, Sequence
from functools import reduce

import torch
from torch import Tensor

from .base import Balancer, Losses, loss_scale, run_backward

_BLOCK = 1 << 15  # columns that are float64 at a time
_STRETCH = 512  # columns that are summed in float32
_LEAST = 1e-24  # squared norm: of less, too much of the squares would be below float32's least


class GradientMethod(Balancer):
    """A method that combines the tasks' gradients instead of their losses; the base of PCGrad, MGDA and the rest.

    ``backward`` runs one backward a task. Shared parameters, or the representation, get :meth:`combine`'s combination
    of the tasks' gradients; every other parameter gets its ordinary gradient. A task that is not active takes no part,
    and its loss is not looked at. A penalty comes in addition, unaltered. Where a gradient is not finite the step is
    the plain sum, which a GradScaler then skips. In eval mode nothing is altered.

    Losses given as T separate scalars keep each backward within its own task's tower.

    Args:
        num_tasks: T.
        weighting: weighs the losses before: a :class:`Balancer` that is no gradient method, such as
            :class:`UncertaintyWeighting`.
        seed: of what the method draws, whose state is in state_dict.
    """

    def __init__(self, num_tasks: int, *, weighting: Balancer | None = None, seed: int = 0) -> None:
        super().__init__(num_tasks)
        if weighting is not None:
            if not isinstance(weighting, Balancer) or isinstance(weighting, GradientMethod):
                raise TypeError(
                    f"weighting must be a Balancer that alters no gradients; got {type(weighting).__name__}"
                )
            if weighting.num_tasks != num_tasks:
                raise ValueError(f"weighting is for {weighting.num_tasks} tasks, num_tasks is {num_tasks}")
        self.weighting = weighting
        self.generator = torch.Generator().manual_seed(seed)
        self._room: Tensor | None = None

    def room(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A matrix to write the tasks' gradients into, good until the next step.

        On a CPU it is kept: every step's touching fresh pages cost as much as all else that is done with the gradients.
        """
        if device.type != "cpu":
            return torch.empty(rows, columns, dtype=dtype, device=device)
        if self._room is None or self._room.dtype != dtype or self._room.numel() < rows * columns:
            self._room = torch.empty(rows * columns, dtype=dtype)
        return self._room[: rows * columns].view(rows, columns)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_room": None}  # no part of copies and files

    def get_extra_state(self) -> Tensor:
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self.generator.set_state(state.cpu())

    def weigh(self, losses: Losses, active: Tensor | None = None) -> Tensor:
        return super().weigh(losses, active) if self.weighting is None else self.weighting.weigh(losses, active)

    def observe(self, losses: Losses, active: Tensor | None = None, **where: object) -> None:
        if self.weighting is not None:
            self.weighting.observe(losses, active, **where)

    def end_epoch(self, losses: Losses | None = None) -> None:
        if self.weighting is not None:
            self.weighting.end_epoch(losses)

    def backward(
        self,
        losses: Losses,
        *,
        shared: Iterable[Tensor] | None = None,
        representation: Tensor | None = None,
        penalty: Tensor | None = None,
        active: Tensor | None = None,
        scaler: torch.amp.GradScaler | None = None,
        backward: Callable[..., object] | None = None,
    ) -> Tensor:
        """As :meth:`Balancer.backward`, with `shared` or `representation`, whichever the method works on.

        `backward` is called with a scalar, ``retain_graph`` and perhaps ``inputs``, as Tensor.backward takes them.
        """
        if not self.training:
            total = self.total(self.weigh(losses, active), penalty)
            run_backward(total, scaler, backward)
            return total.detach()
        values = self.as_losses(losses).detach()
        some = self.as_active(active, values)
        rows = list(range(self.num_tasks)) if some is None else some.nonzero().flatten().tolist()
        place = self._place(shared, representation)
        weighted, factors = self._factors(values, some)
        total = self.total(weighted, penalty)
        self.observe(losses, active, shared=shared, scaler=scaler)
        scalars = self.as_scalars(losses)
        run = _Runner(scaler, backward, loss_scale(scaler, values))
        if rows:
            place.step([scalars[t] * factors[t].to(scalars[t]) for t in rows], rows, self, run, penalty is not None)
        # Weights that are learned hang on the losses' values alone.
        if weighted.requires_grad and self.weighting is not None and any(p.requires_grad for p in self.parameters()):
            run(weighted.sum())
        if penalty is not None and penalty.requires_grad:
            run(penalty)
        return total.detach()

    def combine(self, gradients: Tensor, tasks: Sequence[int], losses: Tensor) -> Tensor:
        """The combination [P] of unscaled gradients [n,P] of these tasks, whose weighted losses are [n]."""
        raise NotImplementedError

    def _place(self, shared: Iterable[Tensor] | None, representation: Tensor | None) -> "Shared | Representation":
        """Where the method works; ValueError where it is not given."""
        if shared is None:
            raise ValueError("shared must name the parameters that all tasks share; got None")
        return Shared(shared)

    def _factors(self, values: Tensor, active: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weighted losses [T] of values that are constants of the model, and d weighted / d loss [T], detached."""
        leaf = values.clone().requires_grad_()
        with torch.enable_grad():
            weighted = self.weigh(leaf, active)
        if not weighted.requires_grad:
            return weighted, torch.ones_like(values)
        (factors,) = torch.autograd.grad(weighted.sum(), leaf, retain_graph=True, allow_unused=True)
        return weighted, torch.zeros_like(values) if factors is None else factors


class _Runner:
    """Backward by the caller's means; `scale` is what gradients are multiplied by then."""

    def __init__(
        self, scaler: torch.amp.GradScaler | None, backward: Callable[..., object] | None, scale: Tensor
    ) -> None:
        self.scaler, self.backward, self.scale = scaler, backward, scale
        if backward is not None:
            # accelerate and Lightning multiply losses as they like: by what, a number of our own tells.
            probe = torch.ones_like(scale, requires_grad=True)
            self(probe * 1)
            self.scale = probe.grad

    def __call__(self, scalar: Tensor, **options: object) -> None:
        scalar = scalar if self.scaler is None else self.scaler.scale(scalar)
        (torch.Tensor.backward if self.backward is None else self.backward)(scalar, **options)


class Shared:
    """Shared parameters: their gradients of every task, side by side as rows of one matrix [n,P]."""

    def __init__(self, shared: Iterable[Tensor]) -> None:
        found = (shared,) if isinstance(shared, Tensor) else tuple(shared)
        for i, p in enumerate(found):
            if not isinstance(p, Tensor) or not p.is_leaf:
                raise TypeError(f"shared[{i}] must be a parameter; got {type(p).__name__}, no leaf of the graph")
        self.parameters = [p for p in dict.fromkeys(found) if p.requires_grad]
        if not self.parameters:
            raise ValueError("shared must name parameters that require a gradient; got none")

    def step(self, scalars: list[Tensor], tasks: list[int], method: GradientMethod, run: _Runner, retain: bool) -> None:
        """One backward a scalar; .grad of the shared parameters becomes what it was, plus the combination."""
        before = [p.grad for p in self.parameters]
        wide, columns = widest(self.parameters), sum(p.numel() for p in self.parameters)
        gradients = method.room(len(scalars), columns, wide, self.parameters[0].device)
        try:
            for i, scalar in enumerate(scalars):
                for p in self.parameters:
                    p.grad = None
                if scalar.requires_grad:
                    # All but the last keep the graph, and the last too where a penalty may hang on it.
                    run(scalar, retain_graph=retain or i + 1 < len(scalars))
                self._take(gradients[i])
        finally:
            for p, grad in zip(self.parameters, before, strict=True):
                p.grad = grad
        losses = torch.stack([s.detach().to(wide) for s in scalars])
        combined = finite_or_sum(method, gradients, tasks, losses, run.scale)
        for p, part in zip(self.parameters, combined.split([p.numel() for p in self.parameters]), strict=True):
            part = part.view_as(p).to(p)
            p.grad = part if p.grad is None else p.grad + part

    def _take(self, row: Tensor) -> None:
        parts = row.split([p.numel() for p in self.parameters])
        for p, part in zip(self.parameters, parts, strict=True):
            if p.grad is None:
                part.zero_()
            else:
                part.copy_((p.grad.to_dense() if p.grad.is_sparse else p.grad).flatten())


class Representation:
    """A tensor Z between trunk and tasks: its gradient of every task, then one backward through the trunk."""

    def __init__(self, representation: Tensor) -> None:
        if not isinstance(representation, Tensor):
            raise TypeError(f"representation must be a tensor; got {type(representation).__name__}")
        if not representation.requires_grad:
            raise ValueError("representation must require a gradient: it lies between the trunk and the tasks")
        self.z = representation

    def step(self, scalars: list[Tensor], tasks: list[int], method: GradientMethod, run: _Runner, retain: bool) -> None:
        z, wide = self.z, widest([self.z])
        gradients = torch.zeros(len(scalars), z.numel(), dtype=wide, device=z.device)
        for i, scalar in enumerate(scalars):
            if not scalar.requires_grad:
                continue
            caught: list[Tensor] = []
            # The graph below Z is left alone: what is wanted lies above, and Z itself. A leaf may lie on both sides,
            # with a way around Z, so nothing goes on from Z; nor into the .grad of a Z that is a leaf.
            above = leaves_above(scalar, z)
            handle = z.register_hook(lambda grad, caught=caught: caught.append(grad) or torch.zeros_like(grad))
            try:
                run(scalar, retain_graph=True, inputs=[*above, z])
            finally:
                handle.remove()
                if not z.is_leaf:
                    z.grad = None
            if caught:
                gradients[i] = caught[0].flatten()
        losses = torch.stack([s.detach().to(wide) for s in scalars])
        combined = finite_or_sum(method, gradients, tasks, losses, run.scale) / run.scale.to(gradients)
        # z . d has the gradient d; the number itself means nothing.
        run((z.to(wide) * combined.view(z.shape)).sum(), retain_graph=retain)


def finite_or_sum(
    method: GradientMethod, gradients: Tensor, tasks: Sequence[int], losses: Tensor, scale: Tensor
) -> Tensor:
    """The method's combination of scaled gradients [n,P], scaled; their sum where one is not finite."""
    if not _finite(gradients):  # of others nothing is drawn or learned
        return gradients.sum(0)
    scale = scale.to(gradients)
    with torch.autocast(gradients.device.type, enabled=False):  # which would round the products to bfloat16
        if scale == 1:
            combined = method.combine(gradients, tasks, losses)
        else:
            combined = method.combine(gradients / scale, tasks, losses) * scale
    return combined if _finite(combined) else gradients.sum(0)


def _finite(values: Tensor) -> Tensor:
    """Whether all are finite. A finite sum has finite terms: most often that cheap pass tells."""
    return values.sum().isfinite() or values.isfinite().all()


def gram(gradients: Tensor) -> Tensor:
    """``G G^T`` [n,n] of gradients [n,P] in float64, in one pass over them.

    Summed in float64: over millions of numbers sums in float32 keep four digits, and a sign is wanted of what nearly
    cancels. On a CPU short stretches are summed in float32 and these in float64: of many stretches that errs by less
    than the gradients' own rounding, and costs no more than reading them. Where there are few, where squares leave
    float32's range, where the user's settings round its products, and elsewhere, all is float64, a block at a time.
    """
    n, columns = gradients.shape
    products = gradients.new_zeros(n, n, dtype=torch.float64)
    if gradients.device.type == "cpu" and gradients.dtype == torch.float32 and columns > _BLOCK and _full_float32():
        whole = columns // _STRETCH
        parts = gradients[:, : whole * _STRETCH].unflatten(1, (whole, _STRETCH)).transpose(0, 1)
        with torch.autocast("cpu", enabled=False):
            products += torch.bmm(parts, parts.transpose(1, 2)).sum(0, dtype=torch.float64)
        rest = gradients[:, whole * _STRETCH :].double()
        products.addmm_(rest, rest.T)
        if _LEAST < products.diagonal().min() and products.isfinite().all():
            return products
        products.zero_()
    for block in gradients.split(_BLOCK if gradients.device.type == "cpu" else 32 * _BLOCK, 1):
        block = block.double()
        products.addmm_(block, block.T)
    return products


def _full_float32() -> bool:
    return torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")


def widest(tensors: Sequence[Tensor]) -> torch.dtype:
    """float32, or float64 where one of the tensors is: what their gradients are put side by side in."""
    return reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)


def leaves_above(scalar: Tensor, z: Tensor) -> list[Tensor]:
    """The leaves that `scalar` depends on by ways that do not lead through z."""
    stop, seen, found = z.grad_fn, set(), []
    stack = [scalar.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen or node is stop:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and leaf is not z:
            found.append(leaf)
        stack.extend(following for following, _ in node.next_functions)
    return found
