"""The tuner without a GPU: its candidates, that it forces them, and that it sees a wrong one."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from bench import tune
from bench.shapes import tiny
from bench.tiles import gemm_candidates, mix_candidates
from mtlkernels.triton.config import GemmConfig, pick_gemm, pick_mix

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter: log(0), 1/0
SHAPE = tiny({"B": 1, "U": 1, "E": 2, "K": 4, "N": 4})


@pytest.mark.parametrize("shape", [(4, 8, 128, 2), (1, 1, 1, 4), (64, 256, 1000, 4)])
def test_mix_candidates_start_at_the_usual_tile(shape):
    found = mix_candidates(*shape)
    assert found[0] == pick_mix(*shape) and len(found) == len(set(found)) > 5
    assert all(tile.width <= 1024 and tile.experts >= 1 for tile in found)


@pytest.mark.parametrize("itemsize, cores, arch", [(2, True, 90), (4, False, 80), (4, True, 89), (2, True, 0)])
def test_gemm_candidates_fit_the_chip(itemsize, cores, arch):
    for m, n, k in itertools.product((None, 48), (48, 256), (None, 300)):
        args = (m, n, k, itemsize, cores, arch)
        found = gemm_candidates(*args)
        assert found[0] == pick_gemm(*args) and len(found) == len(set(found)) > 5
        most = (227 if arch == 90 else 163 if arch == 80 else 99) << 10
        assert all((t.m + t.n) * t.k * itemsize * t.stages <= most for t in found[1:])


@pytest.fixture
def forward():
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    return tune.linear_problems("tiny", SHAPE, torch.float32, "cpu")[0]


def test_a_tile_is_forced_where_it_is_asked_for(forward, monkeypatch):
    args, options, usual = forward.picked()
    used = []
    real = forward.module._Call.constants
    monkeypatch.setattr(forward.module._Call, "constants", lambda self, t, a: used.append(t) or real(self, t, a))
    other = usual._replace(m=32, n=32)
    forward.forced(other, args, options)()
    forward.forced(other, (0, *args[1:]), options)()
    forward.run()
    assert used == [other, usual, usual] and isinstance(usual, GemmConfig)


def test_search_times_the_best_beside_the_usual_tile(forward):
    found = tune.search(forward, "cpu", 5.0, limit=2, small=True)
    assert found["tried"] == 2 and found["refused"] == 0 and found["wrong"] == []
    assert found["best"] in [row["tile"] for row in found["rows"]] and found["gain"] >= 1.0
    assert tuple(found["usual"]) == tuple(forward.picked()[2])


def test_search_sees_a_wrong_tile(forward):
    forward.expected = [forward.expected[0] * 1.01]
    found = tune.search(forward, "cpu", 5.0, limit=2, small=True)
    assert found["best"] is None and len(found["wrong"]) == 2


def test_a_tile_that_does_not_run_is_left_out(forward, monkeypatch):
    args, options, usual = forward.picked()
    monkeypatch.setattr(tune, "gemm_candidates", lambda *a, **o: [usual, usual._replace(m=17)])
    found = tune.search(forward, "cpu", 5.0, small=True)
    assert found["refused"] == 1 and found["best"] == usual


@pytest.mark.slow
def test_the_dry_run(tmp_path):
    assert tune.main(["--interpret", "--out", str(tmp_path / "t.json")]) == 0
    assert "mix backward" in (tmp_path / "t.json").read_text()
