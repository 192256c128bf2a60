"""Where the Triton tests run: on the GPU, or in the interpreter, which tests/conftest.py has then chosen."""

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
