"""Losses by task kind against float64 numpy: values, gradients, masks, weights, reductions."""

import math

import numpy as np
import pytest
import torch

from python_models.losses import KINDS, REDUCTIONS, TaskLosses, watch_time

MIXED = ("binary", "multiclass", "huber", "watch_time", "regression")


def softplus(x):
    return np.logaddexp(0, x)


def term(kind, x, y, delta=1.0):
    """One row's loss and its derivative by x, from the formulas."""
    sigmoid = np.exp(-softplus(-np.asarray(x)))
    if kind == "binary":
        return max(x, 0) - x * y + math.log1p(math.exp(-abs(x))), sigmoid - y
    if kind == "regression":
        return (x - y) ** 2, 2 * (x - y)
    if kind == "huber":
        d = abs(x - y)
        return (d * d / 2, x - y) if d < delta else (delta * (d - delta / 2), delta * np.sign(x - y))
    if kind == "watch_time":
        return (y * softplus(-x), y * (sigmoid - 1)) if y > 0 else (softplus(x), sigmoid)
    p = np.exp(x - x.max())
    p /= p.sum()
    return -math.log(p[int(y)]), p - np.eye(len(x))[int(y)]


def oracle(kinds, outputs, labels, weights, reduction, delta):
    """T losses and T gradients of ``sum_t c_t L_t``, with c = 1, 2, ..."""
    losses, grads = [], []
    for t, kind in enumerate(kinds):
        total, grad, share = 0.0, np.zeros_like(outputs[t]), 0.0
        for b in range(len(labels)):
            if weights[b, t] != 0:
                value, slope = term(kind, outputs[t][b], labels[b, t], delta[t])
                total, share = total + weights[b, t] * value, share + weights[b, t]
                grad[b] = weights[b, t] * slope
        divisor = {"task_mean": share or 1.0, "batch_mean": max(len(labels), 1), "sum": 1.0}[reduction]
        losses.append(total / divisor)
        grads.append((t + 1) * grad / divisor)
    return losses, grads


