"""What gets installed: the compiled operators where they can be; elsewhere the reference backend and one warning."""

import email
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import mtlkernels
from mtlkernels import _library

ROOT = Path(__file__).resolve().parent.parent
SITE = sysconfig.get_path("purelib")
USES_IT = """
import torch, mtlkernels
out = mtlkernels.linear_mix(torch.ones(2, 3, 4), torch.ones(5, 3))
assert out.shape == (2, 5, 4) and (out == 3).all()
"""


def run(*command: object, ok: bool = True, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run the command; returns what it printed on both streams."""
    done = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "MTLKERNELS_CUDA": "0", "MTLKERNELS_BACKEND": "auto", **(env or {})},
        cwd=cwd,
    )
    assert (done.returncode == 0) == ok, done.stdout
    return done.stdout


# The installation that runs these tests.


def test_the_library_is_loaded_or_says_why() -> None:
    if _library.loaded():
        assert _library.reason() == ""
    else:
        assert str(_library.PATH) in _library.reason()
        assert "pip install --no-build-isolation" in _library.reason()


def test_build_info_tells_what_is_there() -> None:
    info = mtlkernels.build_info()
    assert info["loaded"] == _library.loaded()
    assert info["library"] == str(_library.PATH)
    assert set(info) >= {"reason", "cpu_isas", "cuda_archs", "cxx", "nvcc", "torch_target", "torch_headers", "torch"}
    if info["cxx"]:
        assert info["cpu_isas"][0] == "generic"
        assert info["torch_target"] == "2.11"
        assert bool(info["nvcc"]) == bool(info["cuda_archs"])


@pytest.mark.skipif(not _library.loaded(), reason=_library.reason())
def test_the_library_has_no_python_in_it_and_no_torch_but_libtorch() -> None:
    """Otherwise it would not load under another Python or another build of torch."""
    needed = _needed(_library.PATH)
    assert "libtorch.so" in needed
    assert not [
        name for name in needed if "python" in name or "cuda" in name or name.startswith(("libc10", "libtorch_"))
    ]


def _needed(path: Path) -> list[str]:
    """The DT_NEEDED entries of a 64-bit ELF library."""
    data = path.read_bytes()
    table, (size, count) = struct.unpack_from("<Q", data, 40)[0], struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, table + i * size) for i in range(count)]
    dynamic = next(s for s in sections if s[1] == 6)
    strings = sections[dynamic[6]][4]
    entries = struct.iter_unpack("<QQ", data[dynamic[4] : dynamic[4] + dynamic[5]])
    return [data[strings + value :].split(b"\0", 1)[0].decode() for tag, value in entries if tag == 1]


# A library that is absent or damaged.


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package, without its library."""
    without = shutil.ignore_patterns("lib", "_build_info*", "__pycache__")
    return Path(shutil.copytree(ROOT / "mtlkernels", tmp_path / "mtlkernels", ignore=without))


def use(package: Path, code: str = USES_IT) -> str:
    return run(sys.executable, "-c", code, cwd=package.parent, env={"PYTHONPATH": str(package.parent)})


def test_without_the_library_the_reference_runs_after_one_warning(package: Path) -> None:
    said = use(package, USES_IT + "print(mtlkernels.explain('mix', torch.ones(1, 1, 1), torch.ones(1, 1, 1)))")
    assert said.count("RuntimeWarning") == 1
    assert "libmtlkernels.so is missing" in said and "pip install --no-build-isolation" in said
    assert "reference runs" in " ".join(said.split())


@pytest.mark.skipif(not _library.loaded(), reason=_library.reason())
def test_with_half_a_library_the_reference_runs_after_one_warning(package: Path) -> None:
    whole = _library.PATH.read_bytes()
    (package / "lib").mkdir()
    (package / "lib" / "libmtlkernels.so").write_bytes(whole[: len(whole) // 2])
    said = use(package, USES_IT + "assert not mtlkernels.build_info()['loaded']")
    assert said.count("RuntimeWarning") == 1
    assert "libmtlkernels.so cannot be loaded (truncated" in said


@pytest.mark.skipif(not _library.loaded(), reason=_library.reason())
@pytest.mark.parametrize(
    "damage, cause",
    [
        (lambda whole: b"", "not a 64-bit ELF file"),
        (lambda whole: b"version https://git-lfs.github.com/spec/v1\n" * 3, "not a 64-bit ELF file"),
        (lambda whole: whole[:-1], "truncated"),
        (lambda whole: bytes(len(whole)), "not a 64-bit ELF file"),
        (lambda whole: b"\x7fELG" + whole[4:], "not a 64-bit ELF file"),
        (lambda whole: whole[:18] + b"\xf3\x00" + whole[20:], ""),  # the machine field: RISC-V
        # What it was built for and finds no more: a function of torch, its library.
        (lambda whole: whole.replace(b"\0aoti_torch_get_dim\0", b"\0aoti_torch_get_dix\0"), ".*aoti_torch_get_dix"),
        (lambda whole: whole.replace(b"\0libtorch.so\0", b"\0libtorcx.so\0"), "libtorcx.so"),
    ],
    ids=["empty", "text", "last byte missing", "zeros", "other magic", "other machine", "other torch", "no libtorch"],
)
def test_a_damaged_library_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes], cause: str
) -> None:
    damaged = tmp_path / "libmtlkernels.so"
    damaged.write_bytes(damage(_library.PATH.read_bytes()))
    monkeypatch.setattr(_library, "PATH", damaged)
    said = _library._load() or ""
    assert re.match(rf"{re.escape(str(damaged))} cannot be loaded \({cause}", said), said
    assert said.endswith(_library.REMEDY)


# Building and installing. Each works on a copy of the sources, in an environment of its own that sees this one's torch.


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    copy = tmp_path / "sources"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy2(ROOT / name, copy)
    for name in ("csrc", "mtlkernels", "python_models"):
        without = shutil.ignore_patterns("lib", "_build_info*", "__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=without)
    return copy


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """The Python of a new environment without mtlkernels, but with the packages of the one that runs the tests."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # The .pth files in there are not read in their turn: the editable installation of this checkout stays out of sight.
    Path(site, "borrowed.pth").write_text(f"{SITE}\n")
    return python


def pip(python: Path, *arguments: object, **options: object) -> str:
    return run(python, "-m", "pip", "--disable-pip-version-check", *arguments, **options)


def wheel_tags(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        return email.message_from_bytes(archive.read(name)).get_all("Tag") or []


@pytest.mark.slow
def test_under_isolation_a_pure_wheel_comes_out(sources: Path, fresh: Path) -> None:
    # A torch-less Python stands for pip's isolated environment, and needs no network: -S hides every installed package.
    tools = {
        "PYTHONPATH": os.pathsep.join(
            [str(_only(sources.parent, "setuptools", "_distutils_hack", "wheel", "packaging"))]
        )
    }
    code = "import setuptools.build_meta as b; print('WHEEL', b.build_wheel('dist'))"
    said = run(sys.executable, "-S", "-c", code, cwd=sources, env=tools)
    assert said.count("warning: mtlkernels is built without its compiled kernels") == 1
    assert "pip install --no-build-isolation ." in said
    (wheel,) = (sources / "dist").iterdir()
    assert wheel_tags(wheel) == ["py3-none-any"]
    pip(fresh, "install", "--ignore-installed", "--no-deps", wheel)
    assert "libmtlkernels.so is missing" in run(fresh, "-c", USES_IT, cwd=sources.parent)


def _only(folder: Path, *packages: str) -> Path:
    """A folder that holds these installed packages and no other."""
    tools = folder / "tools"
    tools.mkdir()
    for package in packages:
        for found in [*Path(SITE).glob(package), *Path(SITE).glob(f"{package}-*.dist-info")]:
            (tools / found.name).symlink_to(found)
    return tools


@pytest.mark.slow
def test_without_a_compiler_it_installs(sources: Path, fresh: Path, tmp_path: Path) -> None:
    bare = {"PATH": str(tmp_path / "nothing"), "CXX": ""}
    said = pip(fresh, "install", "-v", "--ignore-installed", "--no-build-isolation", "--no-deps", sources, env=bare)
    assert "No C++20 compiler was found" in said
    said = run(fresh, "-c", USES_IT, cwd=tmp_path)
    assert said.count("RuntimeWarning") == 1 and "libmtlkernels.so is missing" in said


@pytest.mark.slow
@pytest.mark.skipif(not _library.loaded(), reason=_library.reason())
def test_a_wheel_holds_the_kernels_and_nothing_else_and_installs_elsewhere(sources: Path, fresh: Path) -> None:
    pip(sys.executable, "wheel", "--no-build-isolation", "--no-deps", "-w", "dist", ".", cwd=sources)
    (wheel,) = (sources / "dist").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "mtlkernels/lib/libmtlkernels.so" in names
    assert [name for name in names if name.startswith("mtlkernels/_build_info.")]
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"mtlkernels", "python_models"}
    assert not [name for name in names if name.endswith((".cpp", ".h", ".cu"))]

    pip(fresh, "install", "--ignore-installed", "--no-deps", wheel)
    said = run(fresh, "-W", "error", "-c", USES_IT + "print(mtlkernels.build_info())", cwd=sources.parent)
    assert "'loaded': True" in said and str(sources) not in said

    # Nothing of the machine or the day is in it: from another folder the same bytes come out.
    moved = sources.with_name("moved")
    shutil.copytree(sources, moved, ignore=shutil.ignore_patterns("build", "dist", "*.egg-info"))
    pip(sys.executable, "wheel", "--no-build-isolation", "--no-deps", "-w", "dist", ".", cwd=moved)
    (again,) = (moved / "dist").iterdir()
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        for name in [name for name in names if name.endswith(".so")]:
            assert first.read(name) == second.read(name), name
