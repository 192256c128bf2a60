"""What comes with an installation: licences, no network, no code in checkpoints."""

import importlib.metadata
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# Of what the package needs, and of what builds and tests it: nothing that would bind who ships it.
FREE = re.compile(r"apache|bsd|mit\b|mit license|psf|python software|isc|unlicense|mpl|mozilla|nvidia|lgpl|zlib", re.I)
OFFLINE = """
import socket
def refuse(*args, **kwargs):
    raise AssertionError(f"a connection to {args[1:]}")
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
import torch, mtlkernels.nn, python_models, python_models.balancing, python_models.interop, python_models.viz
from python_models import MultiTaskModel, PLE, Towers
model = MultiTaskModel(PLE(8, 2, 1, 1, [[6], [4]]), Towers(4, 2))
model(torch.randn(5, 8)).sum().backward()
import mtlkernels.__main__
assert mtlkernels.__main__.main() == 0
"""


def licence(name: str) -> str:
    meta = importlib.metadata.metadata(name)
    words = [meta.get("License-Expression") or "", *(meta.get_all("Classifier") or [])]
    said = " ".join(w for w in words if "License" in w or w == words[0])
    return said if said.strip() else (meta.get("License") or "")[:200]


def test_licences_of_what_it_needs():
    needed = importlib.metadata.requires("mtlkernels") or []
    names = {re.match(r"[\w.-]+", requirement).group() for requirement in needed}
    found = {}
    for name in names:
        try:
            found[name] = licence(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that is not here
    assert {"torch", "numpy"} <= found.keys()
    odd = {name: said for name, said in found.items() if said and not FREE.search(said)}
    assert not odd, odd


def test_no_network():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", OFFLINE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_nothing_unpickles_what_it_is_given():
    """Checkpoints are read with weights_only, which is the default; nowhere is it turned off, nor pickle used."""
    for folder in ("mtlkernels", "python_models", "bench", "docs"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            assert "weights_only=False" not in text, path
            assert not re.search(r"\b(pickle|joblib|dill|cloudpickle)\.loads?\(", text), path
            assert "allow_pickle=True" not in text, path


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_checkpoint_with_code_is_refused(tmp_path, capsys):
    torch.save({"model": Evil()}, tmp_path / "bad.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "bad.pt")
    assert "code ran" not in capsys.readouterr().out
