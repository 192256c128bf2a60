"""Random networks: any arguments of a constructor make one that trains, on every backend alike, or a named error."""

import inspect
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import mtlkernels as mtl
import python_models
from python_models.multitask import MultiTaskModel, Towers
from tests.ops.cases import close

NETWORKS = {
    name: kind
    for name in python_models.__all__
    if isinstance(kind := getattr(python_models, name), type) and kind not in (MultiTaskModel, Towers)
}
_levels = st.sampled_from([[[8]], [[8, 4]], [[6], [4]], [[4], [4], [4]], [(5,), [3, 4]], [[1]], ((4,), (4,))])
_widths = st.sampled_from([[8], [8, 4], (4, 4), [1], [3, 5, 2], []])
_layers = {
    "activation": st.sampled_from(["relu", "tanh", "gelu", "silu", "sigmoid", None]),
    "norm": st.sampled_from([None, "layer", "batch"]),
    "dropout": st.sampled_from([0.0, 0]),
}
# What each argument is usually given, by its name.
GOOD: dict[str, st.SearchStrategy] = {
    "in_features": st.integers(1, 17),
    "num_tasks": st.integers(1, 4),
    "num_domains": st.integers(1, 4),
    "num_experts": st.one_of(st.integers(1, 4), st.just([2, 3])),
    "task_experts": st.one_of(st.integers(0, 3), st.just([1, 2, 0])),
    "shared_experts": st.integers(0, 2),
    "expert_dims": _levels,
    "dims": _widths,
    "head_dims": _widths,
    "gate_dims": st.sampled_from([(), [4], [3, 2]]),
    "attention_dims": st.sampled_from([None, 3, [2, 3]]),
    "partitions": st.sampled_from([[[[0]]], [[[0, 1]]], [[[0, 1]], [[0], [1]]], [[[0, 1, 2]], [[2], [0, 1]]]]),
    "width": st.integers(1, 9),
    "num_modules": st.integers(1, 3),
    "depth": st.sampled_from([None, 1, 3]),
    "encoder": st.sampled_from(["task", "shared"]),
    "residual": st.booleans(),
    "single_expert": st.sampled_from(["paper", "per_unit"]),
    "omoe": st.booleans(),
    "routed": st.booleans(),
    "channelwise": st.booleans(),
    "num_subspaces": st.integers(1, 3),
    "mode": st.sampled_from(["product", "logit_sum"]),
    "fallback": st.sampled_from([None, "shared"]),
    "kind": st.sampled_from(["l2", "trace"]),
    "out_features": st.sampled_from([1, 3]),
    "views": st.integers(1, 2),
    **_layers,
}
_TREES = [(1, [[4]], [[[0]]]), (2, [[8, 4]], [[[0, 1]]]), (2, [[6], [4]], [[[0, 1]], [[0], [1]]]),
          (3, [[4], [4]], [[[0, 1, 2]], [[2], [0, 1]]])]  # fmt: skip
# What none of them takes, or hardly.
BAD = st.sampled_from(
    [0, -1, 2.5, "4", "", None, [], [[]], [0], [[-1]], [["a"]], [[[]]], True, float("nan"), {}, object]
)
Network = dict[str, Any]


def _takes(kind: type) -> list[str]:
    """The names of the arguments; of Blocks' for a network that passes them on, the usual ones."""
    parameters = inspect.signature(kind).parameters.values()
    more = [*_layers] if any(p.kind is p.VAR_KEYWORD for p in parameters) else []
    return [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name in GOOD] + more


def _defaults(kind: type) -> list[Any]:
    return [p.default for p in inspect.signature(kind).parameters.values()]


def _required(kind: type) -> set[str]:
    some = inspect.signature(kind).parameters.values()
    return {p.name for p in some if p.default is p.empty and p.kind is not p.VAR_KEYWORD}


@st.composite
def network_of(draw: st.DrawFn, name: str) -> Network:
    """Random arguments of one network; in one of four cases one of them is bad."""
    kind = NETWORKS[name]
    names = _takes(kind)
    optional = [n for n in names if n not in _required(kind)]
    chosen = [n for n in names if n in _required(kind)]
    chosen += draw(st.lists(st.sampled_from(optional), unique=True, max_size=3)) if optional else []
    arguments = {n: draw(GOOD[n]) for n in chosen}
    if name == "BranchedMTL":
        arguments |= zip(("num_tasks", "expert_dims", "partitions"), draw(st.sampled_from(_TREES)), strict=True)
    elif name == "CGC":
        arguments["expert_dims"] = draw(st.sampled_from([[8], (8, 4), [[3]]]))
    bad = draw(st.one_of(st.none(), st.none(), st.none(), st.sampled_from(chosen)))
    if bad is not None:
        arguments[bad] = draw(BAD)
    return {"network": name, "arguments": arguments, "rows": draw(st.integers(1, 9))}


def check_network(call: Network) -> str:
    """AssertionError unless the network trains, the same on the native backend and the reference, or its constructor
    raises an error that names one of its arguments. "agreed" or "refused".
    """
    kind, arguments = NETWORKS[call["network"]], call["arguments"]
    torch.manual_seed(0)
    try:
        network = kind(**arguments)
    except (TypeError, ValueError) as error:
        names = [*inspect.signature(kind).parameters, *_layers]
        assert any(name in str(error) for name in names), f"the error names no argument: {error!r}"
        return "refused"
    network.double()
    found, wanted = (_step(network, call, backend) for backend in ("native", "reference"))
    assert found.keys() == wanted.keys()
    # A batch norm divides by deviations that may be as small as sqrt(1e-5), level after level.
    tolerance = 1e-9 if "batch" in (arguments.get("norm"), *_defaults(kind)) else 1e-11
    for name, value in found.items():
        assert value.isfinite().all(), f"{name} is not finite"
        close(value, wanted[name], tolerance, name, floor=1)
    return "agreed"


def _step(network: torch.nn.Module, call: Network, backend: str) -> dict[str, Tensor]:
    """Outputs and gradients of a step in training mode. What is drawn is drawn alike; statistics start anew."""
    state = {k: v.clone() for k, v in network.state_dict().items()}
    torch.manual_seed(1)
    rows = call["rows"] + 4  # of two rows a batch norm leaves the signs alone
    views = [call["arguments"]["views"]] if call["arguments"].get("views", 1) > 1 else []
    x = torch.randn(rows, *views, call["arguments"]["in_features"], dtype=torch.float64, requires_grad=True)
    extras = [torch.arange(rows) % call["arguments"]["num_domains"]] if "num_domains" in call["arguments"] else []
    with mtl.use_backend(backend):
        out = network(x, *extras)
        outputs = _tensors(out)
        sum((o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape)).sum() for o in outputs).backward()
    found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    found |= {f"gradient of {n}": p.grad for n, p in network.named_parameters() if p.grad is not None}
    found["gradient of x"] = torch.zeros_like(x) if x.grad is None else x.grad
    network.zero_grad(set_to_none=True)
    network.load_state_dict(state)
    return found


def _tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    values = out.values() if isinstance(out, dict) else out
    return [t for value in values for t in _tensors(value)]
