"""What the tests of the training package share."""

from collections.abc import Callable
from typing import Any

import pytest

from python_models.train import config

from .runs import SMALL, merged


@pytest.fixture
def small(tmp_path) -> Callable[..., config.Config]:
    """``small(section={...}, ...)``: a configuration of a run of a second, in a folder of its own."""

    def make(**over: Any) -> config.Config:
        if "name" in over.get("model", {}):  # the sizes of SMALL are MMoE's
            return config.make({"out": str(tmp_path / "run"), **merged({**SMALL, "model": {}}, over)})
        return config.make(merged({"out": str(tmp_path / "run"), **SMALL}, over))

    return make