def data(kinds, rows, seed=0, spread=2.0):
    rng = np.random.default_rng(seed)
    outputs = [spread * rng.standard_normal((rows, 4) if kind == "multiclass" else rows) for kind in kinds]
    labels = np.empty((rows, len(kinds)))
    for t, kind in enumerate(kinds):
        labels[:, t] = {
            "binary": rng.uniform(size=rows),
            "multiclass": rng.integers(0, 4, rows),
            "watch_time": rng.uniform(0.1, 9, rows) * (rng.uniform(size=rows) < 0.5),
        }.get(kind, 2 * rng.standard_normal(rows))
    return outputs, labels


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("how", ["all", "mask", "row weights", "weights", "mask and row weights", "mask and weights"])
@pytest.mark.parametrize("rows", [0, 1, 13])
@pytest.mark.parametrize("kinds", [MIXED, ("binary", "binary", "binary"), ("regression",)])
def test_values_and_gradients(kinds, rows, how, reduction):
    """NaN wherever nothing is to be read, in outputs and labels; one task has no label at all."""
    outputs, labels = data(kinds, rows)
    rng = np.random.default_rng(1)
    mask = rng.uniform(size=labels.shape) < 0.6
    mask[:, 0] = False
    weights = rng.uniform(0.2, 5, (rows,) if "row" in how else labels.shape)
    weights[:2] = 0
    combined, options = np.ones_like(labels), {}
    if "mask" in how:
        combined, options["mask"] = combined * mask, torch.from_numpy(mask)
    if "weights" in how:
        combined = combined * (weights[:, None] if weights.ndim == 1 else weights)
        options["weights"] = torch.from_numpy(weights)
    delta = [0.7 + t for t in range(len(kinds))]
    expected, slopes = oracle(kinds, outputs, labels, combined, reduction, delta)
    for t, out in enumerate(outputs):
        out[combined[:, t] == 0] = math.nan
    labels[combined == 0] = math.nan
    leaves = [torch.from_numpy(out).requires_grad_() for out in outputs]
    losses = TaskLosses(kinds, delta=delta, reduction=reduction)(leaves, torch.from_numpy(labels), **options)
    assert [loss.shape for loss in losses] == [()] * len(kinds)
    np.testing.assert_allclose([loss.item() for loss in losses], expected, rtol=1e-11, atol=1e-14)
    sum((t + 1) * loss for t, loss in enumerate(losses)).backward()
    for leaf, slope in zip(leaves, slopes, strict=True):
        np.testing.assert_allclose(leaf.grad.numpy(), slope, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kinds", [("binary",) * 3, ("binary", "regression", "watch_time")])
def test_one_tensor_and_columns_are_the_same(kinds):
    outputs, labels = data(kinds, 9)
    mask = torch.rand(9, 3) < 0.7
    stacked = torch.from_numpy(np.stack(outputs, 1)).requires_grad_()
    labels, names = torch.from_numpy(labels), ("a", "b", "c")
    losses, found = TaskLosses(kinds), []
    columns = stacked.unbind(1)
    for outs, given in (
        (stacked, labels),
        (columns, labels),
        ([c[:, None] for c in columns], labels.unbind(1)),
        (dict(zip(names, columns, strict=True)), labels),
        (dict(zip(names, columns, strict=True)), dict(reversed(list(zip(names, labels.unbind(1), strict=True))))),
    ):
        values = losses(outs, given, mask)
        found.append((torch.stack(values).detach(), torch.autograd.grad(sum(values), stacked, retain_graph=True)[0]))
    for value, grad in found[1:]:
        torch.testing.assert_close(value, found[0][0], rtol=1e-12, atol=0)
        torch.testing.assert_close(grad, found[0][1], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_outputs_are_widened(dtype):
    """The loss is that of the rounded outputs in float32."""
    outputs, labels = data(MIXED, 33)
    leaves = [torch.from_numpy(out).to(dtype).requires_grad_() for out in outputs]
    losses = TaskLosses(MIXED)(leaves, torch.from_numpy(labels).float())
    wide = [leaf.detach().double().numpy() for leaf in leaves]
    expected, _ = oracle(MIXED, wide, labels, np.ones_like(labels), "task_mean", [1.0] * 5)
    assert all(loss.dtype == torch.float32 for loss in losses)
    np.testing.assert_allclose([loss.item() for loss in losses], expected, rtol=2e-6)
    sum(losses).backward()
    assert all(leaf.grad.dtype == dtype for leaf in leaves)


def test_extreme_outputs_stay_finite():
    x = torch.tensor([-1e4, -200.0, 200.0, 1e4] * 2, requires_grad=True)
    y = torch.tensor([0.0] * 4 + [1.0] * 4)
    for kind in ("binary", "huber", "regression", "watch_time"):
        (loss,) = TaskLosses([kind])([x], y[:, None])
        (grad,) = torch.autograd.grad(loss, x)
        assert torch.isfinite(loss) and torch.isfinite(grad).all(), kind
    (loss,) = TaskLosses(["multiclass"])([torch.stack([x, -x], 1)], y[:, None])
    assert torch.isfinite(loss)


def test_the_odds_of_watch_time_are_the_papers():
    """A constant logit ends where exp(x) = sum of the times / number of rows that were not watched."""
    y = torch.tensor([0.0, 0, 0, 30, 0, 12, 0], dtype=torch.float64)
    x = torch.full((7,), math.log(42 / 5), dtype=torch.float64, requires_grad=True)
    watch_time(x, y).sum().backward()
    assert abs(float(x.grad.sum())) < 1e-12


def test_active():
    mask = torch.tensor([[True, False, False], [True, False, True]])
    assert TaskLosses.active(mask).tolist() == [True, False, True]
    assert TaskLosses.active(mask * 0.5).tolist() == [True, False, True]
    assert TaskLosses.active(None) is None


def test_row_weights_of_one_tensor():
    outputs, labels = data(("binary",) * 3, 9)
    stacked, labels, rows = torch.from_numpy(np.stack(outputs, 1)), torch.from_numpy(labels), torch.rand(9) + 0.1
    losses = TaskLosses(["binary"] * 3)
    found, wanted = (losses(stacked, labels, weights=w) for w in (rows, rows[:, None].expand(9, 3)))
    assert torch.equal(torch.stack(found), torch.stack(wanted)) and torch.stack(found).all()


def test_integer_labels_and_bool_ones():
    outputs, _ = data(("binary", "multiclass"), 6)
    labels = torch.tensor([[0, 3], [1, 0], [1, 1], [0, 2], [0, 3], [1, 1]])
    losses = TaskLosses(("binary", "multiclass"))
    whole = losses([torch.from_numpy(o) for o in outputs], labels)
    parts = losses([torch.from_numpy(o) for o in outputs], [labels[:, 0].bool(), labels[:, 1].to(torch.int32)])
    assert torch.equal(torch.stack(whole), torch.stack(parts))
    expected, _ = oracle(("binary", "multiclass"), outputs, labels.numpy(), np.ones((6, 2)), "task_mean", [1, 1])
    np.testing.assert_allclose(torch.stack(whole).numpy(), expected, rtol=1e-12)


def test_bad_arguments():
    for error, message, make in (
        (TypeError, "kinds must be a sequence of words", lambda: TaskLosses("binary")),
        (TypeError, "kinds must be a sequence of words", lambda: TaskLosses([])),
        (ValueError, rf"kinds\[1\] must be one of {', '.join(KINDS)}; got 'mse'", lambda: TaskLosses(["huber", "mse"])),
        (ValueError, "reduction must be one of task_mean", lambda: TaskLosses(["huber"], reduction="mean")),
        (ValueError, "delta must be positive and finite; got 0", lambda: TaskLosses(["huber"], delta=0)),
        (ValueError, "delta has 1 entries for 2", lambda: TaskLosses(["huber"] * 2, delta=[1.0])),
    ):
        with pytest.raises(error, match=message):
            make()
    two, x = TaskLosses(["regression", "multiclass"]), torch.zeros(4, 2)
    outs, classes = [x[:, 0], torch.zeros(4, 3)], torch.zeros(4, 2)
    for error, message, args, options in (
        (ValueError, r"outputs must be \[B,T\] with T = 2; got shape \(4, 3\)", (outs[1], x), {}),
        (ValueError, "outputs must be of 2 tasks; got 1", (outs[:1], x), {}),
        (ValueError, r"outputs\[1\], multiclass, must be \[B,n\].*got shape \(4,\)", (x, x), {}),
        (ValueError, r"outputs\[0\], regression, must be \[B\] or \[B,1\]; got shape \(4, 3\)", (outs[::-1], x), {}),
        (ValueError, r"labels of task 0 must be \[B\] with B = 4; got shape \(3,\)", (outs, x[:3]), {}),
        (ValueError, "labels must have the keys", ({"a": x, "b": x}, {"a": x, "c": x}), {}),
        (TypeError, "mask must be a bool tensor; got torch.float32", (outs, x), {"mask": x}),
        (ValueError, r"mask must be \[B,T\] with T = 2; got shape \(4, 3\)", (outs, x), {"mask": outs[1].bool()}),
        (TypeError, "weights must be a tensor; got list", (outs, x), {"weights": [1.0]}),
        (ValueError, r"weights must be \[B\] or \[B,T\]", (outs, x), {"weights": outs[1]}),
        (ValueError, r"weights must be .* and B = 4; got", (outs, x), {"mask": x.bool(), "weights": x[:3]}),
    ):
        with pytest.raises(error, match=message):
            two(*args, **options)
    assert len(two(outs, classes)) == 2
