"""A sweep without its clock: who is swept, along what, and what the curves say."""

import pytest
import torch

from bench import slopes, sweep, swept
from bench.contest import BOTH, FORWARD
from bench.lines import SWEPT

SMALL = {"B": 13, "T": 3, "E": 5, "K": 6, "N": 4}
QUICK = {"seconds": 0.0, "min_rounds": 1, "memory": False}


def about(what=BOTH, dtype="float32", **changes):
    return {"subject": SWEPT, "shape": SMALL | changes, "dtype": dtype, "device": "cpu", "what": what}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("8:64", [8, 16, 32, 64]),
        ("8:100", [8, 16, 32, 64, 100]),
        ("4:64:4", [4, 16, 64]),
        ("1,3,9", [1, 3, 9]),
        ("7", [7]),
    ],
)
def test_points(text, expected):
    assert sweep.points(text, "--experts") == expected


@pytest.mark.parametrize("text", ["", "a", "0:8", "8:4", "3,1", "2,2", "1:8:1", "-1", "1:2:3:4", "8:"])
def test_points_name_what_they_do_not_take(text):
    with pytest.raises(ValueError, match="--experts: got"):
        sweep.points(text, "--experts")


def test_a_number_moves_what_the_others_stay_at():
    found = sweep.plan({"B": 9, "T": 4, "E": 32, "K": 5, "N": 6}, {"experts": [8, 16], "tasks": [2], "width": [1, 2]})
    assert found == [
        ("experts", 8, {"B": 9, "T": 2, "E": 8, "K": 5, "N": 6}),
        ("experts", 16, {"B": 9, "T": 2, "E": 16, "K": 5, "N": 6}),
        ("width", 1, {"B": 9, "T": 2, "E": 32, "K": 5, "N": 1}),
        ("width", 2, {"B": 9, "T": 2, "E": 32, "K": 5, "N": 2}),
    ]


@pytest.mark.parametrize("what", [FORWARD, BOTH])
@pytest.mark.parametrize("changes", [{}, {"E": 1}, {"T": 1, "B": 1}, {"N": 1, "K": 1}], ids=str)
def test_every_variant_computes_the_same(what, changes):
    variants = (*swept.VARIANTS, swept.BATCHED, "expert_mix, reference", "expert_linear + mix, reference")
    found = sweep.measure(about(what, "float64", **changes), {"name": "n", "axis": "a", "at": 1}, variants, **QUICK)
    assert [entry["variant"] for entry in found] == list(variants)
    for entry in found:
        assert entry["check"]["ok"], entry
        assert entry["ours"] is entry["variant"].startswith("expert_")
        assert (entry["ratio"] is None) == (entry["variant"] == swept.EXPERT_MIX)
        assert (entry["backend"] is None) is not entry["ours"]


def test_what_is_expected_does_not_depend_on_slices(monkeypatch):
    numbers = swept.Numbers(SMALL, torch.float64, "cpu")
    whole = swept.truth(numbers, (BOTH,))
    monkeypatch.setattr(swept, "_SLICE", 4 * 20)  # four rows of five experts' four outputs
    sliced = swept.truth(numbers, (BOTH,))
    assert len(whole) == 5 and all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(whole, sliced, strict=True))


@pytest.mark.parametrize("wrong", ["output", "gradient"])
def test_no_ratio_where_the_check_fails(monkeypatch, wrong):
    def off(x, weight, bias, logits):
        out = swept.batched(x, weight, bias, logits)
        return out * 1.01 if wrong == "output" else out + 0.01 * (out - out.detach())

    monkeypatch.setattr(swept, "two_calls", off)
    ours, bad, plain = sweep.measure(about(), {"name": "n", "axis": "a", "at": 1}, swept.VARIANTS, **QUICK)
    assert not bad["check"]["ok"] and bad["ratio"] is None
    assert ours["check"]["ok"] and plain["ratio"] > 0
    monkeypatch.setattr(swept, "expert_mix", off)
    assert all(
        e["ratio"] is None for e in sweep.measure(about(), {"name": "n", "axis": "a", "at": 1}, swept.VARIANTS, **QUICK)
    )


def test_what_does_not_fit_is_left_out(monkeypatch):
    room = 3_000.0
    monkeypatch.setattr(sweep, "free_bytes", lambda device: room)
    found = sweep.measure(about(FORWARD), {"name": "n", "axis": "a", "at": 1}, swept.VARIANTS, **QUICK)
    others = {entry["variant"]: entry["kind"] for entry in found}
    assert others[swept.EXPERT_MIX] == "figure" and others[swept.MODULES] == "remark"
    room = 100.0
    found = sweep.measure(about(FORWARD), {"name": "n", "axis": "a", "at": 1}, swept.VARIANTS, **QUICK)
    assert {entry["kind"] for entry in found} == {"remark"} and len(found) == 3


def test_memory_that_cannot_be_had_leaves_the_time(monkeypatch):
    def killed(*words, **options):
        raise RuntimeError("the measuring process failed:\nKilled")

    monkeypatch.setattr(sweep, "peak_memory", killed)
    for entry in sweep.measure(about(), {"name": "n", "axis": "a", "at": 1}, swept.VARIANTS, seconds=0.0, min_rounds=1):
        assert entry["ms"]["median"] > 0 and entry["peak_mib"] is None and entry["note"] == "no peak memory: Killed"


