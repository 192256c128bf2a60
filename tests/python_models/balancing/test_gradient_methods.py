"""What PCGrad, MGDA, GradDrop and RotoGrad share: where gradients go, masks, weightings, scaling, resuming."""

import copy

import pytest
import torch
from torch import nn
from toy import Toy, batch, gradients, same, weighted_gradients

from mtlkernels.nn import Towers
from python_models.balancing import MGDA, FixedWeights, GradDrop, GradientMethod, PCGrad, RotoGrad, UncertaintyWeighting
from python_models.balancing.task_gradients import leaves_above

WEIGHTS = [1.0, 0.5, 2.0]


class Parted(Toy):
    """The toy with its representation to be had."""

    def z(self, x):
        return torch.tanh(self.last(torch.tanh(self.first(x))))

    def parts(self, rows, rotate=None):
        x, y = rows
        z = self.z(x)
        seen = [z] * len(self.heads) if rotate is None else rotate(z).unbind(1)
        losses = [
            (t + 1) * (head(r).squeeze(1) - y[:, t]).square().mean()
            for t, (head, r) in enumerate(zip(self.heads, seen, strict=True))
        ]
        return losses, z


class Sum(GradientMethod):
    """The plain sum, by way of every task's own gradient."""

    def combine(self, gradients, tasks, losses):
        return gradients.sum(0)


class SumAtZ(Sum):
    def _place(self, shared, representation):
        return MGDA(self.num_tasks)._place(None, representation)


def step(method, model, rows, **options):
    """.grad after one step of the method, where it works."""
    model.zero_grad()
    method.zero_grad()
    losses, z = model.parts(rows, method.rotate if isinstance(method, RotoGrad) else None)
    method.backward(losses, **place(method, model, z), **options)
    return gradients(model)


def place(method, model, z):
    """Where it works."""
    if isinstance(method, (GradDrop, RotoGrad, SumAtZ)):
        return {"representation": z}
    return {"shared": model.shared_parameters()}


METHODS = {
    "PCGrad": lambda **o: PCGrad(3, **o),
    "MGDA": lambda **o: MGDA(3, **o),
    "GradDrop": lambda **o: GradDrop(3, **o),
    "RotoGrad": lambda **o: RotoGrad(3, 4, **o),
}
each_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)


@pytest.mark.parametrize("make", [Sum, SumAtZ])
def test_a_sum_of_task_gradients_is_the_gradient_of_the_sum(make):
    model = Parted()
    same(step(make(3), model, batch()), weighted_gradients(model, batch(), [1, 1, 1]), 1e-12)
    weighting = FixedWeights(3, WEIGHTS)
    same(step(make(3, weighting=weighting), model, batch()), weighted_gradients(model, batch(), WEIGHTS), 1e-12)


@pytest.mark.parametrize("make", [Sum, SumAtZ])
def test_what_is_there_stays(make):
    model = Parted()
    wanted = weighted_gradients(model, batch(), [1, 1, 1])
    model.zero_grad()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    losses, z = model.parts(batch())
    make(3).backward(losses, shared=model.shared_parameters(), representation=z, penalty=model.first.weight.sum())
    wanted = {name: grad + 1 + (name == "first.weight") for name, grad in wanted.items()}
    same(gradients(model), wanted, 1e-12)


class Around(Parted):
    """Its losses look past the representation too, at what the trunk's first layer makes."""

    def parts(self, rows, rotate=None):
        losses, z = super().parts(rows, rotate)
        return [(t + 1) * loss + self.first(rows[0]).square().mean() for t, loss in enumerate(losses)], z


def test_ways_around_the_representation_count_once():
    model = Around()
    losses, _ = model.parts(batch())
    sum(losses).backward()
    wanted = gradients(model)
    same(step(SumAtZ(3), model, batch()), wanted, 1e-12)
    same(step(GradDrop(3, leak=1.0), model, batch()), wanted, 1e-12)


def test_a_representation_that_is_a_leaf():
    """Of an embedding that is served from elsewhere: .grad is the combination, beside what was there."""
    model = Parted()
    z = model.z(batch()[0]).detach().requires_grad_()
    losses = [head(z).square().mean() for head in model.heads]
    (wanted,) = torch.autograd.grad(sum(losses), z, retain_graph=True)
    z.grad = torch.ones_like(z)
    SumAtZ(3).backward(losses, representation=z)
    torch.testing.assert_close(z.grad, wanted + 1)


@each_method
def test_autocast_does_not_round_the_combination(make):
    """Called within the block it rounds neither products nor sums, to bfloat16 as it would torch's own."""
    found, y = [], torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    for enabled in (False, True):
        z = torch.linspace(-1, 1, 24).view(6, 4).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            make().backward([(t + 1) * (z - y[t]).square().mean() for t in range(3)], shared=[z], representation=z)
        found.append(z.grad)
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)


