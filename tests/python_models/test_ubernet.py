"""UberNet against numpy, and what it is at one depth."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mtlkernels as mtl
from python_models import SharedBottom, Towers, UberNet
from python_models.ubernet import deeply_supervised

CASES = {
    "binary": dict(num_tasks=3, dims=[5, 4]),
    "views": dict(num_tasks=2, dims=[5, 4], views=3, skip_features=2),
    "unequal outputs": dict(num_tasks=2, dims=[5, 4], out_features=[1, 3], skip_features=2, views=2),
    "unequal scores": dict(num_tasks=3, dims=[5, 4], out_features=[1, 3, 2], views=2),
    "unequal scores, equal outputs": dict(num_tasks=2, dims=[5], out_features=2, skip_features=[3, 1]),
    "one task": dict(num_tasks=1, dims=[5]),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
EPS = 1e-5


def per_task(case, name, default):
    value = case.get(name) or default
    return [value] * case["num_tasks"] if isinstance(value, int) else list(value)


def sizes(case):
    outputs = per_task(case, "out_features", 1)
    return per_task(case, "skip_features", outputs), outputs


def make(case, **options):
    torch.manual_seed(0)
    model = UberNet(6, activation="tanh", dtype=torch.float64, **case, **options)
    with torch.no_grad():
        for p in model.fusion.parameters():
            p.add_(torch.randn_like(p))
    return model


def features(case, rows=6):
    views = case.get("views", 1)
    return torch.randn((rows, views, 6) if views > 1 else (rows, 6), dtype=torch.float64)


def normalised(h, norm, running=None):
    """[V,B,n], all views together for the batch norm."""
    if norm == "batch":
        mean, var = (h.mean((0, 1)), h.var((0, 1))) if running is None else running
    else:
        mean, var = h.mean(-1, keepdims=True), h.var(-1, keepdims=True)
    return (h - mean) / np.sqrt(var + EPS) if norm else h


def forward_of(numeric, case, norm, running=None):
    """Task by task: s = norm(h) U + c of each depth and view, o = [s; ...] Q + q. All tasks' outputs in a row."""
    scores, outputs = sizes(case)

    def forward(params, x):
        h = x[None] if x.ndim == 2 else x.transpose(1, 0, 2)
        states = []
        for i in range(len(case["dims"])):
            h = np.stack([numeric.expert(params, f"trunk.{i}", 0, view) for view in h])
            states.append(normalised(h, norm, None if running is None else running[i]))
        found, c, q, o = [], 0, 0, 0
        for own, width in zip(scores, outputs, strict=True):
            parts = []
            for i, state in enumerate(states):
                weight, bias = params[f"skips.{i}.weight"][0, c : c + own], params[f"skips.{i}.bias"][0, c : c + own]
                parts += [view @ weight.T + bias for view in state]
            s = np.concatenate(parts, 1)
            weight = params["fusion.weight"].reshape(-1)[q : q + width * s.shape[1]].reshape(width, -1)
            found.append(s @ weight.T + params["fusion.bias"][o : o + width])
            c, q, o = c + own, q + weight.size, o + width
        return np.concatenate(found, 1)

    return forward


def in_a_row(outputs):
    return outputs if isinstance(outputs, torch.Tensor) else torch.cat(list(outputs.values()), 1)


@every_case
@pytest.mark.parametrize("norm", ["batch", "layer", None])
def test_equals_numpy(numeric, case, norm):
    model = make(case, skip_norm=norm)
    numeric.compare(model, forward_of(numeric, case, norm), features(case), lambda x: in_a_row(model(x)))


def test_evaluation_uses_running_statistics(numeric):
    case = CASES["views"]
    model = make(case)
    mean, var = np.zeros(5), np.ones(5)
    for _ in range(3):
        x = features(case)
        model(x)
        h = numeric.expert(numeric.arrays(model), "trunk.0", 0, x.numpy().reshape(-1, 6))
        mean, var = 0.9 * mean + 0.1 * h.mean(0), 0.9 * var + 0.1 * h.var(0, ddof=1)
    running = [(norm.running_mean.numpy(), norm.running_var.numpy()) for norm in model.norms]
    np.testing.assert_allclose(running[0], (mean, var), rtol=0, atol=1e-14)
    numeric.compare(model.eval(), forward_of(numeric, case, "batch", running), features(case))


@every_case
def test_parameter_count(case):
    scores, outputs = sizes(case)
    slots, chain = len(case["dims"]) * case.get("views", 1), [6, *case["dims"]]
    expected = sum(k * n + n for k, n in zip(chain, case["dims"], strict=False))
    expected += sum((n + 1) * c for n in case["dims"] for c in scores)
    expected += sum(slots * c * o + o for c, o in zip(scores, outputs, strict=True))
    model = make(case)
    assert sum(p.numel() for p in model.parameters()) == expected
    in_a_row(model(features(case))).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_outputs_are_those_of_towers():
    x = torch.randn(4, 6)
    assert UberNet(6, 3, [5])(x).shape == (4, 3)
    found = UberNet(6, 2, [5], [1, 3], ["ctr", "category"])(x)
    assert {name: tuple(y.shape) for name, y in found.items()} == {"ctr": (4, 1), "category": (4, 3)}
    assert list(UberNet(6, 2, [5], 2)(x)) == ["task0", "task1"]


