"""The parts of the bench that need no clock: order, quantiles, noise, and that every rival is the network it rivals."""

import pytest
import torch

from bench import contest
from bench.rivals import gradient, value
from bench.timing import (
    AGAIN,
    NOISE_LIMIT,
    Timing,
    control_difference,
    interleaved,
    is_noisy,
    per_call,
    quantile,
    summarise,
    turn_order,
)

EAGER = {
    "AdaTT": ("ours", "slices", "unbind", "batched"),
    "MMoE": ("ours", "unbind", "batched"),
}


def small(network, experts_per_task, **changes):
    sizes = {"tasks": 3, "batch": 7, "in_features": 6, "dims": (5, 4), "dtype": "float64"}
    return contest.Task(network, experts_per_task=experts_per_task, **{**sizes, **changes})


@pytest.mark.parametrize(
    "samples, q, expected",
    [([3.0], 0.2, 3.0), ([4.0, 1.0], 0.5, 2.5), ([5.0, 1.0, 3.0], 0.5, 3.0), ([0.0, 10.0], 0.2, 2.0), ([1, 2], 1.0, 2)],
)
def test_quantile_interpolates(samples, q, expected):
    assert quantile(samples, q) == pytest.approx(expected)


def test_quantile_refuses_nothing_and_nonsense():
    with pytest.raises(ValueError, match="samples"):
        quantile([], 0.5)
    with pytest.raises(ValueError, match="q: got 2"):
        quantile([1.0], 2)


def test_summary_orders_its_quantiles():
    timing = summarise([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (timing.q20, timing.median, timing.q80) == pytest.approx((1.8, 3.0, 4.2))
    assert timing.as_ms() == pytest.approx({"median": 3000.0, "q20": 1800.0, "q80": 4200.0, "samples": 5})


def test_every_other_round_runs_backwards():
    assert [turn_order("abc", turn) for turn in range(3)] == [list("abc"), list("cba"), list("abc")]


def test_interleaved_runs_the_variants_in_turn():
    ran = []
    variants = {name: lambda name=name: ran.append(name) for name in "ab"}
    times = interleaved(variants, seconds=0.0, warmup_seconds=0.0, min_rounds=2, control="a")
    assert ran == ["a", "b"] + ["a", "b", "a"] + ["a", "b", "a"]  # warm-up, a round, the same backwards
    assert set(times) == {"a", "b", "a" + AGAIN}
    assert all(timing.samples == 2 and timing.q20 <= timing.median <= timing.q80 for timing in times.values())


def test_interleaved_names_what_does_not_fit():
    with pytest.raises(ValueError, match="variants"):
        interleaved({}, seconds=0.0)
    with pytest.raises(ValueError, match="control: got 'c'"):
        interleaved({"a": lambda: None}, seconds=0.0, control="c")


@pytest.mark.parametrize("second, noisy", [(1.0 + 0.9 * NOISE_LIMIT, False), (1.0 + 1.1 * NOISE_LIMIT, True)])
def test_the_control_tells_noise(second, noisy):
    times = {"a": Timing(1.0, 1.0, 1.0, 1), "a" + AGAIN: Timing(second, second, second, 1)}
    difference = control_difference(times, "a")
    assert difference == pytest.approx(second - 1.0)
    assert is_noisy(difference) is noisy


def test_per_call_counts_calls():
    ran = []
    assert per_call(lambda: ran.append(0), seconds=0.0, calls=3, blocks=2) > 0
    assert len(ran) == 2 * 3 + 2 * 5 * 3  # a warm-up of two loops, then five loops a block


@pytest.mark.parametrize("experts_per_task", [1, 2])
@pytest.mark.parametrize("network", ["AdaTT", "MMoE"])
def test_rivals_are_the_same_network(network, experts_per_task):
    task = small(network, experts_per_task)
    contestants = contest.build_all(task, EAGER[network])
    checks, _ = contest.check_all(task, contestants)
    assert set(checks) == set(EAGER[network])
    assert all(check.ok for check in checks.values()), checks


@pytest.mark.parametrize("variant", EAGER["AdaTT"])
@pytest.mark.parametrize("experts_per_task", [1, 2])
def test_weights_survive_the_copy(variant, experts_per_task):
    task = small("AdaTT", experts_per_task)
    contestants = contest.build_all(task, ("ours", variant))
    (ours,), (theirs,) = (contestants[name].levels(value) for name in ("ours", variant))
    expected, found = ours.named(""), theirs.named("")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert ("native" in found) is (experts_per_task > 1)


@pytest.mark.parametrize("name", ["gate_bias", "native", "weight.1"])
def test_the_check_catches_another_network(name):
    task = small("AdaTT", 2)
    contestants = contest.build_all(task, ("ours", "unbind"))
    network = contestants["unbind"].network
    wrong = {
        "gate_bias": network.gates[0][0].bias,
        "native": network.native[0],
        "weight.1": network.experts[0][3][2].weight,
    }[name]
    with torch.no_grad():
        wrong.mul_(1.01)
    checks, _ = contest.check_all(task, contestants)
    assert checks["ours"].ok and not checks["unbind"].ok


def test_a_missing_gradient_is_an_error():
    with pytest.raises(RuntimeError, match="no gradient"):
        gradient(torch.nn.Parameter(torch.zeros(2)))


def test_a_nan_is_no_small_error():
    nan = torch.tensor([float("nan")])
    assert contest.relative_error(nan, torch.ones(1)) == float("inf")
    assert contest.relative_error(torch.zeros(1), nan) == float("inf")


def test_flops_of_the_products():
    task = contest.Task("AdaTT", tasks=2, experts_per_task=3, batch=10, in_features=4, dims=(5, 7))
    experts, gates = 6 * (4 * 5 + 5 * 7), 2 * 6 * 4
    assert task.gemm_flops() == 3 * 2 * 10 * (experts + gates)
