"""MRN against numpy: outputs, prior, closed-form update; and what a training loop does with it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy_layers import inputs, linear, mlp

from python_models import MRN, MultiTaskModel, SharedBottom, Towers
from python_models.mrn import FlipFlop
from python_models.tensor_normal import TensorNormal

ALL = ("task", "class", "feature")
SHAPES = [(2, 3, 4), (3, 1, 5), (1, 2, 3), (4, 2, 1)]


def weight_of(shape):
    torch.manual_seed(3)
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def covariances(prior, learn):
    """[D1,D2,D3] covariances (feature, class, task), the identity where nothing is learned."""
    sizes = dict(zip(ALL, prior.shape, strict=True))
    return [
        prior.covariance(mode).numpy() if mode in learn else np.eye(sizes[mode])
        for mode in ("feature", "class", "task")
    ]


def spread(prior):
    """Covariances far from the identity."""
    for mode in prior.learn:
        factor = getattr(prior, f"{mode}_factor")
        factor.copy_(torch.randn_like(factor).tril(-1) + torch.rand_like(factor).add(0.5).diag().diag())


def numpy_prior(weight, sigmas):
    """R(W) with the Kronecker product written out; weight [T,N,K] as stored."""
    tensor = weight.transpose(2, 1, 0)
    kron = np.kron(np.kron(sigmas[0], sigmas[1]), sigmas[2])
    vec = tensor.reshape(-1)
    total = vec @ np.linalg.solve(kron, vec)
    for k, sigma in enumerate(sigmas):
        total += tensor.size / tensor.shape[k] * np.linalg.slogdet(sigma)[1]
    return np.asarray(total / 2)


@pytest.mark.parametrize("learn", [("task",), ALL, ("feature", "task")], ids="-".join)
@pytest.mark.parametrize("shape", SHAPES)
def test_prior_equals_numpy(plain, shape, learn):
    weight, prior = weight_of(shape), TensorNormal(shape, learn, dtype=torch.float64)
    assert prior(weight).item() == pytest.approx(weight.square().sum().item() / 2, rel=1e-14)
    spread(prior)
    sigmas = covariances(prior, learn)
    plain.numpy(prior(weight), {"weight": weight}, lambda a: numpy_prior(a["weight"], sigmas))


def numpy_update(weight, sigmas, learn, eps):
    """The flip-flop of each mode in turn: feature, class, task."""
    tensor, sigmas = weight.transpose(2, 1, 0), list(sigmas)
    for k, mode in enumerate(("feature", "class", "task")):
        if mode not in learn:
            continue
        unfolded = np.moveaxis(tensor, k, 0).reshape(tensor.shape[k], -1)
        a, b = (sigmas[j] for j in range(3) if j != k)
        found = tensor.shape[k] / tensor.size * unfolded @ np.linalg.inv(np.kron(a, b)) @ unfolded.T
        found = found + eps * np.eye(len(found))
        sigmas[k] = found if mode == "task" else found * len(found) / np.trace(found)
    return sigmas


@pytest.mark.parametrize("learn", [("task",), ALL, ("class", "task")], ids="-".join)
@pytest.mark.parametrize("shape", SHAPES)
def test_update_equals_numpy(shape, learn):
    weight, prior = weight_of(shape), TensorNormal(shape, learn, eps=1e-3, dtype=torch.float64)
    spread(prior)
    for _ in range(2):
        expected = numpy_update(weight.detach().numpy(), covariances(prior, learn), learn, 1e-3)
        prior.update(weight)
        for found, sigma in zip(covariances(prior, learn), expected, strict=True):
            np.testing.assert_allclose(found, sigma, rtol=1e-9, atol=1e-11)


def test_updates_go_down_to_where_the_prior_is_stationary():
    weight, prior = weight_of((3, 4, 5)), TensorNormal((3, 4, 5), ALL, eps=1e-12, dtype=torch.float64)
    values = [prior(weight).item()]
    for _ in range(60):
        prior.update(weight)
        values.append(prior(weight).item())
    assert all(b <= a + 1e-9 for a, b in zip(values[1:], values[2:], strict=False)) and values[-1] < values[0] - 1
    still = [prior.covariance(mode) for mode in ALL]
    prior.update(weight)
    for mode, before in zip(ALL, still, strict=True):
        torch.testing.assert_close(prior.covariance(mode), before, rtol=1e-4, atol=1e-6)
    # No other task covariance nearby has a lower value.
    for _ in range(5):
        other = TensorNormal((3, 4, 5), ALL, dtype=torch.float64)
        other.load_state_dict(prior.state_dict())
        other.task_factor.add_(0.05 * torch.randn(3, 3).tril())
        assert other(weight) > prior(weight)


def test_a_binary_head_has_class_covariance_one():
    weight, prior = weight_of((3, 1, 5)), TensorNormal((3, 1, 5), ALL)
    prior.update(weight.float())
    assert prior.covariance("class").item() == pytest.approx(1, rel=1e-6)
    assert prior.covariance("feature").trace().item() == pytest.approx(5, rel=1e-5)


CASES = {
    "linear heads": dict(num_tasks=3, dims=[5, 4]),
    "hidden heads": dict(num_tasks=2, dims=[4], head_dims=[3], out_features=2, learn=ALL),
    "different outputs": dict(num_tasks=2, dims=[4], head_dims=[3], out_features=[1, 3], activation="tanh"),
    "one task": dict(num_tasks=1, dims=[4], learn=ALL),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@pytest.mark.parametrize("per_unit", [False, True], ids=["shared x", "per-unit x"])
@every_case
def test_equals_numpy(plain, case, per_unit):
    torch.manual_seed(3)
    model, tasks, act = MRN(6, dtype=torch.float64, **case), case["num_tasks"], case.get("activation", "relu")
    x = torch.randn((7, tasks + 1, 6) if per_unit else (7, 6), dtype=torch.float64)
    outputs = case.get("out_features", 1)
    outputs = [outputs] * tasks if isinstance(outputs, int) else outputs

    def oracle(a):
        h, found, row = mlp(a, "bottom.bottom", 0, a["x"] if a["x"].ndim == 2 else a["x"][:, -1], act), [], 0
        for t in range(tasks):
            g = mlp(a, "towers.hidden", t, h, act) if case.get("head_dims") else h
            if len(set(outputs)) == 1:
                found.append(linear(a, "towers.last", t, g))
            else:
                found += [linear(a, "towers.last", row + i, g) for i in range(outputs[t])]
                row += outputs[t]
        return np.concatenate(found, 1)

    def flat(out):
        return torch.cat(list(out.values()), 1) if isinstance(out, dict) else out

    tensors = inputs(model, x)
    plain.numpy(flat(model(x)), tensors, oracle)
    assert isinstance(model(x), dict) == (outputs != [1] * tasks)


@every_case
def test_penalty_is_the_sum_over_the_stacked_layers(case):
    torch.manual_seed(3)
    model = MRN(6, dtype=torch.float64, eps=1e-3, **case)
    weights = [] if model.towers.hidden is None else [layer.weight for layer in model.towers.hidden.linears]
    if case.get("out_features") != [1, 3]:
        weights.append(model.towers.last.weight)
    assert len(weights) == len(model.priors)
    learn = case.get("learn", ("task",))
    for _ in range(2):
        model.update_covariances()
    expected = sum(
        numpy_prior(weight.detach().numpy(), covariances(prior, learn))
        for prior, weight in zip(model.priors, weights, strict=True)
    )
    assert model.penalty().item() == pytest.approx(float(expected), rel=1e-10)
    model.penalty().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in weights)
    assert not any(buffer.requires_grad for buffer in model.buffers())


@every_case
def test_parameter_count(case):
    tasks, outputs = case["num_tasks"], case.get("out_features", 1)
    outputs = [outputs] * tasks if isinstance(outputs, int) else outputs
    bottom, head = [6, *case["dims"]], [case["dims"][-1], *case.get("head_dims", ())]
    expected = sum(k * n + n for k, n in zip(bottom, bottom[1:], strict=False))
    expected += tasks * sum(k * n + n for k, n in zip(head, head[1:], strict=False))
    expected += sum((head[-1] + 1) * n for n in outputs)
    assert sum(p.numel() for p in MRN(6, **case).parameters()) == expected


def test_is_shared_bottom_with_towers():
    mrn = MRN(6, 2, [5, 4], [3])
    plain_model = MultiTaskModel(SharedBottom(6, 2, [5, 4]), Towers(4, 2, [3]))
    plain_model.fusion.load_state_dict(mrn.bottom.state_dict())
    plain_model.towers.load_state_dict(mrn.towers.state_dict())
    x = torch.randn(7, 6)
    assert torch.equal(mrn(x), plain_model(x))


def test_task_correlation():
    model = MRN(6, 3, [4])
    torch.testing.assert_close(model.task_correlation(), torch.eye(3)[None])
    with torch.no_grad():
        weight = model.towers.last.weight
        weight[1], weight[2] = weight[0], -2 * weight[0]
    model.update_covariances()
    expected = torch.tensor([[1.0, 1, -1], [1, 1, -1], [-1, -1, 1]])
    torch.testing.assert_close(model.task_correlation(), expected[None], rtol=0, atol=1e-3)
    sigma = model.priors[0].covariance("task")
    torch.testing.assert_close(sigma, 1 / 4 * torch.einsum("ink,jnk->ij", weight, weight) + 1e-5 * torch.eye(3))


def test_training_loop_learns_which_tasks_are_alike():
    torch.manual_seed(0)
    x, w = torch.randn(256, 6), torch.randn(6)
    labels = torch.stack([x @ w, x @ w, -(x @ w), x @ torch.randn(6)], 1).sign().clamp(min=0)
    model = MRN(6, 4, [8])
    optimizer, update = torch.optim.Adam(model.parameters(), 0.02), FlipFlop(model, every=10)
    optimizer.register_step_post_hook(update)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(F.binary_cross_entropy_with_logits(model(x), labels))
        (losses[-1] + 1e-3 * model.penalty()).backward()
        optimizer.step()
    assert update.steps == 60 and losses[-1] < 0.5 * losses[0]
    found = model.task_correlation()[0]
    assert found[0, 1] > 0.9 and found[0, 2] < -0.9 and abs(found[0, 3]) < 0.8


def test_flip_flop_counts():
    class Network:
        updates = 0

        def update_covariances(self):
            self.updates += 1

    network = Network()
    update, found = FlipFlop(network, every=3), []
    for _ in range(7):
        update()
        found.append(network.updates)
    assert found == [0, 0, 1, 1, 1, 2, 2] and FlipFlop(network).every == 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype):
    torch.manual_seed(0)
    exact = MRN(6, 3, [5], [4], learn=ALL, eps=1e-3, dtype=torch.float64)
    model = MRN(6, 3, [5], [4], learn=ALL, eps=1e-3, dtype=dtype)
    model.load_state_dict(exact.state_dict())
    for network in (exact, model):
        network.update_covariances()
    assert model.penalty().dtype == torch.float32 and model.task_correlation().dtype == torch.float32
    rough = 1e-4 if dtype == torch.float32 else 0.05
    assert model.penalty().item() == pytest.approx(exact.penalty().item(), rel=rough)
    before = model.penalty()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.penalty(), before)


def test_copies_and_compiles(plain):
    def make():
        return MRN(6, 3, [5], [4], learn=ALL)

    model, x = make(), torch.randn(7, 6)
    model.update_covariances()
    for twin in plain.copies(model, make):
        assert torch.equal(twin(x), model(x)) and torch.equal(twin.penalty(), model.penalty())
    plain.compiles(model, (x,), (torch.randn(5, 6),), (torch.randn(12, 6),))
    found = torch.compile(model.penalty, fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(found, model.penalty())
    expected = model.penalty()
    expected.backward()
    assert all(p.grad is None for p in model.bottom.parameters())


def test_starts_on_the_meta_device():
    with torch.device("meta"):
        model = MRN(6, 3, [5], [4], learn=ALL)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    torch.testing.assert_close(model.task_correlation(), torch.eye(3).expand(2, 3, 3))
    assert model(torch.randn(7, 6)).isfinite().all() and model.penalty() > 0


def test_a_factor_that_is_not_learned_is_one():
    prior = MRN(6, 2, [5], learn=("task",), dtype=torch.bfloat16).priors[0]
    found = prior.covariance("feature")
    assert torch.equal(found, torch.eye(prior.shape[2])) and found.dtype == torch.float32


def test_empty():
    model = MRN(6, 2, [0])
    model.update_covariances()
    assert model(torch.randn(4, 6)).shape == (4, 2) and model.penalty() == 0
    model = MRN(6, 2, [3])
    out = model(torch.zeros(0, 6))
    out.sum().backward()
    assert out.shape == (0, 2) and all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: MRN(6, 2, [5], out_features=[1, 2]), ValueError, r"out_features=\[1, 2\] differ, .* head_dims must"),
        (lambda: MRN(6, 2, [5], learn=("class",)), ValueError, r"learn must hold 'task', .* got \('class',\)"),
        (lambda: MRN(6, 2, [5], learn="task"), ValueError, "learn must hold 'task', .* got 'task'"),
        (lambda: MRN(6, 2, [5], learn=("task", "row")), ValueError, "learn must hold 'task', and may hold"),
        (lambda: MRN(6, 2, [5], eps=0), ValueError, "eps must be a positive number; got 0"),
        (lambda: MRN(6, 0, [5]), ValueError, "num_tasks must be at least 1; got 0"),
        (lambda: MRN(6, 2, [5], colour=1), TypeError, "unexpected keyword argument 'colour'"),
        (lambda: MRN(6, 2, [5]).priors[0].covariance("row"), ValueError, "mode must be one of task, class, feature"),
        (lambda: FlipFlop(SharedBottom(6, 2, [5])), TypeError, r"network must have update_covariances\(\); got Shared"),
        (lambda: FlipFlop(MRN(6, 2, [5]), every=0), ValueError, "every must be at least 1; got 0"),
        (lambda: MRN(6, 2, [5])(torch.zeros(4, 2, 6)), ValueError, r"or \[B,3,6\] .* got \(4, 2, 6\)"),
    ],
)
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make()
