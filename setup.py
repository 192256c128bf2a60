"""Builds the compiled half of mtlkernels. Everything else about the package stands in pyproject.toml.

Two products, from the sources under csrc/:

* ``mtlkernels/lib/libmtlkernels.so``: the operators, on the LibTorch stable ABI and without Python, so that one file
  loads under every torch from 2.11 on, with or without CUDA, and under every Python.
* ``mtlkernels/_build_info``: a pybind11 module that says what the first one holds.

Both need torch (its headers) to be importable here: install with ``pip install --no-build-isolation .``. Where torch or
a C++20 compiler is missing, a pure-Python package comes out, which runs on the reference (and Triton) backends, and one
warning says why. Rebuild after a change of a source with ``python setup.py -q build_ext --inplace``.

Environment:
  CXX                    the C++ compiler (default: c++, g++ or clang++, whichever is found first)
  MAX_JOBS               how many compilers run at once (default: one a core)
  MTLKERNELS_NATIVE      0: compile nothing, make the pure-Python package
  MTLKERNELS_CUDA        0: leave the CUDA sources out; 1: fail where nvcc is missing;
                         unset: compile them wherever nvcc is found, with or without a GPU
  MTLKERNELS_CUDA_ARCHS  the architectures to compile them for, as in "90a" or "80,90a,100" (the default)
"""

import fcntl
import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
WORK = ROOT / "build" / "ninja"  # shared by wheel, editable and in-place builds: each reuses the others' objects
LIBRARY = "mtlkernels.lib.libmtlkernels"
BUILD_INFO = "mtlkernels._build_info"
TORCH_TARGET = "0x020b000000000000"  # torch 2.11: the oldest that loads the library; 2.9 lacks parallel_for
CUDA_ARCHS = ("80", "90a", "100")

# Never -march=native and never -ffast-math: a wheel runs on other machines, and NaN and Inf must come through.
CXX_FLAGS = "-std=c++20 -O3 -fPIC -Wall -Wextra -fno-math-errno -fno-trapping-math".split()
CXX_FLAGS += ["-fvisibility=hidden", "-fvisibility-inlines-hidden"]
NVCC_FLAGS = "-std=c++20 -O3 --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden".split()

# Sources under csrc/cpu/isa/ are compiled once for each of these, with MTL_ISA naming the set; which one serves is
# decided at run time. The order is the link order, and matters: of an inline function from a header the linker keeps
# the first copy it meets, which must be one that the plainest processor can run.
ISAS = {"generic": []}
if sysconfig.get_platform() == "linux-x86_64":
    ISAS["avx2"] = "-mavx2 -mfma -mf16c".split()
    ISAS["avx512"] = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512".split()
    ISAS["avx512bf16"] = [*ISAS["avx512"], "-mavx512bf16"]


def output(*command: str) -> str:
    """What the command prints, or nothing where it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


@functools.cache
def torch_home() -> Path | None:
    """Where torch is installed; found without importing it, which takes seconds."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def torch_version() -> str:
    found = re.search(r"__version__ = '([^']*)'", (torch_home() / "version.py").read_text())
    return found.group(1) if found else ""


@functools.cache
def cxx() -> str | None:
    """The C++ compiler, if it can compile C++20."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cpp")
        probe.write_text("#include <concepts>\n#include <span>\nint main() { return std::integral<int> ? 0 : 1; }\n")
        for name in names:
            command = [*shlex.split(name), "-std=c++20", "-c", str(probe), "-o", str(probe) + ".o"]
            if shutil.which(command[0]) and not subprocess.run(command, capture_output=True).returncode:
                return name
    return None


@functools.cache
def nvcc() -> str | None:
    """The CUDA compiler, unless MTLKERNELS_CUDA=0."""
    wish = os.environ.get("MTLKERNELS_CUDA", "")
    if wish == "0":
        return None
    folders = [os.path.join(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = shutil.which("nvcc", path=os.pathsep.join([*folders, os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
    if wish and not found:
        raise SystemExit(f"MTLKERNELS_CUDA={wish} asks for the CUDA kernels, but nvcc is not on PATH or in CUDA_HOME")
    return found


@functools.cache
def cuda_archs() -> list[str]:
    """The architectures to compile for; of the default ones, those that this nvcc knows."""
    wish = os.environ.get("MTLKERNELS_CUDA_ARCHS", "").strip()
    if wish:
        archs = re.split(r"[\s,;]+", wish.lower().replace("sm_", "").replace(".", ""))
        if not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in archs):
            raise SystemExit(f"MTLKERNELS_CUDA_ARCHS should look like 80,90a,100; got {wish!r}")
        return archs
    known = output(nvcc(), "--list-gpu-code").split()
    return [arch for arch in CUDA_ARCHS if "sm_" + arch.rstrip("a") in known]


def gencode() -> list[str]:
    """nvcc's -gencode flags: machine code for each architecture, and PTX of the first portable one for GPUs to come."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in cuda_archs()]
    portable = [arch for arch in cuda_archs() if arch.isdigit()]
    return flags + [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in portable[:1]]


