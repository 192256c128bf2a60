"""Small heads in training alone."""

import pytest
import torch
import torch.nn.functional as F
from toy import batch, gradients, same

from python_models import MultiTaskModel, SharedBottom, Towers
from python_models.balancing import AuxiliaryHeads, Balancer, param_groups
from python_models.losses import TaskLosses


def parts(**options):
    torch.manual_seed(3)
    model = MultiTaskModel(SharedBottom(5, 3, [7]), Towers(7, 3, (6,))).double()
    heads = AuxiliaryHeads(7, 3, **options).double()
    x, y = batch()
    return model, heads, x, y


@pytest.mark.parametrize("dims", [(), (2,)])
def test_losses_are_the_formula_and_reach_the_trunk(dims):
    """L_t + kappa L(a_t(h), y_t), with a plain linear layer (or two) a head."""
    model, heads, x, y = parts(dims=dims, kappa=0.3)
    h = model.fusion(x)
    kinds = TaskLosses(["regression"] * 3)
    losses = heads.losses(kinds(model.towers(h), y), h, lambda out: kinds(out, y))
    total = Balancer(3).backward(losses)
    found = gradients(model) | gradients(heads)
    model.zero_grad(), heads.zero_grad()
    h, main = model.fusion(x)[:, 0], model(x)
    small = {key.removeprefix("heads."): value for key, value in heads.named_parameters()}
    expected = 0
    for t in range(3):
        out = h
        if dims:
            out = torch.relu(F.linear(out, small["hidden.linears.0.weight"][t], small["hidden.linears.0.bias"][t]))
        out = F.linear(out, small["last.weight"][t], small["last.bias"][t]).squeeze(1)
        expected = expected + (main[:, t] - y[:, t]).square().mean() + 0.3 * (out - y[:, t]).square().mean()
    expected.backward()
    torch.testing.assert_close(total, expected.detach(), rtol=1e-12, atol=0)
    same(found, gradients(model) | gradients(heads), 1e-12)


@pytest.mark.parametrize("form", ["tensor", "list", "dict"])
def test_the_losses_come_as_they_went(form):
    model, heads, x, y = parts()
    make = {"tensor": torch.stack, "list": list, "dict": lambda ls: dict(zip("abc", ls, strict=True))}[form]
    h = model.fusion(x)

    def loss(out):
        return make(list((out - y).square().mean(0).unbind()))

    found = heads.losses(loss(model.towers(h)), h, loss)
    assert type(found) is type(loss(y))
    expected = (model(x) - y).square().mean(0) + 0.5 * (heads(h[:, 0]) - y).square().mean(0)
    values = list(found.values()) if form == "dict" else list(found)
    torch.testing.assert_close(torch.stack(values), expected, rtol=1e-12, atol=0)
    heads.eval()
    losses = loss(model.towers(h))
    assert heads.losses(losses, h, None) is losses


def test_outputs_of_several_classes_have_the_towers_names():
    heads = AuxiliaryHeads(4, 2, out_features=[3, 1], task_names=["a", "b"])
    assert {name: tuple(out.shape) for name, out in heads(torch.randn(5, 4)).items()} == {"a": (5, 3), "b": (5, 1)}


def test_the_model_is_what_it_was_and_the_heads_learn_with_the_towers():
    model, heads, x, y = parts()
    assert not [key for key in model.state_dict() if key in heads.state_dict()]
    groups = {group["name"]: group["params"] for group in param_groups(model, 1.0, also=[heads])}
    assert {id(p) for p in heads.parameters()} <= {id(p) for p in groups["towers"]}


def test_bad_arguments():
    model, heads, x, y = parts()
    for kappa in (-1, float("nan"), True, "1"):
        with pytest.raises(ValueError, match="kappa must be finite and at least 0"):
            AuxiliaryHeads(7, 3, kappa=kappa)
    with pytest.raises(ValueError, match=r"loss must give what losses is, list of 2; got Tensor of 3"):
        heads.losses([y.sum(), y.sum()], model.fusion(x), lambda out: out.mean(0))
