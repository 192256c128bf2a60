"""Without a GPU the kernels run in Triton's interpreter, which must be chosen before triton is first imported."""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> str:
    """Where the kernels run: the GPU, or the CPU in the interpreter."""
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.fail("triton was imported before tests/triton/conftest.py: run these tests with TRITON_INTERPRET=1")
    return "cpu"