def what_is_missing() -> str | None:
    """Why nothing can be compiled here, as a sentence; None if all is there."""
    if os.environ.get("MTLKERNELS_NATIVE") == "0":
        return "MTLKERNELS_NATIVE=0 was set."
    if sys.platform != "linux":
        return f"The compiled kernels are for Linux; this is {sys.platform}."
    if not torch_home():
        return "torch cannot be imported by the build; with torch installed, use: pip install --no-build-isolation ."
    if tuple(map(int, re.findall(r"\d+", torch_version())[:2])) < (2, 11):
        return f"torch 2.11 or newer is needed; {torch_version()} is installed."
    if not cxx():
        return f"No C++20 compiler was found (CXX={os.environ.get('CXX', '')!r}, and c++, g++, clang++ on PATH)."
    return None


def max_jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))


def ninja_program() -> str:
    """The path of ninja, from the Python package of that name or from PATH."""
    try:
        import ninja

        return os.path.join(ninja.BIN_DIR, "ninja")
    except ImportError:
        found = shutil.which("ninja")
    if not found:
        raise SystemExit("building the kernels needs ninja, which is missing: pip install ninja")
    return found


class BuildFile:
    """A build.ninja in the making: each statement is one command, and rebuilds what its depfile says."""

    def __init__(self) -> None:
        self.text = f"builddir = {self.path(WORK)}\n"
        self.text += "\nrule compile\n  command = $command\n  depfile = $out.d\n  deps = gcc\n"
        self.text += "\nrule link\n  command = $command\n"

    @staticmethod
    def path(path: Path | str) -> str:
        return re.sub(r"([$: ])", r"$\1", str(path))

    def add(self, rule: str, out: Path, inputs: list[Path], command: list[str]) -> Path:
        shell = shlex.join(map(str, command)).replace("$", "$$")
        self.text += f"\nbuild {self.path(out)}: {rule} {' '.join(map(self.path, inputs))}\n  command = {shell}\n"
        return out

    def compile(self, source: Path, tag: str, command: list[str]) -> Path:
        out = WORK / tag / source.relative_to(ROOT).with_suffix(".o")
        depfile = ["-MD", "-MF", f"{out}.d", "-c", source, "-o", out]
        return self.add("compile", out, [source], [*command, *depfile])

    def run(self) -> None:
        """Runs ninja on it. Raises SystemExit where a command fails; its own output has said why."""
        build_file = WORK / "build.ninja"
        if not build_file.exists() or build_file.read_text() != self.text:
            build_file.write_text(self.text)
        command = [ninja_program(), "-f", str(build_file), "--quiet", "-j", str(max_jobs())]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        print(done.stdout.replace("ninja: no work to do.\n", ""), end="", file=sys.stderr)
        if done.returncode:
            raise SystemExit(
                "mtlkernels: compiling the kernels failed (see above). MTLKERNELS_CUDA=0 leaves the CUDA kernels out, "
                "MTLKERNELS_NATIVE=0 all of them."
            )


