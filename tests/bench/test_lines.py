"""A file of lines: what a run that is cut off leaves, and what the next one makes of it."""

import json

import pytest

from bench import calibrate, lines
from bench.jobs import DONE, STOPPED, Job, work_off
from bench.record import ResultsFileError

ABOUT = {"shape": {"B": 4}, "dtype": "float32", "device": "cpu", "what": "forward"}
MACHINE = {"cpu": "c", "gpu": None, "threads": 1, "torch": "2"}


def entry(subject="mix", variant="ours", median=1.0, ok=True):
    fields = ABOUT | {"subject": subject, "name": "n", "variant": variant, "ours": variant == "ours", "mode": "clock"}
    ms = {"median": median, "q20": median, "q80": median, "samples": 5}
    check = {"output": 0.0, "gradient": 0.0, "worst": "", "ok": ok}
    return lines.figure(**fields, ms=ms, check=check, control_difference=0.0, noisy=False)


def opened(path, again=False, machine=MACHINE):
    return lines.Lines(path, "run", machine, lambda: [{"threads": 1}], again)


def job(subject, measure=None, variants=("ours",)):
    return Job(subject, ABOUT | {"subject": subject}, variants, measure or (lambda: [entry(subject)]))


def test_a_run_goes_on_where_it_was_cut_off(tmp_path):
    path, ran = tmp_path / "a.jsonl", []

    def interrupted():
        raise KeyboardInterrupt

    first = opened(path)
    assert work_off([job("a"), job("b", interrupted), job("c")], first, ran.append) == STOPPED
    assert ran == ["a", "b", ""] and [e["subject"] for e in first.figures] == ["a"]
    path.write_text(path.read_text() + '{"kind": "fig')  # as a power cut leaves it
    assert [e["kind"] for e in lines.read(path)] == ["machine", "figure"]
    second = opened(path)
    assert second.ceilings == [{"threads": 1}]
    assert work_off([job("a"), job("b"), job("c")], second, ran.append) == DONE
    assert ran[3:] == ["b", "c", ""]
    assert [e["subject"] for e in lines.figures(lines.read(path))] == ["a", "b", "c"]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_file_begun_anew_forgets(tmp_path):
    path = tmp_path / "a.jsonl"
    work_off([job("a")], opened(path), print)
    assert opened(path).has(**ABOUT, subject="a", variant="ours")
    assert not opened(path, again=True).has(**ABOUT, subject="a", variant="ours")


def test_a_failure_is_remarked_and_the_rest_measured(tmp_path):
    def fails():
        raise ValueError("x: got 1\nand more")

    found = opened(tmp_path / "a.jsonl")
    assert work_off([job("a", fails, ("ours", "plain")), job("b")], found, print) == DONE
    remarks = [e for e in found.records if e["kind"] == lines.REMARK]
    assert [(e["variant"], e["text"]) for e in remarks] == [
        ("ours", "ValueError: x: got 1"),
        ("plain", "ValueError: x: got 1"),
    ]
    assert [e["subject"] for e in found.figures] == ["b"] and job("a", fails, ("ours", "plain")).done(found)
    assert not job("a", fails, ("ours", "another")).done(found)


def test_what_is_measured_again_counts(tmp_path):
    path = tmp_path / "a.jsonl"
    found = opened(path)
    found.add([entry(median=1.0), entry(variant="plain")])
    found.add([entry(median=2.0)])
    assert {e["variant"]: e["ms"]["median"] for e in lines.figures(lines.read(path))} == {"ours": 2.0, "plain": 1.0}


@pytest.mark.parametrize("changes", [{"cpu": "d"}, {"threads": 2}, {"torch": "3"}, {"gpu": "g"}])
def test_figures_of_two_machines_do_not_mix(tmp_path, changes):
    path = tmp_path / "a.jsonl"
    opened(path)
    with pytest.raises(ResultsFileError, match=f"{next(iter(changes))} .* there"):
        opened(path, machine=MACHINE | changes)


def test_figures_of_two_versions_do_not_mix(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    opened(path)
    monkeypatch.setattr(lines.record, "sources", lambda: {"commit": None, "changed": False, "sources": "other"})
    with pytest.raises(ResultsFileError, match="sources"):
        opened(path)
    assert opened(path, again=True).records[0]["sources"] == "other"


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    for text in ("{}\n", "nonsense\n", "[1]\n"):
        path.write_text(text)
        with pytest.raises(ResultsFileError, match="no file of the format"):
            lines.read(path)
    found = opened(path, again=True)
    found.add([entry()])
    path.write_text(path.read_text().replace('"kind": "figure"', "oops", 1))
    with pytest.raises(ResultsFileError, match="line 2 is no JSON"):
        lines.read(path)


def test_the_format_is_written_down():
    """Every field of a figure and of the head is named in the docstring."""
    assert all(f'"{name}"' in lines.__doc__ for name in entry())
    assert calibrate.machine().keys() >= set(lines._SAME)