@pytest.mark.parametrize("name", ["binary", "views", "unequal scores"])
def test_starts_with_the_mean_of_the_scores(name):
    case = {**CASES[name], "skip_features": None}
    model = UberNet(6, dtype=torch.float64, **case)
    outputs, scores = model(features(case), with_scores=True)
    assert len(scores) == len(case["dims"]) * case.get("views", 1)
    mean = torch.stack([in_a_row(s) for s in scores]).mean(0)
    torch.testing.assert_close(in_a_row(outputs), mean, rtol=0, atol=1e-14)


def test_starts_as_linear_layers_elsewhere():
    fusion = UberNet(6, 2, [5] * 4, [1, 2], skip_features=[100, 2]).fusion
    (wide, _), (mean, bias) = ([p.view(-1)[a:b] for p, a, b in own] for own in fusion.parameter_sets())
    assert 0.9 * 400**-0.5 < wide.abs().max() <= 400**-0.5
    assert mean.view(2, 4, 2).tolist() == [[[0.25, 0]] * 4, [[0, 0.25]] * 4] and not bias.any()


def test_one_depth_is_a_shared_bottom_with_linear_towers():
    torch.manual_seed(0)
    net = UberNet(6, 3, [5], skip_norm=None, dtype=torch.float64)
    bottom, towers = SharedBottom(6, 3, [5], dtype=torch.float64), Towers(5, 3, dtype=torch.float64)
    bottom.bottom.load_state_dict(net.trunk[0].state_dict())
    with torch.no_grad():
        towers.last.weight.copy_(net.skips[0].weight.view(3, 1, 5))
        towers.last.bias.copy_(net.skips[0].bias.view(3, 1))
    x = torch.randn(7, 6, dtype=torch.float64)
    torch.testing.assert_close(net(x), towers(bottom(x)), rtol=0, atol=1e-14)


@every_case
def test_task_without_labels_has_zero_gradient(case):
    model, x = make(case), features(case)
    outputs = model(x)
    flat = in_a_row(outputs)
    last = flat if isinstance(outputs, torch.Tensor) else list(outputs.values())[-1]
    last = last[:, -1:] if isinstance(outputs, torch.Tensor) else last
    mask = torch.ones_like(flat, dtype=torch.bool)
    mask[:, -last.shape[1] :] = False
    mtl.masked_bce(flat, torch.rand_like(flat), mask).sum().backward()
    shared, tasks = model.parameter_sets()
    for t, own in enumerate(tasks):
        grads = [p.grad.view(-1)[a:b] for p, a, b in own]
        assert all(g.any() for g in grads) == any(g.any() for g in grads) == (t < len(tasks) - 1)
    assert all(p.grad.any() for p in shared) == (len(tasks) > 1)


@every_case
def test_parameter_sets_cover_everything_once(case):
    model = make(case)
    shared, tasks = model.parameter_sets()
    seen = {id(p): torch.zeros(p.numel()) for p in model.parameters()}
    for p in shared:
        seen[id(p)] += 1
    for p, begin, end in (entry for own in tasks for entry in own):
        seen[id(p)][begin:end] += 1
    assert all((times == 1).all() for times in seen.values())


def test_deep_supervision():
    model, x, labels = make(CASES["binary"]), features(CASES["binary"]), torch.rand(6, 3, dtype=torch.float64)

    def loss(outputs):
        return F.binary_cross_entropy_with_logits(outputs, labels)

    outputs, scores = model(x, with_scores=True)
    assert deeply_supervised(loss, outputs, scores) == loss(outputs)
    expected = loss(outputs) + 0.3 * (loss(scores[0]) + loss(scores[1]))
    torch.testing.assert_close(deeply_supervised(loss, outputs, scores, 0.3), expected)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: UberNet(6, 0, [5]), ValueError, "num_tasks must be at least 1"),
        (lambda: UberNet(6, 2, []), ValueError, "dims must name at least one layer"),
        (lambda: UberNet(6, 2, [5], skip_norm="group"), ValueError, "skip_norm must be .* got 'group'"),
        (lambda: UberNet(6, 2, [5], views=0), ValueError, "views must be at least 1"),
        (lambda: UberNet(6, 2, [5], [1, 2, 3]), ValueError, "out_features has 3 entries for num_tasks=2"),
        (lambda: UberNet(6, 2, [5], skip_features=[1]), ValueError, "skip_features has 1 entries for num_tasks=2"),
        (lambda: UberNet(6, 2, [5], skip_features=0), ValueError, r"skip_features\[0\] must be at least 1"),
        (lambda: UberNet(6, 2, [5], 1, ["a", "a"]), ValueError, "task_names must be 2 different strings"),
        (lambda: UberNet(6, 2, [5], activation="elu"), ValueError, "activation .* got 'elu'"),
        (lambda: UberNet(6, 2, [5])(torch.zeros(3, 5)), ValueError, r"x must be \[B,6\]"),
        (lambda: UberNet(6, 2, [5], views=2)(torch.zeros(3, 6)), ValueError, r"x must be \[B,2,6\] .* got \(3, 6\)"),
        (lambda: UberNet(6, 2, [5], views=2)([1]), ValueError, r"x must be \[B,2,6\] .* got list"),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()
