"""The install matrix at its smallest, with the Python and the torch that are here; and that it sees what is wrong."""

import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import setuptools

from tests import matrix
from tests.ops.cases import native_only

ROOT = Path(__file__).resolve().parents[1]
PYTHON = Path(sys.executable)
NO_NUMPY = 'raise ModuleNotFoundError("numpy is not here", name="numpy")'


@pytest.fixture
def place(tmp_path):
    found = tmp_path / "a path with spaces"
    found.mkdir()
    yield found
    matrix.remove(found)


@native_only
def test_no_numpy_no_compiler_no_right_to_write(place):
    (place / "numpy.py").write_text(NO_NUMPY)
    problem, said = matrix.self_test(PYTHON, matrix.install(place), place)
    assert not problem, said
    assert "WRONG" not in said and " right, " in said and str(place) in said


def stub(place: Path, what: str) -> Path:
    """A package that does `what` in place of the self-test."""
    package = place / "mtlkernels"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(what)
    return package


@pytest.mark.parametrize(
    "what, problem",
    [
        ("print('loaded  True')", ""),
        ("print('loaded  False')", "the library is not loaded"),
        ("print('loaded  True'); raise SystemExit(1)", "exit status 1"),
        ("print('loaded  True'); open(__file__ + '.log', 'w')", "it wrote into the installation"),
    ],
)
def test_what_is_wrong_is_seen(place, what, problem):
    assert matrix.self_test(PYTHON, stub(place, what), place)[0] == problem


def test_interpreters():
    here = "{}.{}".format(*sys.version_info)
    assert matrix.interpreters([here, "3.99"]) == {here: PYTHON}


@pytest.fixture
def setup(monkeypatch):
    """What setup.py defines, read anew; it builds nothing."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.chdir(ROOT)
    for name in ("MTLKERNELS_CUDA", "MTLKERNELS_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MTLKERNELS_NATIVE", "0")
    monkeypatch.setattr(sys, "stderr", open(os.devnull, "w"))
    return lambda: runpy.run_path(str(ROOT / "setup.py"))


def test_nvcc_present(setup, monkeypatch, place):
    nvcc = place / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho sm_75 sm_80 sm_90\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(place))
    found = setup()
    assert found["nvcc"]() == str(nvcc)
    assert found["cuda_archs"]() == ["80", "90a"]  # those of the default ones that it knows
    assert [source.name for source in found["cuda_sources"]()] == sorted(p.name for p in ROOT.glob("csrc/cuda/*.cu"))
    monkeypatch.setenv("MTLKERNELS_CUDA", "0")
    found = setup()
    assert found["nvcc"]() is None and found["cuda_sources"]() == []


def test_nvcc_absent(setup, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    found = setup()
    assert found["nvcc"]() is None and found["cuda_sources"]() == []
    monkeypatch.setenv("MTLKERNELS_CUDA", "1")
    found = setup()
    with pytest.raises(SystemExit, match="MTLKERNELS_CUDA=1 asks for the CUDA kernels, but nvcc is not on PATH"):
        found["nvcc"]()
