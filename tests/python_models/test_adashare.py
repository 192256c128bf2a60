"""AdaShare against numpy: draws, policies, losses, and the network of one policy."""

import itertools

import numpy as np
import pytest
import torch

from python_models import AdaShare
from python_models.adashare import Curriculum
from python_models.serving import flops

CASES = {
    "widths change": dict(num_tasks=3, expert_dims=[[5], [4, 5], [4]]),
    "constant width": dict(num_tasks=2, expert_dims=[[6], [5, 6]]),
    "one task": dict(num_tasks=1, expert_dims=[[5], [5]]),
    "one block": dict(num_tasks=2, expert_dims=[[4]]),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
each_x = pytest.mark.parametrize("per_unit", [False, True], ids=["shared x", "per-unit x"])


def make(case, **options):
    torch.manual_seed(0)
    model = AdaShare(6, activation="tanh", dtype=torch.float64, **case, **options)
    with torch.no_grad():
        model.policy_logits.normal_()
    return model


def features(case, per_unit):
    return torch.randn((5, case["num_tasks"], 6) if per_unit else (5, 6), dtype=torch.float64)


def trunk(numeric, params, x, v, activation=np.tanh):
    """x' = v[0] F(x) + v[1] R(x), F(x) = act(R(x) + block(x)), task by task; v [T,L,2]."""
    outputs = []
    for t in range(len(v)):
        h = x if x.ndim == 2 else x[:, t]
        for i in range(v.shape[1]):
            projection = params.get(f"blocks.{i}.projection.weight")
            r = h if projection is None else h @ projection[0].T
            f = activation(r + numeric.expert(params, f"blocks.{i}.block", 0, h, activation, last=False))
            h = v[t, i, 0] * f + v[t, i, 1] * r
        outputs.append(h)
    return np.stack(outputs, 1)


def one_hot(policy):
    policy = np.asarray(policy, dtype=float)
    return np.stack((policy, 1 - policy), -1)


def drawn(logits, uniform, temperature, live):
    """Gumbel-softmax of the last `live` blocks; the others are executed."""
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    v = one_hot(np.ones(logits.shape[:2]))
    first = logits.shape[1] - live
    d = np.exp((np.log(p[:, first:]) - np.log(-np.log(uniform))) / temperature)
    v[:, first:] = d / d.sum(-1, keepdims=True)
    return v


def seeded(model, seed):
    def run(x):
        torch.manual_seed(seed)
        return model(x)

    return run


@every_case
@each_x
def test_soft_draws_equal_numpy(numeric, case, per_unit):
    model, x = make(case, temperature=0.8), features(case, per_unit)
    for live in range(1, len(case["expert_dims"]) + 1):
        model.live_blocks = live
        torch.manual_seed(7)
        uniform = torch.rand(case["num_tasks"], live, 2, dtype=torch.float64).numpy()

        def forward(params, x):
            v = drawn(params["policy_logits"], uniform, 0.8, live)  # noqa: B023
            return trunk(numeric, params, x, v)

        numeric.compare(model, forward, x, seeded(model, 7))


@each_x
def test_hard_draws(numeric, per_unit):
    case = CASES["widths change"]
    soft, hard, x = make(case), make(case, hard=True), features(case, per_unit)
    torch.manual_seed(7)
    uniform = torch.rand(3, 3, 2, dtype=torch.float64).numpy()
    params = numeric.arrays(hard)
    policy = drawn(params["policy_logits"], uniform, 5.0, 3).argmax(-1) == 0
    out = seeded(hard, 7)(x)
    np.testing.assert_allclose(out.detach(), trunk(numeric, params, x.numpy(), one_hot(policy)), rtol=0, atol=1e-13)
    out.sum().backward()
    assert hard.policy_logits.grad.any() and not torch.equal(out, seeded(soft, 7)(x))


@every_case
@each_x
def test_execute_all_is_the_plain_trunk(numeric, case, per_unit):
    model, x = make(case), features(case, per_unit)
    everything = one_hot(np.ones((case["num_tasks"], len(case["expert_dims"]))))
    model.live_blocks = 0
    numeric.compare(model, lambda params, x: trunk(numeric, params, x, everything), x)
    assert model.policy_logits.grad is None
    warm = model(x)
    model.live_blocks = len(case["expert_dims"])
    model.fix_policy(torch.ones(case["num_tasks"], len(case["expert_dims"]), dtype=torch.bool))
    torch.testing.assert_close(model(x), warm, rtol=0, atol=1e-14)


@each_x
def test_skip_all_is_the_projections(per_unit):
    case = CASES["widths change"]
    model, x = make(case), features(case, per_unit)
    model.fix_policy(torch.zeros(3, 3, dtype=torch.bool))
    r = x @ model.blocks[0].projection.weight[0].T @ model.blocks[2].projection.weight[0].T
    expected = r if per_unit else r[:, None].expand(-1, 3, -1)
    for network in (model, model.for_serving()):
        torch.testing.assert_close(network(x), expected, rtol=0, atol=1e-14)
    assert all(block.block is None for block in model.for_serving().blocks)


@every_case
@each_x
def test_every_policy(numeric, case, per_unit):
    """A fixed policy, the network of it, and numpy; x' and the weights' gradients too."""
    model, x = make(case), features(case, per_unit)
    tasks, blocks = case["num_tasks"], len(case["expert_dims"])
    policies = list(itertools.product([False, True], repeat=tasks * blocks))
    for flat in policies[:: max(1, len(policies) // 12)]:
        policy = np.reshape(flat, (tasks, blocks))
        model.fix_policy(policy.tolist())
        served, params = model.for_serving(), numeric.arrays(model)
        expected = trunk(numeric, params, x.numpy(), one_hot(policy))
        for network in (model, model.eval(), served):
            np.testing.assert_allclose(network(x).detach(), expected, rtol=0, atol=1e-13)
        used = {name for name, _ in served.named_parameters()}
        for i in range(blocks):
            assert any(name.startswith(f"blocks.{i}.block.") for name in used) == policy[:, i].any()
    numeric.compare(served, lambda params, x: trunk(numeric, params, x, one_hot(policy)), x)


def test_serving_costs_what_is_executed():
    model, x = AdaShare(6, 3, [[6], [6], [6]], norm="batch", dropout=0.5), torch.randn(9, 6)
    for _ in range(3):
        model(torch.randn(20, 6))  # running statistics
    policy = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 0]]).bool()
    model.fix_policy(policy)
    model.eval()
    served = model.for_serving()
    torch.testing.assert_close(served(x), model(x), rtol=0, atol=1e-6)
    found = [flops(network, x) for network in (model, served)]
    # Block 1 once for all, block 2 for task 1, block 3 for nobody; and one pass to hand the streams to the tasks.
    assert found[1] == 9 * (2 * 2 * 36 + 2 * 3 * 6)
    assert found[0] > 9 * 7 * 2 * 36
    assert served.blocks[2].block is None
    assert served.shared.tasks.rows == 3 and served.shared.tasks._built.num_experts == 2
    x = torch.randn(9, 3, 6)
    torch.testing.assert_close(served(x), model(x), rtol=0, atol=1e-6)


