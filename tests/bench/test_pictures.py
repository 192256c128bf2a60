"""Pictures of files of lines: what is on them, that nothing covers anything, and that grey tells things apart."""

import re

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("typer")

from itertools import combinations  # noqa: E402

from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.colors import to_rgb  # noqa: E402
from matplotlib.text import Text  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from bench import calibrate, charts, cli, lines, pictured, roofline, style  # noqa: E402
from bench.swept import ALL  # noqa: E402

OK = {"output": 0.0, "gradient": 0.0, "worst": "", "ok": True}


def head():
    machine = calibrate.machine()
    row = {"threads": machine["threads"], "copy_gb_s": 10.0, "gemm": {"float32": [{"gflops": 100.0}]}}
    start = {"kind": lines.MACHINE, "format": lines.FORMAT, "program": "run", "sources": "0", "commit": None}
    return start | {"machine": machine, "ceilings": [row]}


def figure(subject, variant, ms, **fields):
    about = {"subject": subject, "shape": {"B": 8, "T": 2, "E": 4}, "name": "small", "dtype": "float32"}
    about |= {"device": "cpu", "what": "forward", "variant": variant, "ours": variant in ("ours", "expert_mix")}
    about |= {"ms": {"median": ms, "q20": ms, "q80": ms, "samples": 5}, "check": OK, "noisy": False, "mode": "clock"}
    return lines.figure(**about | {"control_difference": 0.0} | fields)


def run_figures():
    found = []
    for i, subject in enumerate(["mix/gated", "expert_linear", "expert_mix", "mix/routed"]):
        work = {"flops": 10 ** (5 + i % 2), "bytes": 10**6}
        found.append(figure(subject, "ours", 1.0 + i, **work))
        found.append(figure(subject, "plain formula", 2.0 + i, ratio=(2.0 + i) / (1 + i)))
        found.append(figure(subject, "torch.compile", 90.0, ratio=90.0 / (1 + i)))
    return found


def sweep_figures(variants=ALL[:4]):
    found = []
    for k, variant in enumerate(variants):
        for at in (8, 16, 32, 64):
            shape = {"B": 8, "T": 2, "E": at}
            where = {"shape": shape, "name": f"experts={at}", "axis": "experts", "at": at, "peak_mib": 0.1 + k * at}
            found.append(figure(lines.SWEPT, variant, at * (1 + 0.01 * k), **where))
    return found


def boxes(made, keep):
    """The extents of the texts that are kept."""
    made.canvas = FigureCanvasAgg(made)
    renderer = made.canvas.get_renderer()
    made.draw(renderer)
    texts = [t for axes in made.axes for t in axes.texts if t.get_text() and keep(t)]
    texts += [label for axes in made.axes for label in axes.get_yticklabels() if label.get_text() and keep(label)]
    return [(t.get_text(), Text.get_window_extent(t, renderer)) for t in texts]  # without the lines to the points


def assert_apart(made, keep=lambda text: True):
    found = boxes(made, keep)
    assert len(found) > 1
    hits = [(a, b) for (a, x), (b, y) in combinations(found, 2) if x.overlaps(y)]
    assert not hits
    return found


@pytest.mark.parametrize("step", [0.0, 0.02, 0.3])
def test_roofline_labels_never_cover_one_another(step):
    """All points in one place, close together, or spread."""
    points = [
        roofline.Point(f"operator {i}", "forward", 1e9 * (1 + step * i), 1e8, 0.02 * (1 + step * i)) for i in range(14)
    ]
    made = roofline.draw(points, 100.0, 10.0, "title", "foot")
    assert_apart(made, lambda text: text.get_text().isdigit() and text.axes is made.axes[0])
    assert_apart(made, lambda text: text.axes is made.axes[1])


