"""The shapes at which operators are measured: those of published recommendation networks and their public code.

B rows, U units, E experts, K inputs, N outputs, T tasks, D width, I and J upper and lower sub-networks, P domains.
"""

_WIDE = {"B": 4096, "U": 5, "E": 10, "K": 256}

SHAPES: dict[str, dict[str, dict[str, int]]] = {
    "expert_linear": {
        "MMoE 8 x 16": {"B": 1024, "E": 8, "K": 100, "N": 16},
        "AdaTT Census": {"B": 4096, "U": 3, "E": 6, "K": 128, "N": 64},
        "AdaTT industrial": {**_WIDE, "N": 256},
        "MTReclib 8 x 512": {"B": 2048, "E": 8, "K": 2176, "N": 512},
        "32 tasks": {"B": 1024, "U": 32, "E": 64, "K": 256, "N": 128},
    },
    "mix/gated": {
        "MMoE 8 x 16": {"B": 1024, "T": 2, "E": 8, "D": 16},
        "MMoE 8 x 128": {"B": 4096, "T": 4, "E": 8, "D": 128},
        "32 tasks": {"B": 1024, "T": 32, "E": 64, "D": 128},
    },
    "mix/adatt": {
        "AdaTT Census": {"B": 4096, "T": 3, "E": 6, "D": 64},
        "AdaTT industrial": {"B": 4096, "T": 5, "E": 10, "D": 256},
        "8 tasks": {"B": 4096, "T": 8, "E": 16, "D": 128},
    },
    "mix/routed": {
        "PLE 1 + 1": {"B": 4096, "T": 2, "E": 3, "D": 256},
        "PLE EasyRec": {"B": 4096, "T": 4, "E": 15, "D": 64},
    },
    "mix/linear": {
        "cross-stitch": {"B": 4096, "T": 4, "E": 4, "D": 128},
        "cross-stitch, channels": {"B": 4096, "T": 4, "E": 4, "D": 128, "channels": 1},
    },
    "expert_mix": {
        "MMoE 8 x 16": {"B": 1024, "T": 2, "E": 8, "K": 100, "N": 16},
        "MMoE 8 x 128": {"B": 4096, "T": 4, "E": 8, "K": 256, "N": 128},
        "AdaTT industrial": {**_WIDE, "T": 5, "N": 256},
    },
    "hard_concrete": {"4 x 4": {"I": 4, "J": 4}, "64 x 64": {"I": 64, "J": 64}},
    "hard_concrete_l0": {"4 x 4": {"I": 4, "J": 4}, "64 x 64": {"I": 64, "J": 64}},
    "snr_linear": {
        "SNR 4 x 4": {"B": 4096, "I": 4, "J": 4, "K": 128, "N": 128},
        "SNR 8 x 8": {"B": 2048, "I": 8, "J": 8, "K": 64, "N": 64},
    },
    "snr_linear/half closed": {"SNR 8 x 8": {"B": 2048, "I": 8, "J": 8, "K": 64, "N": 64}},
    "star_linear": {
        "3 domains": {"B": 4096, "P": 3, "K": 256, "N": 128},
        "30 domains": {"B": 4096, "P": 30, "K": 256, "N": 128},
    },
    "partitioned_norm": {"3 domains": {"B": 4096, "P": 3, "D": 256}, "30 domains": {"B": 4096, "P": 30, "D": 256}},
    "esmm_loss": {"batch 4096": {"B": 4096}, "batch 65536": {"B": 65536}},
    "masked_bce": {"5 tasks": {"B": 4096, "T": 5}, "32 tasks": {"B": 65536, "T": 32}},
}

# What expert_mix saves grows with the number of experts.
SWEEP = {f"E={experts}": {"B": 4096, "T": 4, "E": experts, "K": 256, "N": 128} for experts in (8, 16, 32, 64, 128, 256)}


def odd(shape: dict[str, int]) -> dict[str, int]:
    """Small too, but over a tile of the kernels in every direction, the last tile not full."""
    return tiny(shape) | {name: size for name, size in {"B": 131, "K": 37, "N": 69, "D": 69}.items() if name in shape}


def tiny(shape: dict[str, int]) -> dict[str, int]:
    """A shape of the same kind in which nothing takes time: for dry runs and tests."""
    least = {"B": 24, "K": 12, "N": 8, "D": 8, "I": 2, "J": 3, "P": 2, "U": 2, "T": 2, "E": 6, "channels": 1}
    return {name: min(size, least[name]) for name, size in shape.items()}
