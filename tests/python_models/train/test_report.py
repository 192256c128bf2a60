"""The report: JSON that parses, one page with its pictures in it, and what the pictures are of."""

import base64
import html.parser
import json
import re
import struct
import sys
import zlib

import pytest
import torch

from python_models.train import report
from python_models.train.checkpoint import load
from python_models.train.config import make
from python_models.train.loop import Loop

from .runs import splits_for

pytest.importorskip("matplotlib")
LEARNED = {
    "MMoE": {"What every task takes of every expert", "How evenly the gates spread"},
    "AdaTT": {"What every task takes of every expert", "How evenly the gates spread"},
    "SNRTrans": {"Connections that are open"},
    "LearnedBranching": {"Which tasks share which layers"},
    "ESMM": set(),
}


class Page(html.parser.HTMLParser):
    """Every element, and the pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.pictures, self.links = [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [attrs[name] for name in ("href", "src") if name in attrs]
        if tag == "img":
            self.pictures[attrs["alt"]] = attrs["src"]
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def ink(png: bytes) -> float:
    """The share of the picture's bytes that are not its most frequent one."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, packed, size = 8, b"", None
    while at < len(png):
        (length,), kind = struct.unpack(">I", png[at : at + 4]), png[at + 4 : at + 8]
        if kind == b"IHDR":
            size = struct.unpack(">II", png[at + 8 : at + 16])
        packed += png[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        at += 12 + length
    raw = zlib.decompress(packed)
    assert min(size) > 100
    return 1 - max(raw.count(bytes([value])) for value in set(raw)) / len(raw)


def finished(name, small, folder) -> Loop:
    loop = Loop(small(model={"name": name}, train={"epochs": 3}), splits_for(name), folder)
    assert loop.run()
    return loop


@pytest.mark.parametrize("name", LEARNED)
def test_the_page_holds_its_pictures(name, small, tmp_path):
    report.write(finished(name, small, tmp_path))
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert not page.open
    assert set(page.pictures) == {"Training loss", "Validation metrics"} | LEARNED[name]
    assert all(link.startswith("data:image/png;base64,") for link in page.links), "nothing is fetched"
    for source in page.pictures.values():
        assert ink(base64.b64decode(source.partition(",")[2])) > 0.01


def test_json(small, tmp_path):
    loop = finished("MMoE", small, tmp_path)
    report.write(loop)
    found = report.read(tmp_path)
    assert found["rows"] == {"train": 96, "validation": 48, "test": 48} and found["steps"] == 18
    assert found["parameters"] == sum(p.numel() for p in loop.model.parameters())
    assert found["tasks"] == {"task_1": "binary", "task_2": "binary"} and len(found["history"]) == 3
    assert make(found["config"]) == loop.config
    assert found["weights_of_step"] == loop.progress.best_step
    best = load(tmp_path / "best.pt")["model"]
    assert all(torch.equal(best[key], value) for key, value in load(tmp_path / "model.pt").items())
    assert found["metrics"]["test"] == json.loads(json.dumps(loop.evaluate(loop.splits.test)))


def test_a_run_that_is_not_finished(small, tmp_path):
    loop = Loop(small(train={"epochs": 3}), splits_for("MMoE"), tmp_path)
    assert not loop.run(lambda: loop.progress.step == 7)
    report.write(loop)
    assert "7 of 18 steps" in (tmp_path / "report.html").read_text()
    assert "(not finished)" in (tmp_path / "report.html").read_text()


def test_esmm_is_measured_after_the_click(small, tmp_path):
    loop = finished("ESMM", small, tmp_path)
    tasks = report.write(loop)["metrics"]["test"]["tasks"]
    assert list(tasks) == ["click", "conversion", "conversion after click"]
    rows = loop.splits.test
    clicked = rows.labels[:, 0] == 1
    with torch.no_grad():
        logits = loop.model.eval().conversion_logits(rows.numeric[clicked], rows.categorical[clicked])
    chosen = torch.nn.functional.binary_cross_entropy_with_logits(logits.double(), rows.labels[clicked, 1].double())
    assert tasks["conversion after click"]["log_loss"] == pytest.approx(float(chosen), rel=1e-6)


def test_without_matplotlib_and_with_nan(small, tmp_path, monkeypatch):
    """No pictures, and a page that says so; a metric that is NaN is null in JSON."""
    splits = splits_for("MMoE")
    ones = splits.test.select(splits.test.labels[:, 0].nonzero().flatten())
    loop = Loop(small(), type(splits)(splits.train, splits.validation, ones), tmp_path)
    for module in ("python_models.train.pictures", "python_models.viz"):
        monkeypatch.setitem(sys.modules, module, None)
    assert loop.run()
    report.write(loop)
    assert "No pictures" in (tmp_path / "report.html").read_text()
    assert report.read(tmp_path)["metrics"]["test"]["tasks"]["task_1"]["auc"] is None


def test_names_are_escaped(small, tmp_path):
    splits = splits_for("MMoE")
    names = ("<b>", "a&b")
    parts = [type(p)(**{**vars(p), "task_names": names}) for p in (splits.train, splits.validation, splits.test)]
    loop = Loop(small(), type(splits)(*parts), tmp_path)
    assert loop.run()
    report.write(loop)
    text = (tmp_path / "report.html").read_text()
    assert not Page(text).open and "<b>" not in text and re.search("&lt;b&gt;.*a&amp;b", text, re.DOTALL)
