"""What all weightings share: arguments, inactive tasks, penalties, evaluation, mixed precision, state."""

import copy
import math

import pytest
import torch
from toy import Toy, batch, gradients, same, weighted_gradients

from python_models import balancing
from python_models.balancing import Balancer

MAKE = {
    "Balancer": lambda: Balancer(3),
    "FixedWeights": lambda: balancing.FixedWeights(3, [0.5, 2.0, 3.0]),
    "ScheduledWeights": lambda: balancing.ScheduledWeights(3, [1.0, 2.0, 3.0], [0.5, 0.9, 1.1]),
    "DynamicWeightAverage": lambda: balancing.DynamicWeightAverage(3),
    "UncertaintyWeighting": lambda: balancing.UncertaintyWeighting(["regression", "binary", "huber"], 0.3),
    "GradNorm": lambda: balancing.GradNorm(3),
    "GradNorm adam": lambda: balancing.GradNorm(3, optimizer="adam", alpha=0.5, batched=True),
}
every = pytest.mark.parametrize("name", MAKE)


def step(balancer, model, rows, **options):
    return balancer.backward(model.losses(rows), shared=model.last.parameters(), **options)


@every
@pytest.mark.parametrize("form", ["list", "tuple", "dict", "tensor"])
def test_the_four_forms_of_losses_are_one(name, form):
    make = {"list": list, "tuple": tuple, "dict": lambda ls: dict(zip("abc", ls, strict=True)), "tensor": torch.stack}
    found = []
    for convert in (list, make[form]):
        model, balancer = Toy(), MAKE[name]()
        for i in range(3):
            total = balancer.backward(convert(model.losses(batch(i))), shared=model.last.parameters())
        found.append((gradients(model) | gradients(balancer), total))
    same(found[0][0], found[1][0], 1e-12)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-12, atol=0)


@every
def test_gradients_are_those_of_the_weighted_sum_and_are_added(name):
    model, balancer = Toy(), MAKE[name]()
    for i in range(2):  # so that there are weights
        step(balancer, model, batch(i))
        balancer.end_epoch()
    losses = torch.stack(model.losses(batch(2))).detach().requires_grad_()
    weights = torch.autograd.grad(balancer.weigh(losses).sum(), losses)[0]
    expected = weighted_gradients(model, batch(2), weights)
    step(balancer, model, batch(2))
    same(gradients(model), expected, 1e-12)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in balancer.parameters())
    again = copy.deepcopy(model)
    again.zero_grad()
    model.losses(batch(3))[0].backward()
    again.losses(batch(3))[0].backward()
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        more = 0 if q.grad is None else q.grad
        torch.testing.assert_close(p.grad, expected[name] + more, rtol=1e-12, atol=1e-12)


@every
def test_total_is_detached_and_has_the_penalty_unweighted(name):
    model, balancer = Toy(), MAKE[name]()
    other = copy.deepcopy(balancer)
    extra = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    plain = step(other, copy.deepcopy(model), batch())
    total = step(balancer, model, batch(), penalty=3 * extra)
    assert total.shape == () and not total.requires_grad and total.dtype == torch.float64
    torch.testing.assert_close(total, plain + 6, rtol=1e-12, atol=0)
    assert extra.grad == 3


@every
def test_an_inactive_task_is_not_looked_at(name):
    """Its loss may be NaN, and neither its head nor its weight moves."""
    model, balancer = Toy(), MAKE[name]()
    step(balancer, model, batch())
    balancer.zero_grad()
    model.zero_grad()
    before = copy.deepcopy(balancer)
    losses = model.losses(batch(1))
    losses[1] = losses[1].detach() * math.nan
    active = torch.tensor([True, False, True])
    total = balancer.backward(losses, shared=model.last.parameters(), active=active)
    assert torch.isfinite(total)
    assert model.heads[1].weight.grad is None and torch.isfinite(model.first.weight.grad).all()
    assert before.weigh(losses, active)[1] == 0
    if hasattr(balancer, "weights"):
        assert balancer.weights[1] == before.weights[1]
    if hasattr(balancer, "log_variance"):
        assert balancer.log_variance.grad[1] == 0 and (balancer.log_variance.grad[[0, 2]] != 0).all()


@every
def test_nothing_active(name):
    model, balancer = Toy(), MAKE[name]()
    state = copy.deepcopy(balancer.state_dict())
    total = step(balancer, model, batch(), active=torch.zeros(3, dtype=torch.bool))
    assert total == 0 and all((p.grad == 0).all() for p in model.parameters())
    for key in ("weights", "log_variance", "initial"):
        if key in state:
            assert torch.equal(state[key], balancer.state_dict()[key])


@every
def test_eval_is_the_plain_sum_and_learns_nothing(name):
    model, balancer = Toy(), MAKE[name]()
    step(balancer, model, batch())
    balancer.eval()
    model.zero_grad()
    state = copy.deepcopy(balancer.state_dict())
    total = step(balancer, model, batch(1))
    found = gradients(model)
    torch.testing.assert_close(total, sum(model.losses(batch(1))).detach(), rtol=1e-12, atol=0)
    same(found, weighted_gradients(model, batch(1), [1, 1, 1]), 1e-12)
    same(dict(balancer.state_dict()), dict(state))


