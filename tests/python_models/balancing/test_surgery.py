"""PCGrad, MGDA, GradDrop and RotoGrad against their definitions, and against TorchJD."""

import itertools

import pytest
import torch

from mtlkernels.nn import Towers
from python_models.balancing import MGDA, GradDrop, RotoGrad
from python_models.balancing.mgda import least_norm
from python_models.balancing.pcgrad import project
from python_models.balancing.task_gradients import gram


def draw(n, p, seed=0, shift=0.0):
    return torch.randn(n, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def literal_pcgrad(rows, generator):
    """Algorithm 1, on the gradients themselves."""
    total = torch.zeros_like(rows[0])
    for t in range(len(rows)):
        v = rows[t].clone()
        for j in torch.randperm(len(rows), generator=generator).tolist():
            if j != t and v @ rows[j] < 0:
                v -= v @ rows[j] / (rows[j] @ rows[j]) * rows[j]
        total += v
    return total


@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(4))
def test_pcgrad_on_products_is_pcgrad_on_gradients(n, seed):
    rows = draw(n, 20, seed)
    generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
    found = project(gram(rows), generators[0]) @ rows
    torch.testing.assert_close(found, literal_pcgrad(rows, generators[1]), rtol=1e-12, atol=1e-12)


def test_pcgrad_skips_a_zero_gradient():
    rows = draw(3, 5)
    rows[1] = 0
    found = project(gram(rows), torch.Generator().manual_seed(0)) @ rows
    assert found.isfinite().all()


def check_kkt(rows, a):
    """Nobody's product with the direction is less than its square; equal where a is positive.

    Up to the rounding of the products themselves, each against its own gradient's size.
    """
    assert (a >= 0).all() and abs(a.sum() - 1) < 1e-12
    d, norms = a @ rows, rows.norm(dim=1)
    size = (norms * (a @ norms)).clamp_min(torch.finfo(rows.dtype).tiny)
    slack = (rows @ d - d @ d) / size
    assert (slack >= -1e-12).all()
    assert (slack[a > 0].abs() <= 1e-12).all()


KINDS = {
    "apart": lambda rows: rows,
    "alike": lambda rows: rows + 3,
    "few numbers": lambda rows: rows[:, :2],
    "one number": lambda rows: rows[:, :1],
    "one direction": lambda rows: rows[:, :1] * rows[0],
    "twice": lambda rows: torch.cat([rows, rows, rows[:1]]),
    "nearly twice": lambda rows: torch.cat([rows, rows + 1e-5 * rows.roll(1, 1)]),
    "opposite": lambda rows: torch.cat([rows, -3 * rows]),
    "zero": lambda rows: torch.cat([torch.zeros_like(rows[:1]), rows[1:]]),
    "minute": lambda rows: rows * 1e-10,
    "huge": lambda rows: rows * 1e10,
    "wide": lambda rows: rows * 10.0 ** torch.arange(-3.0, len(rows) - 3).clamp(max=4).unsqueeze(1),
    "wide, alike": lambda rows: (rows + 1) * 10.0 ** torch.arange(6.0, 6 - len(rows), -1).clamp(min=-6).unsqueeze(1),
}


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_mgda_is_at_the_least_norm(n, kind):
    for seed in range(6):
        rows = KINDS[kind](draw(n, 30, seed))
        check_kkt(rows, least_norm(rows @ rows.T))


def test_mgda_does_not_depend_on_the_scale():
    """Nor PCGrad: gradients late in training are minute."""
    rows = draw(6, 30)
    products = gram(rows)
    for scale in (2.0**-60, 2.0**60):
        assert torch.equal(least_norm(products * scale), least_norm(products))
        assert torch.equal(*(project(p, torch.Generator().manual_seed(0)) for p in (products * scale, products)))


@pytest.mark.parametrize("columns", [0, 1, 512, 32_768, 32_769, 70_000, 300_001])
@pytest.mark.parametrize("scale", [1e-25, 1e-13, 1.0, 1e25])
def test_products_of_float32_gradients(columns, scale):
    """Of long rows that nearly cancel, and of numbers whose squares float32 does not hold: to a float32's rounding."""
    rows = draw(3, columns).float()
    rows[1] = -rows[0] + 1e-3 * rows[1]
    rows *= scale
    wanted = rows.double() @ rows.double().T
    norms = wanted.diagonal().sqrt()
    assert ((gram(rows) - wanted).abs() <= 2.0**-24 * torch.outer(norms, norms)).all()


