"""Every network: pytest bench/micro/test_networks.py --benchmark-only -k "MMoE"."""

import re
from typing import Any

import pytest
import torch

from bench import architectures
from bench.conftest import WHATS, Settings
from bench.contest import OURS
from bench.papers import ARCHITECTURES, TINY, Sizes
from bench.run import named, shapes_of
from bench.shapes import network_shapes


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    small = option("--shapes") == "tiny"
    which, start = shapes_of("default" if small else option("--shapes"))
    cases = []
    for name, architecture in ARCHITECTURES.items():
        letters = re.findall("[A-Za-z]+", architecture.parameters)
        for label, changes in named(network_shapes(which, letters), start).items():
            sizes = TINY if small else Sizes(**changes)
            for dtype in option("--dtypes").split(","):
                cases += [pytest.param(name, sizes, dtype, what, id=f"{name}-{label}-{dtype}-{what}") for what in WHATS]
    metafunc.parametrize("name, sizes, dtype, what", cases)


def test_network(name: str, sizes: Sizes, dtype: str, what: str, settings: Settings, benchmark: Any) -> None:
    torch_dtype, device = getattr(torch, dtype), settings.device
    row = architectures.measure(name, sizes, dtype=torch_dtype, what=what, **settings.options())
    settings.note(benchmark, row, row["peak_mib"], "clock" if device == "cpu" else "events")
    call = architectures.contestants(name, sizes, torch_dtype, device)[OURS].work(what)
    benchmark.group = name
    settings.time(benchmark, call)
