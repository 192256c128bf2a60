"""Every operator: pytest bench/micro/test_operators.py --benchmark-only -k "mix and forward"."""

from typing import Any

import pytest
import torch

from bench import operators
from bench.conftest import WHATS, Settings
from bench.contest import OURS
from bench.cost import nbytes
from bench.graphs import captured, copies_for
from bench.run import named, shapes_of
from bench.shapes import operator_shapes, tiny
from bench.subjects import Subject, available


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    small = option("--shapes") == "tiny"
    which, start = shapes_of("default" if small else option("--shapes"))
    cases = [
        pytest.param(subject, tiny(shape) if small else shape, dtype, what, id=f"{subject.name}-{label}-{dtype}-{what}")
        for subject in available()
        for label, shape in named(operator_shapes(subject.name, which), start).items()
        for dtype in option("--dtypes").split(",")
        for what in WHATS
    ]
    metafunc.parametrize("subject, shape, dtype, what", cases)


def test_operator(
    subject: Subject, shape: dict[str, int], dtype: str, what: str, settings: Settings, benchmark: Any
) -> None:
    torch_dtype, device = getattr(torch, dtype), settings.device
    (row,) = operators.measure(subject, shape, dtype=torch_dtype, whats=(what,), **settings.options())
    settings.note(benchmark, row, row["beyond_mib"], row["mode"][OURS])
    operands, grad = operators.prepare(subject, shape, torch_dtype, device)
    call = operators.variants(subject)[OURS]
    sets = [operators.copied(operands, subject.leaves) for _ in range(copies_for(nbytes(operands), device))]
    steps = [operators.step(call, own, subject.leaves, grad, what) for own in sets]
    benchmark.group = subject.name
    settings.time(benchmark, captured(steps, device)[0])
