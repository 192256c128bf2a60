"""Every operator on a GPU, on every backend there and in every dtype, against the reference in float64 on the CPU.

Without a GPU the same checks run on the CPU, on fewer cases: a test of the tests.
"""

import pytest
import torch

from mtlkernels.ops._operator import Operator
from mtlkernels.triton import available
from tests.ops.cases import native_only

from . import checks
from .subjects import BAD_IDS, BROKEN, EVERY, USUAL, Subject

GPU = torch.cuda.is_available()
NEEDS_GPU = pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() says no")
KERNELS = ("native", "triton")
BACKENDS = (*KERNELS, "reference")
SHORT = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*deterministic:UserWarning", "ignore::RuntimeWarning"  # the interpreter's numpy: overflow in exp
)  # fmt: skip
ALL = {f"{op}, {name}": subject for op, table in EVERY.items() for name, subject in table.items()}


def runs(subjects: dict[str, Subject], backends=BACKENDS, cpu=("native float32", "reference bfloat16")):
    """A test for each subject, backend and dtype on the GPU. Without one: on the CPU, with what `cpu` names."""
    found = []
    for name, subject in subjects.items():
        for backend in backends:
            for dtype, short in SHORT.items():
                if not GPU and f"{backend} {short}" not in cpu:
                    continue
                device = "cuda" if GPU else "cpu"
                # Compiling takes its time: of Triton in 16 bit every day a few.
                marks = [pytest.mark.slow] if GPU and backend == "triton" and dtype.itemsize == 2 else []
                marks = [m for m in marks if subject not in USUAL.values() and "odd" not in name]
                marks += [native_only] if backend == "native" else []
                marks += [pytest.mark.skipif(not available()[0], reason=available()[1])] if backend == "triton" else []
                case = f"{name}, {backend} {short} {device}"
                found.append(pytest.param(subject, device, backend, dtype, id=case, marks=marks))
    if not GPU:
        found.append(pytest.param(None, "cuda", "", None, id="on a GPU", marks=NEEDS_GPU))
    return pytest.mark.parametrize("subject, device, backend, dtype", found)


def test_every_operator_is_here():
    public = {name for name, operator in Operator.all.items() if operator.public}
    assert EVERY.keys() == {subject.op for subject in USUAL.values()} == public
    assert all(
        name.split(",")[0] == subject.op for name, subject in USUAL.items()
    )  # by which bench.gpu_check takes them


@runs(USUAL, cpu=("triton float32",))
def test_values_of_a_few(subject, device, backend, dtype):
    checks.check_values(subject, device, backend, dtype)


@runs(USUAL, cpu=("native float32", "reference bfloat16"))
def test_layouts(subject, device, backend, dtype):
    checks.check_layouts(subject, device, backend, dtype)


@runs(
    {name: subject for name, subject in USUAL.items() if not subject.mixes},
    cpu=("native float32", "reference bfloat16"),
)
def test_a_nan_stays_in_its_row(subject, device, backend, dtype):
    checks.check_nan(subject, device, backend, dtype)


@runs(
    {name: subject for name, subject in USUAL.items() if subject.unread}, cpu=("native float32", "reference bfloat16")
)
def test_what_is_left_out_is_not_read(subject, device, backend, dtype):
    checks.check_unread(subject, device, backend, dtype)


@runs(USUAL, KERNELS, cpu=("native float32", "native bfloat16"))
def test_two_runs_agree(subject, device, backend, dtype):
    checks.check_repeats(subject, device, backend, dtype)


@runs(USUAL, cpu=("native float32",))
def test_compiled_is_eager(subject, device, backend, dtype):
    checks.check_compiled(subject, device, backend, dtype)


@runs(USUAL, KERNELS, cpu=("native float32",))
def test_a_graph_is_replayed(subject, device, backend, dtype):
    checks.check_graph(subject, device, backend, dtype)


@runs(USUAL, KERNELS, cpu=("native float32",))
def test_two_streams(subject, device, backend, dtype):
    checks.check_streams(subject, device, backend, dtype)


@runs(BROKEN, cpu=("triton float32",))
def test_ids_out_of_range(subject, device, backend, dtype):
    """On a CPU the interpreter alone goes on; the others raise there."""
    checks.check_broken(*subject, BAD_IDS, device, backend, dtype)


@runs(ALL)
def test_values(subject, device, backend, dtype):
    checks.check_values(subject, device, backend, dtype)
