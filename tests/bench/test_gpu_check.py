"""gpu-check without a GPU: parts that fail, hang or leave nothing cost no other part; one file holds them all."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

from bench import gpu_check, record
from bench.outcomes import outcomes
from bench.sanitizer import verdict

MACHINE = {"gpu": "NVIDIA H200", "cpu": "x"}


def part(name, code, tmp_path, limit=60.0, suffix=".json"):
    out = tmp_path / f"{name}{suffix}"
    return gpu_check.Part(name, [sys.executable, "-c", code, str(out)], limit, out)


WRITES = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('{\"rows\": 1}'); "


def test_parts_that_pass_and_fail(tmp_path):
    good = gpu_check.run(part("good", WRITES, tmp_path), 60)
    assert good["status"] == "passed" and good["result"] == {"rows": 1} and "tail" not in good
    bad = gpu_check.run(part("bad", WRITES + "print('oh'); sys.exit(3)", tmp_path), 60)
    assert (bad["status"], bad["reason"], bad["tail"]) == ("failed", "exit status 3", ["oh"])
    assert bad["result"] == {"rows": 1}  # what it had written is kept
    killed = gpu_check.run(part("killed", "import os; os.kill(os.getpid(), 9)", tmp_path), 60)
    assert killed["reason"] == "killed by SIGKILL"
    empty = gpu_check.run(part("empty", "", tmp_path), 60)
    assert empty["status"] == "failed" and "no result" in empty["reason"]


def test_a_part_that_says_it_skipped(tmp_path):
    said = json.dumps({"status": "skipped", "reason": "not here"})
    found = gpu_check.run(part("s", WRITES.replace('{"rows": 1}', said), tmp_path), 60)
    assert (found["status"], found["reason"]) == ("skipped", "not here")


def test_a_part_that_hangs_is_stopped_with_its_children(tmp_path):
    code = WRITES + (
        "import os, subprocess, time; child = subprocess.Popen(['sleep', '600']); "
        "pathlib.Path(sys.argv[1] + '.pid').write_text(str(child.pid)); time.sleep(600)"
    )
    found = gpu_check.run(part("hangs", code, tmp_path), 5)
    assert found["status"] == "failed" and "limit of 5 s" in found["reason"] and found["result"] == {"rows": 1}
    child = int((tmp_path / "hangs.json.pid").read_text())
    for _ in range(50):  # it is gone once whoever inherited it has looked, which may take a moment
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError(f"the child, process {child}, still runs")


def test_a_failing_part_keeps_the_others(tmp_path, monkeypatch, capsys):
    parts = [part("one", "raise SystemExit(1)", tmp_path), part("two", WRITES, tmp_path)]
    monkeypatch.setattr(gpu_check, "parts", lambda *args: parts)
    out = tmp_path / "results.json"
    assert gpu_check.main(["--device", "cpu", "--out", str(out)]) == 1
    found = record.read(out)
    assert {name: entry["status"] for name, entry in found["parts"].items()} == {"one": "failed", "two": "passed"}
    assert "FAILED: one" in capsys.readouterr().out
    monkeypatch.setattr(gpu_check, "parts", lambda *args: [part("one", WRITES, tmp_path)])
    assert gpu_check.main(["--device", "cpu", "--out", str(out)]) == 0  # again, and it replaces its older self
    assert {entry["status"] for entry in record.read(out)["parts"].values()} == {"passed"}


def test_a_part_without_time_left_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "parts", lambda *args: [part("one", WRITES, tmp_path)])
    assert gpu_check.main(["--device", "cpu", "--limit", "1", "--out", str(tmp_path / "r.json")]) == 1
    entry = record.read(tmp_path / "r.json")["parts"]["one"]
    assert entry["reason"] == "not begun: no time was left"


def test_parts_come_in_order_and_by_group():
    def names(*wanted):
        return [p.name for p in gpu_check.parts(list(wanted), "cpu", True, Path("out"), [])]

    assert names("bench", "build") == ["build", "promises", "ceilings", "operators", "step"]
    assert names(*gpu_check.ORDER) == list(gpu_check.ORDER)
    assert names("device") == list(gpu_check.ON_DEVICE)
    with pytest.raises(SystemExit, match="no nonsense"):
        names("nonsense")


def test_every_operator_is_tested_on_the_device_by_one_part():
    from mtlkernels.ops._operator import Operator

    public = sorted(name for name, operator in Operator.all.items() if operator.public)
    assert sorted(name for names in gpu_check.ON_DEVICE.values() for name in names) == public
    assert gpu_check.chosen(("mix",)) == "(mix) and not expert_mix"
    assert gpu_check.chosen(("expert_mix",)) == "(expert_mix)"


def test_every_part_fits_into_ten_minutes():
    assert all(p.limit <= 600 for p in gpu_check.parts(list(gpu_check.ORDER), "cpu", False, Path("out"), []))


def test_a_file_of_another_machine_is_not_mixed_with(tmp_path):
    path = tmp_path / "r.json"
    record.merge(path, MACHINE, {"step": {"status": "passed"}})
    record.merge(path, MACHINE, {"tune": {"status": "passed"}})
    assert set(record.read(path)["parts"]) == {"step", "tune"}
    with pytest.raises(record.ResultsFileError, match="NVIDIA H200"):
        record.merge(path, {"gpu": "other"}, {})
    path.write_text("[1")
    with pytest.raises(record.ResultsFileError, match="no JSON"):
        record.read(path)
    path.write_text('{"format": "other", "parts": {}}')
    with pytest.raises(record.ResultsFileError, match="'other'"):
        record.read(path)


def test_combine_takes_the_later_part(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    record.merge(a, MACHINE, {"step": {"status": "failed"}, "tune": {"status": "passed"}})
    record.merge(b, MACHINE, {"step": {"status": "passed"}})
    assert gpu_check.main(["--combine", str(a), str(b), "--out", str(c)]) == 0
    assert {k: v["status"] for k, v in record.read(c)["parts"].items()} == {"step": "passed", "tune": "passed"}
    assert record.read(a)["parts"]["step"]["status"] == "failed"


def test_the_name_of_a_results_file():
    import datetime

    assert record.name_for(MACHINE, datetime.date(2026, 1, 2)) == "2026-01-02-nvidia-h200.json"
    assert record.name_for({"gpu": None, "cpu": "AMD (R)"}, datetime.date(2026, 1, 2)) == "2026-01-02-cpu-amd-r.json"


def test_outcomes_of_a_junit_file(tmp_path):
    path = tmp_path / "j.xml"
    path.write_text(
        '<testsuites><testsuite><testcase classname="a" name="x"/>'
        '<testcase classname="a" name="y"><failure message="boom&#10;more"/></testcase>'
        '<testcase classname="b" name="z"><skipped message="no GPU"/></testcase></testsuite></testsuites>'
    )
    assert outcomes(path) == {
        "counts": {"passed": 1, "failed": 1, "skipped": 1},
        "files": {"a": {"passed": 1, "failed": 1}, "b": {"skipped": 1}},
        "bad": {"a::y": "boom"},
        "skipped": {"no GPU": 1},
    }
    path.write_text("<testsuites>")
    with pytest.raises(ValueError, match="j.xml"):
        outcomes(path)


@pytest.mark.parametrize(
    "returncode, output, status",
    [
        (0, "========= ERROR SUMMARY: 0 errors", "passed"),
        (99, "=========     at mix_kernel(int)+0x10\n========= ERROR SUMMARY: 2 errors", "failed"),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed", "passed"),
        (1, "Traceback", "failed"),
        (0, "nothing was said", "failed"),
        (None, "========= ERROR SUMMARY: 0 errors", "failed"),
        (1, "Device not supported. Exiting", "skipped"),
    ],
)
def test_verdict_of_the_sanitizer(returncode, output, status):
    found = verdict(returncode, output)
    assert found["status"] == status
    if "mix_kernel" in output:
        assert found["kernels"] == ["mix_kernel"] and found["errors"] == 2


def dry_run(tmp_path, parts):
    out = tmp_path / "dry.json"
    here = str(Path(__file__).with_name("test_compare.py"))
    assert gpu_check.main(["--device", "cpu", "--small", "--parts", parts, "--tests", here, "--out", str(out)]) == 0
    return record.read(out)


def test_dry_run_of_a_part(tmp_path):
    found = dry_run(tmp_path, "ceilings")
    assert found["format"] == record.FORMAT
    assert found["parts"]["ceilings"]["result"]["ceilings"][0]["copy_gb_s"] > 0
    assert str(record.ROOT) not in json.dumps(found)


@pytest.mark.slow
def test_dry_run_of_every_part(tmp_path):
    found = dry_run(tmp_path, "build,tests,sanitizer,bench,tune")
    status = {name: entry["status"] for name, entry in found["parts"].items()}
    assert status.pop("sanitizer") in ("skipped", "passed") and set(status.values()) == {"passed"}
    assert found["parts"]["tests"]["result"]["counts"]["passed"] > 0
    assert found["parts"]["promises"]["result"]["lines"] and not found["parts"]["promises"]["result"]["failed"]
    assert found["parts"]["operators"]["result"]["rows"] and found["parts"]["tune"]["result"]["rows"]
