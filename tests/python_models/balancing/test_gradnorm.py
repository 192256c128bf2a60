"""GradNorm: its closed form against autograd through the norms, its weights' step, its guards."""

import copy
import math

import numpy as np
import pytest
import torch
from toy import Toy, batch, gradients, same, weighted_gradients

from python_models.balancing import GradNorm


def double_backward(model, rows, on, weights, initial, alpha, active=None):
    """dL_grad/dw [T] by autograd through the gradient norms, the target a constant (Chen et al., algorithm 1)."""
    w = torch.tensor(weights, dtype=torch.float64, requires_grad=True)
    tasks = range(len(weights)) if active is None else [t for t, yes in enumerate(active) if yes]
    losses = model.losses(rows)
    norms = []
    for t in tasks:
        found = torch.autograd.grad(w[t] * losses[t], on, create_graph=True, retain_graph=True, allow_unused=True)
        norms.append(sum(g.square().sum() for g in found if g is not None).sqrt())
    norms = torch.stack(norms)
    rate = torch.stack([losses[t] / initial[t] for t in tasks])
    target = (norms.mean() * (rate / rate.mean()) ** alpha).detach()
    return torch.autograd.grad((norms - target).abs().sum(), w)[0].numpy()


def stepped(weights, gradient, lr, active=None):
    """w after a step and the scaling of the active ones to the sum they had."""
    new, yes = np.array(weights), np.ones(len(weights), bool) if active is None else np.array(active)
    new[yes] = np.maximum(new[yes] - lr * gradient[yes], 1e-6)
    new[yes] *= np.array(weights)[yes].sum() / new[yes].sum()
    return new


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("alpha", [1.5, 0.12, 0.0])
def test_weights_follow_the_double_backward(alpha, batched):
    """Over a run: SGD of the model with the old weights, w by autograd's gradient, then the sum T."""
    model, balancer = Toy(), GradNorm(3, alpha=alpha, lr=0.1, batched=batched).double()
    weights, initial = np.ones(3), None
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for i in range(8):
        rows = batch(i)
        initial = [loss.item() for loss in model.losses(rows)] if initial is None else initial
        slope = double_backward(model, rows, list(model.last.parameters()), weights, initial, alpha)
        expected = weighted_gradients(model, rows, weights)
        optimizer.zero_grad()
        total = balancer.backward(model.losses(rows), shared=model.last.parameters())
        np.testing.assert_allclose(float(total), sum(weights * [v.item() for v in model.losses(rows)]), rtol=1e-12)
        same(gradients(model), expected, 1e-12)  # the model's step has the old weights, W among its parameters
        weights = stepped(weights, slope, 0.1)
        np.testing.assert_allclose(balancer.weights.numpy(), weights, rtol=1e-11)
        optimizer.step()
    np.testing.assert_allclose(weights.sum(), 3, rtol=1e-12)
    assert np.abs(weights - 1).max() > 0.1


