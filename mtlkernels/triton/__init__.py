"""Triton kernels and their launchers.

Nothing here imports the package triton: :mod:`.mix` and :mod:`.expert_linear` do, and are imported when first needed.
"""

import importlib.util
import os

from .config import supports

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def available() -> tuple[bool, str]:
    """Whether the package triton can be imported, and why not."""
    if importlib.util.find_spec("triton") is None:
        return False, "the package triton is not installed"
    return True, "triton is installed"


__all__ = ["INTERPRET", "available", "supports"]
