"""The counts of tests/coverage.py, where they are known."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import coverage

pytest.importorskip("coverage", reason="coverage is not installed")
pytest.importorskip("gcovr", reason="gcovr is not installed")
PYTHON = """
def sign(x):
    if x < 0:
        return -1
    return 1
"""
TEST = """
import subprocess, sys
from ours import sign

def test():
    assert sign(3) == 1
    there = {"cwd": "python_models", "check": True}
    subprocess.run([sys.executable, "-c", "import theirs; theirs.sign(3)"], **there)
"""
# A line that nothing reaches, and half of the branches; a template counts once.
CPP = """template <class T>
T sign(T x) {
  if (x < 0)
    return -1;
  return 1;
}
int main() {
  return sign(1) + sign(2.0f) == 2 ? 0 : 1;
}
"""


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project of its own, which a coverage that counts this test does not see."""
    for name in [name for name in os.environ if name.startswith("COVERAGE_")]:
        monkeypatch.delenv(name)
    shutil.copy(coverage.ROOT / "pyproject.toml", tmp_path)
    for folder in ("mtlkernels", "python_models", "bench", "tests", "out"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(coverage, "ROOT", tmp_path)
    monkeypatch.setattr(coverage, "OUT", tmp_path / "out")
    return tmp_path


def test_python(project, monkeypatch):
    """In the tests' process and in those that they start."""
    monkeypatch.setenv("PYTHONPATH", str(project / "mtlkernels"))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (project / "mtlkernels" / "ours.py").write_text(PYTHON)
    shutil.copy(project / "mtlkernels" / "ours.py", project / "python_models" / "theirs.py")
    (project / "bench" / "never.py").write_text("a = 1\n")
    test = project / "tests" / "test_ours.py"
    test.write_text(TEST)
    assert coverage.python(["tests"]) == 0
    known = {"mtlkernels": [4, 3, 2, 1], "python_models": [4, 3, 2, 1], "bench": [1, 0, 0, 0]}
    assert coverage.counted("python") == known
    assert "ours.py" in (project / "out" / "python.txt").read_text()
    assert coverage.row("mtlkernels", known["mtlkernels"]) == "| `mtlkernels` | 75.0% of 4 | 50.0% of 2 |"
    test.write_text(TEST.replace("== 1", "== 2"))
    assert coverage.python(["tests"]) == 1
    assert coverage.counted("python") == known | {"python_models": [4, 0, 2, 0]}  # the first test's data are gone


def test_cpp(project):
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no g++")
    source = project / "csrc" / "cpu" / "ours.cpp"
    source.parent.mkdir(parents=True)
    source.write_text(CPP)
    subprocess.run([compiler, *coverage.GCOV, "csrc/cpu/ours.cpp", "-o", "ours"], cwd=project, check=True)
    subprocess.run(["./ours"], cwd=project, check=True)
    coverage.gcovr("cpp", project, root=project, only="csrc/cpu/.*")
    assert coverage.counted("cpp") == {"csrc/cpu": [6, 5, 2, 1]}
    assert "ours.cpp" in (project / "out" / "cpp.txt").read_text()