def test_roofline_holds_every_operator_where_it_belongs():
    made = charts.operators(head(), run_figures(), "float32")
    shown = [t.get_text() for t in made.axes[1].texts]
    assert sum("small" in text for text in shown) == 4
    markers = [line for line in made.axes[0].lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert len(markers) == 4
    # mix/gated: 1e5 operations over 1e6 bytes in 1 ms
    assert any(
        line.get_xdata()[0] == pytest.approx(0.1) and line.get_ydata()[0] == pytest.approx(0.1) for line in markers
    )


def test_no_arithmetic_lies_at_the_left_at_its_bandwidth():
    point = roofline.Point("stack", "forward", 0, 1e8, 0.02)
    made = roofline.draw([point], 100.0, 10.0, "title", "foot")
    x, y = next(line.get_xydata()[0] for line in made.axes[0].lines if line.get_marker() == "o")
    assert x < 2 * made.axes[0].get_xlim()[0] and y / x == pytest.approx(5.0)
    assert point.reached(100.0, 10.0) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="points: got none"):
        roofline.draw([roofline.Point("view", "forward", 0, 0, 0.1)], 100.0, 10.0, "", "")


def test_bars_name_every_rival_beside_ours():
    made = charts.bars(head(), run_figures(), "forward", "float32")
    said = [text for text, _ in assert_apart(made)]
    assert "2.00x  plain formula" in said and "90.00x  torch.compile" in said and "mtlkernels" in said
    assert len({patch.get_hatch() for patch in made.axes[0].patches}) == 2
    assert charts.bars(head(), run_figures(), "backward", "float32") is None


def test_a_failed_check_is_not_shown():
    found = run_figures()
    for entry in found:
        if entry["subject"] == "expert_mix":
            entry["check"] = OK | {"ok": False}
            entry["ratio"] = None
    assert not any("expert_mix" in t.get_text() for t in charts.operators(head(), found, "float32").axes[1].texts)
    labels = [t.get_text() for t in charts.bars(head(), found, "forward", "float32").axes[0].get_yticklabels()]
    assert labels and not any("expert_mix" in label for label in labels)


@pytest.mark.parametrize("field, unit", [("ms", "ms"), ("peak_mib", "MiB")])
def test_growth_is_told_apart_without_colour(field, unit):
    made = charts.growth(head(), sweep_figures(ALL), "experts", field, "float32")
    axes = made.axes[0]
    curves = [line for line in axes.lines if line.get_marker() not in ("None", None, "")]
    assert len(curves) == len(ALL)
    assert len({line.get_marker() for line in curves}) == len(ALL)
    assert len({str(line._dash_pattern) for line in curves}) == len(ALL)
    assert unit in axes.get_ylabel() and axes.get_xlabel() == "number of experts"
    assert [t.get_text() for t in axes.get_xticklabels()] == ["8", "16", "32", "64"]
    found = assert_apart(made, lambda text: text.axes is axes and "slope" in text.get_text())
    assert len(found) == len(ALL) and (field == "peak_mib" or any("slope 1.00" in text for text, _ in found))


def test_ours_is_darkest():
    grey = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in map(to_rgb, style.COLOURS)]
    assert grey[0] == min(grey)


def write_lines(path, entries):
    import json

    path.write_text("".join(json.dumps(entry) + "\n" for entry in [head(), *entries]))
    return path


def test_one_page_holds_all(tmp_path):
    run, sweep = write_lines(tmp_path / "r.jsonl", run_figures()), write_lines(tmp_path / "s.jsonl", sweep_figures())
    done = CliRunner().invoke(cli.app, ["pictures", str(run), str(sweep), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    names = ["roofline-float32", "bars-forward-float32", "cost-experts-float32", "memory-experts-float32"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([*(f"{n}.png" for n in names), "report.html"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == len(names) == page.count("src=")
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    for text in ("Slopes in log-log", "Figures of r.jsonl", "expert_linear", "90.00x"):
        assert text in page


def test_bad_files(tmp_path):
    other = tmp_path / "other.json"
    other.write_text("{}")
    empty = write_lines(tmp_path / "empty.jsonl", [])
    run = write_lines(tmp_path / "r.jsonl", run_figures())
    for paths, said in [((other,), "no file of the format"), ((empty,), "nothing to show"), ((run, run), "two files")]:
        with pytest.raises(ValueError, match=said):
            pictured.write(paths, tmp_path / "out")
    done = CliRunner().invoke(cli.app, ["pictures", str(tmp_path / "none.jsonl")])
    assert done.exit_code == 2