def test_serving_is_a_copy_with_its_own_blocks():
    model, x = (
        make(CASES["widths change"], expert=lambda k, dims: torch.nn.Linear(k, dims[-1]).double()),
        torch.ones(4, 6),
    )
    served, x = model.for_serving(), x.double()
    model.eval()
    torch.testing.assert_close(served(x), model(x), rtol=0, atol=1e-14)
    with torch.no_grad():
        expected = served(x)
        for p in model.parameters():
            p.zero_()
    assert torch.equal(served(x), expected)


def test_evaluation_takes_the_likelier():
    model, x = make(CASES["widths change"]), torch.randn(5, 6).double()
    policy = model.policy_logits[..., 0] >= model.policy_logits[..., 1]
    assert torch.equal(model.likeliest_policy(), policy) and policy.any() and not policy.all()
    model.eval()
    found = model(x)
    model.fix_policy(policy)
    assert torch.equal(model(x), found)
    torch.testing.assert_close(model.for_serving()(x), found, rtol=0, atol=1e-14)
    model.fix_policy(None)
    model.live_blocks = 1
    assert model.likeliest_policy()[:, :2].all() and torch.equal(model.likeliest_policy()[:, 2], policy[:, 2])
    torch.testing.assert_close(model(x), model.for_serving()(x), rtol=0, atol=1e-14)


def test_evaluation_may_draw():
    model, x = make(CASES["widths change"], sample_in_eval=True).eval(), torch.randn(5, 6).double()
    torch.manual_seed(3)
    policy = model.sample_policy()
    torch.manual_seed(3)
    found = model(x)
    model.fix_policy(policy)
    assert torch.equal(model(x), found)


def test_frequencies_of_sampled_policies():
    torch.manual_seed(0)
    model, n = AdaShare(6, 2, [[4]] * 3), 3000
    with torch.no_grad():
        model.policy_logits.normal_()
    model.live_blocks = 2
    p = model.policy_logits.softmax(-1)[..., 0].detach()
    found = torch.stack([model.sample_policy() for _ in range(n)]).float().mean(0)
    assert (found[:, 0] == 1).all()
    assert ((found - p).abs() < 4 * (p * (1 - p) / n).sqrt())[:, 1:].all()


