"""Every operator on DTensors equals the operator on one process: forward, every gradient, however its arguments lie."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import mtlkernels as mtl
from mtlkernels import _library
from mtlkernels.exchange import own_part

from .counted import Counted
from .world import run

R = Replicate()


def _draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def _mask(*shape):
    mask = torch.rand(*shape) > 0.4
    mask[0] = False
    return mask


def cases():
    """name -> (call of a dict of tensors, the tensors, placements of each on a 1-D mesh, one dict a way to lie)."""
    torch.manual_seed(0)
    S = Shard
    x, units, domain = _draw(6, 4), _draw(6, 5, 4), torch.arange(6) % 3
    w, b = _draw(5, 3, 4), _draw(5, 3)
    found = {}

    def add(name, call, tensors, *lies):
        for i, lie in enumerate(({}, *lies)):
            found[f"{name} {i}"] = (call, tensors, lie)

    for act in (None, "relu", "gelu"):
        lies = [dict(x=S(0)), dict(w=S(0), b=S(0)), dict(w=S(1), b=S(1)), dict(w=S(2), x=S(1)), dict(w=S(0), x=S(0))]
        add(
            f"expert_linear {act}",
            lambda t, act=act: mtl.expert_linear(t["x"], t["w"], t["b"], activation=act),
            dict(x=x, w=w, b=b),
            *lies,
        )
    add("expert_linear K", lambda t: mtl.expert_linear(t["x"], t["w"]), dict(x=x, w=w), dict(w=S(2), x=S(1)))
    add(
        "expert_linear one a unit",
        lambda t: mtl.expert_linear(t["x"], t["w"], t["b"], activation="tanh"),
        dict(x=units, w=w, b=b),
        dict(w=S(0), b=S(0)),
        dict(w=S(0), b=S(0), x=S(1)),
        dict(x=S(0)),
        dict(x=S(2), w=S(2)),
    )
    add(
        "expert_linear units",
        lambda t: mtl.expert_linear(t["x"], t["w"], t["b"], activation="silu", experts_per_unit=[2, 0, 3]),
        dict(x=_draw(6, 3, 4), w=w, b=b),
        dict(w=S(0), b=S(0)),
        dict(w=S(0)),
        dict(x=S(0)),
    )
    h, logits, static = _draw(6, 5, 3), 3 * _draw(6, 2, 5), _draw(2, 5)
    some = [dict(h=S(1)), dict(h=S(1), logits=S(2)), dict(h=S(0)), dict(h=S(2)), dict(h=S(0), logits=S(0))]
    add("mix logits", lambda t: mtl.mix(t["h"], t["logits"]), dict(h=h, logits=logits), *some, dict(logits=S(1)))
    both = dict(h=h, logits=logits, static=static)
    add("mix both", lambda t: mtl.mix(t["h"], t["logits"], t["static"]), both, *some, dict(h=S(1), static=S(1)))
    mask = _mask(2, 5)
    add("mix masked", lambda t: mtl.mix(t["h"], t["logits"], t["static"], mask=mask), both, *some)
    add("mix static", lambda t: mtl.linear_mix(t["h"], t["s"]), dict(h=h, s=static), dict(h=S(1)), dict(s=S(0)))
    add("mix channels", lambda t: mtl.linear_mix(t["h"], t["s"]), dict(h=h, s=_draw(2, 5, 3)), *some[:1], *some[2:4])
    routes = mtl.Routes([0, 3, 3, 5], [0, 3, 4, 1, 3], 5)
    packed = dict(h=h, logits=_draw(6, 5), static=_draw(5))
    add("mix routes", lambda t: mtl.mix(t["h"], t["logits"], routes=routes), packed, *some[:1], *some[2:4])
    add("mix routes both", lambda t: mtl.mix(t["h"], t["logits"], t["static"], routes=routes), packed, dict(h=S(1)))
    add("mix routes static", lambda t: mtl.mix(t["h"], None, t["static"], routes=routes), packed, dict(h=S(1)))
    for native, counts in ((_draw(3), [1, 2, 2]), (None, [1, 1, 3])):
        add(
            f"adatt {counts}",
            lambda t, counts=counts: mtl.adatt_mix(t["h"], t["logits"], t.get("v"), experts_per_unit=counts),
            dict(h=h, logits=logits, **({} if native is None else {"v": native})),
            *some,
        )
    every = dict(x=x, w=w, b=b, logits=logits, static=static)
    for name in ("logits", "static", "both"):
        add(
            f"expert_mix {name}",
            lambda t, name=name: mtl.expert_mix(
                t["x"],
                t["w"],
                t["b"],
                None if name == "static" else t["logits"],
                None if name == "logits" else t["static"],
                activation="gelu",
            ),
            every,
            dict(x=S(0)),
            dict(w=S(1), b=S(1)),
            dict(w=S(0), b=S(0), static=S(1)),
            dict(logits=S(1), static=S(0)),
        )
    j = dict(x=_draw(6, 2, 4), w=_draw(3, 2, 5, 4), g=torch.rand(3, 2, dtype=torch.float64), b=_draw(3, 5))
    for bias in (True, False):
        add(
            f"snr_linear {bias}",
            lambda t, bias=bias: mtl.snr_linear(t["x"], t["w"], t["g"], t["b"] if bias else None),
            j,
            dict(x=S(0)),
            dict(w=S(0), g=S(0), b=S(0)),
            dict(w=S(2), b=S(1)),
            dict(x=S(1), w=S(1), g=S(1)),
        )
    star = dict(x=x, w=_draw(3, 4), dw=_draw(3, 3, 4), b=_draw(3), db=_draw(3, 3), d=domain)
    for act in (None, "silu"):
        add(
            f"star_linear {act}",
            lambda t, act=act: mtl.star_linear(t["x"], t["d"], t["w"], t["dw"], t["b"], t["db"], activation=act),
            star,
            dict(x=S(0), d=S(0)),
            dict(w=S(0), dw=S(1), b=S(0), db=S(1)),
            dict(x=S(1), w=S(1), dw=S(2)),
            dict(x=S(0)),
        )
    lie = dict(x=S(1), w=S(1), dw=S(2))
    add("star_linear K", lambda t: mtl.star_linear(t["x"], t["d"], t["w"], t["dw"]), star, lie)
    y = (_draw(6, 2) > 0).double()
    m = torch.tensor([[1, 0, 2.0, 0, 1, 3], [0, 1, 1, 1, 0, 0]], dtype=torch.float64).T
    bce = dict(z=_draw(6, 2), y=y, m=m)
    add(
        "masked_bce",
        lambda t: mtl.masked_bce(t["z"], t["y"].detach()),
        bce,
        dict(z=S(0), y=S(0)),
        dict(z=S(1)),
        dict(z=S(0)),
    )
    add(
        "masked_bce m",
        lambda t: mtl.masked_bce(t["z"], t["y"].detach(), t["m"].detach()),
        bce,
        dict(z=S(0), y=S(0), m=S(0)),
    )
    esmm = dict(a=_draw(7), c=_draw(7), y=torch.ones(7).double(), z=torch.tensor([0, 1, 0, 1, 1, 0, 0.0]).double())
    add(
        "esmm_loss",
        lambda t: mtl.esmm_loss(t["a"], t["c"], t["y"].detach(), t["z"].detach(), ctcvr_weight=2.0),
        esmm,
        dict(a=S(0)),
        dict(a=S(0), c=S(0), y=S(0), z=S(0)),
    )
    phi = dict(phi=_draw(3, 5), u=torch.rand(3, 5).double())
    add("hard_concrete", lambda t: mtl.hard_concrete(t["phi"], t["u"]), phi, dict(phi=S(1)), dict(phi=S(0), u=S(0)))
    add("hard_concrete serving", lambda t: mtl.hard_concrete(t["phi"]), phi, dict(phi=S(1)))
    add("hard_concrete_l0", lambda t: mtl.hard_concrete_l0(t["phi"]), phi, dict(phi=S(1)), dict(phi=S(0)))
    norm = dict(x=x, d=domain, w=_draw(4), b=_draw(4), dw=_draw(3, 4), db=_draw(3, 4))
    for training in (True, False):
        add(
            f"partitioned_norm {training}",
            lambda t, training=training: _norm(t, training),
            norm,
            dict(x=S(0), d=S(0)),
            dict(x=S(1), w=S(0), b=S(0), dw=S(1), db=S(1)),
        )
    return found


def _norm(t, training):
    mean, var = (f(3, 4, dtype=torch.float64) for f in (torch.zeros, torch.ones))
    if isinstance(t["x"], DTensor):
        mean, var = (distribute_tensor(s, t["x"].device_mesh, [R]) for s in (mean, var))
    args = (t["x"], t["d"], t["w"], t["b"], t["dw"], t["db"], mean, var)
    return mtl.partitioned_norm(*args, training=training)


def _leaf(tensor):
    return tensor.detach().clone().requires_grad_(tensor.is_floating_point())


def check(rank, ranks):
    """Every case; the worst of each that fails."""
    import mtlkernels.sharding  # noqa: F401  its import registers the rules

    mesh, failed = init_device_mesh("cpu", (ranks,)), {}
    for name, (call, tensors, lie) in cases().items():
        plain = {k: _leaf(t) for k, t in tensors.items()}
        spread = {
            k: distribute_tensor(t.detach(), mesh, [lie.get(k, R)]).requires_grad_(t.is_floating_point())
            for k, t in tensors.items()
        }
        try:
            expected = call(plain)
            torch.manual_seed(1)
            grad = torch.randn_like(expected)
            expected.backward(grad)
            found = call(spread).full_tensor()
            found.backward(grad)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
            for k, t in plain.items():
                if t.grad is None:
                    assert spread[k].grad is None or not spread[k].grad.full_tensor().any(), k
                else:
                    torch.testing.assert_close(spread[k].grad.full_tensor(), t.grad, rtol=1e-12, atol=1e-12, msg=k)
        except Exception as error:
            failed[f"{name} {lie}"] = f"{type(error).__name__}: {error}"[:600]
    return failed


@pytest.mark.skipif(not _library.loaded(), reason=_library.reason() or "loaded")
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_operators_on_dtensors(ranks):
    """Five experts, six rows, three features: uneven on 2 and on 4 ranks, where one has none at all."""
    for rank, failed in enumerate(run(ranks, check, ranks)):
        assert not failed, f"rank {rank}: {len(failed)} failed: " + "\n".join(f"{k}: {v}" for k, v in failed.items())


def scattered(rank, ranks):
    """The mix of experts on several ranks, reduced to this rank's rows; nothing but that is sent for [B,T,D]."""
    import mtlkernels.sharding  # noqa: F401

    mesh, S = init_device_mesh("cpu", (ranks,)), Shard
    torch.manual_seed(2)
    h, logits, static = _draw(6, 5, 3), 3 * _draw(6, 2, 5), _draw(2, 5)
    routes = mtl.Routes([0, 3, 3, 5], [0, 3, 4, 1, 3], 5)
    calls = {
        "softmax": (lambda h, w: mtl.mix(h, w), logits, S(2)),
        "packed": (lambda h, w: mtl.mix(h, w, routes=routes), _draw(6, 5), R),
        "static": (lambda h, w: mtl.linear_mix(h, w), static, S(1)),
        "residual": (lambda h, w: mtl.adatt_mix(h, w, None, experts_per_unit=[1, 1, 3]), logits, S(2)),
    }
    begin, end = own_part(6, (mesh, 0))
    found = {}
    for name, (call, weights, lie) in calls.items():
        a, b = _leaf(h), _leaf(weights)
        expected = call(a, b)
        grad = torch.randn_like(expected)
        expected.backward(grad)
        c, d = (distribute_tensor(t, mesh, [at]).requires_grad_() for t, at in ((h, S(1)), (weights, lie)))
        partial = call(c, d)
        assert partial.placements == (Partial(),), name
        with Counted(ranks) as counted:
            rows = partial.redistribute(placements=[S(0)])
        torch.testing.assert_close(rows.to_local(), expected[begin:end], rtol=1e-12, atol=1e-12)
        with Counted(ranks) as back:
            rows.to_local().backward(grad[begin:end])
        for own, whole in ((c, a), (d, b)):
            torch.testing.assert_close(own.grad.full_tensor(), whole.grad, rtol=1e-12, atol=1e-12, msg=name)
        found[name] = counted.calls, [call for call in back.calls if call[0] == "all_gather"], expected[0].numel() * 8
    return found


