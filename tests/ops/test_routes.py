"""Routes: how they are built, what they refuse, and that a packed mix is the masked one."""

import pytest
import torch

import mtlkernels as mtl

from .cases import agree, close, each_backend, each_dtype, outcome

MASK = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 1, 0, 0, 1]], dtype=torch.bool)


def test_columns():
    routes = mtl.Routes([0, 2, 2, 5], [3, 0, 1, 2, 0], 4)
    assert (routes.num_rows, routes.num_experts, routes.num_routes) == (3, 4, 5)
    assert routes.columns.dtype == torch.int32
    assert routes.columns.tolist() == [[1, -1, -1, 0], [-1, -1, -1, -1], [4, 2, 3, -1]]
    assert routes.offsets.tolist() == [0, 2, 2, 5] and routes.experts.tolist() == [3, 0, 1, 2, 0]
    assert repr(routes) == "Routes(rows=3, experts=4, routes=5)"
    same = mtl.Routes(torch.tensor([0, 2, 2, 5], dtype=torch.int32), torch.tensor([3, 0, 1, 2, 0]), 4)
    assert torch.equal(same.columns, routes.columns)


def test_from_mask():
    routes = mtl.Routes.from_mask(MASK)
    assert routes.columns.tolist() == [[0, -1, 1, 2, -1], [-1] * 5, [-1, -1, 3, -1, -1], [-1, 4, -1, -1, 5]]
    assert torch.equal(routes.columns >= 0, MASK)
    for shape in ((0, 3), (3, 0), (0, 0)):
        empty = mtl.Routes.from_mask(torch.zeros(shape, dtype=torch.bool))
        assert empty.columns.shape == shape and empty.num_routes == 0


def test_by_unit():
    routes = mtl.Routes.by_unit((2, 0, 1, 2), [(0, 3), (1,), (3, 2, 0)])
    assert routes.experts.tolist() == [0, 1, 3, 4, 3, 4, 2, 0, 1] and routes.offsets.tolist() == [0, 4, 4, 9]
    assert routes.num_experts == 5
    assert mtl.Routes.by_unit((2, 1), []).num_rows == 0


def test_to():
    routes = mtl.Routes.from_mask(MASK)
    assert routes.to("cpu") is routes
    moved = routes.to("meta")
    assert moved.columns.device.type == moved.offsets.device.type == moved.experts.device.type == "meta"
    assert routes.columns.device.type == "cpu" and moved.num_routes == 6


BAD = {
    "offsets empty": ("offsets must be", ([], [], 3)),
    "offsets from 1": ("offsets must be.*1", ([1, 2], [0, 1], 3)),
    "offsets fall": ("offsets must be", ([0, 2, 1], [0], 3)),
    "offsets a table": ("offsets must be", ([[0, 1]], [0], 3)),
    "offsets too short": (r"experts must be \[R\] with R = offsets\[-1\] = 1; got \[2\]", ([0, 1], [0, 1], 3)),
    "experts a table": ("experts must be", ([0, 1], [[0]], 3)),
    "experts too large": (r"experts must lie in \[0, 3\)", ([0, 1], [3], 3)),
    "experts negative": ("experts must lie in", ([0, 1], [-1], 3)),
    "twice in a row": ("experts must not name an expert twice", ([0, 2], [1, 1], 3)),
    "no experts": ("experts must lie in", ([0, 1], [0], 0)),
    "num_experts negative": ("num_experts", ([0], [], -1)),
}


@pytest.mark.parametrize("match, args", [pytest.param(*v, id=k) for k, v in BAD.items()])
def test_bad_input(match, args):
    with pytest.raises(ValueError, match=match):
        mtl.Routes(*args)


def test_bad_mask_and_units():
    for mask in (MASK.float(), MASK[0], MASK.tolist()):
        with pytest.raises(ValueError, match=r"mask must be a \[T,E\] bool tensor"):
            mtl.Routes.from_mask(mask)
    with pytest.raises(ValueError, match="units"):
        mtl.Routes.by_unit((1, 1), [(0, 2)])
    with pytest.raises(ValueError, match="units"):
        mtl.Routes.by_unit((1, 1), [(-1,)])
    with pytest.raises(ValueError, match="experts_per_unit"):
        mtl.Routes.by_unit((1, -1), [(0,)])
    with pytest.raises(ValueError, match="experts must not name an expert twice"):
        mtl.Routes.by_unit((1, 1), [(0, 0)])


def test_fractions_are_refused():
    with pytest.raises((TypeError, ValueError), match="offsets"):
        mtl.Routes(torch.tensor([0.0, 1.5]), torch.tensor([0]), 3)
    with pytest.raises((TypeError, ValueError), match="experts"):
        mtl.Routes(torch.tensor([0, 1]), torch.tensor([0.5]), 3)


@each_backend
@each_dtype
def test_packed_is_masked(dtype, backend):
    """Routes in any order give what the mask of the same experts gives."""
    order = [3, 0, 2, 2, 4, 1]  # of the experts of each row
    routes = mtl.Routes([0, 3, 3, 4, 6], order, 5)
    gen = torch.Generator().manual_seed(0)
    experts = torch.randn(9, 5, 17, generator=gen, dtype=torch.float64)
    logits = torch.randn(9, 4, 5, generator=gen, dtype=torch.float64)
    static = torch.randn(4, 5, generator=gen, dtype=torch.float64)
    rows = torch.repeat_interleave(torch.arange(4), routes.offsets.diff())
    tensors = [t.to(dtype) for t in (experts, logits[:, rows, order], static[rows, order])]
    wide = [t.to(dtype).double() for t in (experts, logits, static)]

    def quarter(out):
        return torch.full_like(out, 0.25)

    found = outcome(lambda *t: mtl.mix(*t, routes=routes, backend=backend), tensors, quarter)
    wanted = outcome(lambda *t: mtl.mix(*t, mask=MASK, backend="reference"), wide, quarter)
    dexperts, dlogits, dstatic = wanted.grads
    wanted = wanted._replace(grads=[dexperts, dlogits[:, rows, order], dstatic[rows, order]])
    agree(found, wanted, tensors)


@each_backend
def test_one_gate_for_all(backend):
    """Every row with every expert: routes, mask and neither agree."""
    experts, logits = torch.randn(4, 3, 5), torch.randn(4, 2, 3)
    all_true = torch.ones(2, 3, dtype=torch.bool)
    dense = mtl.mix(experts, logits, backend=backend)
    close(mtl.mix(experts, logits, mask=all_true, backend=backend), dense)
    packed = mtl.mix(experts, logits.flatten(1), routes=mtl.Routes.from_mask(all_true), backend=backend)
    close(packed, dense)
