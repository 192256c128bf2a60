"""More gradient methods in the loops that weightings are held to: plain, mixed precision, Lightning, accelerate."""

import pytest
import test_loops

from python_models.balancing import MGDA, GradNorm, PCGrad

METHODS = {
    "MGDA scaling heads": lambda: MGDA(3, normalisation="l2", scale_heads=True),
    "PCGrad of GradNorm": lambda: PCGrad(3, weighting=GradNorm(3)),
}


@pytest.mark.parametrize("loop", ["plain_loop", "mixed_precision", "lightning", "accelerate"])
@pytest.mark.parametrize("name", METHODS)
def test_loop(name, loop, monkeypatch, tmp_path):
    monkeypatch.setitem(test_loops.METHODS, name, METHODS[name])
    more = (tmp_path,) if loop in ("lightning", "accelerate") else ()
    getattr(test_loops, f"test_{loop}")(name, *more)
