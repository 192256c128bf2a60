"""Every architecture as people write it is ours, and the bench would see it if not."""

import dataclasses
import json
import re
import sys

import pytest
import torch

import python_models
from bench import adatt_repo, architectures, contest, papers, record, report
from bench.contest import COMPILED, OURS
from bench.papers import ADATT_REPOSITORY, ARCHITECTURES, TINY

QUICK = {"seconds": 0.0, "min_rounds": 1}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_plain_network_is_ours(name, dtype):
    row = architectures.measure(name, TINY, dtype=dtype, **QUICK)
    assert all(check["ok"] for check in row["check"].values()), row["check"]
    assert len(set(row["parameters"].values())) == 1, row["parameters"]
    assert row["ratio"]["plain"] > 0


def test_every_architecture_is_there():
    modules = {type(entry.make(TINY)).__name__ for entry in ARCHITECTURES.values()}
    assert modules == set(python_models.__all__) - {"MultiTaskModel", "Towers"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_written_of_it_is_there(name):
    about = papers.about(name)
    assert re.search(r"\ndef test_\w*equals?_numpy\(", (record.ROOT / about["test"]).read_text())
    assert len((record.ROOT / about["file"]).read_text().splitlines()) == about["lines"]
    assert about["paper"].split()[0] in (record.ROOT / about["file"]).read_text()
    assert papers.ARCHITECTURES[name].count(TINY) > 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_counts(name):
    """A part of a gradient or of a parameter that is off by a hundredth makes the check fail."""
    found = architectures.contestants(name, TINY, torch.float64, "cpu")
    expected = architectures.truth(name, TINY, found["plain"])
    for key, parameter in found[OURS].network.named_parameters():
        handle = parameter.register_hook(lambda grad: grad * 1.01)
        check = contest.compare(architectures.results(found[OURS]), expected, torch.float64)
        handle.remove()
        idle = (
            name == "MTAN" and key.endswith(".bias") and "linears" in key and "early" not in key and "late" not in key
        )
        assert idle == check.ok, key  # a batch norm takes such a bias out again
        assert idle or check.worst == "parameters"
    assert contest.compare(architectures.results(found[OURS]), expected, torch.float64).ok
    with torch.no_grad():
        for parameter in found[OURS].network.parameters():
            parameter.mul_(1.01)
    assert not contest.compare(architectures.results(found[OURS]), expected, torch.float64).ok


def test_no_ratio_where_the_check_fails(monkeypatch):
    right = ARCHITECTURES["MMoE"]

    def wrong(ours):
        found = right.rival(ours)
        with torch.no_grad():
            found.gates[0][1].bias[0] += 0.1
        return found

    entry = dataclasses.replace(right, rival=wrong, parameters="0")
    monkeypatch.setitem(ARCHITECTURES, "MMoE", entry)
    row = architectures.measure("MMoE", TINY, **QUICK)
    assert row["ratio"] == {"plain": None} and row["parameters"]["formula"] == 0
    row["about"] = papers.about("MMoE")
    printed = report.architecture_markdown([row])
    assert "check FAILED" in printed and " = 0, NOT ours: 500 |" in printed


@pytest.mark.parametrize("name", ["SharedBottom", "STAR", "MTAN", "ESMM"])
def test_no_gradient_hangs_on_a_kink(name):
    sizes = dataclasses.replace(TINY, B=300, N=64)
    found = architectures.contestants(name, sizes, torch.float64, "cpu")["plain"]
    near = {}
    for margin in (1e-5, 1e-2):
        torch.manual_seed(architectures.SEED)
        with torch.no_grad(), architectures.Kinks(sizes.B, margin) as kinks:
            found.call(found.x)
        near[margin] = kinks.near
    assert 0 < near[1e-2].sum() < sizes.B
    if name == "ESMM":
        assert not near[1e-5].any()
    else:
        assert torch.equal(near[1e-5], found.grad.flatten(1).eq(0).all(1) if found.grad.dim() > 1 else found.grad == 0)


def test_rows_near_a_kink_are_found():
    x, grad = torch.tensor([[1.0], [1e-6], [-2.0], [0.5], [-1e-7], [3.0]]), torch.ones(6, 2)
    same, kept = architectures.away_from_kinks(torch.relu, x, grad)
    assert same is x and kept.sum(1).tolist() == [2, 0, 2, 2, 0, 2]
    clear, kept = architectures.away_from_kinks(torch.relu, x, torch.ones(()))
    assert clear.flatten().tolist() == [1.0, 1.0, -2.0, 0.5, -2.0, 3.0] and kept == 1
    with architectures.Kinks(6) as kinks:
        torch.relu(x.index_select(0, torch.tensor([4, 3, 1, 0])))
        torch.relu(torch.ones(12, 2))
    assert kinks.near.nonzero().flatten().tolist() == [1, 4]


def test_a_compiled_network_stands_beside(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda network, **options: calls.append(options) or network)
    row = architectures.measure("SNRTrans", TINY, rivals=(COMPILED,), **QUICK)
    assert calls[0]["options"] == {"fallback_random": True}
    assert set(row["ratio"]) == {"plain", COMPILED} and all(row["ratio"].values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", ADATT_REPOSITORY)
def test_the_repository_is_ours(name, dtype):
    """facebookresearch/AdaTT's structure, with slices and with unbind: output, gradients, number of parameters."""
    row = architectures.measure(name, TINY, dtype=dtype, rivals=tuple(architectures.REPOSITORY), **QUICK)
    assert all(row["check"][who]["ok"] for who in (OURS, *architectures.REPOSITORY)), row["check"]
    assert set(row["parameters"]) == {OURS, "plain", "formula", *architectures.REPOSITORY}
    assert len(set(row["parameters"].values())) == 1, row["parameters"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: python_models.AdaTT(6, 2, 1, 0, [[5], [4]]),
        lambda: python_models.AdaTT(6, 2, 1, 1, [[5], [4]]),
        lambda: python_models.AdaTT(6, 3, [1, 2, 3], 2, [[5], [7, 4], [3]]),
        lambda: python_models.AdaTT(6, 2, 2, 1, [[5], [4]], residual=False),
        lambda: python_models.PLE(6, 3, [1, 0, 2], 2, [[5], [7, 4], [3]]),
        lambda: python_models.PLE(6, 2, 2, 1, [[4]]),
        lambda: python_models.MMoE(6, 2, 3, [[5], [7, 4], [3]]),
        lambda: python_models.CrossStitch(6, 3, [[5], [7, 4]]),
        lambda: python_models.SharedBottom(6, 3, [5, 4]),
    ],
)
@pytest.mark.parametrize("take", [adatt_repo.SLICES, adatt_repo.UNBIND])
def test_structures_of_the_repository(make, take):
    """One expert everywhere, unequal counts, levels, no shared experts: the same outputs and gradient of x."""
    torch.manual_seed(0)
    ours = make().double()
    theirs = adatt_repo.build(ours, take)
    x = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    found, wanted = ours(x), theirs(x)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(found)
    pair = [torch.autograd.grad(out, x, grad)[0] for out in (found, wanted)]
    torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-12)


