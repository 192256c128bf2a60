"""profile: what every operator costs and where it belongs, loops over experts, and lines that replace them."""

import json
import re

import pytest

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

import torch  # noqa: E402
from torch import nn  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from bench import advice, cli, loops, profiled, watch  # noqa: E402
from bench.target import keywords, load, tensor  # noqa: E402

OWN = "tests/bench/own.py"


def target(name, *inputs, **options):
    return load(f"{OWN}:{name}", inputs=inputs or ("33,12",), **options)


def watched(found, seconds=1.0):
    """One step, as if every operator took the same time."""
    found.step()
    found.release()
    step = watch.watch(found.network, found.step, before=(*found.inputs, *found.above))
    found.release()
    for op in step.ops:
        op.seconds = seconds
    return step


def test_operators_are_counted_and_placed():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3, bias=False))
    x, above = torch.randn(11, 7), torch.randn(11, 3)
    ops = watch.watch(network, lambda: network(x).backward(above), before=(x, above)).ops
    by = {(op.name, op.scope, op.backward): op for op in ops if not op.is_view}
    first, last = by["addmm", "0", False], by["mm", "2", False]
    assert (first.flops, last.flops) == (2 * 11 * 7 * 5, 2 * 11 * 5 * 3)
    assert first.bytes == 4 * (11 * 7 + 7 * 5 + 5 + 11 * 5)
    assert by["threshold_backward", "1", True].flops == 11 * 5
    products = [op for op in ops if op.name == "mm" and op.backward]
    assert sorted((op.scope, op.flops) for op in products) == [("0", 770), ("2", 330), ("2", 330)]
    assert ops[0].shapes == ((7, 5),) or ops[0].shapes  # views come first, and move nothing
    grads = sum(p.numel() for p in network.parameters()) * 4
    assert watch.Step(ops).peak() >= grads and ops[-1].live >= grads


def test_memory_is_what_is_alive():
    module = nn.Identity()

    def step():
        a = torch.ones(256)
        b = a + 1
        del a
        c = b.view(16, 16) * 2
        del b, c

    ops = [op for op in watch.watch(module, step).ops if not op.is_view]
    assert [(op.name, op.live) for op in ops] == [("ones", 1024), ("add", 2048), ("mul", 2048)]


@pytest.mark.parametrize(
    "name, inputs, where, first",
    [
        ("MMoE", "33,12", "network.experts", "from mtlkernels import gated_mix"),
        ("SoftmaxGates", "33,12", "[network.expert_a, network.expert_b]", "from mtlkernels import gated_mix"),
        ("PerTask", "33,3,12", "network.experts", "from mtlkernels.nn import ExpertMLP"),
        ("NotAMixture", "33,12", "network.experts", "from mtlkernels.nn import ExpertMLP"),
    ],
)
def test_lines_give_what_the_loop_gave(name, inputs, where, first):
    found = target(name, inputs)
    best = advice.advise(found, watched(found), 100.0, 10.0, seconds=0.0)[0]
    assert best.lines[0].startswith(first) and len(best.lines) == 3
    assert f"experts of {where}" in best.text or f"modules of {where}" in best.text
    assert best.error < 1e-6 and all(ms > 0 for ms in best.ms)
    network = found.network.eval()
    x = found.inputs[0].detach()
    if name == "MMoE":
        x = torch.relu(network.bottom(x)).detach()
    names = {"network": network, "x": x}
    exec("\n".join(best.lines), names)
    z = names["z"]
    expected = {
        "MMoE": lambda: torch.stack(list(network(found.inputs[0]).values()), 1),
        "SoftmaxGates": lambda: network(x),
        "PerTask": lambda: network(x),
        "NotAMixture": lambda: torch.stack([expert(x) for expert in network.experts], 1),
    }[name]()
    if name == "MMoE":
        z = torch.stack([tower(z[:, t]) for t, tower in enumerate(network.towers)], 1)
    if name == "SoftmaxGates":
        z = z.transpose(1, 2)
    torch.testing.assert_close(z, expected, rtol=1e-5, atol=1e-6)


