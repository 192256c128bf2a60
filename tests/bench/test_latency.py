"""The table of served latencies: what it says, and that the page's is the recorded one."""

import json
import time
from pathlib import Path

import pytest

from bench import latency

ROOT = Path(__file__).parents[2]


def line(rows, served, compiled, eager, control=0.0):
    times = {latency.SERVED: served, latency.COMPILED: compiled, latency.EAGER: eager}
    return {"rows": rows, "ms": {name: {"median": ms} for name, ms in times.items()}, "control": control}


RECORD = {
    "machine": {"cpu": "a processor", "threads": 2, "torch": "2.13"},
    "networks": [
        {
            "network": "MMoE",
            "threads": 4,
            "calls": 1200,
            "others": 0.02,
            "rows": [line(1, 0.1, 0.2, 0.25), line(1024, 4.0, 3.0, 5.0, control=0.2)],
        }
    ],
}


def test_the_table():
    text = latency.table(RECORD)
    assert "| 1 | 100 | 200 (2.00x) | 250 (2.50x) |" in text
    assert "| 1,024 | ~4,000 | 3,000 (0.75x) | 5,000 (1.25x) |" in text
    assert "1,200 calls from 4 threads" in text and "took 2% of" in text


def test_it_goes_between_the_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{latency.BEGIN}\nold\n{latency.END}\nbehind\n")
    for _ in range(2):
        latency.put(page, "new")
        assert page.read_text() == f"before\n{latency.BEGIN}\nnew\n{latency.END}\nbehind\n"


def test_other_programs_alone_are_counted():
    clock, end = latency.Others(), time.perf_counter() + 0.2
    while time.perf_counter() < end:
        pass
    assert 0 <= clock.share() <= 1.1


def test_the_page_has_the_recorded_table():
    records = sorted((ROOT / "bench/results").glob("*-latency.json"))
    if not records:
        pytest.skip("no record")
    text = (ROOT / "docs/serving.md").read_text().split(latency.BEGIN)[1].split(latency.END)[0]
    assert text.strip() == latency.table(json.loads(records[-1].read_text())).strip()
