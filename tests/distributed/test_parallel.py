"""Networks on several ranks equal the same network on one: outputs, gradients, losses."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from python_models import (
    CGC,
    ESMM,
    MRN,
    MTAN,
    PLE,
    STAR,
    AdaShare,
    AdaTT,
    BranchedMTL,
    CrossStitch,
    LearnedBranching,
    MMoE,
    MultiTaskModel,
    SharedBottom,
    Sluice,
    SNRAver,
    SNRTrans,
    SoftOrdering,
    SoftSharing,
    Towers,
    UberNet,
)

from .world import run

T = 3
FUSIONS = {
    "mmoe": lambda **b: MMoE(6, T, [5, 3], [[5, 4], [4]], **b),
    "mmoe, then one": lambda **b: MMoE(6, T, [3, 1], [[5], [4]], **b),
    "mmoe, one first": lambda **b: MMoE(6, T, [1, 3], [[5], [4]], **b),
    "omoe": lambda **b: MMoE(6, T, 5, [[5, 4]], gate_dims=[3], omoe=True, **b),
    "ple": lambda **b: PLE(6, T, [[1, 2, 0], [2, 1, 1]], [2, 1], [[5, 4], [4]], **b),
    "ple, no shared": lambda **b: PLE(6, T, [1, 2, 3], 0, [[5], [4]], gate_dims=[3], **b),
    "cgc": lambda **b: CGC(6, T, 0, 5, [5, 4], **b),
    "adatt": lambda **b: AdaTT(6, T, [[1, 2, 2], [2, 0, 1]], [1, 2], [[5, 4], [4]], **b),
    "adatt, ones": lambda **b: AdaTT(6, T, 1, 0, [[5], [4]], **b),
    "adatt, plain": lambda **b: AdaTT(6, T, 2, 0, [[5], [4]], residual=False, **b),
    "cross stitch": lambda **b: CrossStitch(6, T, [[5, 4], [4]], **b),
    "sluice": lambda **b: Sluice(6, T, [[4], [4]], **b),
    "snr-aver": lambda **b: SNRAver(6, T, [3, 2], [[5], [4]], **b),
    "branched": lambda **b: BranchedMTL(6, T, [[5], [4]], [[[0, 1, 2]], [[0], [1, 2]]], **b),
    "soft ordering": lambda **b: SoftOrdering(6, T, 4, 2, **b),
    "soft sharing": lambda **b: SoftSharing(6, T, [5, 4], **b),
    "mtan": lambda **b: MTAN(6, T, [5, 4], **{"norm": None, **b}),
    "learned branching": lambda **b: LearnedBranching(6, T, [3, 2], [[5], [4]], **b),
    "esmm": lambda **b: Named(ESMM(6, [5, 4], **b)),
}
# Nothing in these is a bank of experts: they are spread by rows and features.
NO_BANKS = {
    "shared bottom": lambda **b: SharedBottom(6, T, [5, 4], **b),
    "adashare": lambda **b: AdaShare(6, T, [[5], [4]], **b),
    "snr-trans": lambda **b: SNRTrans(6, T, 3, [[5, 4], [4]], **b),
    "ubernet": lambda **b: UberNet(6, T, [5, 4], **b),
    "mrn": lambda **b: MRN(6, T, [5, 4], [3], **b),
    "star": lambda **b: Named(STAR(6, 3, [5, 4], **b)),
}


class Named(nn.Module):
    """STAR and ESMM as the others are: one tensor in, one out."""

    def __init__(self, network):
        super().__init__()
        self.network, self.in_features = network, 6

    def forward(self, x):
        if isinstance(self.network, STAR):
            return self.network(x, (x[:, 0] > 0).long())[:, None]
        return torch.stack(list(self.network(x).values()), 1)


def build(name, **options):
    torch.manual_seed(3)
    network = {**FUSIONS, **NO_BANKS}[name](**options)
    heads = isinstance(network, (Named, UberNet, MRN))
    return (network if heads else MultiTaskModel(network, Towers(4, T, [3]))).double()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def close(found, expected, name):
    torch.testing.assert_close(
        whole(found.detach()), expected.detach(), rtol=1e-11, atol=1e-12, msg=lambda text: f"{name}: {text}"
    )


def mesh_of(ranks, plan):
    from python_models.parallel import parallelize

    plan = [plan] if isinstance(plan, str) else plan
    shape = (ranks,) if len(plan) == 1 else (2, ranks // 2)
    return parallelize, init_device_mesh("cpu", shape, mesh_dim_names=tuple(plan))


def same(rank, ranks, plan, names, options):
    """Output and every gradient; ranks of "data" and "fsdp" have a part of the rows, and average."""
    parallelize, mesh = mesh_of(ranks, plan)
    failed = {}
    for name in names:
        try:
            one = build(name, **options).train(name not in ("star", "ubernet"))  # its statistics are each rank's own
            spread = parallelize(copy.deepcopy(one), mesh, plan)
            torch.manual_seed(4)
            x, parts, part = torch.randn(8, 6).double(), 1, 0
            for axis in ("data", "fsdp"):
                if axis in mesh.mesh_dim_names:
                    parts, part = mesh[axis].size(), mesh[axis].get_local_rank()
            rows = slice(part * 8 // parts, (part + 1) * 8 // parts)
            a, b = x.clone().requires_grad_(), x[rows].clone().requires_grad_()
            torch.manual_seed(5)  # of connections and policies that are drawn
            expected = one(a)
            torch.manual_seed(5)
            found = spread(b)
            if not options.get("norm") == "batch" or parts == 1:
                close(found, expected[rows], name)
            weight = torch.randn_like(expected)
            (expected * weight).mean().backward()
            (found * weight[rows]).mean().backward()
            close(b.grad, a.grad[rows] * parts, f"{name} x")
            theirs = dict(one.named_parameters())
            for key, p in spread.named_parameters():
                assert p.grad is not None, key
                close(p.grad, theirs.pop(key).grad, f"{name} {key}")
            assert not theirs
            for key, value in spread.named_buffers():
                if parts == 1:
                    close(value, one.get_buffer(key), f"{name} {key}")
        except Exception as error:
            import traceback

            failed[name] = "".join(traceback.format_exception(error))[-3000:]
    return failed


def check(ranks, plan, names, **options):
    for rank, failed in enumerate(run(ranks, same, ranks, plan, names, options)):
        assert not failed, f"rank {rank}\n" + "\n".join(f"{k}: {v}" for k, v in failed.items())


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_experts(ranks):
    check(ranks, "experts", list(FUSIONS))


ALL = [*FUSIONS, *NO_BANKS]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_features(ranks):
    """Widths 5 and 4: uneven, and on four ranks one has none."""
    check(ranks, "features", ALL)


BETWEEN = [{"dropout": 0.4}, {"norm": "layer"}, {"norm": "batch"}]


@pytest.mark.parametrize(
    "options", [BETWEEN[0], *(pytest.param(o, marks=pytest.mark.slow) for o in BETWEEN[1:])], ids=str
)
def test_what_lies_between_the_layers(options):
    """Norms are of all features, and masks those that one process draws."""
    names = ["mmoe", "ple", "shared bottom", "adashare", "snr-trans", "ubernet", "mrn", "mtan"]
    check(2, "features", names + (["star"] if "dropout" in options else []), **options)


def fallback(rank):
    """STAR serving an id that it does not know: the tables are longer by a row."""
    parallelize, mesh = mesh_of(2, "features")
    one = STAR(6, 3, [5, 4], fallback="shared").double()
    with torch.no_grad():
        for p in one.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    sum_of_logits = STAR(6, 3, [5], mode="logit_sum", fallback="shared").double()
    x, domain = torch.randn(6, 6, generator=torch.Generator().manual_seed(1)).double(), torch.arange(6) - 1
    for network in (one, sum_of_logits):
        torch.distributed.broadcast(flat := torch.nn.utils.parameters_to_vector(network.parameters()).detach(), 0)
        torch.nn.utils.vector_to_parameters(flat, network.parameters())
        spread = parallelize(copy.deepcopy(network), mesh, "features")
        close(spread.eval()(x, domain), network.eval()(x, domain), "fallback")


def test_unknown_domains():
    run(2, fallback)


def cut(rank, names):
    """How many of the elements of the parameters this rank has."""
    parallelize, mesh = mesh_of(2, "features")
    found = {}
    for name in names:
        model = parallelize(build(name), mesh, "features")
        assert list(model.state_dict()) == list(build(name).state_dict())
        spread = [p for p in model.parameters() if isinstance(p, DTensor)]
        found[name] = sum(p.to_local().numel() for p in spread), sum(p.numel() for p in spread)
    return found


def test_every_network_is_cut_by_features():
    first, second = run(2, cut, ALL)
    for name in ALL:
        (a, whole), (b, _) = first[name], second[name]
        assert 0 < b <= a < whole == a + b, name


MIXED = ["mmoe", "ple", "adatt"]
OPTIONS = [{"norm": "batch"}, {"norm": "layer"}, {"gate_logit_norm": True}, {"gate_dims": [3], "gate_norm": "batch"}]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options):
    """Running statistics lie with their experts."""
    check(4, "experts", MIXED, **options)


def gates(rank):
    parallelize, mesh = mesh_of(2, "experts")
    for name in MIXED:
        one = build(name)
        spread, x = parallelize(copy.deepcopy(one), mesh, "experts"), torch.randn(5, 6).double()
        a, b = one(x, return_gates=True), spread(x, return_gates=True)
        close(b[0], a[0], name)
        for level, (left, right) in enumerate(zip(b[1], a[1], strict=True)):
            assert not isinstance(left, DTensor)
            close(left, right, f"{name} {level}")
        found, expected = ([*m.parameters()] for m in (spread, one))
        a, b = (
            torch.autograd.grad(sum(w.square().sum() for w in g), p, allow_unused=True)
            for (_, g), p in ((a, expected), (b, found))
        )
        for left, right in zip(b, a, strict=True):
            assert (left is None) == (right is None)
            if left is not None:
                close(left, right, name)


def test_gate_weights_come_whole_with_their_gradients():
    run(2, gates)


def sizes(rank, ranks):
    parallelize, mesh = mesh_of(ranks, "experts")
    model = parallelize(build("mmoe"), mesh, "experts")
    assert list(model.state_dict()) == list(build("mmoe").state_dict())
    return [
        tuple(model.get_parameter(f"fusion.{key}").to_local().shape)
        for key in ("experts.0.linears.0.weight", "gates.0.logits.weight")
    ]


def test_every_rank_has_its_own_experts_alone():
    assert [s[0][0] for s in run(4, sizes, 4)] == [2, 2, 1, 0]
    assert [s[1][:2] for s in run(2, sizes, 2)] == [(3, 3), (3, 2)]


def ddp(rank, names):
    """torch's own wrapper around a network that is whole on every rank."""
    for name in names:
        one = build(name).train(name not in ("star", "ubernet"))
        spread = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(one))
        x, rows = torch.randn(8, 6, generator=torch.Generator().manual_seed(4)).double(), slice(4 * rank, 4 * rank + 4)
        for model, part in ((one, x), (spread, x[rows])):
            torch.manual_seed(5)
            model(part).square().mean().backward()
        for (key, p), q in zip(one.named_parameters(), spread.parameters(), strict=True):
            close(q.grad, p.grad, f"{name} {key}")


