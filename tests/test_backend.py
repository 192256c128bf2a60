"""The choice of a backend: use_backend, backend=, the environment variable, explain, and what cannot run."""

import re
import subprocess
import sys

import pytest
import torch

import mtlkernels as mtl
from mtlkernels import _library, backend, triton
from mtlkernels.ops._operator import Operator

native_only = pytest.mark.skipif(not _library.loaded(), reason=_library.reason() or "loaded")
X, W = torch.randn(3, 4), torch.randn(2, 5, 4)
H, L = torch.randn(3, 2, 5), torch.randn(3, 4, 2)
CALLS = {
    "expert_linear": ((X, W), {}),
    "mix": ((H, L), {}),
    "gated_mix": ((H, L), {}),
    "linear_mix": ((H, torch.randn(4, 2)), {}),
    "adatt_mix": ((H, L[:, :2], torch.randn(2)), {"experts_per_unit": [1, 1]}),
}
each_call = pytest.mark.parametrize("name", CALLS)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No decision of an earlier test, and no Triton interpreter, which tests of Triton switch on."""
    monkeypatch.setattr(backend, "_chosen", {})
    monkeypatch.setattr(backend, "_default", "auto")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def ran(monkeypatch):
    """The backends that calls went to, in order."""
    seen = []

    def spy(self, which, wants_grad, *args):
        seen.append(which)
        return self.reference(*args)[0]

    from mtlkernels.ops import _operator

    monkeypatch.setattr(_operator.Operator, "__call__", spy)
    monkeypatch.setattr(_operator.Operator, "goes_straight", lambda *_: False)
    return seen


def call(name, **options):
    args, kwargs = CALLS[name]
    return getattr(mtl, name)(*args, **kwargs, **options)


@native_only
@each_call
def test_auto_takes_the_first_that_can(name, ran):
    call(name)
    assert ran == ["native"]


@native_only
@each_call
def test_use_backend(name, ran):
    with mtl.use_backend("reference"):
        call(name)
        with mtl.use_backend("native"):
            call(name)
        call(name)
        with pytest.raises(KeyError), mtl.use_backend("native"):
            raise KeyError
        call(name)
        with mtl.use_backend("auto"):
            call(name)
        call(name, backend="native")  # the argument wins
    call(name)
    assert ran == ["reference", "native", "reference", "reference", "native", "native", "native"]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="backend must be one of auto, native, triton, reference; got 'cuda'"):
        with mtl.use_backend("cuda"):
            pass
    for name in CALLS:
        with pytest.raises(ValueError, match="backend must be one of.*got 'Native'"):
            call(name, backend="Native")


@each_call
def test_one_that_cannot_run_says_why(name):
    beneath = "expert_linear" if name == "expert_linear" else "mix"
    message = f"backend 'triton' cannot run {beneath} here: .*(not installed|need a GPU)"
    with pytest.raises(ValueError, match=message):
        call(name, backend="triton")
    with mtl.use_backend("triton"), pytest.raises(ValueError, match=message):
        call(name)


def test_without_the_library(monkeypatch, ran):
    """auto goes on with the reference; asking for native says what is missing."""
    monkeypatch.setattr(_library, "_problem", "lib/libmtlkernels.so is missing: for a test")
    call("mix")
    assert ran == ["reference"]
    with pytest.raises(ValueError, match="'native' cannot run mix here: .*is missing: for a test"):
        call("mix", backend="native")
    assert "cannot run: lib/libmtlkernels.so is missing" in mtl.explain("mix", H, L)


@native_only
@each_call
def test_explain(name):
    args, kwargs = CALLS[name]
    lines = mtl.explain(name, *args, **kwargs).splitlines()
    beneath = "expert_linear" if name == "expert_linear" else "mix"
    assert lines[0] == f"{beneath} on cpu, float32: native" and len(lines) == 4
    states = {line.split()[0]: line for line in lines[1:]}
    assert "runs: C++ kernel" in states["native"]
    assert "cannot run: " in states["triton"]
    assert "could run: plain torch" in states["reference"]
    asked = mtl.explain(name, *args, **kwargs, backend="reference")
    assert asked.splitlines()[0].endswith("float32: reference (asked for)")
    with mtl.use_backend("reference"):
        assert mtl.explain(name, *args, **kwargs) == asked
    with pytest.raises(ValueError, match="'triton' cannot run"):
        mtl.explain(name, *args, **kwargs, backend="triton")


@native_only
def test_explain_finds_its_tensor():
    assert mtl.explain("expert_linear", x=X.double(), weight=W.double()).startswith("expert_linear on cpu, float64")
    out = mtl.explain("mix", logits=L, experts=H.bfloat16())
    assert out.startswith("mix on cpu, bfloat16")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mtl.explain("expert_linear", X, W).startswith("expert_linear on cpu, bfloat16")


def test_explain_refuses():
    with pytest.raises(ValueError, match="op must be one of.*got 'softmax'"):
        mtl.explain("softmax", X)
    for args in ((), (3,)):
        with pytest.raises(TypeError, match="first argument of mix must be a tensor"):
            mtl.explain("mix", *args)


def test_choice_by_size(monkeypatch):
    """An operator whose predicates look at sizes is decided for each of them, and explain shows the same."""

    def small(case):
        ok = case.sizes.experts * case.sizes.width <= 64
        return backend.Support(ok, f"{case.sizes.experts} experts, {case.sizes.width} wide")

    predicates = {"native": small, "reference": backend.reference_support}
    monkeypatch.setitem(backend._predicates, "mix", predicates)
    for experts, width, wanted in ((4, 16, "native"), (4, 17, "reference"), (4, 16, "native"), (65, 1, "reference")):
        assert backend.choose("mix", None, H, backend.Sizes(experts=experts, width=width)) == wanted
    with pytest.raises(ValueError, match="'native' cannot run mix here: 5 experts, 40 wide"):
        backend.choose("mix", "native", H, backend.Sizes(5, 2, 3, 40))
    assert len(backend._chosen) == 3

    def sizes(experts, **_):
        return backend.Sizes(experts.shape[1], width=experts.shape[2])

    monkeypatch.setattr(Operator.all["mix"], "sizes", staticmethod(sizes))
    assert mtl.explain("gated_mix", H, L).splitlines()[0].endswith("native")
    wide = mtl.explain("mix", torch.zeros(2, 65, 1))
    assert wide.splitlines()[0].endswith("reference") and "cannot run: 65 experts, 1 wide" in wide


@pytest.mark.parametrize("strict", [False, True])
def test_export_leaves_triton_out(monkeypatch, strict):
    """Wherever auto takes it otherwise, under torch.compile too; asked for by name it is taken."""

    class Told(torch.nn.Module):
        def forward(self, x):
            chosen = backend.choose("mix", None, x)
            return {"triton": torch.sin, "native": torch.cos, "reference": torch.tan}[chosen](x)

    def functions(graph):
        return {found for node in graph.nodes for found in re.findall(r"\b(?:sin|cos|tan)\b", str(node.target))}

    def exported():
        return functions(torch.export.export(Told(), (x,), strict=strict).graph)

    def spy(module, _):
        compiled.append(functions(module.graph))
        return module

    x, compiled = torch.zeros(3, device="meta"), []
    yes = {name: lambda case: backend.Support(True, "for a test") for name in ("triton", "native", "reference")}
    monkeypatch.setitem(backend._predicates, "mix", yes)
    assert backend.choose("mix", None, x) == "triton"
    assert exported() == {"cos"}
    assert backend.choose("mix", None, x) == "triton"
    torch._dynamo.reset()
    torch.compile(Told(), fullgraph=True, backend=spy)(x)
    assert compiled == [{"sin"}]
    with mtl.use_backend("triton"):
        assert exported() == {"sin"}
    yes["native"] = lambda case: backend.Support(False, "for a test")
    assert exported() == {"tan"}


def test_triton_says_one_thing():
    """The choice and the launchers ask the same function."""
    for device in ("cpu", "cuda", "xpu"):
        for dtype in (torch.float64, torch.float32, torch.int8):
            ok, reason = backend.triton_support(backend.Case(device, dtype))
            assert not triton.available()[0] or (ok, reason) == triton.supports(device, dtype, False)


def test_other_dtypes():
    case = backend.Case("cpu", torch.int8)
    assert backend.reference_support(case).ok
    ok, reason = backend.native_support("mix", on_gpu=True)(case)
    assert not ok and (not _library.loaded() or "int8" in reason)
    ok, reason = backend.native_support("mix", on_gpu=True)(backend.Case("xpu", torch.float32))
    assert not ok and (not _library.loaded() or "xpu" in reason)
    ok, reason = backend.native_support("expert_mix_saving", on_gpu=False)(backend.Case("cuda", torch.float32, 90))
    assert not ok and (not _library.loaded() or "expert_mix_saving has no CUDA C++ kernel" in reason)


ENVIRONMENT = """
import os, sys
os.environ["MTLKERNELS_BACKEND"] = "fastest"
try:
    import mtlkernels
except ValueError as error:
    print(error)
for name in [n for n in sys.modules if n.split(".")[0] == "mtlkernels"]:
    del sys.modules[name]
os.environ["MTLKERNELS_BACKEND"] = "reference"
import torch, mtlkernels
print(mtlkernels.explain("mix", torch.zeros(1, 1, 1)).splitlines()[0])
"""


def test_the_environment_variable():
    command = [sys.executable, "-W", "ignore", "-c", ENVIRONMENT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    refused, said = done.stdout.splitlines()
    assert refused.startswith("the environment variable MTLKERNELS_BACKEND must be one of") and "'fastest'" in refused
    assert said == "mix on cpu, float32: reference (asked for)"
