"""torch.export of every network, as it is and for serving: at any batch size, with our operators or without them."""

import pytest
import torch
from test_multitask import FUSIONS, model

import mtlkernels as mtl
from mtlkernels import _library
from python_models import (
    ESMM,
    MRN,
    STAR,
    AdaShare,
    LearnedBranching,
    MultiTaskModel,
    SNRAver,
    SNRTrans,
    Towers,
    UberNet,
)


def snr(kind):
    """An SNR network that training has left with open, half open and closed connections."""
    network = kind(6, 2, 3, [[5, 4], [4]])
    with torch.no_grad():
        for level in network.levels:
            level.connections.log_alpha.normal_(std=4)
            level.connections.log_alpha[:, 0] = 4
    return network


def star(mode="product", domain=None, serving=False, **options):
    network = STAR(6, 3, [5, 4], mode=mode, domain_features=3, aux_dims=[4], **options)
    context = [torch.randn(20, network.context_features)] if network.context_features else []
    network(1 + torch.randn(20, 6), torch.arange(20) % 3, *context)  # running statistics
    return network.for_serving(domain=domain) if serving or domain is not None else network


# The networks on towers, and those that come with heads of their own.
NETWORKS = {name: lambda make=make: model(make) for name, make in FUSIONS.items()}
NETWORKS |= {
    f"{name}, norms": lambda name=name: model(FUSIONS[name], norm="batch", dropout=0.1).eval()
    for name in ("mmoe", "ple", "adatt")
}
NETWORKS |= {
    "adashare": lambda: MultiTaskModel(AdaShare(6, 2, [[5], [4]]), Towers(4, 2)),
    "learned branching": lambda: MultiTaskModel(LearnedBranching(6, 2, [3, 2], [[5], [4]]), Towers(4, 2)),
    "ubernet": lambda: UberNet(6, 2, [5, 4]),
    "mrn": lambda: MRN(6, 2, [5, 4], [3]),
    "esmm": lambda: ESMM(6, [5, 4], norm="batch"),
    "star": star,
    "star, logit sum": lambda: star("logit_sum", context_features=2, fallback="shared"),
    "adashare, served": lambda: AdaShare(6, 2, [[5], [4]]).for_serving([[True, True], [True, False]]),
    "learned branching, served": lambda: LearnedBranching(6, 2, [3, 2], [[5], [4]]).for_serving(),
    "snr-trans, served": lambda: snr(SNRTrans).for_serving(),
    "snr-aver, served": lambda: snr(SNRAver).for_serving(),
    "esmm, served": lambda: ESMM(6, [5, 4], norm="batch").for_serving(),
    "star, served": lambda: star(serving=True, fallback="shared"),
    "star, logit sum, served": lambda: star("logit_sum", context_features=2, serving=True),
    "star, one domain served": lambda: star(domain=1),
}


def batch_of(network, rows):
    batch = [torch.randn(rows, 6)]
    if "star" in type(network).__name__.lower() and not getattr(network, "single", False):
        batch.append(torch.arange(rows) % 3)
        if network.context_features:
            batch.append(torch.randn(rows, network.context_features))
    return tuple(batch)


def namespaces(program):
    """Where the operators of an exported program come from."""
    return {
        node.target.namespace
        for module in program.graph_module.modules()
        for node in getattr(module, "graph", torch.fx.Graph()).nodes
        if isinstance(node.target, torch._ops.OpOverload)
    }


def test_no_network_is_left_out():
    import python_models

    names = {name for name in python_models.__all__ if name not in ("MultiTaskModel", "Towers")}
    found = {type(module).__name__ for make in NETWORKS.values() for module in make().modules()}
    assert names <= found


# The plain form is many more operators, and takes longer to trace: make test does one network with each of ours.
QUICK = ("adatt", "snr-trans", "snr-trans, served", "sluice", "star, logit sum", "esmm")
CALLS = [
    (name, "auto", pytest.mark.skipif(not _library.loaded(), reason=_library.reason() or "loaded")) for name in NETWORKS
]
CALLS += [(name, "reference", () if name in QUICK else pytest.mark.slow) for name in NETWORKS]


@pytest.mark.parametrize("name, backend", [pytest.param(*call, marks=marks) for *call, marks in CALLS])
def test_exports_with_any_batch(name, backend):
    """auto gives operators of the C++ library, the reference torch's own alone, which any converter knows."""
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    batch, rows = batch_of(network, 3), torch.export.Dim("rows")
    with mtl.use_backend(backend):
        program = torch.export.export(network, batch, dynamic_shapes=tuple({0: rows} for _ in batch))
    assert "mtlkernels_triton" not in namespaces(program)
    assert ("mtlkernels" in namespaces(program)) == (backend == "auto")
    run = program.module()
    for size in (0, 1, 7):
        batch = batch_of(network, size)
        torch.testing.assert_close(run(*batch), network(*batch))
    assert set(program.state_dict) == set(network.state_dict())


def test_save_and_load(tmp_path):
    network = NETWORKS["ple"]().eval()
    rows = torch.export.Dim("rows")
    program = torch.export.export(network, batch_of(network, 3), dynamic_shapes=({0: rows},))
    torch.export.save(program, tmp_path / "network.pt2")
    x = torch.randn(7, 6)
    torch.testing.assert_close(torch.export.load(tmp_path / "network.pt2").module()(x), network(x))


@pytest.mark.parametrize("strict", [False, True])
def test_no_operators_of_ours_for_onnx(monkeypatch, strict):
    """torch.onnx.export, which says when it is at work, gets torch's own operators by itself."""
    network = NETWORKS["adatt"]()
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert namespaces(torch.export.export(network, batch_of(network, 3), strict=strict)) == {"aten"}
    with mtl.use_backend("native"):
        if _library.loaded():
            assert "mtlkernels" in namespaces(torch.export.export(network, batch_of(network, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_onnx(name, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    batch, rows = batch_of(network, 3), torch.export.Dim("rows")
    torch.onnx.export(network, batch, tmp_path / "network.onnx", dynamic_shapes=tuple({0: rows} for _ in batch))
    session = runtime.InferenceSession(tmp_path / "network.onnx")
    for size in (1, 7):
        batch = batch_of(network, size)
        found = session.run(None, {i.name: t.numpy() for i, t in zip(session.get_inputs(), batch, strict=True)})
        expected = network(*batch)
        expected = list(expected.values()) if isinstance(expected, dict) else [expected]
        torch.testing.assert_close([torch.from_numpy(y) for y in found], [y.detach() for y in expected])
