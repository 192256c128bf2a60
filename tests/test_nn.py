"""The drop-in modules against lists of torch.nn modules."""

import copy

import pytest
import torch
from torch import nn

from mtlkernels.nn import ExpertLinear, ExpertMLP, Towers
from mtlkernels.norms import ExpertBatchNorm, ExpertLayerNorm

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


class Wrapped(nn.Module):
    """An MLP the way libraries wrap it: one Sequential under a name."""

    def __init__(self, *parts):
        super().__init__()
        self.mlp_net = nn.Sequential(*parts)

    def forward(self, x):
        return self.mlp_net(x)


class Residual(Wrapped):
    def forward(self, x):
        return x + self.mlp_net(x)


MLPS = {
    "linear": lambda: nn.Linear(6, 5),
    "relu": lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(inplace=True)),
    "no last activation": lambda: nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4, bias=False)),
    "nested": lambda: nn.Sequential(nn.Sequential(nn.Linear(6, 5), nn.SiLU(), nn.Identity()), nn.Linear(5, 4)),
    "wrapped": lambda: Wrapped(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.Sigmoid()),
    "batch norm": lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, 1e-3, 0.3), nn.ReLU(), nn.Linear(5, 4)),
    "layer norm": lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5, 1e-3), nn.GELU(), nn.Dropout(0.0)),
    "norm alone": lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)),
}


def shaken(make, count, dtype=torch.float32):
    """`count` modules whose every parameter and running statistic is random, norms included."""
    modules = nn.ModuleList(make() for _ in range(count)).to(dtype)
    with torch.no_grad():
        for p in modules.parameters():
            p.add_(0.3 * torch.randn_like(p))
        for name, buffer in modules.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand_like(buffer))
    return modules


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", MLPS.values(), ids=MLPS.keys())
def test_from_modules(make, training, dtype):
    torch.manual_seed(0)
    modules = shaken(make, 4, dtype).train(training)
    bank = ExpertMLP.from_modules(modules, experts_per_unit=[1, 0, 3])
    assert bank.training is training
    units = torch.randn(9, 3, 6, dtype=dtype, requires_grad=True)
    for x, reads in ((units, [0, 2, 2, 2]), (units[:, 1], None)):
        expected = torch.stack([m(x if reads is None else x[:, reads[e]]) for e, m in enumerate(modules)], 1)
        found = bank(x)
        assert (found - expected).abs().max() <= TOLERANCE[dtype]
        grad = torch.randn_like(expected)
        a, b = (torch.autograd.grad(y, units, grad)[0] for y in (found, expected))
        assert (a - b).abs().max() <= 10 * TOLERANCE[dtype]
    for left, right in zip(bank.to_modules().buffers(), modules.buffers(), strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("make", MLPS.values(), ids=MLPS.keys())
def test_round_trip_is_bit_equal(make):
    modules = shaken(make, 3).eval()
    back = ExpertMLP.from_modules(modules).to_modules()
    again = ExpertMLP.from_modules(back)
    assert len(back) == 3 and all(isinstance(m, nn.Sequential) and not m.training for m in back)
    for left, right in zip(back.parameters(), modules.parameters(), strict=True):
        assert torch.equal(left, right) and left.data_ptr() != right.data_ptr()
    for left, right in zip(back.buffers(), modules.buffers(), strict=True):
        assert torch.equal(left, right)
    state = ExpertMLP.from_modules(modules).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


def test_from_modules_keeps_frozen_weights_dropout_and_leaves_the_source_alone():
    modules = nn.ModuleList(Wrapped(nn.Linear(3, 2), nn.ReLU(), nn.Dropout(0.25)) for _ in range(2))
    modules.requires_grad_(False)
    modules[0].mlp_net[2].eval()
    bank = ExpertMLP.from_modules(modules)
    assert modules[0].training and not modules[0].mlp_net[2].training
    assert not any(p.requires_grad for p in bank.parameters())
    assert bank.dropouts == [0.25] and isinstance(bank.to_modules()[1][2], nn.Dropout)
    bank.train()
    kept = (bank(torch.randn(4000, 3)) != 0).double().mean() / (bank.eval()(torch.randn(4000, 3)) != 0).double().mean()
    assert abs(kept - 0.75) < 0.05


@pytest.mark.parametrize(
    ("modules", "error", "words"),
    [
        ([], ValueError, "modules must hold at least one"),
        (nn.Linear(3, 2), TypeError, "modules must be a list of modules or a ModuleList; got Linear"),
        ([nn.Linear(3, 2), nn.Linear(3, 4)], ValueError, r"modules\[1\] .*layer 0 has out_features=4, expected 2"),
        ([nn.Linear(3, 2), nn.Linear(3, 2, bias=False)], ValueError, r"modules\[1\] .*bias=False, expected True"),
        ([nn.Linear(3, 2), nn.Linear(3, 2).double()], ValueError, r"modules\[1\] .*dtype=torch.float64"),
        (
            [nn.Sequential(nn.Linear(3, 2), a) for a in (nn.ReLU(), nn.ReLU(), nn.Tanh())],
            ValueError,
            r"modules\[2\] differs from modules\[0\]: layer 0 has activation='tanh', expected 'relu'",
        ),
        ([nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))], ValueError, "2 layers, expected 1"),
        ([nn.Linear(3, 2), nn.Linear(3, 2).eval()], ValueError, r"modules\[1\] .*training is False"),
        ([nn.Sequential(nn.Linear(3, 2), nn.PReLU())], TypeError, r"modules\[0\].1 is a PReLU; supported are"),
        ([nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.BatchNorm1d(2))], TypeError, "BatchNorm1d comes where"),
        ([nn.Sequential(nn.Linear(3, 2), nn.GELU("tanh"))], TypeError, "GELU must be the exact one"),
        ([nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, affine=False))], TypeError, "BatchNorm1d must be affine"),
        ([nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2, bias=False))], TypeError, "LayerNorm must be affine"),
        ([nn.Sequential(nn.Linear(3, 2), nn.Dropout(1.0))], TypeError, "Dropout must have p below 1; got 1.0"),
        ([nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2))], ValueError, "layer 1 takes 3 features, layer 0 gives 2"),
        ([nn.Sequential(nn.ReLU())], TypeError, "ReLU comes where it cannot be stacked"),
        ([nn.Sequential()], TypeError, r"modules\[0\] holds no Linear layer"),
        ([Residual(nn.Linear(3, 3), nn.ReLU())], TypeError, "Residual that computes more than the layers inside it"),
    ],
)
def test_from_modules_refuses(modules, error, words):
    with pytest.raises(error, match=words):
        ExpertMLP.from_modules(modules)