class NinjaBuild(build_ext):
    """build_ext that compiles both products with one ninja run."""

    def get_ext_filename(self, fullname: str) -> str:
        if LIBRARY.endswith(fullname):  # setuptools asks by the full and by the last name
            return fullname.replace(".", os.sep) + ".so"  # without Python's version: there is no Python in it
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        WORK.mkdir(parents=True, exist_ok=True)
        with open(WORK / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two builds at a time would write the same objects
            file = BuildFile()
            add = {LIBRARY: add_library, BUILD_INFO: add_build_info}
            built = {ext.name: add[ext.name](file) for ext in self.extensions}
            file.run()
            for name, path in built.items():
                replace(path, Path(self.get_ext_fullpath(name)))

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            file = self.get_ext_filename(ext.name)
            replace(Path(self.build_lib, file), ROOT / file)


def replace(source: Path, target: Path) -> None:
    """Puts a copy of source at target in one step: writing into a library that a process runs would crash it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copy2(source, fresh)
    os.replace(fresh, target)


def cxx_command() -> list[str]:
    # With the prefix map no path of this machine stays in the binaries: the same sources give the same bytes anywhere.
    return [*shlex.split(cxx()), *CXX_FLAGS, f"-ffile-prefix-map={ROOT}=."]


def torch_flags() -> list[str]:
    return [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-I", ROOT / "csrc", "-isystem", torch_home() / "include"]


def cuda_sources() -> list[Path]:
    return sorted((ROOT / "csrc/cuda").glob("*.cu")) if nvcc() else []


def library_sources() -> list[Path]:
    """C++ sources of the operator library, without those compiled once an instruction set."""
    plain = [*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc/cpu").glob("*.cpp")]
    return sorted(source for source in plain if source.name != "build_info.cpp")


def add_library(file: BuildFile) -> Path:
    command = [*cxx_command(), *torch_flags()]
    objects = [file.compile(source, "plain", command) for source in library_sources()]
    for isa, flags in ISAS.items():
        for source in sorted((ROOT / "csrc/cpu/isa").glob("*.cpp")):
            objects.append(file.compile(source, isa, [*command, *flags, f"-DMTL_ISA={isa}"]))
    link, no_as_needed = [*shlex.split(cxx())], "-Wl,--no-as-needed"
    if cuda_sources():
        host = ["-ccbin", shlex.split(cxx())[0]]
        threads = f"--threads={min(max_jobs(), len(gencode()))}"  # architectures side by side
        command = [nvcc(), *host, threads, *NVCC_FLAGS, *gencode(), *torch_flags()]
        objects += [file.compile(source, "cuda", command) for source in cuda_sources()]
        # The CUDA runtime goes in whole: the library must load where there is none, and beside any other.
        link, no_as_needed = [nvcc(), *host, "-cudart", "static"], "-Xlinker=--no-as-needed"
    # libtorch.so alone, not libtorch_cpu or libtorch_cuda: it is the one name that every build of torch has.
    torch = [no_as_needed, f"-L{torch_home() / 'lib'}", "-ltorch"]
    out = WORK / "libmtlkernels.so"
    return file.add("link", out, objects, [*link, "-shared", "-o", out, *objects, *torch])


def add_build_info(file: BuildFile) -> Path:
    nvcc_version = re.search(r"release .*", output(nvcc(), "--version")) if cuda_sources() else None
    facts = {
        "MTL_CPU_ISAS": ",".join(ISAS),
        "MTL_CUDA_ARCHS": ",".join(cuda_archs()) if cuda_sources() else "",
        "MTL_NVCC": nvcc_version.group() if nvcc_version else "",
        "MTL_TORCH_HEADERS": torch_version(),
        "MTL_TORCH_TARGET": f"{int(TORCH_TARGET[2:4], 16)}.{int(TORCH_TARGET[4:6], 16)}",
    }
    includes = ["-isystem", sysconfig.get_path("include"), "-isystem", pybind11_include()]
    command = [*cxx_command(), *includes, "-O1", *(f'-D{name}="{value}"' for name, value in facts.items())]
    # A folder each for with and without CUDA: going to and fro recompiles nothing.
    tag = sysconfig.get_config_var("SOABI") + ("-cuda" if cuda_sources() else "")
    source = file.compile(ROOT / "csrc/build_info.cpp", tag, command)
    out = WORK / tag / "_build_info.so"
    return file.add("link", out, [source], [*shlex.split(cxx()), "-shared", "-o", out, source])


def pybind11_include() -> str | Path:
    """pybind11's own headers, or the copy that torch carries (which refuses what is compiled with torch_flags())."""
    try:
        import pybind11

        return pybind11.get_include()
    except ImportError:
        return torch_home() / "include"


def extensions() -> list[Extension]:
    missing = what_is_missing()
    if missing:
        print(f"warning: mtlkernels is built without its compiled kernels. {missing}", file=sys.stderr)
        return []
    wanted = []
    if library_sources():
        wanted.append(Extension(LIBRARY, [str(source.relative_to(ROOT)) for source in library_sources()]))
    if Path(sysconfig.get_path("include"), "Python.h").exists():
        wanted.append(Extension(BUILD_INFO, ["csrc/build_info.cpp"]))
    else:
        print("warning: Python.h is missing; mtlkernels.build_info() will not list what was compiled", file=sys.stderr)
    return wanted


os.chdir(ROOT)
# The license stands here because pyproject.toml's key for it changed with setuptools 77: without isolation any serves.
setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuild}, license="Apache-2.0")