def test_the_command_prints_lines_that_run(tmp_path, ceilings):
    words = [f"{OWN}:MMoE", "--inputs", "33,12", "--arguments", "experts=6", "--small", "--out", tmp_path]
    done = CliRunner().invoke(cli.app, ["profile", *map(str, [*words, "--ceilings", ceilings])])
    assert done.exit_code == 0, done.output
    said = re.search(
        r"\d\. The Python loop over the 6 experts of network\.experts and the 3 gates.*takes (\d+)%", done.output
    )
    assert said and int(said[1]) > 20
    printed = done.output[said.end() :].split("\n")
    lines = [line.strip() for line in printed if line.startswith("    ")][:3]
    network, x = target("MMoE", arguments={"experts": 6}).network.eval(), torch.randn(9, 12)
    names = {"network": network, "x": torch.relu(network.bottom(x))}
    exec("\n".join(lines), names)
    found = [tower(names["z"][:, t]) for t, tower in enumerate(network.towers)]
    torch.testing.assert_close(found, list(network(x).values()), rtol=1e-5, atol=1e-6)
    assert "addmm" in done.output and "of the step" in done.output
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert any(event.get("name") == "aten::addmm" for event in trace["traceEvents"])
    numbers = json.loads((tmp_path / "operators.json").read_text())
    assert numbers["operators"] and numbers["peak_bytes"] > numbers["kept_bytes"] > 0
    for name in ("roofline", "memory"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "gated_mix(experts(x), gates(x))" in page
    assert not re.search(r"https?://|<script|<link|@import", page)


def test_layers_one_after_another_are_no_experts():
    found = target("Deep")
    assert loops.find(found, watched(found)) == []


def test_a_loop_costs_what_ran_in_it():
    found = target("MMoE")
    step = watched(found)
    experts = next(loop for loop in loops.find(found, step) if loop.where == "network.experts")
    assert {op.scope.split(".")[0] for op in experts.ops} <= {"experts", ""}
    assert [op.name for op in experts.ops if not op.scope] == ["stack"]
    inside = [op for op in step.ops if op.scope.startswith("experts.")]
    assert experts.share == pytest.approx((len(inside) + 1) / len(step.ops))


def test_evaluation_leaves_modes_and_statistics():
    found = target("MMoE")
    found.network.bottom.eval()
    step = watched(found)
    before = torch.get_rng_state()
    loops.find(found, step)
    assert found.network.training and not found.network.bottom.training
    assert torch.equal(before, torch.get_rng_state())


def test_ours_by_name_and_plain():
    rows = profiled.rows(watched(load("MMoE", small=True)), 100.0, 10.0)
    assert {(row.label, row.what) for row in rows if row.ours} >= {("expert_linear", "forward"), ("mix", "backward")}
    plain = load("MMoE", small=True, plain=True)
    assert not any(row.ours for row in profiled.rows(watched(plain), 100.0, 10.0))
    assert advice.advise(plain, watched(plain), 100.0, 10.0, seconds=0.0)[0].lines


def test_whole_numbers_in():
    found = target("embedded", "9,4:50")
    assert found.inputs[0].dtype == torch.int64 and found.inputs[0].max() < 50
    assert any(op.scope == "0" and op.backward for op in watched(found).ops)


def test_bad_words():
    for call, said in [
        (lambda: load("Mmoe"), "name: got 'Mmoe', expected one of SharedBottom"),
        (lambda: load("MMoE", inputs=("3,4",)), "MMoE takes sizes"),
        (lambda: load("MMoE", sizes={"Q": 3}), "sizes: got Q, expected some of B, D"),
        (lambda: load(f"{OWN}:MMoE"), "needs the shape of a batch"),
        (lambda: load(f"{OWN}:Nothing", inputs=("3,4",)), "has no Nothing"),
        (lambda: load("no.such:Thing", inputs=("3,4",)), "no.such cannot be imported"),
        (lambda: load(f"{OWN}:mlp", inputs=("3,4",), sizes={"B": 2}), "takes inputs and arguments"),
        (lambda: load(f"{OWN}:torch", inputs=("3,4",)), "must be or make an nn.Module; got module"),
        (lambda: tensor("3,x", torch.float32, "cpu"), "inputs: got '3,x'"),
        (lambda: keywords("E=", "--sizes"), "--sizes: got 'E='"),
        (lambda: keywords("E=open('x')", "--sizes"), "--sizes: got"),
    ]:
        with pytest.raises(ValueError, match=re.escape(said)):
            call()
    done = CliRunner().invoke(cli.app, ["profile", "MMoE", "--dtype", "int8"])
    assert done.exit_code == 2 and "--dtype: got 'int8'" in done.output
