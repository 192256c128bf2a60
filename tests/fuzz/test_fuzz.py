"""A thousand random calls, and every one that ever failed; `make fuzz` runs fifty times as many.

A failing call is printed shrunk, as the dictionary that it is: put it into corpus.jsonl as a line when it is mended.
"""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz.agreement import EMULATED, check
from tests.fuzz.calls import OPERATORS, call_of
from tests.fuzz.networks import NETWORKS, check_network, network_of

CORPUS = [json.loads(line) for line in Path(__file__).with_name("corpus.jsonl").read_text().splitlines()]
BACKENDS = ("native", EMULATED, "triton")
# The same calls in every run: one that fails here fails everywhere.
QUICK = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("op", OPERATORS)
def test_backends_agree(op: str) -> None:
    @settings(QUICK, max_examples=60)
    @given(call_of(op))
    def every(call: dict) -> None:
        check(call, BACKENDS if call["which"] == 0 else BACKENDS[:2])  # Triton's interpreter takes the longest

    every()


@pytest.mark.parametrize("name", NETWORKS)
def test_constructors(name: str) -> None:
    @settings(QUICK, max_examples=25)
    @given(network_of(name))
    def every(call: dict) -> None:
        check_network(call)

    every()


@pytest.mark.parametrize("call", CORPUS, ids=lambda call: call.get("op") or call["network"])
def test_what_failed_once(call: dict) -> None:
    if "network" in call:
        check_network(call)
    else:
        check(call, BACKENDS)


def test_a_wrong_number_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from mtlkernels.ops._operator import Operator

    linear = Operator.all["expert_linear"]
    right = linear.differentiable
    monkeypatch.setattr(linear, "differentiable", lambda *args: right(*args) * (1 + 1e-4))
    monkeypatch.setattr(linear, "_differentiable", {"native": linear.differentiable})
    call = {"op": "expert_linear", "dtype": "float32", "values": "drawn", "layouts": {}, "grad": "drawn"}
    call |= {"spoil": "sound", "which": 0}
    sizes = {"B": 3, "E": 2, "N": 4, "K": 5, "counts": [], "inputs": "shared", "activation": None}
    with pytest.raises(AssertionError, match="native"):
        check(call | {"sizes": sizes}, ("native",))
