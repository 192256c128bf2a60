"""The shortest convex combination of the tasks' gradients."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .base import Balancer, Losses, loss_scale, run_backward
from .task_gradients import GradientMethod, Representation, Shared, gram, widest

NORMALISATIONS = ("none", "l2", "loss", "loss+")


class MGDA(GradientMethod):
    """``sum_t a_t g_t`` of least norm over the simplex: no task gets worse (Sener and Koltun, NeurIPS 2018, alg. 2).

    Given ``shared``, g_t are the gradients of these parameters. Given ``representation`` Z, those of Z: this is
    MGDA-UB, an upper bound for one backward through the trunk. Task parameters get their own, unweighted gradients.

    Args:
        num_tasks: T.
        normalisation: what g_t is divided by in the choice of a: "none"; "l2", its norm; "loss", L_t; "loss+", both.
        scale_heads: steps ``sum_t a_t L_t``, task parameters and learned weights included, as the authors' code does;
            one backward more.
        weighting, seed: as of :class:`GradientMethod`.

    ``coefficients`` [T] holds the last a; 0 for tasks that were not active.
    """

    def __init__(
        self,
        num_tasks: int,
        *,
        normalisation: str = "none",
        scale_heads: bool = False,
        weighting: Balancer | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(num_tasks, weighting=weighting, seed=seed)
        if normalisation not in NORMALISATIONS:
            raise ValueError(f"normalisation must be one of {', '.join(NORMALISATIONS)}; got {normalisation!r}")
        self.normalisation, self.scale_heads = normalisation, scale_heads
        self.register_buffer("coefficients", torch.full((num_tasks,), 1 / num_tasks))

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
        if not (self.scale_heads and self.training):
            where = {"shared": shared, "representation": representation, "penalty": penalty}
            return super().backward(losses, **where, active=active, scaler=scaler, backward=backward)
        place = self._place(shared, representation)
        on = place.parameters if isinstance(place, Shared) else [place.z]
        scalars = self.as_scalars(losses)
        some = self.as_active(active, self.as_losses(losses))
        tasks = list(range(self.num_tasks)) if some is None else some.nonzero().flatten().tolist()
        weighted, factors = self._factors(self.as_losses(losses).detach(), some)
        shares = torch.zeros_like(factors)
        if tasks:
            scale = loss_scale(scaler, factors)
            rows = [_flat(scalars[t] * (factors[t] * scale).to(scalars[t]), on) for t in tasks]
            gradients = torch.stack(rows) / scale.to(rows[0])
            shares[tasks] = 1.0
            if gradients.isfinite().all():
                shares[tasks] = self.choose(gradients, tasks, weighted.detach()[tasks]).to(shares)
        self.observe(losses, active, shared=shared, scaler=scaler)
        # Of the gradient alone is this the step: its model part has the losses, its learned weights the losses' values.
        step = [scalars[t] * (factors[t] * shares[t]).to(scalars[t]) for t in tasks] + [(weighted * shares).sum()]
        step += [] if penalty is None else [penalty]
        if step := [part for part in step if part.requires_grad]:
            run_backward(torch.stack([part.to(weighted) for part in step]).sum(), scaler, backward)
        return self.total(weighted, penalty).detach()

    def combine(self, gradients: Tensor, tasks: Sequence[int], losses: Tensor) -> Tensor:
        return self.choose(gradients, tasks, losses).to(gradients) @ gradients

    def choose(self, gradients: Tensor, tasks: Sequence[int], losses: Tensor) -> Tensor:
        """a [n] in float64 on the CPU, from gradients [n,P] of these tasks and their weighted losses [n]; keeps it."""
        products = gram(gradients).cpu()
        sizes = torch.ones(len(products), dtype=products.dtype)
        if self.normalisation in ("l2", "loss+"):
            sizes = sizes * products.diagonal().clamp_min(0).sqrt()
        if self.normalisation in ("loss", "loss+"):
            sizes = sizes * losses.cpu().double()
        sizes = torch.where(sizes > 0, sizes, 1)
        chosen = least_norm(products / torch.outer(sizes, sizes))
        self.coefficients.zero_()[list(tasks)] = chosen.to(self.coefficients)
        return chosen

    def _place(self, shared: Iterable[Tensor] | None, representation: Tensor | None) -> Shared | Representation:
        return super()._place(shared, None) if representation is None else Representation(representation)


def _flat(scalar: Tensor, on: Sequence[Tensor]) -> Tensor:
    """The gradient of a scalar in `on`, side by side: [P]."""
    none = [None] * len(on)
    found = torch.autograd.grad(scalar, on, retain_graph=True, allow_unused=True) if scalar.requires_grad else none
    parts = [torch.zeros_like(x) if g is None else g for x, g in zip(on, found, strict=True)]
    return torch.cat([(g.to_dense() if g.is_sparse else g).flatten().to(widest(on)) for g in parts])


def least_norm(products: Tensor, tolerance: float = 1e-13) -> Tensor:
    """The a [n] in the simplex that makes ``a^T products a`` least, exact up to rounding: Wolfe's method on n points.

    products [n,n] of g_1 .. g_n, in float64 on the CPU; where one is not finite, equal parts. At the end
    ``g_t.d >= d.d - tolerance |g_t| sum_s a_s |g_s|``, and equal where ``a_t > 0``. A zero gradient is the least.

    Wolfe, Mathematical Programming 11, 1976: the points in use are an affinely independent set; the least norm of their
    affine hull is a small linear system, and a point with a negative part leaves the set on the way there.
    """
    n = len(products)
    if not products.isfinite().all():
        return torch.full((n,), 1 / n, dtype=products.dtype)
    norms = products.diagonal().clamp_min(0).sqrt()
    start = int(norms.argmin())
    parts = torch.zeros(n, dtype=products.dtype).index_fill(0, torch.tensor([start]), 1.0)  # a_t |g_t| / |g_start|
    if norms[start] == 0:
        return parts
    # Each gradient in units of its own length: neither their scale nor a mixture of scales makes the systems worse.
    cosines, inverse = products / norms / norms.unsqueeze(1), norms[start] / norms
    used = [start]
    for _ in range(16 * n + 16):
        along = cosines @ parts
        ahead = along - parts @ along * inverse  # (g_t.d - d.d) / |g_t|
        ahead[used] = torch.inf
        best = int(ahead.argmin())
        if ahead[best] >= -tolerance * parts.sum():
            break
        used.append(best)
        while True:
            wanted = _affine_least(cosines[used][:, used], inverse[used])
            falling, now = wanted < 0, parts[used]
            share = torch.where(falling, now / (now - wanted), torch.inf)
            now = now + share.min().clamp_max(1) * (wanted - now)
            now[share == share.min().clamp_max(1)] = 0  # the first to fall leaves, whatever rounding made of it
            parts = torch.zeros_like(parts).index_copy(0, torch.tensor(used), now.clamp_min(0))
            used = [t for t in used if parts[t] > 0]
            if not falling.any():
                break
    parts = parts * inverse
    return parts / parts.sum()


def _affine_least(cosines: Tensor, inverse: Tensor) -> Tensor:
    """The point x of least norm in the affine hull ``inverse.x = 1``: parts of unit vectors, maybe negative."""
    normal = inverse / inverse.norm()
    # The hull's normal added to it changes the length of the solution alone, and makes a dependent set regular.
    system = cosines + torch.outer(normal, normal)
    found = torch.linalg.lstsq(system, normal.unsqueeze(1), driver="gelsd").solution[:, 0]
    return found / (inverse @ found)