def test_products_under_autocast_and_rounded_matmuls():
    """The user's settings for the network's matmuls are not for these."""
    rows = draw(3, 50_000).float()
    wanted, before = gram(rows), torch.get_float32_matmul_precision()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gram(rows), wanted)
    try:
        torch.set_float32_matmul_precision("medium")
        found = gram(rows)
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(found, rows.double() @ rows.double().T, rtol=1e-12, atol=1e-10)


def test_mgda_of_two_is_the_formula():
    for seed in range(8):
        one, two = draw(2, 3, seed, 1.0)
        share = ((two - one) @ two / (one - two).square().sum()).clamp(0, 1)
        found = least_norm(gram(torch.stack([one, two])))
        torch.testing.assert_close(found, torch.stack([share, 1 - share]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("normalisation", ["l2", "loss", "loss+"])
def test_mgda_normalised(normalisation):
    rows, losses = draw(4, 9) * torch.tensor([1.0, 5.0, 0.1, 2.0]).unsqueeze(1), torch.tensor([0.5, 2.0, 1.0, 3.0])
    method = MGDA(4, normalisation=normalisation).double()
    size = {"l2": rows.norm(dim=1), "loss": losses, "loss+": losses * rows.norm(dim=1)}[normalisation].double()
    found = method.combine(rows, range(4), losses)
    a = method.coefficients
    check_kkt(rows / size.unsqueeze(1), a)
    torch.testing.assert_close(found, a @ rows)


def dropped(rows, leak=0.0, sign=None, seed=0, **options):
    method = GradDrop(len(rows), leak=leak, seed=seed, **options)
    method._sign = torch.ones(1, rows.shape[1]) if sign is None else sign
    return method.combine(rows, range(len(rows)), rows[:, 0])


def test_graddrop_keeps_what_all_agree_on():
    rows = draw(3, 40).abs() * torch.tensor([1.0, -1.0]).repeat(20)
    torch.testing.assert_close(dropped(rows), rows.sum(0))


def test_graddrop_keeps_it_with_the_largest_draw(monkeypatch):
    """Which float32 would round to 1."""
    rows = draw(3, 7).abs().float()
    monkeypatch.setattr(torch, "rand", lambda size, dtype, **_: torch.full(size, 1 - 2.0**-53, dtype=dtype))
    assert torch.equal(dropped(rows), rows.sum(0))


def test_graddrop_with_all_leaking_is_the_sum():
    rows = draw(3, 40)
    torch.testing.assert_close(dropped(rows, 1.0), rows.sum(0))
    torch.testing.assert_close(dropped(rows, 0.3, keep_norm=True).norm(), rows.sum(0).norm())


def test_graddrop_on_average():
    """Of two opposite numbers a > 0 > b: P a + (1 - P) b, P = a / (a + |b|)."""
    rows = torch.tensor([[3.0], [-1.0]], dtype=torch.float64).expand(2, 40_000)
    assert abs(dropped(rows).mean() - (0.75 * 3 - 0.25 * 1)) < 4 * 4 * (0.75 * 0.25 / 40_000) ** 0.5
    sharp = dropped(rows, sharpness=1.0).mean()
    p = torch.sigmoid(torch.tensor(1.0, dtype=torch.float64))
    assert abs(sharp - (p * 3 - (1 - p))) < 4 * 4 * (0.25 / 40_000) ** 0.5


def test_graddrop_draws_once_for_all_rows_by_the_sign_of_the_input():
    """Rows of one feature share its fate; a gradient counts as its product with the input's sign, summed."""
    sign = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    rows = torch.tensor([[2.0, -1.0], [-0.5, 0.25]], dtype=torch.float64)  # G: 3 and -0.75
    seen = {tuple(dropped(rows, sign=sign, seed=s).tolist()) for s in range(40)}
    assert seen == {(2.0, -1.0), (-0.5, 0.25)}


def test_graddrop_is_torchjds():
    aggregation = pytest.importorskip("torchjd.aggregation")
    rows = draw(4, 60)
    leak = torch.tensor([0.0, 0.5, 0.2, 1.0], dtype=torch.float64)
    torch.manual_seed(3)
    wanted = aggregation.GradDrop(leak=leak)(rows)
    method = GradDrop(4, leak=leak.tolist(), seed=3)
    method._sign = torch.ones(1, 60)
    found = method.combine(rows, range(4), rows[:, 0])
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("n", [2, 3, 6])
def test_pcgrad_is_torchjds(n):
    aggregation = pytest.importorskip("torchjd.aggregation")
    rows = draw(n, 30, n)
    torch.manual_seed(11)
    wanted = aggregation.PCGrad()(rows)
    found = project(gram(rows), torch.Generator().manual_seed(11)) @ rows
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n", [2, 3, 6])
def test_mgda_is_torchjds(n):
    """Whose Frank-Wolfe steps come near to where ours is."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    rows = draw(n, 30, n, 0.3)
    wanted = aggregation.MGDA(epsilon=1e-9, max_iters=200_000 // n)(rows)
    found = least_norm(gram(rows)) @ rows
    assert found.norm() <= wanted.norm() + 1e-12
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-3 * wanted.norm().item() + 1e-3)


def combine(method, rows, tasks=None):
    return method.combine(rows, range(len(rows)) if tasks is None else tasks, rows[:, 0])


def test_rotograd_sizes():
    rows = draw(3, 5 * 4) * torch.tensor([1.0, 10.0, 0.1]).unsqueeze(1)
    method = RotoGrad(3, 4, burn_in=1).double()
    norms = rows.norm(dim=1)
    torch.testing.assert_close(combine(method, rows), norms.mean() * (rows / norms.unsqueeze(1)).sum(0))
    torch.testing.assert_close(method.initial, norms)
    combine(method, rows * 2)  # the burn-in takes the norms again
    torch.testing.assert_close(method.initial, norms * 2)
    now = rows * torch.tensor([1.0, 2.0, 4.0]).unsqueeze(1)
    n, k = now.norm(dim=1), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    wanted = (k / k.sum() * n).sum() * (now / n.unsqueeze(1)).sum(0)
    torch.testing.assert_close(combine(method, now), wanted)


def test_rotograd_may_rotate_alone():
    rows = draw(3, 5 * 4)
    method = RotoGrad(3, 4, rotate_only=True).double()
    assert torch.equal(combine(method, rows), rows.sum(0)) and method._direction > 0


def test_lengths_past_the_range():
    """Finite gradients, whose lengths or products are not: the plain sum, and equal parts."""
    rows = draw(3, 20).float() * 1e30
    method = RotoGrad(3, 4)
    assert torch.equal(combine(method, rows), rows.sum(0)) and not method.initial.any()
    products = torch.tensor([[1.0, 0], [0, torch.inf]], dtype=torch.float64)
    assert least_norm(products).tolist() == [0.5, 0.5]


def test_rotations_are_rotations():
    method = RotoGrad(3, 6, rotated=4).double()
    with torch.no_grad():
        method.skew.normal_()
    r = method.rotations()
    torch.testing.assert_close(r.transpose(1, 2) @ r, torch.eye(6, dtype=torch.float64).expand(3, 6, 6))
    assert (torch.linalg.det(r) > 0).all() and torch.equal(
        r[:, 4:, 4:], torch.eye(2, dtype=torch.float64).expand(3, 2, 2)
    )
    z = draw(5, 6)
    for t in range(3):
        torch.testing.assert_close(method.rotate(z)[:, t], z @ r[t].T)


def test_rotations_bring_gradients_together():
    """Gradients that a rotation of each task makes equal: its objective goes to 0."""
    torch.manual_seed(0)
    base, turn = draw(64, 3, 1), torch.matrix_exp(torch.tensor([[0.0, 0.6, 0], [-0.6, 0, 0], [0, 0, 0]])).double()
    method = RotoGrad(2, 3).double()
    optimizer = torch.optim.Adam(method.parameters(), 0.02)
    fixed = torch.stack([base, base @ turn.T])  # of r: what the heads want
    values = []
    for _ in range(300):
        optimizer.zero_grad()
        r = method.rotations().detach()
        combine(method, torch.einsum("nbd,ndk->nbk", fixed, r).flatten(1))
        method._direction.backward()
        optimizer.step()
        values.append(method._direction.item())
    assert values[-1] < 1e-3 * values[0]


@pytest.mark.parametrize("dims", [(), (5,)])
def test_rotations_fold_into_towers(dims):
    method, towers = RotoGrad(3, 4).double(), Towers(4, 3, dims).double()
    with torch.no_grad():
        method.skew.normal_()
    z = draw(6, 4)
    wanted = towers(method.rotate(z))
    method.fold(towers)
    torch.testing.assert_close(towers(z.unsqueeze(1).expand(6, 3, 4).contiguous()), wanted)
    torch.testing.assert_close(method.rotate(z), z.unsqueeze(1).expand(6, 3, 4))


def test_one_task_is_left_as_it_is():
    rows = draw(1, 8)
    for found in (project(gram(rows)) @ rows, least_norm(gram(rows)) @ rows, combine(RotoGrad(1, 4).double(), rows)):
        torch.testing.assert_close(found, rows[0])
    assert all(dropped(rows)[i] == rows[0, i] for i in itertools.chain(range(8)))
