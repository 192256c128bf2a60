"""Beneath the public functions: each dispatcher op refuses a tensor with one size, its rank or its dtype off alone."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from .cases import native_only

pytestmark = native_only
B, E, D, K, T, U, P = 3, 2, 5, 4, 7, 2, 6  # no two that meet in a tensor are the same, but E and U, which must be
ALL = 31  # every gradient
ANY = {0, 1, "rank", "dtype"}  # the logsumexp, which backward on a CPU computes again


def zeros(*sizes: int) -> Tensor:
    return torch.zeros(sizes)


X, XU, W, BIAS, H = zeros(B, K), zeros(B, U, K), zeros(E, D, K), zeros(E, D), zeros(B, E, D)
LOGITS, STATIC, MASK, LSE = zeros(B, T, E), zeros(T, E), torch.ones(T, E, dtype=torch.bool), zeros(B, T)
OUT = zeros(B, T, D)
COLUMNS = torch.arange(T * E, dtype=torch.int32).view(T, E) - 1  # a route less than T x E
PACKED, ROW = zeros(B, T * E - 1), zeros(T * E - 1)
NATIVE = [1, 0, 1] + [0] * (T - 2)
GATES, SNR_W, SNR_X, SNR_BIAS, SNR_OUT = zeros(P, T), zeros(P, T, D, K), zeros(B, T, K), zeros(P, D), zeros(B, P, D)
IDS, STAR_W, STAR_BIAS, STAR_OUT = torch.zeros(B, dtype=torch.int64), zeros(P, D, K), zeros(P, D), zeros(B, D)
# Arguments, and what may be different: of that argument a size, its "dtype", its "rank" where only its numbers count.
CALLS = {
    "expert_linear": ((X, W, BIAS, None, "relu", False), {0: {0}}),
    "expert_linear units": ((XU, W, BIAS, [1, 1], "", False), {0: {0}}),
    "expert_linear_backward": ((H, X, W, H, None, "relu", ALL), {0: {"rank"}, 3: {"rank"}}),
    "expert_linear_backward_into": ((H, X, W, None, "relu", ALL), {0: {"rank"}}),
    "mix": ((H, LOGITS, STATIC, MASK, None, None), {0: {2, "dtype"}, 1: {"dtype"}, 2: {"dtype"}}),
    "mix logits": ((H, LOGITS, None, None, None, None), {0: {2, "dtype"}, 1: {1, "dtype"}}),
    "mix packed": ((H, PACKED, ROW, None, COLUMNS, None), {0: {2, "dtype"}, 1: {"dtype"}, 2: {"dtype"}}),
    "mix native": ((H, LOGITS, ROW[:2], None, None, NATIVE), {0: {2, "dtype"}, 1: {1, "dtype"}, 2: {"dtype"}}),
    "mix channel": ((H, None, zeros(T, E, D), None, None, None), {0: {0, "dtype"}, 2: {0, "dtype"}}),
    "mix_backward": (
        (OUT, LSE, H, LOGITS, STATIC, MASK, None, None, LSE, 7),
        {0: {"rank"}, 1: {"rank"}, 3: {"dtype"}, 4: {"dtype"}, 8: ANY},
    ),
    "mix_backward_into": (
        (OUT, H, LOGITS, STATIC, None, None, "relu", ALL),
        {0: {"rank"}, 2: {"dtype"}, 3: {"dtype"}},
    ),
    "expert_mix": ((X, W, BIAS, LOGITS, STATIC, MASK, None, None, "relu"), {2: {"rank"}, 3: {"dtype"}, 4: {"dtype"}}),
    "expert_mix logits": ((X, W, None, LOGITS, None, None, None, None, ""), {1: {1}, 3: {1, "dtype"}}),
    "expert_mix packed": (
        (XU, W, BIAS, PACKED, ROW, None, COLUMNS, [1, 1], ""),
        {2: {"rank"}, 3: {"dtype"}, 4: {"dtype", "rank"}, 6: {0}},
    ),
    "expert_mix_backward": (
        (OUT, LSE, X, W, BIAS, LOGITS, STATIC, MASK, None, None, "relu", LSE, ALL),
        {0: {"rank"}, 1: {"rank"}, 4: {"rank"}, 5: {"dtype"}, 6: {"dtype"}, 11: ANY},
    ),
    "expert_mix_saving_backward": (
        (OUT, LSE, X, W, BIAS, LOGITS, STATIC, MASK, None, None, "relu", H, ALL),
        {0: {"rank"}, 1: {"rank"}, 4: {"rank"}, 5: {"dtype"}, 6: {"dtype"}, 11: {"rank"}},
    ),
    "snr_linear": ((SNR_X, SNR_W, GATES, SNR_BIAS, "relu", False, False), {0: {0}, 2: {"dtype"}, 3: {"rank"}}),
    "snr_linear_backward": (
        (SNR_OUT, SNR_X, SNR_W, GATES, SNR_OUT, "relu", False, 15),
        {0: {"rank"}, 3: {"dtype"}, 4: {"rank"}},
    ),
    "star_linear": (
        (X, IDS, W[0], STAR_W, BIAS[0], STAR_BIAS, "", False),
        {4: {"rank"}, 5: {"rank"}},
    ),
    "star_linear_backward": (
        (STAR_OUT, X, IDS, W[0], STAR_W, STAR_OUT, "relu", ALL),
        {0: {"rank"}, 4: {0}, 5: {"rank"}},
    ),
    "partitioned_norm": (
        (X, IDS, W[0, 0], W[0, 0], *[zeros(P, K)] * 4, True, 1e-5),
        {i: {"dtype"} for i in (0, *range(2, 8))},
    ),
    "partitioned_norm_backward": (
        (X, X, IDS, W[0, 0], *[zeros(P, K)] * 3, torch.ones(P, dtype=torch.int64), True, 1e-5, ALL),
        {3: {"dtype"}, 4: {"dtype"}},
    ),
    "hard_concrete": ((X, X, 0.6, -0.1, 1.1), {0: {"rank", "dtype"}, 1: {"rank", "dtype"}}),
    "hard_concrete_backward": ((X, X, 0.6, -0.1, 1.1, True), {0: {"rank"}, 1: {"rank"}}),
    "esmm_loss": ((X[0], X[0], X[0], X[0], 1.0), {2: {"dtype"}, 3: {"dtype"}}),
    "masked_bce": ((X, X, X), {0: {"dtype"}, 1: {"dtype"}, 2: {"dtype"}}),
    "masked_bce_backward": ((X[0], X), {1: {0}}),
}


def changed(t: Tensor) -> Iterator[tuple[int | str, str, Tensor]]:
    """What is different, in which way, and that tensor."""
    for d in range(t.dim()):
        yield d, "shorter", t.narrow(d, 0, t.shape[d] - 1).contiguous()
        yield d, "longer", torch.cat([t, t.narrow(d, 0, 1)], d)
    yield "rank", "more", t[None]
    yield "dtype", "wider", t.double()


@pytest.mark.parametrize("name", CALLS)
def test_no_size_may_be_wrong_alone(name):
    args, free = CALLS[name]
    op = getattr(torch.ops.mtlkernels, name.split()[0])
    op(*args)
    taken = []
    for i, tensor in enumerate(args):
        if not isinstance(tensor, Tensor):
            continue
        for what, how, other in changed(tensor):
            call = (*args[:i], other, *args[i + 1 :])
            if what in free.get(i, ()):
                op(*call)
            else:
                try:
                    op(*call)
                    taken.append((i, what, how))
                except (RuntimeError, ValueError, IndexError):
                    pass
    assert not taken, f"(argument, what, how) that {name} took: {taken}"