def test_parameters_of_several_dtypes():
    """Rows are as wide as the widest of them."""
    half, whole = nn.Parameter(torch.ones(3)), nn.Parameter(torch.full((2,), 1 / 3, dtype=torch.float64))
    Sum(2).backward([half.sum().double() + whole.square().sum(), whole.sum().exp()], shared=[half, whole])
    wanted = 2 * whole.detach() + whole.detach().sum().exp()
    torch.testing.assert_close(whole.grad, wanted, rtol=1e-14, atol=0)
    assert half.grad.dtype == torch.float32 and half.grad.tolist() == [1, 1, 1]


@pytest.mark.parametrize("at", ["shared", "representation"])
@pytest.mark.parametrize("weighting", [None, lambda: FixedWeights(3, WEIGHTS)])
def test_mgda_may_scale_the_heads(at, weighting):
    """As the authors' code: the gradient of ``sum_t a_t w_t L_t`` everywhere, a as of the method without."""
    model, options = Parted(), {} if weighting is None else {"weighting": weighting()}
    plain, scaled = MGDA(3, **options), MGDA(3, scale_heads=True, **options)
    scaler, active = torch.amp.GradScaler("cpu", init_scale=64.0), torch.tensor([True, True, False])
    for method in (plain, scaled):
        model.zero_grad()
        losses, z = model.parts(batch())
        losses[2] = losses[2] * torch.nan if method is scaled else losses[2]
        where = {"shared": model.shared_parameters()} if at == "shared" else {"representation": z}
        penalty = model.first.weight.sum()
        total = method.backward(losses, **where, active=active, scaler=scaler, penalty=penalty)
        assert total.isfinite()
    torch.testing.assert_close(scaled.coefficients, plain.coefficients, rtol=1e-6, atol=0)
    found = gradients(model)
    weights = [1, 1, 1] if weighting is None else WEIGHTS
    shares = [64 * w * a for w, a in zip(weights, scaled.coefficients.tolist(), strict=True)]
    wanted = weighted_gradients(model, batch(), shares)
    wanted["first.weight"] += 64
    for name in ("heads.2.weight", "heads.2.bias"):
        grad = found.pop(name)
        assert grad is None or not grad.any()
    same(found, {name: wanted[name] for name in found}, 1e-6)


@each_method
def test_heads_get_their_own_gradients(make):
    model, method = Parted(), make()
    found = step(method, model, batch())
    wanted = weighted_gradients(model, batch(), [1, 1, 1])
    heads = [name for name in wanted if name.startswith("heads")]
    same({n: found[n] for n in heads}, {n: wanted[n] for n in heads}, 1e-12)
    assert not all(torch.allclose(found[n], wanted[n]) for n in wanted if n not in heads)


@each_method
def test_a_task_that_is_not_active_takes_no_part(make):
    """Not even where its loss is NaN."""
    model, rows = Parted(), batch()
    rows[1][:, 1] = torch.nan
    found = step(make(), model, rows, active=torch.tensor([True, False, True]))
    assert found["heads.1.weight"] is None or not found["heads.1.weight"].any()
    assert all(g.isfinite().all() for g in found.values() if g is not None)
    found = step(make(), model, batch(), active=torch.zeros(3, dtype=torch.bool))
    assert not any(g.any() for g in found.values() if g is not None)


@each_method
def test_eval_is_the_plain_sum(make):
    model, method = Parted(), make().eval()
    same(step(method, model, batch()), weighted_gradients(model, batch(), [1, 1, 1]), 1e-12)


@each_method
def test_a_learned_weighting_learns(make):
    weighting = UncertaintyWeighting(["regression"] * 3).double()
    model, method = Parted(), make(weighting=weighting)
    step(method, model, batch())
    losses, _ = model.parts(batch(), getattr(method, "rotate", None))
    wanted = torch.stack([0.5 - 0.5 * loss.detach() for loss in losses])
    torch.testing.assert_close(weighting.log_variance.grad, wanted, rtol=1e-10, atol=1e-12)


@each_method
def test_scaled_gradients_are_the_gradients_scaled(make):
    model = Parted()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    plain, other = make(), make()
    wanted = step(plain, model, batch())
    found = step(other, model, batch(), scaler=scaler)
    same(found, {n: g * 2.0**12 for n, g in wanted.items()}, 1e-9)
    if isinstance(plain, RotoGrad):
        torch.testing.assert_close(other.skew.grad, plain.skew.grad * 2.0**12, rtol=1e-6, atol=0)


@each_method
def test_a_backward_that_multiplies(make):
    """As accelerate does where it accumulates: by a factor nobody mentions."""
    model = Parted()
    wanted = step(make(), model, batch())
    found = step(make(), model, batch(), backward=lambda loss, **options: (loss / 4).backward(**options))
    same(found, {n: g / 4 for n, g in wanted.items()}, 1e-9)


@each_method
def test_a_gradient_that_is_not_finite_turns_it_off(make):
    model, rows = Parted(), batch()
    rows[1][0, 2] = torch.inf
    method = make()
    step(method, model, batch(1))
    state = copy.deepcopy(dict(method.state_dict()))
    found, wanted = step(method, model, rows), weighted_gradients(model, rows, [1, 1, 1])
    same(dict(method.state_dict()), state)  # nothing is drawn, and nothing learned
    for name in ("first.weight", "last.bias"):
        assert not found[name].isfinite().all() and not wanted[name].isfinite().all()


