"""Fresh memory is filled with rubbish here, so that a kernel that leaves a part of its output unwritten is seen."""

import ctypes
import sys

import pytest

_PERTURB = -6  # M_PERTURB of glibc's malloc.h: new blocks are filled with the complement of this byte, 0xfe: huge numbers


@pytest.fixture(scope="session", autouse=True)
def rubbish():
    if sys.platform != "linux":
        yield
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
    mallopt(_PERTURB, 1)
    yield
    mallopt(_PERTURB, 0)