def test_networks_the_repository_has_not():
    with pytest.raises(TypeError, match="STAR, which facebookresearch/AdaTT has no structure for"):
        adatt_repo.build(python_models.STAR(6, 2, [4]))


def test_the_repository_beside_ours(monkeypatch, tmp_path, capsys):
    out = tmp_path / "a.json"
    words = [
        "--small",
        "--repository",
        "--only",
        "PLE,CrossStitch",
        "--sizes",
        "T=2,B=20",
        "--markdown",
        "--out",
        str(out),
    ]
    monkeypatch.setattr(sys, "argv", ["architectures", *words])
    assert architectures.main() == 0
    rows = json.loads(out.read_text())["rows"]
    assert all((row["sizes"]["T"], row["sizes"]["B"], row["sizes"]["K"]) == (2, 20, 7) for row in rows)
    printed = capsys.readouterr().out
    assert "| structure | dtype | mtlkernels | AdaTT repo | AdaTT repo, unbind |" in printed
    assert sum(line.startswith(("| PLE |", "| CrossStitch |")) for line in printed.splitlines()) == 2
    for words, told in ((["--repository", "--only", "STAR"], "has no STAR"), (["--sizes", "Q=3"], "'Q=3'")):
        monkeypatch.setattr(sys, "argv", ["architectures", *words])
        with pytest.raises(SystemExit):
            architectures.main()
        assert told in capsys.readouterr().err


@pytest.mark.parametrize("words", ["T", "T=", "T=0", "T=-1", "T=1.5", "Z=2"])
def test_sizes_that_do_not_fit(words):
    with pytest.raises(ValueError, match=f"--sizes: got '{words}', expected one of B, K, N"):
        architectures.sizes_of(words, TINY)


def test_the_command_writes_and_prints(monkeypatch, tmp_path, capsys):
    out = tmp_path / "a.json"
    words = ["--small", "--only", "MMoE,STAR", "--dtype", "float32,bfloat16", "--markdown", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["architectures", *words])
    assert architectures.main() == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["architecture"], row["dtype"]) for row in rows] == [
        ("MMoE", "float32"),
        ("STAR", "float32"),
        ("MMoE", "bfloat16"),
        ("STAR", "bfloat16"),
    ]
    printed = capsys.readouterr().out
    markdown = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(markdown) == 4 and {line.count(" | ") for line in markdown} == {6}
    assert "R modules of soft ordering" in printed and "K=7" in printed
    assert "[mmoe.py](python_models/mmoe.py), " in printed and "T*E*(K+1)` = 500 |" in printed
    assert "numpy and plain torch, [test_star.py](tests/python_models/test_star.py)" in printed
    monkeypatch.setattr(sys, "argv", ["architectures", "--only", "Nonsense"])
    with pytest.raises(SystemExit):
        architectures.main()
    assert "Nonsense" in capsys.readouterr().err
