"""What tests of the bench share."""

import json

import pytest

from bench import calibrate


@pytest.fixture
def ceilings(tmp_path):
    """A file of ceilings of this machine, with nothing measured."""
    machine = calibrate.machine()
    row = {"threads": machine["threads"], "copy_gb_s": 10.0, "gemm": {"float32": [{"gflops": 100.0}]}}
    path = tmp_path / "ceilings.json"
    path.write_text(json.dumps({"machine": machine, "ceilings": [row]}))
    return path
