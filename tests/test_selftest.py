"""python -m mtlkernels: the self-test, and that it says so where something is wrong."""

import torch

from mtlkernels import __main__ as selftest


def test_all_is_right(capsys):
    assert selftest.main() == 0
    printed = capsys.readouterr().out
    assert "WRONG" not in printed and "cpu_isa" in printed and "masked_bce" in printed


def test_a_wrong_operator_is_named(capsys, monkeypatch):
    honest = selftest.results

    def off(call, tensors, backend):
        found = honest(call, tensors, backend)
        return [found[0] + 1e-3, *found[1:]] if tensors[0].dtype == torch.float32 else found

    monkeypatch.setattr(selftest, "results", off)
    assert selftest.main() == 1
    printed = capsys.readouterr().out
    assert "WRONG" in printed and "float32: 1.0e-03 from the reference" in printed


def test_an_operator_that_breaks_is_named(capsys, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(selftest, "results", broken)
    assert selftest.main() == 1
    assert "RuntimeError: no such kernel" in capsys.readouterr().out
