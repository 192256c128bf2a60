"""The operators' bench without its clock: every rival computes the same, and the check would see it if not."""

import dataclasses

import pytest
import torch
from torch import nn

import mtlkernels as mtl
import python_models
from bench import graphs, operators, subjects
from bench.contest import BOTH, OURS
from bench.cost import Cost, floor, watched
from bench.papers import ARCHITECTURES, TINY
from bench.shapes import SHAPES, SWEEP, tiny

NAMES = [subject.name for subject in subjects.SUBJECTS]
QUICK = {"seconds": 0.0, "min_rounds": 1}


@pytest.fixture
def gated():
    return subjects.find("mix/gated"), tiny(SHAPES["mix/gated"]["MMoE 8 x 128"])


@pytest.mark.parametrize("name", NAMES)
def test_every_rival_computes_the_same(name):
    subject = subjects.find(name)
    if not hasattr(mtl, subject.op):
        pytest.skip(f"there is no {subject.op} yet")
    for shape in SHAPES[name].values():
        rows = operators.measure(subject, tiny(shape), **QUICK)
        assert [row["what"] for row in rows] == [operators.FORWARD, operators.BOTH]
        for row in rows:
            assert len(row["ms"]) == 2 + (subject.rival is not None)
            assert all(check["ok"] for check in row["check"].values()), row["check"]
            assert all(ratio > 0 for ratio in row["ratio"].values())


@pytest.mark.parametrize("name", subjects.EAGER)
def test_rivals_that_are_asked_for_compute_the_same(name):
    subject = subjects.find(name)
    for shape in SHAPES[name].values():  # of x [B,K] and [B,U,K], of as many units as experts and of fewer
        for row in operators.measure(subject, tiny(shape), rivals=operators.rivals_of(subject)[:2], **QUICK):
            assert {subjects.PLAIN, subjects.BATCHED} < set(row["ms"])
            assert all(check["ok"] for check in row["check"].values()), row["check"]
    assert operators.build_step(name, subjects.PLAIN, BOTH, tiny(shape), "float32", "cpu")[0]()


def test_there_is_no_operator_or_network_that_is_not_measured():
    none = {"build_info", "empty_cache", "explain", "use_backend", "Routes"}
    forms = {"gated_mix", "adatt_mix", "linear_mix"}  # of mix
    assert {subject.op for subject in subjects.SUBJECTS} | forms == set(mtl.__all__) - none
    made = {type(architecture.make(TINY)) for architecture in ARCHITECTURES.values()}
    networks = [value for value in vars(python_models).values() if isinstance(value, type)]
    assert made == {n for n in networks if issubclass(n, nn.Module)} - {
        python_models.MultiTaskModel,
        python_models.Towers,
    }


@pytest.mark.parametrize("wrong", ["output", "gradient"])
def test_no_ratio_where_the_check_fails(gated, wrong):
    subject, shape = gated

    def off(operands):
        out = subject.call(operands)
        return out * 1.01 if wrong == "output" else out + 0.01 * (out - out.detach())

    rows = operators.measure(dataclasses.replace(subject, rival=("rival", off)), shape, **QUICK)
    for row in rows:
        assert row["check"][OURS]["ok"] and not row["check"]["rival"]["ok"]
        assert row["ratio"]["rival"] is None and row["ratio"][subjects.FORMULA] > 0


def test_forward_alone_needs_no_gradient(gated):
    subject, shape = gated
    (row,) = operators.measure(subject, shape, whats=(operators.FORWARD,), **QUICK)
    assert row["check"][OURS] == {"output": row["check"][OURS]["output"], "gradient": 0.0, "worst": "", "ok": True}


def test_further_backends_stand_beside_ours(gated):
    subject, shape = gated
    rows = operators.measure(subject, shape, backends=("reference",), **QUICK)
    assert all("reference" in row["ratio"] for row in rows)
    with pytest.raises(ValueError, match="nonsense"):
        operators.measure(subject, shape, backends=("nonsense",), **QUICK)


def test_an_operator_that_is_missing_is_left_out(monkeypatch):
    monkeypatch.delattr(mtl, "mix")
    names = {subject.op for subject in subjects.available()}
    assert "mix" not in names and "expert_linear" in names
    assert all(subject.op != "mix" for subject, _, _ in operators.plan(None, True))


def test_plan_takes_an_operator_or_one_form_of_it():
    assert {s.name for s, _, _ in operators.plan(["mix"], False)} == {n for n in NAMES if n.startswith("mix/")}
    assert {s.name for s, _, _ in operators.plan(["mix/adatt"], False)} == {"mix/adatt"}


def test_every_subject_has_shapes():
    assert set(SHAPES) == set(NAMES)
    assert [shape["E"] for shape in SWEEP.values()] == [8, 16, 32, 64, 128, 256]


def test_watched_names_the_backend(gated):
    subject, shape = gated
    operands, _ = operators.prepare(subject, shape, torch.float32, "cpu")
    assert watched(lambda: operators.on_backend(subject, "reference")(operands)) == ("reference", None)
    if mtl.build_info()["loaded"]:
        backend, cost = watched(lambda: operators.on_backend(subject, "native")(operands))
        assert backend == "native" and (cost is None or cost.flops > 0 < cost.bytes)


def test_the_larger_term_sets_the_floor():
    assert floor(Cost(2_000_000, 1_000_000), 1.0, 1.0) == (2.0, "arithmetic")
    assert floor(Cost(1_000_000, 3_000_000), 1.0, 1.0) == (3.0, "memory")
    assert floor(None, 1.0, 1.0) is None


@pytest.mark.parametrize("size, cache, expected", [(10, 100, 16), (100, 100, 3), (1000, 100, 1), (0, 100, 16)])
def test_copies_fill_the_cache_several_times(size, cache, expected):
    assert graphs.copies_for(size, "cuda", cache) == expected


def test_the_caches_of_all_threads_count(tmp_path, monkeypatch):
    for index, (level, size) in enumerate([("1", "32K"), ("2", "1024K"), ("3", "32768K")]):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        (folder / "level").write_text(f"{level}\n")
        (folder / "size").write_text(f"{size}\n")
    monkeypatch.setattr(graphs, "_CPU_CACHES", tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert graphs.l2_bytes("cpu") == 2 << 20 and graphs.copies_for(3 << 20, "cpu") == 2
    monkeypatch.setattr(graphs, "_CPU_CACHES", tmp_path / "none")
    assert graphs.copies_for(1, "cpu") == 1


def test_calls_rotate():
    ran = []
    call, mode = graphs.captured([lambda i=i: ran.append(i) for i in range(3)], "cpu")
    for _ in range(4):
        call()
    assert ran == [0, 1, 2, 0] and mode == "clock"