@each_method
def test_a_saved_run_goes_on(make):
    def train(method, model, steps):
        optimizer = torch.optim.SGD([*model.parameters(), *method.parameters()], 0.05)
        for k in steps:
            step(method, model, batch(k))
            optimizer.step()

    method, model = make().double(), Parted()
    train(method, model, range(4))
    saved = copy.deepcopy((method.state_dict(), model.state_dict()))
    train(method, model, range(4, 8))
    again, other = make().double(), Parted(seed=5)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    train(again, other, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_room_for_gradients_is_kept_and_not_copied():
    """Steps of other widths and fewer tasks in between change nothing, and no .grad lies in it."""
    method, plain = Sum(3), Parted()
    for k, active in enumerate([None, torch.tensor([True, False, True]), None]):
        other = Parted(seed=k)
        kept = step(method, other, batch(k), active=active)
        wanted = weighted_gradients(other, batch(k), [1, 1 if active is None else 0, 1])
        same(
            {n: g for n, g in kept.items() if g is not None},
            {n: wanted[n] for n, g in kept.items() if g is not None},
            1e-12,
        )
        small = nn.Parameter(torch.ones(2))
        method.backward([small.sum(), 2 * small.sum(), small.prod()], shared=[small])
        assert small.grad.tolist() == [4, 4]
        found = step(method, plain, batch(k))
        again = {name: grad.clone() for name, grad in found.items()}
        step(method, other, batch(k + 1))
        same(gradients(plain), again)
    copied = copy.deepcopy(method)
    assert method._room is not None and copied._room is None
    same(step(copied, plain, batch()), step(method, plain, batch()))


@pytest.mark.parametrize("make", [Sum, SumAtZ])
def test_a_task_that_hangs_on_nothing(make):
    """A loss that is a constant, and one that does not come by way of the representation, add nothing there."""
    model = Parted()
    wanted = weighted_gradients(model, batch(), [0, 0, 1])
    model.zero_grad()
    losses, z = model.parts(batch())
    losses[0], losses[1] = losses[0].detach(), model.heads[1].weight.square().sum()
    method = make(3)
    method.backward(losses, **place(method, model, z))
    found, trunk = gradients(model), [name for name in wanted if "heads" not in name]
    same({name: found[name] for name in trunk}, {name: wanted[name] for name in trunk}, 1e-12)
    torch.testing.assert_close(found["heads.1.weight"], 2 * model.heads[1].weight.detach())


def test_bad_arguments_are_named():
    model = Parted()
    losses, z = model.parts(batch())
    with pytest.raises(ValueError, match="shared must name the parameters"):
        PCGrad(3).backward(losses)
    with pytest.raises(TypeError, match=r"shared\[0\] must be a parameter"):
        PCGrad(3).backward(losses, shared=[z])
    with pytest.raises(ValueError, match="shared must name parameters that require"):
        PCGrad(3).backward(losses, shared=[])
    with pytest.raises(ValueError, match="representation must be"):
        GradDrop(3).backward(losses)
    with pytest.raises(ValueError, match="representation must require"):
        GradDrop(3).backward(losses, representation=z.detach())
    with pytest.raises(ValueError, match=r"representation must be \[B,5\]"):
        RotoGrad(3, 5).backward(losses, representation=z)
    with pytest.raises(TypeError, match="weighting must be a Balancer"):
        PCGrad(3, weighting=MGDA(3))
    with pytest.raises(ValueError, match="weighting is for 2 tasks"):
        MGDA(3, weighting=FixedWeights(2))
    with pytest.raises(ValueError, match="normalisation"):
        MGDA(3, normalisation="l1")
    for leak in (-0.1, [0.5], "1", [0, 0, 2]):
        with pytest.raises(ValueError, match="leak"):
            GradDrop(3, leak=leak)
    with pytest.raises(ValueError, match="rotated must be at most"):
        RotoGrad(3, 4, rotated=5)
    with pytest.raises(TypeError, match="representation must be a tensor; got list"):
        GradDrop(3).backward(losses, representation=[z])
    with pytest.raises(ValueError, match=r"representation must be \[B, ...\]; got shape \(5,\)"):
        GradDrop(3).backward(losses, representation=torch.ones(5, requires_grad=True))
    with pytest.raises(ValueError, match=r"representation must be z \[B,d\].* got None"):
        RotoGrad(3, 4).backward(losses)
    with pytest.raises(ValueError, match=r"z must be \[B,5\]; got shape"):
        RotoGrad(3, 5).rotate(z)
    with pytest.raises(ValueError, match="towers must be a bank with one first layer a task"):
        RotoGrad(3, 4).fold(Towers(4, 2))


def test_the_graph_below_z_is_left_alone():
    below, above = nn.Linear(3, 4), nn.Linear(4, 1)
    z = below(torch.randn(2, 3))
    assert set(leaves_above((above(z) + below.bias.sum()).sum(), z)) == {*above.parameters(), below.bias}