@pytest.mark.parametrize("live", [0, 1, 4])
def test_losses(numeric, live):
    torch.manual_seed(0)
    model = AdaShare(6, 3, [[4]] * 4, dtype=torch.float64)
    with torch.no_grad():
        model.policy_logits.normal_()
    model.live_blocks = live
    logits = model.policy_logits.detach().numpy().copy()

    def alpha():
        return np.exp(logits[..., 0]) / np.exp(logits).sum(-1)

    def code():
        return sum(np.mean([-np.log(1 - a) for a in row[4 - live :]]) for row in alpha()) if live else 0.0

    def paper():
        return sum(np.log(a) for row in alpha() for a in row[4 - live :])

    def sharing():
        a, total = alpha(), 0.0
        for t, u in itertools.combinations(range(3), 2):
            total += sum((4 - i) / 4 * abs(a[t, i - 1] - a[u, i - 1]) for i in range(1, 5))
        return total

    cases = [
        (lambda: model.sparsity_loss(), code),
        (lambda: model.sparsity_loss("paper"), paper),
        (model.sharing_loss, sharing),
        (lambda: model.policy_loss(0.3, 0.7), lambda: 0.3 * code() + 0.7 * sharing()),
        (lambda: model.policy_loss(form="paper"), lambda: 0.05 * paper() + 0.05 * sharing()),
    ]
    for ours, theirs in cases:
        model.zero_grad()
        value = ours()
        value.backward()
        assert value.item() == pytest.approx(theirs(), abs=1e-12)
        np.testing.assert_allclose(model.policy_logits.grad, numeric.slopes(theirs, logits), rtol=0, atol=1e-8)


def test_losses_at_their_ends():
    model = AdaShare(6, 1, [[4]] * 2)
    assert model.sharing_loss().item() == 0
    assert model.sparsity_loss().item() == pytest.approx(np.log(2))
    with torch.no_grad():
        model.policy_logits[..., 0] = -200
    loss = model.sparsity_loss()
    loss.backward()
    assert loss.item() == 0 and model.policy_logits.grad.abs().max() < 1e-30


def test_start():
    model = AdaShare(6, 2, [[4]] * 3)
    assert model.temperature == 5.0 and model.live_blocks == 3 and not model.hard
    assert (model.policy_logits == 0.5).all() and model.likeliest_policy().all()
    split = {id(p) for p in model.search_parameters()}, {id(p) for p in model.network_parameters()}
    assert not split[0] & split[1] and split[0] | split[1] == {id(p) for p in model.parameters()}
    model(torch.randn(9, 6)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@every_case
def test_parameter_count(case):
    width, expected = 6, 2 * case["num_tasks"] * len(case["expert_dims"])
    for dims in case["expert_dims"]:
        chain = [width, *dims]
        expected += sum(k * n + n for k, n in zip(chain, dims, strict=False)) + (width != dims[-1]) * width * dims[-1]
        width = dims[-1]
    assert sum(p.numel() for p in make(case).parameters()) == expected


def test_curriculum():
    assert [Curriculum(4)(r) for r in range(14)] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 4, 4]
    assert [Curriculum(3, speed=1)(r) for r in range(5)] == [1, 2, 3, 3, 3]
    assert Curriculum(0)(3) == 0
    with pytest.raises(ValueError, match="speed must be at least 1; got 0"):
        Curriculum(3, 0)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: AdaShare(6, 0, [[4]]), ValueError, "num_tasks must be at least 1"),
        (lambda m: AdaShare(6, 2, [4]), ValueError, r"\[\[4\]\] for one level"),
        (lambda m: AdaShare(6, 2, [[4]], activation="elu"), ValueError, "activation must be .* got 'elu'"),
        (lambda m: AdaShare(6, 2, [[4]], temperature=0), ValueError, "temperature must be above 0"),
        (lambda m: AdaShare(6, 2, [[4]], gate_dims=[2]), ValueError, "gate_dims is for networks with gates"),
        (lambda m: setattr(m, "live_blocks", 3), ValueError, "live_blocks must be at most 2, .* got 3"),
        (lambda m: setattr(m, "live_blocks", -1), ValueError, "live_blocks must be at least 0"),
        (lambda m: m.fix_policy([[True, False]]), ValueError, r"policy must be \[T,L\] = \(2, 2\); got \(1, 2\)"),
        (lambda m: m.for_serving(torch.ones(2, 2)), TypeError, "policy must be bool.* got torch.float32"),
        (lambda m: m.sparsity_loss("mean"), ValueError, "form must be 'code' or 'paper'; got 'mean'"),
        (lambda m: m(torch.zeros(3, 3, 6)), ValueError, r"x must be \[B,6\] or \[B,2,6\]"),
        (lambda m: m.for_serving()(torch.zeros(3, 3, 6)), ValueError, r"x must be \[B,6\] or \[B,2,6\]"),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call(AdaShare(6, 2, [[4], [4]]))