def test_what_cannot_be_compiled_is_left_out(monkeypatch):
    def broken(network, name):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(swept, "compiled", broken)
    found = sweep.measure(about(), {"name": "n", "axis": "a", "at": 1}, (swept.EXPERT_MIX, swept.COMPILED), **QUICK)
    assert [(entry["kind"], entry.get("text")) for entry in found] == [
        ("remark", "RuntimeError: no compiler"),
        ("figure", None),
    ]


def test_memory_is_beyond_what_a_call_returns():
    assert swept.kept_bytes(SMALL, 4, FORWARD) == 4 * 13 * 3 * 4
    contender = swept.Contender(swept.TWO_CALLS, swept.Numbers(SMALL, torch.float32, "cpu"))
    assert swept.kept_bytes(SMALL, 4, BOTH) == 4 * sum(t.numel() for t in contender.both())


def test_the_memory_of_modules_grows():
    shape = SMALL | {"B": 512, "N": 64}
    peaks = []
    for experts in (16, 64):
        entry = about(FORWARD) | {"variant": swept.MODULES, "shape": shape | {"E": experts}}
        peaks.append(sweep.weigh(entry))
    if None in peaks:
        pytest.skip("no /proc here")
    outputs = 512 * 64 * 4 / 2**20
    assert peaks[1] - peaks[0] > 0.8 * 2 * 48 * outputs  # twice: apart, and stacked


def figure(variant, at, ms, peak=None, axis="experts", ok=True):
    found = {"axis": axis, "what": FORWARD, "variant": variant, "at": at, "check": {"ok": ok}, "peak_mib": peak}
    return found | {"ms": {"median": ms}}


def test_slopes_are_of_the_upper_points():
    figures = [
        figure("a", at, 1.0 if at < 32 else at**1.01, 3.0 if at < 128 else 6.0) for at in (8, 16, 32, 64, 128, 256)
    ]
    (found,) = slopes.growth(figures)
    assert (found.start, found.end) == (32, 256) and found.time == pytest.approx(1.01) and found.peak_ratio == 2.0
    assert 0 < found.memory < 1
    (found,) = slopes.growth([figure("a", at, 5.0, axis="batch") for at in (1, 2, 4, 8)])
    assert found.start == 2 and found.time == pytest.approx(0) and found.memory is None
    (found,) = slopes.growth([figure("a", 32, 1.0, 0.0), figure("a", 64, 1.0, 0.7)])
    assert found.memory == 0 and found.peak_ratio == 1  # within what a resident size resolves


def test_what_one_costs():
    figures = [figure("a", at, at * (2.0 if at == 64 else 1.6)) for at in (4, 8, 64, 512, 1024)]
    (found,) = slopes.each(figures)
    assert (found.start, found.end) == (8, 512) and (found.first, found.last) == pytest.approx((1.6, 1.6))
    assert found.spread == pytest.approx(0.25)
    assert sweep.each_lines(figures) == [
        "forward, a: one of the experts costs 1.6e+03 us at 8, 1.6e+03 us at 512; within 25% all along"
    ]
    assert slopes.each([figure("a", at, 1.0, axis="tasks") for at in (8, 64)]) == []


def test_a_slope_needs_two_points_that_are_green():
    assert slopes.slope([(8, 1.0)]) is None and slopes.slope([(8, 1.0), (8, 2.0)]) is None
    assert slopes.slope([(8, 0.0), (16, 1.0)]) is None
    (found,) = slopes.growth([figure("a", 32, 1.0), figure("a", 64, 2.0), figure("a", 128, 9.0, ok=False)])
    assert found.time == pytest.approx(1.0) and found.end == 64


def test_crossovers_lie_between_points_that_are_apart():
    """b doubles from 1, a stays at 4: b overtakes no more from 4 on; at 4 they are equal, which says nothing."""
    figures = [figure("a", at, 4.0) for at in (1, 2, 4, 8)] + [figure("b", at, float(at)) for at in (1, 2, 4, 8)]
    (found,) = slopes.crossovers(figures)
    assert (found.faster, found.slower) == ("a", "b") and found.at == pytest.approx(4.0)
    assert slopes.crossovers([figure("a", 1, 1.0), figure("b", 1, 2.0)]) == []
    noise = [figure("a", 1, 1.0), figure("b", 1, 1.04), figure("a", 2, 1.04), figure("b", 2, 1.0)]
    assert slopes.crossovers(noise) == []


def test_expert_mix_is_always_swept():
    options = {"dtypes": ("float32", "bfloat16"), "device": "cpu", "whats": (FORWARD, BOTH), "seconds": 0.0}
    jobs = list(sweep.jobs(sweep.plan(SMALL, {"experts": [2, 4]}), (swept.MODULES,), **options))
    assert [job.variants for job in jobs] == [(swept.EXPERT_MIX, swept.MODULES)] * 8
    assert [job.about["shape"]["E"] for job in jobs] == [2, 2, 4, 4] * 2
