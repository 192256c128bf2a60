"""A C++ program without Python runs packaged networks; docs/serving.md, line by line."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mtlkernels as mtl
from bench import latency
from mtlkernels import _library
from python_models import PLE, STAR, AdaTT, MMoE, MultiTaskModel, SNRTrans, Towers

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/serving.md").read_text()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _library.loaded() or not shutil.which("c++"), reason="needs the library and a compiler"),
]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def run(command, folder, **environment):
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The folder in which the page's commands ran: the program, a package, inputs, outputs and what is expected."""
    folder = tmp_path_factory.mktemp("serving")
    (folder / "package.py").write_text(blocks("python")[0])
    (folder / "docs").symlink_to(ROOT / "docs")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    (commands,) = blocks("sh")
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    run(["sh", "-e", "-c", commands], folder, **environment)
    return folder


def test_the_page(served):
    (found,), (expected,) = torch.load(served / "outputs.pt"), torch.load(served / "expected.pt")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    libraries = run(["ldd", str(served / "run_package")], served)
    assert "libtorch_cpu" in libraries and "libpython" not in libraries and "libtorch_python" not in libraries


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    return latency.program(tmp_path_factory.mktemp("serve"))


def towers(fusion):
    return MultiTaskModel(fusion, Towers(4, 2, [3]))


def snr():
    network = SNRTrans(6, 2, 3, [[5], [4]])
    with torch.no_grad():
        for level in network.levels:
            level.connections.log_alpha.copy_(torch.tensor([-9.0, 9.0, 9.0]).expand_as(level.connections.log_alpha))
    return network.for_serving()


NETWORKS = {
    "mmoe": lambda: towers(MMoE(6, 2, 3, [[5], [4]])),
    "ple": lambda: towers(PLE(6, 2, [1, 2], 1, [[5], [4]], [3])),
    "adatt": lambda: towers(AdaTT(6, 2, [1, 2], 1, [[5], [4]], [3])),
    "snr-trans, served": snr,
    "star, served": lambda: STAR(6, 3, [5, 4], domain_features=3, aux_dims=[4]).for_serving(),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_packages(served, serve, tmp_path, name):
    """At batch sizes other than the exported one, in an empty environment; and from four threads at once."""
    torch.manual_seed(0)
    network, rows = NETWORKS[name]().eval(), torch.export.Dim("rows")

    def batch(size):
        x, domain = torch.randn(size, 6), torch.arange(size) % 3
        return (x, domain) if name.startswith("star") else (x,)

    with torch.no_grad():
        program = torch.export.export(network, batch(3), dynamic_shapes=tuple({0: rows} for _ in batch(3)))
        assert any("mtlkernels" in str(node.target) for node in program.graph.nodes)
        torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "network.pt2"))
        for size in (1, 7):
            inputs = batch(size)
            torch.save(inputs, tmp_path / "inputs.pt")
            files = ["network.pt2", "inputs.pt", "outputs.pt"]
            run([str(served / "run_package"), mtl.build_info()["library"], *files], tmp_path)
            (found,) = torch.load(tmp_path / "outputs.pt")
            torch.testing.assert_close(found, network(*inputs), rtol=1e-5, atol=1e-5)
        calls = [batch(size) for size in (1, 300, 7, 64, 0)]
        outputs, said = latency.served(serve, tmp_path / "network.pt2", calls, threads=4, seconds=0.5)
        assert said["different"] == 0 and said["calls"] >= 4 * len(calls)
        for (found,), inputs in zip(outputs, calls, strict=True):
            torch.testing.assert_close(found, network(*inputs), rtol=1e-5, atol=1e-5)


def test_threads_that_get_something_else_are_told(served, serve, tmp_path):
    """A network that draws has other outputs at every call."""
    program = torch.export.export(torch.nn.Dropout(0.5), (torch.ones(4, 6),))
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "network.pt2"))
    with pytest.raises(RuntimeError, match="ended with 1"):
        latency.served(serve, tmp_path / "network.pt2", [(torch.ones(4, 6),)], threads=2, seconds=0.1)


def test_refusals(served, tmp_path):
    """The program ends with a word on what is wrong, and not with a wrong output."""
    program, library = str(served / "run_package"), mtl.build_info()["library"]
    files = [str(served / "model.pt2"), str(served / "inputs.pt"), "outputs.pt"]
    torch.save((torch.randn(4, 6),), tmp_path / "narrow.pt")
    for command, words in (
        ([program], "run_package libmtlkernels.so network.pt2 inputs.pt outputs.pt"),
        ([program, "nowhere.so", *files], "nowhere.so: cannot open"),
        ([program, library, files[0], "narrow.pt", files[2]], "x and weight must agree in K"),
    ):
        done = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True, timeout=100)
        assert done.returncode != 0 and words in done.stderr, done.stderr
        assert not (tmp_path / "outputs.pt").exists()