@pytest.mark.skipif(not _library.loaded(), reason=_library.reason() or "loaded")
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_mix_is_scattered_as_it_is_reduced(ranks):
    """Half of an all-reduce's bytes; the gradient comes back by one gather. Six rows on four ranks: one has none."""
    rows = -(-6 // ranks) * ranks
    for found in run(ranks, scattered, ranks):
        for name, (forward, backward, row) in found.items():
            assert forward == [("reduce_scatter", rows * row)], name
            assert backward == [("all_gather", rows * row)], name


def silent(rank):
    """Calls whose arguments lie as a rule has them: what is sent on the way forward."""
    import mtlkernels.sharding  # noqa: F401

    mesh, sent, known = init_device_mesh("cpu", (2,)), {}, cases()
    for name in ("expert_linear relu 1", "expert_linear relu 2", "expert_linear gelu 3", "mix logits 3", "mix both 4",
                 "mix static 1", "expert_mix both 1", "snr_linear True 2", "star_linear silu 1",
                 "star_linear K 1"):  # fmt: skip
        call, tensors, lie = known[name]
        spread = {k: distribute_tensor(t.detach(), mesh, [lie.get(k, R)]) for k, t in tensors.items()}
        # What a rule cuts without sending may be given whole.
        with Counted(2) as counted:
            call(spread)
        sent[name] = counted.calls
    return sent


@pytest.mark.skipif(not _library.loaded(), reason=_library.reason() or "loaded")
def test_a_rule_that_fits_sends_nothing():
    for sent in run(2, silent):
        assert not any(sent.values()), sent
