"""The connection variables of SNR by themselves."""

import math

import pytest
import torch

from python_models.connections import Connections

LIKE = torch.zeros(1, dtype=torch.float64)
LIMIT = math.log(100)


def make(*phi, **options):
    """One row of connections with these log_alpha."""
    connections = Connections(1, len(phi), dtype=torch.float64, **options)
    with torch.no_grad():
        connections.log_alpha.copy_(torch.tensor([phi]))
    return connections


def test_how_often_open_and_closed():
    """SPEC's chances at log alpha 0.7, within four standard errors; the penalty is one minus that of 0."""
    torch.manual_seed(0)
    n = 200_000
    z = make(*[0.7] * n)(LIKE)
    for found, chance in (((z == 0), 0.0912), ((z == 1), 0.2893)):
        assert abs(found.double().mean() - chance) < 4 * math.sqrt(chance * (1 - chance) / n) + 5e-5
    assert abs(make(0.7).l0() - (1 - 0.0912)) < 5e-5


def test_estimate_needs_no_beta():
    edge = math.log(1.1 / 0.1)  # beyond it z is 1, and below minus it 0
    connections = make(-edge - 0.01, -edge + 0.01, 0.0, edge - 0.01, edge + 0.01, beta=0.1)
    z = connections.estimate(LIKE)
    assert torch.equal(z, connections.eval()(LIKE))
    assert z[0, 0] == 0 and 0 < z[0, 1] < 0.01 and abs(z[0, 2] - 0.5) < 1e-15 and 0.99 < z[0, 3] < 1 and z[0, 4] == 1


def test_clamp_after_the_optimiser():
    for clamp in (True, False):
        connections = make(-9.0, 9.0, 0.5, clamp=clamp)
        phi = connections.log_alpha
        connections.eval()(LIKE)
        with torch.no_grad():
            connections.train()(LIKE)
        assert phi.tolist() == [[-9, 9, 0.5]]  # nothing is trained here
        loss = connections(LIKE).sum() + connections(LIKE).sum() + connections.l0()
        loss.backward()  # the later calls do not disturb the graph of the first
        assert phi.tolist() == [[-LIMIT, LIMIT, 0.5] if clamp else [-9, 9, 0.5]]
        assert phi.grad.all()  # at the limit a connection can still come back
        torch.optim.SGD([phi], lr=1e3).step()
        connections(LIKE)
        assert phi.abs().max() <= LIMIT if clamp else phi.abs().max() > LIMIT
    assert make(-20.0, gamma=-1e-4).estimate(LIKE) > 0  # as it serves, too, the parameter counts as cut
    assert make(-20.0, gamma=-1e-4, clamp=False).estimate(LIKE) == 0


@pytest.mark.parametrize(("delta", "mean"), [(0.5, 0.0), (0.9, math.log(0.1 / 0.9))])
def test_starts(delta, mean):
    torch.manual_seed(0)
    phi = Connections(100, 200, delta=delta).log_alpha
    assert abs(phi.mean() - mean) < 1e-3 and 0.009 < phi.std() < 0.011


def test_all_open_where_nothing_is_learned():
    connections = Connections(2, 3, learned=False)
    assert not list(connections.parameters())
    assert (
        torch.equal(connections(LIKE), torch.ones(2, 3).double()) and connections(LIKE.bfloat16()).dtype.itemsize == 2
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_noise_is_the_generators(dtype):
    one, two = (Connections(3, 4, dtype=dtype, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    two.load_state_dict(one.state_dict())
    state = torch.get_rng_state()
    first = one(LIKE)
    assert first.dtype == dtype and torch.equal(first, two(LIKE)) and not torch.equal(first, one(LIKE))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(gamma=0.1), ValueError, "gamma must be below 0"),
        (dict(zeta=1.0), ValueError, "zeta must be above 1"),
        (dict(beta=0), ValueError, "beta must be above 0"),
        (dict(delta=1.0), ValueError, "delta must be a number between 0 and 1; got 1.0"),
        (dict(clamp=1), TypeError, "clamp must be a bool; got 1"),
        (dict(generator=3), TypeError, "generator must be a torch.Generator; got int"),
    ],
)
def test_bad_arguments(change, error, words):
    with pytest.raises(error, match=words):
        Connections(2, 3, **change)
