"""Fresh memory is filled with rubbish here, so that a kernel that leaves a part of its output unwritten is seen."""

import ctypes
import sys

import pytest

_PERTURB = -6  # M_PERTURB in glibc's malloc.h: fills new blocks with a byte's complement; 0xfe makes huge numbers


@pytest.fixture(scope="session", autouse=True)
def rubbish():
    if sys.platform != "linux":
        yield
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
    mallopt(_PERTURB, 1)
    yield
    mallopt(_PERTURB, 0)
