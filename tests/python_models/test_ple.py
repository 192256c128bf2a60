"""CGC and PLE against plain torch and numpy, and as the other networks they contain."""

import pytest
import torch
from numpy_layers import moved

from python_models import CGC, PLE, MMoE

CASES = {
    "one level": dict(num_tasks=3, task_experts=2, shared_experts=2, expert_dims=[[5, 4]]),
    "levels": dict(num_tasks=2, task_experts=2, shared_experts=1, expert_dims=[[5], [7, 4], [3]]),
    "unequal tasks": dict(num_tasks=3, task_experts=[1, 0, 3], shared_experts=2, expert_dims=[[5], [4]]),
    "unequal levels": dict(
        num_tasks=2, task_experts=[[1, 2], [3, 0]], shared_experts=[1, 2], expert_dims=[[5], [4]], gate_dims=[6]
    ),
    "shared first": dict(num_tasks=2, task_experts=1, shared_experts=[2, 0], expert_dims=[[5], [4]]),
    "shared last": dict(num_tasks=2, task_experts=1, shared_experts=[0, 2], expert_dims=[[5], [4]]),
    "none shared": dict(num_tasks=2, task_experts=2, shared_experts=0, expert_dims=[[5], [4]]),
    "all shared": dict(num_tasks=2, task_experts=0, shared_experts=3, expert_dims=[[5], [4]], gate_bias=False),
    "one task": dict(num_tasks=1, task_experts=1, shared_experts=2, expert_dims=[[5], [4]]),
}


def sizes(case):
    """Own counts a level and task, shared counts a level."""
    levels, tasks = len(case["expert_dims"]), case["num_tasks"]
    own, shared = case["task_experts"], case["shared_experts"]
    own = [own] * tasks if isinstance(own, int) else own
    own = [own] * levels if isinstance(own[0], int) else own
    return own, [shared] * levels if isinstance(shared, int) else shared


def plain_ple(plain, case):
    own, shared = sizes(case)
    tasks, levels = case["num_tasks"], len(own)

    def forward(params, x):
        units = [x if x.ndim == 2 else x[:, u] for u in range(tasks + 1) if x.ndim == 2 or u < x.shape[1]]
        for i in range(levels):
            counts = own[i] + [shared[i]]
            reads = [units[u] for u, n in enumerate(counts) for _ in range(n)]
            flat = plain.experts(params, f"levels.{i}.experts", reads)
            of = [flat[sum(counts[:u]) : sum(counts[: u + 1])] for u in range(tasks + 1)]
            sources = [of[t] + of[tasks] for t in range(tasks)]
            if any(shared[i + 1 :]):
                sources.append(flat)
            routes = [len(source) for source in sources]
            gates = plain.gates(params, f"levels.{i}.gates", units[: len(routes)], routes)
            units = [plain.mix(gate, source) for gate, source in zip(gates, sources, strict=True)]
        return plain.stack(units)

    return forward


