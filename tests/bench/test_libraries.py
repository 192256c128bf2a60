"""MMoE out of other libraries' layers is ours; stand-ins with their signatures are there without them."""

import sys
import types

import pytest
import torch
from torch import nn

from bench import architectures, libraries
from bench.papers import TINY

QUICK = {"seconds": 0.0, "min_rounds": 1}


class MLP(nn.Sequential):
    """As torch_rechub.basic.layers.MLP."""

    def __init__(self, input_dim, output_layer=True, dims=None, dropout=0, activation="relu"):
        layers = []
        for width in dims:
            act = nn.Softmax(dim=1) if activation == "softmax" else nn.ReLU()
            layers += [nn.Linear(input_dim, width), nn.BatchNorm1d(width), act, nn.Dropout(dropout)]
            input_dim = width
        super().__init__(*layers)
        assert not output_layer


class DNN(nn.Sequential):
    """As deepctr_torch.layers.DNN."""

    def __init__(self, inputs_dim, hidden_units, activation="relu"):
        widths = [inputs_dim, *hidden_units]
        super().__init__(*(m for k, n in zip(widths, widths[1:], strict=False) for m in (nn.Linear(k, n), nn.ReLU())))


class MMoE(nn.Module):
    """As LibMTL.architecture.MMoE."""

    def __init__(self, task_name, encoder_class, decoders, rep_grad, multi_input, device, *, img_size, num_experts):
        super().__init__()
        self.experts_shared = nn.ModuleList(encoder_class() for _ in range(num_experts[0]))
        gates = {t: nn.Sequential(nn.Linear(img_size[0], num_experts[0]), nn.Softmax(dim=-1)) for t in task_name}
        self.gate_specific, self.decoders = nn.ModuleDict(gates), decoders

    def forward(self, inputs):
        outputs = torch.stack([expert(inputs) for expert in self.experts_shared])
        mixed = {t: torch.einsum("ij...,ji->j...", outputs, gate(inputs)) for t, gate in self.gate_specific.items()}
        return {task: self.decoders[task](rep) for task, rep in mixed.items()}


STAND_INS = {libraries.RECHUB: MLP, libraries.DEEPCTR: DNN, libraries.LIBMTL: MMoE}


@pytest.fixture
def stand_ins(monkeypatch):
    for library, layer in STAND_INS.items():
        module, name = libraries._LAYERS[library]
        made = types.ModuleType(module)
        setattr(made, name, layer)
        monkeypatch.setitem(sys.modules, module, made)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("library", STAND_INS)
def test_a_stand_in_is_ours(stand_ins, library, dtype):
    row = architectures.measure("MMoE", TINY, dtype=dtype, rivals=(library,), **QUICK)
    assert row["check"][library]["ok"], row["check"]
    assert row["ratio"][library] > 0


@pytest.mark.parametrize("library", libraries.LIBRARIES)
def test_the_library_is_ours(library):
    if word := libraries.missing(library):
        pytest.skip(word)
    row = architectures.measure("MMoE", TINY, dtype=torch.float64, rivals=(library,), **QUICK)
    assert row["check"][library]["ok"], row["check"]


def test_another_network_in_their_layers_is_seen(stand_ins, monkeypatch):
    right = libraries.DeepCTR.forward
    monkeypatch.setattr(libraries.DeepCTR, "forward", lambda self, x: 1.01 * right(self, x))
    row = architectures.measure("MMoE", TINY, dtype=torch.float64, rivals=(libraries.DEEPCTR,), **QUICK)
    assert not row["check"][libraries.DEEPCTR]["ok"] and row["ratio"][libraries.DEEPCTR] is None


def test_a_missing_library_says_so(monkeypatch):
    monkeypatch.setitem(libraries._LAYERS, libraries.RECHUB, ("no_such_module", "MLP"))
    libraries.missing.cache_clear()
    assert "torch-rechub cannot be imported" in libraries.missing(libraries.RECHUB)
    libraries.missing.cache_clear()


def test_a_network_without_such_a_rival_names_those_it_has():
    with pytest.raises(ValueError, match="rivals: got LibMTL, expected some of plain, torch.compile"):
        architectures.measure("STAR", TINY, rivals=(libraries.LIBMTL,), **QUICK)