def test_expert_linear_starts_like_linear():
    torch.manual_seed(0)
    layer = ExpertLinear(50, 100, 40)
    assert layer.weight.shape == (50, 40, 100) and layer.bias.shape == (50, 40)
    for p in (layer.weight, layer.bias):
        assert 0.099 < p.abs().max() <= 0.1 and abs(p.std() - 0.1 / 3**0.5) < 2e-3
    assert "activation=None" in repr(layer)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_norms_in_16_bit_and_empty(norm):
    mlp = ExpertMLP(2, 3, [4, 5], norm=norm)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mlp(torch.randn(16, 3))
    assert y.dtype == torch.bfloat16 and y.isfinite().all()
    y.float().sum().backward()
    mlp.zero_grad()
    empty = mlp(torch.zeros(0, 3))
    assert empty.shape == (0, 2, 5)
    empty.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in mlp.parameters())


@pytest.mark.parametrize("kind", [ExpertBatchNorm, ExpertLayerNorm])
def test_norms_of_no_experts(kind):
    """As a rank has them that holds none."""
    norm, x = kind(0, 4), torch.zeros(3, 0, 4, requires_grad=True)
    norm(x).sum().backward()
    assert norm(x).shape == x.grad.shape == (3, 0, 4) and norm.weight.grad.shape == (0, 4)
    assert "(2, 4), eps=1e-05" in repr(kind(2, 4))


def test_batch_norm_of_one_row_in_training_raises():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ExpertMLP(2, 3, [4], norm="batch")(torch.zeros(1, 3))


