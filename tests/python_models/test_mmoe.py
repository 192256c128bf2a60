"""MMoE, multi-level MMoE and OMoE against plain torch and numpy."""

import pytest
import torch
from numpy_layers import moved

from python_models import MMoE

CASES = {
    "one level": dict(num_tasks=3, num_experts=4, expert_dims=[[5, 4]]),
    "one task": dict(num_tasks=1, num_experts=2, expert_dims=[[4]]),
    "levels": dict(num_tasks=2, num_experts=3, expert_dims=[[5], [7, 4], [3]]),
    "unequal levels": dict(num_tasks=2, num_experts=[2, 5], expert_dims=[[5], [4]], gate_dims=[6]),
    "one gate": dict(num_tasks=3, num_experts=4, expert_dims=[[5], [4]], omoe=True),
    "no gate bias": dict(num_tasks=3, num_experts=4, expert_dims=[[5]], gate_bias=False),
    "torch gate": dict(num_tasks=3, num_experts=4, expert_dims=[[5]], gate_init="torch_default", gate_dims=[8, 6]),
}


def plain_mmoe(plain, model):
    """Ma et al., section 4.2; below the last level expert e of the next level has gate e."""
    tasks = model.num_tasks

    def forward(params, x):
        shared = x if x.ndim == 2 else x[:, tasks]
        own = [shared if x.ndim == 2 or model.omoe else x[:, t] for t in range(tasks)]
        inputs, levels = None, len(model.experts)
        for i in range(levels):
            num_experts = len(params[f"experts.{i}.linears.0.weight"])
            experts = plain.experts(params, f"experts.{i}", inputs or [shared] * num_experts)
            if i + 1 < levels:
                reads = [shared] * len(params[f"experts.{i + 1}.linears.0.weight"])
            else:
                reads = own[:1] if model.omoe else own
            gates = plain.gates(params, f"gates.{i}", reads, [num_experts] * len(reads))
            inputs = [plain.mix(gate, experts) for gate in gates]
        return plain.stack(inputs * (tasks if model.omoe else 1))

    return forward


@pytest.mark.parametrize("per_unit", [False, True], ids=["shared x", "per-unit x"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_plain(plain, precision, case, per_unit):
    dtype, tolerance = precision
    model = MMoE(6, dtype=dtype, **case)
    x = torch.randn((7, case["num_tasks"] + 1, 6) if per_unit else (7, 6), dtype=dtype)
    plain.compare(model, plain_mmoe(plain, model), x, tolerance)
    assert model(x).shape == (7, case["num_tasks"], model.out_features)


@pytest.mark.parametrize("per_unit", [False, True], ids=["shared x", "per-unit x"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_numpy(numeric, case, per_unit):
    torch.manual_seed(5)
    model = moved(MMoE(6, dtype=torch.float64, activation="tanh", **case))
    x = torch.randn((4, case["num_tasks"] + 1, 6) if per_unit else (4, 6), dtype=torch.float64)
    numeric.compare(model, plain_mmoe(numeric, model), x)


def test_parameter_count():
    def expert(k, n):
        return k * n + n

    model = MMoE(6, 2, [3, 4], [[5], [7]])
    gates = 4 * (6 * 3 + 3) + 2 * (6 * 4 + 4)
    assert sum(p.numel() for p in model.parameters()) == 3 * expert(6, 5) + 4 * expert(5, 7) + gates
    assert sum(p.numel() for p in MMoE(6, 2, 3, [[5]], gate_bias=False).parameters()) == 3 * expert(6, 5) + 2 * 18


def test_omoe_is_mmoe_with_equal_gates():
    torch.manual_seed(0)
    one, each = MMoE(6, 3, 4, [[5]], omoe=True).double(), MMoE(6, 3, 4, [[5]]).double()
    state = one.state_dict()
    each.load_state_dict({k: v.expand(3, *v.shape[1:]) if k.startswith("gates") else v for k, v in state.items()})
    x = torch.randn(7, 6).double()
    torch.testing.assert_close(one(x), each(x), rtol=0, atol=1e-15)


def test_gate_starts():
    x = torch.randn(7, 6)
    model = MMoE(6, 2, 4, [[5]], gate_init="zero")
    torch.testing.assert_close(model(x), model.experts[0](x).mean(1, keepdim=True).expand(-1, 2, -1))
    assert not MMoE(6, 2, 4, [[5]]).gates[0].logits.bias.any()
    assert MMoE(6, 2, 4, [[5]]).gates[0].logits.weight.std() > 0.1
    assert MMoE(6, 2, 4, [[5]], gate_init="torch_default").gates[0].logits.bias.all()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(expert_dims=[5, 4]), ValueError, r"\[\[5, 4\]\] for one level .* \[\[5\], \[4\]\] for 2 levels"),
        (dict(expert_dims=[]), ValueError, "expert_dims must have at least one level"),
        (dict(expert_dims=[[5], []]), ValueError, r"expert_dims\[1\] must name at least one layer"),
        (dict(expert_dims=7), TypeError, "expert_dims must be one list of widths a level; got 7"),
        (dict(expert_dims=[[5], [-1]]), ValueError, r"expert_dims\[1\]\[0\] must be at least 0; got -1"),
        (dict(num_experts=0), ValueError, "num_experts must be at least 1; got 0"),
        (dict(num_experts=[2, 2, 2]), ValueError, "num_experts has 3 entries for 2 levels"),
        (dict(num_tasks=-1), ValueError, "num_tasks must be at least 1; got -1"),
        (dict(num_tasks=2.0), TypeError, "num_tasks must be an int; got 2.0"),
        (dict(gate_init="ones"), ValueError, "gate_init must be .* got 'ones'"),
        (dict(expert=5), TypeError, "expert must be a factory"),
        (dict(gate=len, gate_dims=[3]), ValueError, r"gate_dims=\[3\] is for the built-in gates"),
        (dict(norm="group"), ValueError, "norm must be None, 'batch' or 'layer'; got 'group'"),
        (dict(dropout=1.0), ValueError, r"dropout must be a probability in \[0, 1\); got 1.0"),
        (dict(colour="red"), TypeError, "unexpected keyword argument 'colour'"),
    ],
)
def test_bad_arguments(change, error, words):
    arguments = dict(in_features=6, num_tasks=2, num_experts=2, expert_dims=[[5], [4]]) | change
    with pytest.raises(error, match=words):
        MMoE(**arguments)


def test_bad_x():
    with pytest.raises(ValueError, match=r"x must be \[B,6\] or \[B,3,6\] \(per unit\); got \(4, 2, 6\)"):
        MMoE(6, 2, 2, [[5]])(torch.zeros(4, 2, 6))
    with pytest.raises(TypeError, match="x must be a tensor; got list"):
        MMoE(6, 2, 2, [[5]])([1.0])
