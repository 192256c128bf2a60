"""Flops and bytes: against numbers worked out by hand, and as FlopCounterMode reports them."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mtlkernels as mtl
from mtlkernels import _library, costs

native_only = pytest.mark.skipif(not _library.loaded(), reason=_library.reason() or "loaded")


def f32(*shape):
    return torch.empty(shape, device="meta")


def bf16(*shape):
    return torch.empty(shape, device="meta", dtype=torch.bfloat16)


def ids(*shape):
    return torch.empty(shape, device="meta", dtype=torch.int64)


# B=10, E=3, N=5, K=7: BEN=150, BEKN=1050, EKN=105, EN=15, BK=70. mix: T=2, D=4: BED=120, BTD=80, BTE=60, BTED=240.
X, W, C, Y = f32(10, 7), f32(3, 5, 7), f32(3, 5), f32(10, 3, 5)
H, L, S, V, OUT = bf16(10, 3, 4), f32(10, 2, 3), f32(2, 3), f32(2, 3, 4), bf16(10, 2, 4)
PACKED, COLUMNS, LSE = f32(10, 4), torch.empty(2, 3, dtype=torch.int32, device="meta"), f32(10, 2)
MASK = torch.empty(2, 3, dtype=torch.bool, device="meta")
# J=2, I=3, N=5, K=7: IJNK=210, BJK=140, BIN=150. Domains P=4, N=5, K=7: NK=35.
SNR_X, SNR_W, SNR_G, SNR_Y = f32(10, 2, 7), f32(3, 2, 5, 7), f32(3, 2), f32(10, 3, 5)
STAR_W, STAR_P, STAR_Y = f32(5, 7), f32(4, 5, 7), f32(10, 5)
NORM = (f32(7), f32(7), f32(4, 7), f32(4, 7))
COSTS = [
    ("expert_linear", (X, W, C, None, "relu", True), 2100, 4 * (70 + 105 + 15 + 150)),
    ("expert_linear", (X, W, None, None, "silu", True), 2100, 4 * (70 + 105 + 150 + 150)),
    ("expert_linear", (bf16(10, 2, 7), W, C, [1, 2], "", False), 2100, 2 * (140 + 150) + 4 * (105 + 15)),
    ("expert_linear_backward", (Y, X, W, Y, None, "relu", 7), 2 * 2100 + 150,
     4 * (2 * 150 + 105 + 70) + 4 * (70 + 2 * 150 + 105 + 15)),
    ("expert_linear_backward", (Y, X, W, Y, None, "", 2), 2100, 4 * (70 + 150 + 105)),
    ("expert_linear_backward", (Y, X, W, Y, None, "", 1), 2100, 4 * (150 + 105 + 70)),
    ("expert_linear_backward", (Y, X, W, Y, None, "", 4), 150, 4 * (150 + 15)),
    ("mix", (H, L, None, None, None, None), 2 * 240 + 4 * 60, 2 * (120 + 80) + 4 * 60),
    ("mix", (H, L, S, MASK, None, None), 2 * 240 + 4 * 60, 2 * (120 + 80) + 4 * 66),
    ("mix", (H, None, S, None, None, None), 2 * 240, 2 * (120 + 80) + 4 * 6),
    ("mix", (H, None, V, None, None, None), 2 * 240, 2 * (120 + 80) + 4 * 24),
    ("mix", (H, L, f32(2), None, None, [1, 1, 1]), 2 * 240 + 4 * 60, 2 * (120 + 80) + 4 * 62),
    ("mix", (H, PACKED, None, None, COLUMNS, None), 2 * 160 + 4 * 40, 2 * (120 + 80) + 4 * 40),
    ("mix", (H, None, f32(4), None, COLUMNS, None), 2 * 160, 2 * (120 + 80) + 4 * 4),
    ("mix_backward", (OUT, None, H, L, None, None, None, None, LSE, 3), 4 * 240 + 5 * 60, 2 * (80 + 240) + 4 * 120),
    ("mix_backward", (OUT, None, H, None, V, None, None, None, LSE, 5), 4 * 240, 2 * (80 + 240) + 8 * 24),
    ("mix_backward", (OUT, None, H, L, None, None, None, None, LSE, 1), 2 * 240, 2 * (80 + 120) + 4 * 60),
    ("mix_backward", (OUT, None, H, L, None, None, None, None, LSE, 2), 2 * 240 + 300, 2 * (80 + 120) + 4 * 120),
    ("mix_backward_into", (OUT, H, L, None, None, None, "relu", 2), 4 * 240 + 5 * 60, 2 * (80 + 240) + 4 * 120),
    ("expert_linear_backward_into", (Y, X, W, None, "relu", 6), 2 * 2100 + 150, 4 * (2 * 150 + 2 * (105 + 70) + 15)),
    ("expert_mix", (X, W, C, L, None, None, None, None, "relu"), 2100 + 2 * 300 + 240, 4 * (70 + 105 + 15 + 60 + 100)),
    ("expert_mix_backward", (f32(10, 2, 5), None, X, W, C, L, None, None, None, None, "relu", LSE, 15),
     6 * 1050 + 150 + 4 * 300 + 5 * 60, 4 * (2 * 150 + 100 + 3 * 70 + 2 * 105 + 2 * 15 + 2 * 60)),
    ("expert_mix_backward", (f32(10, 2, 5), None, X, W, C, None, S, None, None, None, "relu", LSE, 16),
     2 * 1050 + 2 * 300, 4 * (100 + 70 + 105 + 15 + 2 * 6)),
    ("expert_mix_saving", (X, W, C, L, None, None, None, None, "relu"), 2100 + 2 * 300 + 240,
     4 * (70 + 105 + 15 + 60 + 100 + 150)),
    ("expert_mix_saving_backward", (f32(10, 2, 5), None, X, W, C, L, None, None, None, None, "relu", H, 15),
     4 * 1050 + 150 + 4 * 300 + 5 * 60, 4 * (150 + 100 + 3 * 70 + 2 * 105 + 2 * 15 + 2 * 60)),
    ("snr_linear", (SNR_X, SNR_W, SNR_G, C[0], "", False, True), 2 * 2100, 4 * (140 + 210 + 6 + 5 + 150)),
    ("snr_linear_backward", (SNR_Y, SNR_X, SNR_W, SNR_G, SNR_Y, "", False, 15), 4 * 2100 + 4 * 210 + 150,
     4 * (150 + 2 * 140 + 2 * 210 + 2 * 6 + 15)),
    ("star_linear", (X, ids(10), STAR_W, STAR_P, None, None, "", False), 2 * 350 + 4 * 35,
     4 * (70 + 50 + 5 * 35) + 80),
    ("star_linear", (X[:2], ids(2), STAR_W, STAR_P, None, None, "", False), 2 * 70 + 2 * 35,
     4 * (14 + 10 + 3 * 35) + 16),
    ("star_linear_backward", (STAR_Y, X, ids(10), STAR_W, STAR_P, STAR_Y, "relu", 31),
     4 * 350 + 3 * 4 * 35 + 50, 4 * (2 * 50 + 2 * 70 + (2 + 8) * 35 + 5 + 20) + 80),
    ("partitioned_norm", (X, ids(10), *NORM, NORM[2], NORM[2], True, 1e-5), 8 * 70, 4 * 140 + 80 + 16 * 28),
    ("partitioned_norm_backward", (X, X, ids(10), NORM[0], NORM[2], NORM[2], NORM[2], ids(4), True, 1e-5, 31),
     12 * 70, 4 * 210 + 80),
    ("esmm_loss", (f32(10), f32(10), f32(10), f32(10), 1.0), 400, 4 * 60),
    ("esmm_loss_backward", (f32(), f32(10), f32(10)), 20, 4 * 40),
    ("masked_bce", (L[:, 0], L[:, 0], MASK[:1].expand(10, 3)), 600, 4 * 90 + 30),
    ("masked_bce_backward", (f32(3), f32(10, 3)), 30, 4 * 60),
    ("hard_concrete", (S, S, 0.6, -0.1, 1.1), 72, 4 * 24),
    ("hard_concrete", (S, None, 0.6, -0.1, 1.1), 36, 4 * 18),
    ("hard_concrete_backward", (S, S, 0.6, -0.1, 1.1, True), 36, 4 * 18),
    ("hard_concrete_l0", (S, 0.6, -0.1, 1.1), 42, 4 * 12),
    ("hard_concrete_l0_backward", (f32(), S), 6, 4 * 12),
]  # fmt: skip


@pytest.mark.parametrize("op, args, flops, moved", COSTS, ids=[f"{c[0]}-{i}" for i, c in enumerate(COSTS)])
def test_by_hand(op, args, flops, moved):
    assert costs.cost(op, *args) == (flops, moved)


def test_every_formula_is_checked():
    assert {c[0] for c in COSTS} == costs.COSTS.keys()
    assert costs.cost("mix_eager", *COSTS[7][1]) == COSTS[7][2:]
    with pytest.raises(KeyError):
        costs.cost("softmax")


def test_formulas_take_the_ops_arguments():
    """Each formula has as many parameters as its op, where that op exists; and every op has a formula."""
    for namespace in (torch.ops.mtlkernels, torch.ops.mtlkernels_triton):
        for op, args, *_ in COSTS:
            packet = getattr(namespace, op, None)
            assert packet is None or len(packet.default._schema.arguments) == len(args), op
    assert mtl.ops._operator.Operator.all.keys() <= costs.COSTS.keys()


@native_only
def test_flop_counter_mode():
    x, w, c = torch.randn(10, 7), torch.randn(3, 5, 7, requires_grad=True), torch.randn(3, 5)
    logits = torch.randn(10, 2, 3)
    with FlopCounterMode(display=False) as counter:
        h = mtl.expert_linear(x, w, c, activation="relu")
        mtl.gated_mix(h, logits).sum().backward()
    found = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    forward, backward = 2 * 1050, 2 * 1050
    assert found["mtlkernels.expert_linear_eager"] == forward
    assert found["mtlkernels.expert_linear_backward"] == backward
    assert found["mtlkernels.mix_eager"] == 2 * 300 + 4 * 60
    assert found["mtlkernels.mix_backward"] == 2 * 300
    assert counter.get_total_flops() == sum(found.values())


LATER = """
import sys, torch, mtlkernels
assert "torch.utils.flop_counter" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.flop_counter import flop_registry
namespaces = [torch.ops.mtlkernels] + [torch.ops.mtlkernels_triton] * hasattr(torch.ops.mtlkernels_triton, "mix")
for n in namespaces:
    assert {n.mix, n.mix_eager, n.mix_backward, n.expert_linear, n.expert_linear_backward} <= flop_registry.keys()
assert not [f for f in sys.meta_path if type(f).__module__.startswith("mtlkernels")]
with FlopCounterMode(display=False) as counter:
    torch.ops.mtlkernels.mix.default(torch.ones(10, 3, 4), torch.ones(10, 2, 3), None, None, None, None)
print(counter.get_total_flops())
"""


@native_only
def test_imported_later():
    """Importing mtlkernels does not import the counter, which knows the formulas all the same."""
    done = subprocess.run([sys.executable, "-c", LATER], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 2 * 240 + 4 * 60
