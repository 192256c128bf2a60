"""What comes with an installation: licences, no network, no code in checkpoints."""

import importlib.metadata
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
# Licences of what may be shipped with something under the Apache licence, and build and test it: none binds who does.
FREE = re.compile(
    r"Apache( Software License|-2\.0( WITH LLVM-exception)?)|(0|3-Clause )?BSD( License|-[23]-Clause)?|BSL-1\.0"
    r"|CC0-1\.0|DFSG approved|ISC( License.*)?|MIT(-CMU| License)?|MPL-2\.0|Mozilla Public License 2\.0.*|PSF-2\.0"
    r"|Python Software Foundation License|Unlicense|Zlib"
)
NVIDIA = re.compile(r"(nvidia|cuda)[\w-]*")  # CUDA's own libraries, which its builds of torch bring along
EXTRAS = {"test", "dev", "bench", "demo", "train"}
PINNED = ROOT / "requirements-dev.txt"
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


def licence(name: str) -> list[str]:
    """The licences that it is under, all of them at a time or one of them by choice."""
    meta = importlib.metadata.metadata(name)
    named = [c.rpartition("::")[2].strip() for c in meta.get_all("Classifier") or [] if c.startswith("License")]
    title = (meta.get("License") or "").strip().partition("\n")[0]  # some give the whole text
    words = meta.get("License-Expression") or " AND ".join(named) or title
    return [word.strip("() ") for word in re.split(r" AND | OR ", words)]


def brought_along(package: str, extras: set[str]) -> set[str]:
    """Everything installed that the package and its extras ask for, and what that asks for."""
    found, left = set(), [(package, frozenset(extras))]
    while left:
        name, chosen = left.pop()
        for requirement in map(Requirement, importlib.metadata.requires(name) or []):
            named = canonicalize_name(requirement.name)
            fits = requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in {"", *chosen})
            if fits and named not in found and list(importlib.metadata.distributions(name=named)):
                found.add(named)
                left.append((named, frozenset(requirement.extras)))
    return found - {canonicalize_name(package)}


def test_licences_of_what_it_brings_along():
    found = {name: licence(name) for name in brought_along("mtlkernels", EXTRAS | {"triton", "interop"})}
    assert {"torch", "numpy", "pytest"} <= found.keys()
    odd = {
        name: said for name, said in found.items() if not NVIDIA.fullmatch(name) and not all(map(FREE.fullmatch, said))
    }
    assert not odd, odd


@pytest.mark.parametrize(
    "said", ["GPL-3.0", "GNU Lesser General Public License v3", "AGPL-3.0-only", "Proprietary", ""]
)
def test_other_licences_are_seen(said):
    assert not FREE.fullmatch(said)


def test_what_builds_and_tests_it_is_pinned():
    """One version of each package for every Python, with hashes; all that the extras ask for, but torch and triton."""
    blocks = re.split(r"\n(?=\S)", re.sub(r"^#.*\n", "", PINNED.read_text(), flags=re.M).strip())
    pinned: dict[str, list[Requirement]] = {}
    for block in blocks:
        line, *hashes = block.split(" \\\n")
        assert hashes and all(re.fullmatch(r" +--hash=sha256:[0-9a-f]{64}", h) for h in hashes), block[:200]
        requirement = Requirement(line)
        assert re.fullmatch(r"==[^*,]+", str(requirement.specifier)), line
        pinned.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    assert not pinned.keys() & {"torch", "triton"}
    for python in ("3.10", "3.11", "3.12", "3.13"):
        here = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux"}
        for requirement in map(Requirement, importlib.metadata.requires("mtlkernels")):
            marker = requirement.marker
            if requirement.name == "torch" or not any(
                marker is None or marker.evaluate({**here, "extra": e}) for e in EXTRAS
            ):
                continue
            serving = [p for p in pinned.get(canonicalize_name(requirement.name), [])
                       if p.marker is None or p.marker.evaluate(here)]  # fmt: skip
            assert len(serving) == 1, f"{requirement} under Python {python}: {serving}; make requirements"
            (version,) = (s.version for s in serving[0].specifier)
            assert requirement.specifier.contains(version), f"{requirement}, but {version} is pinned: make requirements"


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