@pytest.mark.parametrize("per_unit", [False, True], ids=["shared x", "per-unit x"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_plain(plain, precision, case, per_unit):
    dtype, tolerance = precision
    model = PLE(6, dtype=dtype, **case)
    units = case["num_tasks"] + any(sizes(case)[1])
    x = torch.randn((7, units, 6) if per_unit else (7, 6), dtype=dtype)
    plain.compare(model, plain_ple(plain, case), x, tolerance)


@pytest.mark.parametrize("per_unit", [False, True], ids=["shared x", "per-unit x"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_numpy(numeric, case, per_unit):
    torch.manual_seed(5)
    model = moved(PLE(6, dtype=torch.float64, activation="tanh", **case))
    units = case["num_tasks"] + any(sizes(case)[1])
    x = torch.randn((4, units, 6) if per_unit else (4, 6), dtype=torch.float64)
    numeric.compare(model, plain_ple(numeric, case), x)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_parameter_count(case):
    own, shared = sizes(case)
    width, bias, expected = 6, case.get("gate_bias", True), 0
    for i, dims in enumerate(case["expert_dims"]):
        chain = [width, *dims]
        expected += (sum(own[i]) + shared[i]) * sum(k * n + n for k, n in zip(chain, dims, strict=False))
        routes = [n + shared[i] for n in own[i]] + ([sum(own[i]) + shared[i]] if any(shared[i + 1 :]) else [])
        for n in routes:
            gate = [width, *case.get("gate_dims", ())]
            expected += sum(k * m + m for k, m in zip(gate, gate[1:], strict=False)) + (gate[-1] + bias) * n
        width = dims[-1]
    assert sum(p.numel() for p in PLE(6, **case).parameters()) == expected


def test_cgc_is_ple_with_one_level():
    torch.manual_seed(0)
    cgc, ple = CGC(6, 2, [1, 2], 2, [5, 4]), PLE(6, 2, [1, 2], 2, [[5, 4]])
    cgc.load_state_dict(ple.state_dict())
    x = torch.randn(7, 6)
    assert torch.equal(cgc(x), ple(x))
    assert CGC(6, 2, 1, 1, [[5, 4]])(x).shape == (7, 2, 4)


def test_cgc_without_own_experts_is_mmoe():
    torch.manual_seed(0)
    cgc, mmoe = CGC(6, 3, 0, 4, [5]).double(), MMoE(6, 3, 4, [[5]]).double()
    state = cgc.state_dict()
    mmoe.load_state_dict({k.removeprefix("levels.0.").replace("s.", "s.0.", 1): v for k, v in state.items()})
    for x in (torch.randn(7, 6).double(), torch.randn(7, 4, 6).double()):
        torch.testing.assert_close(cgc(x), mmoe(x), rtol=0, atol=1e-14)


def test_one_own_expert_and_none_shared_are_separate_networks():
    torch.manual_seed(0)
    ple = PLE(6, 3, 1, 0, [[5], [4]]).double()
    x = torch.randn(7, 6).double()
    for t in range(3):
        h = x
        for level in ple.levels:
            h = level.experts.to_modules()[t](h)
        torch.testing.assert_close(ple(x)[:, t], h, rtol=0, atol=1e-14)


def test_routes_follow_the_module():
    ple = PLE(6, 2, [1, 2], 1, [[5], [4]])
    assert not any("columns" in name for name in ple.state_dict())
    with torch.device("meta"):
        empty = PLE(6, 2, [1, 2], 1, [[5], [4]])
    empty.to_empty(device="cpu").load_state_dict(ple.state_dict())
    x = torch.randn(7, 6)
    assert torch.equal(empty(x), ple(x))
    assert ple.to("meta").levels[0].mix.routes.columns.is_meta


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: PLE(6, 2, 1, 1, [5, 4]), ValueError, r"\[\[5, 4\]\] for one level .* \[\[5\], \[4\]\] for 2 levels"),
        (lambda: PLE(6, 2, [1, 0], [1, 0], [[5], [4]]), ValueError, "gives task 1 no expert at level 1"),
        (lambda: PLE(6, 2, [1, 2, 3], 1, [[5]]), ValueError, "task_experts has 3 entries for num_tasks=2"),
        (lambda: PLE(6, 2, [[1, 2]], 1, [[5], [4]]), ValueError, "task_experts has 1 lists for 2 levels"),
        (lambda: PLE(6, 2, [[1, 2], 3], 1, [[5], [4]]), TypeError, "must not mix ints and lists"),
        (lambda: PLE(6, 2, -1, 1, [[5]]), ValueError, "task_experts must be at least 0; got -1"),
        (lambda: PLE(6, 2, "2", 1, [[5]]), TypeError, "task_experts must be an int, .* got '2'"),
        (lambda: PLE(6, 2, 1, [1], [[5], [4]]), ValueError, "shared_experts has 1 entries for 2 levels"),
        (lambda: CGC(6, 2, 1, 1, [[5], [4]]), ValueError, "expert_dims must have one level in CGC"),
        (lambda: PLE(6, 2, 1, 0, [[5]])(torch.zeros(4, 3, 6)), ValueError, r"or \[B,2,6\] .* got \(4, 3, 6\)"),
    ],
)
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make()
