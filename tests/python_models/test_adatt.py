"""AdaTT against plain torch and numpy, its identities, and its loss curve."""

import pytest
import torch
import torch.nn.functional as F
from numpy_layers import moved
from torch import nn

from python_models import PLE, AdaTT, MMoE, MultiTaskModel, Towers

CASES = {
    "sp": dict(num_tasks=3, task_experts=2, expert_dims=[[5], [7, 4], [3]]),
    "sp single": dict(num_tasks=3, task_experts=1, expert_dims=[[5], [4]]),
    "sp unequal": dict(num_tasks=3, task_experts=[1, 0, 3], expert_dims=[[5], [4]], gate_dims=[6]),
    "general": dict(num_tasks=2, task_experts=2, shared_experts=3, expert_dims=[[5], [7, 4], [3]]),
    "general single": dict(num_tasks=2, task_experts=1, shared_experts=1, expert_dims=[[5], [4]]),
    "single tasks": dict(num_tasks=2, task_experts=1, shared_experts=2, expert_dims=[[5], [4]]),
    "one level": dict(num_tasks=2, task_experts=2, shared_experts=2, expert_dims=[[5]]),
    "unequal levels": dict(num_tasks=2, task_experts=[[1, 2], [3, 1]], shared_experts=[2, 1], expert_dims=[[5], [4]]),
    "shared first": dict(num_tasks=2, task_experts=1, shared_experts=[2, 0], expert_dims=[[5], [4]]),
    "shared last": dict(num_tasks=2, task_experts=1, shared_experts=[0, 2], expert_dims=[[5], [4]]),
    "only shared": dict(num_tasks=2, task_experts=0, shared_experts=2, expert_dims=[[5], [4]]),
    "no residual": dict(num_tasks=2, task_experts=2, shared_experts=1, expert_dims=[[5], [4]], residual=False),
    "per unit": dict(
        num_tasks=3, task_experts=[1, 2, 0], shared_experts=1, expert_dims=[[5], [4]], single_expert="per_unit"
    ),
    "per unit, none learned": dict(
        num_tasks=3, task_experts=[1, 0, 1], shared_experts=2, expert_dims=[[5]], single_expert="per_unit"
    ),
    "one task": dict(num_tasks=1, task_experts=1, expert_dims=[[4]]),
}


def sizes(case):
    levels, tasks = len(case["expert_dims"]), case["num_tasks"]
    own, shared = case["task_experts"], case.get("shared_experts", 0)
    own = [own] * tasks if isinstance(own, int) else own
    own = [own] * levels if isinstance(own[0], int) else own
    return own, [shared] * levels if isinstance(shared, int) else shared


def residual_is_learned(case, counts, n):
    """Li et al., section 3.1: unit weight where all units have one expert."""
    if case.get("single_expert") == "per_unit":
        return n > 1
    return any(m != 1 for m in counts)


def plain_adatt(plain, case):
    """Eq. 7 to 10, gate and residual as two sums."""
    own, shared = sizes(case)
    tasks, levels = case["num_tasks"], len(own)

    def forward(params, x):
        units = [x if x.ndim == 2 else x[:, u] for u in range(tasks + 1) if x.ndim == 2 or u < x.shape[1]]
        for i in range(levels):
            counts = own[i] + ([shared[i]] if any(shared[i:]) else [])
            reads = [units[u] for u, n in enumerate(counts) for _ in range(n)]
            flat = plain.experts(params, f"levels.{i}.experts", reads)
            rows = tasks + any(shared[i + 1 :])
            gates = plain.gates(params, f"levels.{i}.gates", units[:rows], [len(flat)] * rows)
            units, at = [plain.mix(gate, flat) for gate in gates], 0
            if not case.get("residual", True):
                continue
            for u, n in enumerate(counts[:rows]):
                mine = flat[sum(counts[:u]) : sum(counts[:u]) + n]
                if n and residual_is_learned(case, counts, n):
                    v = params[f"levels.{i}.native"][at : at + n]
                    at += n
                    units[u] = units[u] + plain.sum(v, mine)
                elif n:
                    units[u] = units[u] + mine[0]
        return plain.stack(units)

    return forward


