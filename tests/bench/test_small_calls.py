"""What compute-sanitizer runs: every operator, in two sizes, and right."""

import sys

import pytest

from bench import shapes, small_calls
from bench.subjects import available
from mtlkernels.ops._operator import Operator
from tests.ops.cases import native_only


@native_only
def test_every_operator_is_called_and_right(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["small_calls", "--device", "cpu", "--backends", "native,reference"])
    assert small_calls.main() == 0
    lines = capsys.readouterr().out.splitlines()
    called = {tuple(line.split(":")[0].replace("/", " ").split()) for line in lines if ": ok" in line}
    for operator in (name for name, operator in Operator.all.items() if operator.public):
        for size in ("tiny", "odd"):
            for backend in ("native", "reference"):
                for dtype in ("torch.float32", "torch.bfloat16"):
                    assert any(c[0] == operator and c[-3:] == (size, backend, dtype) for c in called), operator


def test_a_wrong_answer_is_said(monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["small_calls", "--device", "cpu", "--backends", "reference", "--dtype", "float32"]
    )
    monkeypatch.setattr(small_calls, "truth", lambda subject, operands, grad: [2 + grad])
    monkeypatch.setattr(small_calls, "available", lambda: available()[:1])
    assert small_calls.main() == 1 and "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize("size", ["tiny", "odd"])
def test_sizes(size):
    found = getattr(shapes, size)({"B": 4096, "E": 8, "K": 100, "N": 16})
    assert found == {"tiny": {"B": 24, "E": 6, "K": 12, "N": 8}, "odd": {"B": 131, "E": 6, "K": 37, "N": 69}}[size]