@every
def test_state_survives_in_the_middle_of_a_run(name, tmp_path):
    """Bit for bit: six steps, and three, a file, three more."""

    def run(first, last, model, balancer, optimizer):
        for i in range(first, last):
            optimizer.zero_grad()
            step(balancer, model, batch(i, dtype=torch.float32))
            optimizer.step()
            if i % 2:
                balancer.end_epoch()

    def start():
        model, balancer = Toy(dtype=torch.float32), MAKE[name]()
        return model, balancer, torch.optim.Adam([*model.parameters(), *balancer.parameters()], 0.05)

    whole = start()
    run(0, 8, *whole)
    half = start()
    run(0, 5, *half)
    torch.save([part.state_dict() for part in half], tmp_path / "state.pt")
    resumed = start()
    for part, state in zip(resumed, torch.load(tmp_path / "state.pt"), strict=True):
        part.load_state_dict(state)
    run(5, 8, *resumed)
    for left, right in zip(whole[:2], resumed[:2], strict=True):
        same(dict(left.state_dict()), dict(right.state_dict()))
    if name not in ("Balancer", "FixedWeights"):
        assert any(not torch.equal(v, MAKE[name]().state_dict()[k]) for k, v in whole[1].state_dict().items())


@every
def test_a_scaler_changes_nothing_but_the_scale(name):
    model, other = Toy(), Toy()
    balancer, plain = MAKE[name](), MAKE[name]()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i in range(3):
        model.zero_grad(), other.zero_grad(), balancer.zero_grad(), plain.zero_grad()
        total = step(balancer, model, batch(i), scaler=scaler)
        torch.testing.assert_close(total, step(plain, other, batch(i)), rtol=1e-12, atol=0)
        found = {key: None if g is None else g / 1024 for key, g in (gradients(model) | gradients(balancer)).items()}
        same(found, gradients(other) | gradients(plain), 1e-12)
    same(dict(balancer.state_dict()), dict(plain.state_dict()), 1e-12)


@every
def test_float16_losses_and_an_overflow_under_a_scaler(name):
    """The step with the overflow is skipped by the scaler, and leaves no trace in the weights."""
    model, balancer = Toy(dtype=torch.float32), MAKE[name]()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer = torch.optim.SGD([*model.parameters(), *balancer.parameters()], 0.01)
    for i in range(4):
        optimizer.zero_grad()
        kept = copy.deepcopy((dict(model.state_dict()), dict(balancer.state_dict())))
        with torch.autocast("cpu", torch.bfloat16):
            losses = [loss.half() for loss in model.losses(batch(i, dtype=torch.float32))]
        if i == 2:
            losses[1] = losses[1] * 60000 * 60000
        total = balancer.backward(losses, shared=model.last.parameters(), scaler=scaler)
        assert total.dtype == torch.float32
        scaler.step(optimizer)
        scaler.update()
        if i == 2:
            same(dict(model.state_dict()), kept[0])
            for key in ("weights", "log_variance", "initial"):
                if key in kept[1]:
                    assert torch.equal(kept[1][key], balancer.state_dict()[key])
        else:
            assert not torch.equal(model.last.weight, kept[0]["last.weight"])
    assert scaler.get_scale() == 32
    assert all(torch.isfinite(value).all() for value in balancer.state_dict().values())


@every
def test_backward_is_called_in_place_of_tensors(name):
    model, balancer, calls = Toy(), MAKE[name](), []

    def backward(scalar):
        calls.append(scalar.detach().clone())
        (2 * scalar).backward()

    other = Toy()
    total = step(balancer, model, batch(), backward=backward)
    step(MAKE[name](), other, batch())
    assert calls == [total]
    same(gradients(model), {key: 2 * g for key, g in gradients(other).items()}, 1e-12)


def test_bad_arguments():
    balancer, scalar = Balancer(2), torch.tensor(1.0, requires_grad=True)
    for error, message, losses, options in (
        (TypeError, "losses must be a tensor", "ab", {}),
        (TypeError, "losses must be a tensor", [], {}),
        (TypeError, r"losses\[1\] must be a tensor; got float", [scalar, 1.0], {}),
        (ValueError, r"losses\[0\] must be a scalar; got shape \(1,\)", [scalar[None], scalar], {}),
        (ValueError, r"losses must be \[T\] with T = 2; got shape \(3,\)", [scalar] * 3, {}),
        (TypeError, "losses must be floating point; got torch.int64", torch.tensor([1, 2]), {}),
        (TypeError, "active must be a bool tensor; got torch.float32", [scalar] * 2, {"active": torch.ones(2)}),
        (TypeError, "active must be a bool tensor; got list", [scalar] * 2, {"active": [True, False]}),
        (ValueError, r"active must be \[T\]", [scalar] * 2, {"active": torch.ones(3, dtype=torch.bool)}),
        (TypeError, "penalty must be a tensor; got float", [scalar] * 2, {"penalty": 1.0}),
        (ValueError, r"penalty must be a scalar; got shape \(1,\)", [scalar] * 2, {"penalty": scalar[None]}),
    ):
        with pytest.raises(error, match=message):
            balancer.backward(losses, **options)
    for value, error in ((0, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="num_tasks"):
            Balancer(value)