@pytest.mark.parametrize("per_unit", [False, True], ids=["shared x", "per-unit x"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_plain(plain, precision, case, per_unit):
    dtype, tolerance = precision
    model = AdaTT(6, dtype=dtype, **case)
    units = case["num_tasks"] + any(sizes(case)[1])
    x = torch.randn((7, units, 6) if per_unit else (7, 6), dtype=dtype)
    plain.compare(model, plain_adatt(plain, case), x, tolerance)


@pytest.mark.parametrize("per_unit", [False, True], ids=["shared x", "per-unit x"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_numpy(numeric, case, per_unit):
    torch.manual_seed(5)
    model = moved(AdaTT(6, dtype=torch.float64, activation="tanh", **case))
    units = case["num_tasks"] + any(sizes(case)[1])
    x = torch.randn((4, units, 6) if per_unit else (4, 6), dtype=torch.float64)
    numeric.compare(model, plain_adatt(numeric, case), x)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_parameter_count(case):
    own, shared = sizes(case)
    width, expected = 6, 0
    for i, dims in enumerate(case["expert_dims"]):
        counts = own[i] + ([shared[i]] if any(shared[i:]) else [])
        rows, chain = case["num_tasks"] + any(shared[i + 1 :]), [width, *dims]
        expected += sum(counts) * sum(k * n + n for k, n in zip(chain, dims, strict=False))
        gate = [width, *case.get("gate_dims", ()), sum(counts)]
        expected += rows * sum(k * n + n for k, n in zip(gate, gate[1:], strict=False))
        if case.get("residual", True):
            expected += sum(n for n in counts[:rows] if residual_is_learned(case, counts, n))
        width = dims[-1]
    assert sum(p.numel() for p in AdaTT(6, **case).parameters()) == expected


def test_without_residual_is_a_full_gated_mixture():
    torch.manual_seed(0)
    adatt, mmoe = AdaTT(6, 3, 2, 0, [[5]], residual=False).double(), MMoE(6, 3, 6, [[5]]).double()
    state = adatt.state_dict()
    mmoe.load_state_dict({k.removeprefix("levels.0.").replace("s.", "s.0.", 1): v for k, v in state.items()})
    x = torch.randn(7, 6).double()
    torch.testing.assert_close(adatt(x), mmoe(x), rtol=0, atol=1e-14)
    learned = AdaTT(6, 3, 2, 0, [[5]]).double()
    learned.load_state_dict(state | {"levels.0.native": torch.zeros(6)})
    torch.testing.assert_close(learned(x), adatt(x), rtol=0, atol=1e-14)


def test_one_task_with_one_expert_doubles_it():
    model, x = AdaTT(6, 1, 1, 0, [[5]]).double(), torch.randn(7, 6).double()
    torch.testing.assert_close(model(x), 2 * model.levels[0].experts(x))


def test_equals_ple_where_foreign_gates_are_shut():
    """Task rows agree with PLE's when foreign logits are far below, shared rows always; v is 0."""
    torch.manual_seed(0)
    size = dict(in_features=6, num_tasks=2, task_experts=[1, 2], shared_experts=1, expert_dims=[[5], [4]])
    ple, adatt = PLE(**size).double(), AdaTT(**size).double()
    with torch.no_grad():
        for a, p in zip(adatt.levels, ple.levels, strict=True):
            a.experts.load_state_dict(p.experts.state_dict())
            a.native.zero_()
            reads = [[0, 3], [1, 2, 3], [0, 1, 2, 3]][: a.rows]
            a.gates.logits.weight.zero_()
            a.gates.logits.bias.fill_(-1e4)
            weight, bias = p.gates.logits.weight.flatten(0, 1), p.gates.logits.bias.flatten()
            at = 0
            for row, experts in enumerate(reads):
                a.gates.logits.weight[row, experts] = weight[at : at + len(experts)]
                a.gates.logits.bias[row, experts] = bias[at : at + len(experts)]
                at += len(experts)
    x = torch.randn(7, 6).double()
    torch.testing.assert_close(adatt.levels[0](x), ple.levels[0](x), rtol=0, atol=1e-14)
    torch.testing.assert_close(adatt(x), ple(x), rtol=0, atol=1e-14)


def test_native_starts_within_its_bound():
    native = AdaTT(6, 2, [400, 100], 0, [[1]]).levels[0].native
    for part, m in ((native[:400], 400), (native[400:], 100)):
        assert 0.9 * m**-0.5 < part.abs().max() <= m**-0.5


class PlainAdaTTSp(nn.Module):
    """AdaTT-sp with its towers, as one writes it by hand."""

    def __init__(self, in_features, tasks, m, dims, tower):
        super().__init__()
        self.tasks, self.m = tasks, m
        self.experts, self.gates, self.native = nn.ModuleList(), nn.ModuleList(), nn.ParameterList()
        for k, n in zip([in_features, *dims], dims, strict=False):
            self.experts.append(nn.ModuleList(nn.Sequential(nn.Linear(k, n), nn.ReLU()) for _ in range(tasks * m)))
            self.gates.append(nn.ModuleList(nn.Linear(k, tasks * m) for _ in range(tasks)))
            self.native.append(nn.Parameter(torch.rand(tasks, m) - 0.5))
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(dims[-1], tower), nn.ReLU(), nn.Linear(tower, 1)) for _ in range(tasks)
        )

    def forward(self, x):
        units = [x] * self.tasks
        for experts, gates, native in zip(self.experts, self.gates, self.native, strict=True):
            outputs = torch.stack([expert(units[e // self.m]) for e, expert in enumerate(experts)], 1)
            mixed = []
            for t, gate in enumerate(gates):
                own = outputs[:, t * self.m : (t + 1) * self.m]
                full = torch.einsum("be,bed->bd", gate(units[t]).softmax(-1), outputs)
                mixed.append(full + torch.einsum("e,bed->bd", native[t], own))
            units = mixed
        return torch.cat([tower(h) for tower, h in zip(self.towers, units, strict=True)], 1)


def load_from_plain(model, plain_model):
    with torch.no_grad():
        for i, level in enumerate(model.fusion.levels):
            level.experts.load_state_dict(type(level.experts).from_modules(plain_model.experts[i]).state_dict())
            for t, gate in enumerate(plain_model.gates[i]):
                level.gates.logits.weight[t] = gate.weight
                level.gates.logits.bias[t] = gate.bias
            level.native.copy_(plain_model.native[i].flatten())
        for t, tower in enumerate(plain_model.towers):
            for bank, linear in ((model.towers.hidden.linears[0], tower[0]), (model.towers.last, tower[2])):
                bank.weight[t], bank.bias[t] = linear.weight, linear.bias


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_loss_curve(dtype, tolerance):
    torch.manual_seed(0)
    x = torch.randn(64, 8, dtype=dtype)
    labels = (x @ torch.randn(8, 3, dtype=dtype) + 0.3 * torch.randn(64, 3, dtype=dtype) > 0).to(dtype)
    by_hand = PlainAdaTTSp(8, 3, 2, [8, 6], 4).to(dtype)
    model = MultiTaskModel(AdaTT(8, 3, 2, 0, [[8], [6]]), Towers(6, 3, [4])).to(dtype)
    load_from_plain(model, by_hand)
    curves = []
    for network in (by_hand, model):
        optimizer, losses = torch.optim.Adam(network.parameters(), lr=1e-3, foreach=True), []
        for _ in range(200):
            loss = F.binary_cross_entropy_with_logits(network(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses, dtype=torch.float64))
    assert curves[0][-1] < 0.95 * curves[0][0]
    assert (curves[0] - curves[1]).abs().max() <= tolerance


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: AdaTT(6, 2, 1, 0, [5, 4]), ValueError, r"\[\[5, 4\]\] for one level .* \[\[5\], \[4\]\] for 2 levels"),
        (lambda: AdaTT(6, 2, 0, 0, [[5]]), ValueError, "give level 0 no expert at all"),
        (lambda: AdaTT(6, 2, 1, -1, [[5]]), ValueError, "shared_experts must be at least 0; got -1"),
        (lambda: AdaTT(6, 2, 1, 0, [[5]], single_expert="all"), ValueError, "single_expert must be .* got 'all'"),
        (lambda: AdaTT(6, 2, 1, 1, [[5]])(torch.zeros(4, 2, 6)), ValueError, r"or \[B,3,6\] .* got \(4, 2, 6\)"),
    ],
)
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make()
