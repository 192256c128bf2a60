"""What surrounds every test here: rubbish in fresh memory, products that keep float32, and a GPU that still works."""

import os

import pytest
import torch

_broken: list[str] = []  # the test after which the GPU gave nothing but errors


@pytest.fixture(autouse=True)
def numerics():
    """Fresh tensors are full of NaN, so that what a kernel leaves unwritten is seen; warn_only, since some reference
    has nothing but an operation that torch calls nondeterministic."""
    matmul = torch.backends.cuda.matmul
    before = torch.utils.deterministic.fill_uninitialized_memory, matmul.allow_tf32
    torch.utils.deterministic.fill_uninitialized_memory, matmul.allow_tf32 = True, False
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory, matmul.allow_tf32 = before


@pytest.fixture(autouse=True)
def a_gpu_that_works(request):
    """After an illegal access every call fails: only the test that made it is to be called the culprit."""
    if _broken and "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)  # the next worker has a GPU that works; this one would skip its way through everybody's tests
    if _broken:
        pytest.skip(f"the GPU is out of order since {_broken[0]}")
    yield
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            _broken.append(request.node.name)
            pytest.fail(f"left the GPU out of order: {error}")