def test_no_gradient_is_differentiated_twice():
    """The graph of an activation without a second derivative suffices."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return grad

    w = torch.randn(4, requires_grad=True)
    GradNorm(2).backward([Once.apply(w).square().sum(), Once.apply(w).sum().exp()], shared=[w])
    assert w.grad is not None


def test_inactive_tasks_are_in_no_mean():
    model, balancer = Toy(4), GradNorm(4, lr=0.1, initial=[1.0, 2.0, 3.0, 4.0]).double()
    balancer.weights.copy_(torch.tensor([0.5, 1.5, 0.8, 1.2], dtype=torch.float64))
    active = [True, False, True, True]
    rows = batch(0, 4)
    slope = double_backward(
        model, rows, list(model.last.parameters()), balancer.weights.tolist(), [1, 2, 3, 4], 1.5, active
    )
    expected = stepped([0.5, 1.5, 0.8, 1.2], slope, 0.1, active)
    balancer.backward(model.losses(rows), shared=model.last.parameters(), active=torch.tensor(active))
    np.testing.assert_allclose(balancer.weights.numpy(), expected, rtol=1e-12)
    assert balancer.weights[1] == 1.5


def test_equal_norms_stay_with_alpha_0():
    """Exactly: what rounding leaves of a mean of equal w n is no difference, whose sign would be a whole step."""
    for tasks in (2, 3, 7, 11, 13):
        balancer = GradNorm(tasks, alpha=0.0).double()
        start = 2.0 ** (torch.arange(tasks, dtype=torch.float64) % 4)
        balancer.weights.copy_(start)
        for seed in range(8):
            w = torch.randn(1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)
            losses = w.square() / start
            balancer.observe(losses, shared=[w])
        assert torch.equal(balancer.weights, start)


@pytest.mark.parametrize("above", [1e-3, -1e-3])
def test_the_sign_turns_at_the_target(above):
    """r = (1.2, 0.8) and a mean of 1: the first target is 1.2^2, wherever the task without labels stands."""
    norms = torch.tensor([1.44 + above, 0.56 - above, 50.0], dtype=torch.float64)
    balancer = GradNorm(3, alpha=2.0, lr=0.1, initial=1.0).double()
    balancer.initial.copy_(norms / torch.tensor([1.2, 0.8, 9.0], dtype=torch.float64))
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    balancer.backward(norms * w, shared=[w], active=torch.tensor([True, True, False]))
    first, second = 1 - math.copysign(0.1, above) * norms[0].item(), 1 + 0.1 * norms[1].item()
    share = 2 / (first + second)
    np.testing.assert_allclose(balancer.weights.numpy(), [first * share, second * share, 1], rtol=1e-12)


def test_the_norms_become_equal():
    """Three losses with gradients of 1 : 2 : 4 and constant rates: w n ends equal, up to the step."""
    balancer, scale = GradNorm(3, alpha=0.0, lr=2e-3).double(), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    w = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    for _ in range(1000):
        balancer.backward(scale * w, shared=[w])
    share = (balancer.weights * scale).numpy()
    np.testing.assert_allclose(share, share.mean(), rtol=0.02)
    np.testing.assert_allclose(float(balancer.weights.sum()), 3, rtol=1e-12)


def test_adam_is_torchs():
    model, balancer = Toy(), GradNorm(3, optimizer="adam", lr=0.03).double()
    w = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    adam, initial = torch.optim.Adam([w], 0.03), None
    for i in range(6):
        rows = batch(i)
        initial = [loss.item() for loss in model.losses(rows)] if initial is None else initial
        slope = double_backward(model, rows, list(model.last.parameters()), w.tolist(), initial, 1.5)
        w.grad = torch.from_numpy(slope)
        adam.step()
        w.data *= 3 / w.data.sum()
        balancer.backward(model.losses(rows), shared=model.last.parameters())
        torch.testing.assert_close(balancer.weights, w.data, rtol=1e-9, atol=0)


def test_the_first_loss_is_kept_of_each_task():
    balancer = GradNorm(3)
    w = torch.ones(2, requires_grad=True)
    for losses, active in (
        ((2.0, math.inf, 5.0), (True, True, False)),
        ((3.0, 4.0, math.nan), (True, True, True)),
        ((9.0, 9.0, 6.0), (True, True, True)),
    ):
        balancer.observe([value * w.prod() for value in losses], torch.tensor(active), shared=[w])
    assert balancer.initial.tolist() == [2, 4, 6] and balancer.known.all()
    assert GradNorm(2, initial=[0.5, math.log(8)]).initial.tolist() == pytest.approx([0.5, math.log(8)])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_leaves_the_weights(bad):
    balancer, w = GradNorm(2), torch.ones(2, requires_grad=True)
    balancer.backward([w.sum(), 3 * w.prod()], shared=[w])
    kept = balancer.weights.clone()
    balancer.backward([w.sum(), bad * w.prod()], shared=[w])
    assert torch.equal(balancer.weights, kept) and (kept != 1).all()
    losses = [w.sum(), (w.sum() - 2).abs().sqrt()]  # 0, with an infinite slope
    balancer.backward(losses, shared=[w])
    assert torch.isfinite(torch.stack(losses)).all() and torch.equal(balancer.weights, kept)


def test_a_first_loss_of_0_and_zero_gradients():
    balancer, w = GradNorm(3).double(), torch.ones(2, dtype=torch.float64, requires_grad=True)
    for factor in (0.0, 1.0):
        balancer.backward([factor * w.sum(), w.prod(), 0 * w.sum()], shared=[w])
    # Of the second step: rates 1, 1, 1 since the first loss of two tasks was below 1e-12; norms sqrt 2, sqrt 2, 0.
    assert torch.isfinite(balancer.weights).all() and balancer.weights.min() > 0
    zero = GradNorm(2)
    zero.backward([0 * w.sum(), 0 * w.prod()], shared=[w])
    assert (zero.weights == 1).all()


def test_weights_stay_positive():
    balancer, w = GradNorm(2, lr=1000.0).double(), torch.ones(1, dtype=torch.float64, requires_grad=True)
    balancer.backward([w.sum(), 50 * w.sum()], shared=[w])
    np.testing.assert_allclose(balancer.weights.sum(), 2, rtol=1e-12)
    assert 0 < balancer.weights[1] <= 2e-6


def test_one_task():
    model, balancer = Toy(1), GradNorm(1)
    for i in range(3):
        balancer.backward(model.losses(batch(i, 1)), shared=model.last.parameters())
    assert balancer.weights.tolist() == [1]


def test_it_measures_on_what_it_is_given():
    """measured_on before shared; sparse gradients and losses without W are taken."""
    table = torch.nn.Embedding(5, 2, sparse=True, dtype=torch.float64)
    ids = torch.tensor([1, 1, 4])
    dense = copy.deepcopy(table)
    dense.sparse = False
    found = []
    for bank in (table, dense):
        z = bank(ids)
        other = torch.ones((), dtype=torch.float64, requires_grad=True)
        balancer = GradNorm(3, measured_on=[bank.weight]).double()
        balancer.backward([z.square().sum(), z.sum() * other, other.exp()], shared=[other])
        found.append(balancer.weights)
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)
    assert (found[0] != 1).all()
    assert not [name for name, _ in GradNorm(2, measured_on=table.parameters()).named_parameters()]


def test_towers_of_other_tasks_are_not_passed():
    """T scalars: the gradients for the norms go through each task's own head alone."""
    model, passes = Toy(), []
    for t, head in enumerate(model.heads):
        head.register_full_backward_hook(lambda *_, t=t: passes.append(t))
    losses = model.losses(batch())
    GradNorm(3).observe(losses, shared=model.last.parameters())
    assert passes == [0, 1, 2]


def test_eval_and_bad_arguments():
    model = Toy()
    balancer = GradNorm(3).eval()
    balancer.backward(model.losses(batch()))  # asks for no W
    assert not balancer.known.any()
    with pytest.raises(ValueError, match="shared must name the tensors that gradient norms are measured on; got None"):
        GradNorm(3).backward(model.losses(batch()))
    for error, message, options in (
        (ValueError, "alpha must be finite and at least 0", {"alpha": -1}),
        (ValueError, "lr must be finite and at least 0", {"lr": math.nan}),
        (ValueError, "optimizer must be 'sgd' or 'adam'; got 'lion'", {"optimizer": "lion"}),
        (ValueError, "initial must be 3 finite numbers", {"initial": [1.0, 2.0]}),
        (TypeError, r"measured_on\[0\] must be a tensor; got str", {"measured_on": ["w"]}),
        (ValueError, "measured_on must name tensors that require a gradient", {"measured_on": [torch.ones(1)]}),
    ):
        with pytest.raises(error, match=message):
            GradNorm(3, **options)
    with pytest.raises(ValueError, match="shared must name tensors that require a gradient; got none"):
        GradNorm(3).backward(model.losses(batch()), shared=[])