@pytest.mark.parametrize("norm", [None, "batch", "layer"])
def test_mlp_compiles_and_copies(norm):
    torch.manual_seed(0)
    mlp = ExpertMLP(3, 6, [5, 4], activation="silu", norm=norm, experts_per_unit=[1, 2]).eval()
    x = torch.randn(7, 2, 6)
    expected = mlp(x)
    torch.testing.assert_close(torch.compile(mlp, fullgraph=True, backend="eager")(x), expected)
    twin = copy.deepcopy(mlp)
    assert torch.equal(twin(x), expected)
    other = ExpertMLP(3, 6, [5, 4], activation="silu", norm=norm, experts_per_unit=[1, 2]).eval()
    other.load_state_dict(mlp.state_dict())
    assert torch.equal(other(x), expected)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ExpertLinear(0, 3, 2), ValueError, "num_experts must be at least 1; got 0"),
        (lambda: ExpertLinear(2, -3, 2), ValueError, "in_features must be at least 0; got -3"),
        (lambda: ExpertLinear(2, 3, 2.5), TypeError, "out_features must be an int; got 2.5"),
        (lambda: ExpertLinear(2, 3, True), TypeError, "out_features must be an int; got True"),
        (lambda: ExpertLinear(2, 3, 2, activation="elu"), ValueError, "activation must be None or one of relu"),
        (lambda: ExpertLinear(2, 3, 2, experts_per_unit=[1, 2]), ValueError, "must sum to num_experts=2; got"),
        (lambda: ExpertLinear(2, 3, 2, experts_per_unit=2), TypeError, "experts_per_unit must be a sequence of ints"),
        (lambda: ExpertLinear(2, 3, 2, experts_per_unit=[3, -1]), ValueError, r"experts_per_unit\[1\] must be at"),
        (lambda: ExpertMLP(2, 3, []), ValueError, "dims must name at least one layer"),
        (lambda: ExpertMLP(2, 3, 5), TypeError, "dims must be a sequence of ints; got 5"),
        (lambda: ExpertMLP(2, 3, [5], dropout=-0.1), ValueError, "dropout must be a probability"),
        (lambda: ExpertMLP(2, 3, [5], norm="rms"), ValueError, "norm must be None, 'batch' or 'layer'; got 'rms'"),
        (lambda: ExpertMLP(2, 3, [5], activation=["relu"] * 2), ValueError, "activation has 2 entries for 1 layers"),
        (lambda: Towers(3, 2, out_features=[1]), ValueError, "out_features has 1 entries for num_tasks=2"),
        (lambda: Towers(3, 2, out_features=[1, 0]), ValueError, r"out_features\[1\] must be at least 1; got 0"),
        (lambda: Towers(3, 2, task_names=["a", "a"]), ValueError, "task_names must be different strings"),
        (lambda: Towers(3, 2, task_names=["a"]), ValueError, "task_names has 1 entries for num_tasks=2"),
        (lambda: Towers(3, 2)(torch.zeros(4, 3, 3)), ValueError, r"x must be \[B,2,3\] .* got \(4, 3, 3\)"),
    ],
)
def test_bad_arguments(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("dims", [(), (5, 4)])
@pytest.mark.parametrize("outputs", [1, 3, [2, 1, 3]])
def test_towers(dims, outputs):
    torch.manual_seed(0)
    towers, x = Towers(6, 3, dims, outputs).double(), torch.randn(7, 3, 6).double()
    found = towers(x)
    sizes = [outputs] * 3 if isinstance(outputs, int) else outputs
    hidden = towers.hidden.to_modules() if dims else [nn.Identity()] * 3
    weight, bias = towers.last.weight.flatten(0, 1).split(sizes), towers.last.bias.flatten().split(sizes)
    expected = [nn.functional.linear(hidden[t](x[:, t]), weight[t], bias[t]) for t in range(3)]
    if outputs == 1:
        torch.testing.assert_close(found, torch.cat(expected, 1), rtol=0, atol=1e-12)
    else:
        assert list(found) == ["task0", "task1", "task2"]
        for y, z in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(y, z, rtol=0, atol=1e-12)
    count = sum(k * n + n for k, n in zip((6, *dims), dims, strict=False)) * 3
    assert sum(p.numel() for p in towers.parameters()) == count + sum(sizes) * ((6, *dims)[-1] + 1)


def test_towers_of_ones_own():
    made = []

    def tower(k, n):
        made.append(nn.Sequential(nn.Linear(k, 4), nn.Softplus(), nn.Linear(4, n)))
        return made[-1]

    towers, x = Towers(6, 2, out_features=[1, 2], task_names=["a", "b"], tower=tower), torch.randn(5, 2, 6)
    found = towers(x)
    assert torch.equal(found["a"], made[0](x[:, 0])) and torch.equal(found["b"], made[1](x[:, 1]))