def test_distributed_data_parallel():
    run(2, ddp, ALL)


def refused(rank):
    from python_models.parallel import parallelize

    line = init_device_mesh("cpu", (2,), mesh_dim_names=("experts",))
    for model, plan, message in (
        (build("shared bottom"), "experts", "no bank of two experts"),
        (build("mmoe"), "rows", "plan must name one of"),
        (build("mmoe"), ("data", "experts"), "each of mesh's 1 dimensions"),
        (Towers(4, T, [3]), "features", "no layer of two features"),
    ):
        with pytest.raises(ValueError, match=message):
            parallelize(model, line, plan)
    square = init_device_mesh("cpu", (2, 1), mesh_dim_names=("experts", "features"))
    with pytest.raises(ValueError, match="both experts and features"):
        parallelize(build("mmoe"), square, ("experts", "features"))
    with pytest.raises(TypeError, match="model must be a module"):
        parallelize("mmoe", line, "experts")


def test_bad_arguments():
    run(2, refused)


ROWS = ["fsdp", "data", ("fsdp", "experts"), ("data", "experts"), ("experts", "data"), ("experts", "fsdp")]
ROWS += [("fsdp", "features"), ("features", "data")]


@pytest.mark.parametrize("plan", [p if p in ROWS[2:3] else pytest.param(p, marks=pytest.mark.slow) for p in ROWS])
def test_rows(plan):
    names = MIXED if plan == ROWS[2] else list(FUSIONS) if "experts" in plan else ALL
    check(2 if isinstance(plan, str) else 4, plan, names)
