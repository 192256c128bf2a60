"""The shapes at which operators and networks are measured: those of published networks, of their public code, and rows,
experts and tasks as recommendation has them.

B rows, U units, E experts, K inputs, N outputs, T tasks, D width, I and J upper and lower sub-networks, P domains; a
network's letters are those of `bench.papers.Sizes`. SHAPES and NETWORKS hold what is published; `operator_shapes` and
`network_shapes` give one set of the three: "default" (one each), "papers", "all". Every input wants its gradient.
"""

from collections.abc import Iterable

_WIDE = {"B": 4096, "U": 5, "E": 10, "K": 256}

SHAPES: dict[str, dict[str, dict[str, int]]] = {
    "expert_linear": {
        "MMoE 8 x 16": {"B": 1024, "E": 8, "K": 100, "N": 16},
        "AdaTT Census": {"B": 4096, "U": 3, "E": 6, "K": 128, "N": 64},
        "AdaTT industrial": {**_WIDE, "N": 256},
        "MTReclib 8 x 512": {"B": 2048, "E": 8, "K": 2176, "N": 512},
        "32 tasks": {"B": 1024, "U": 32, "E": 64, "K": 256, "N": 128},
        "keras-mmoe 8 x 4": {"B": 1024, "E": 8, "K": 499, "N": 4},
        "DeepCTR-Torch 3 x 256": {"B": 4096, "E": 3, "K": 256, "N": 256},
        "EasyRec 3 x 512": {"B": 4096, "E": 3, "K": 256, "N": 512},
        "FuxiCTR 9 x 512": {"B": 128, "E": 9, "K": 640, "N": 512},
        "deep AdaTT": {"B": 1024, "U": 5, "E": 5, "K": 2048, "N": 1024},
    },
    "mix/gated": {
        "MMoE 8 x 16": {"B": 1024, "T": 2, "E": 8, "D": 16},
        "MMoE 8 x 128": {"B": 4096, "T": 4, "E": 8, "D": 128},
        "32 tasks": {"B": 1024, "T": 32, "E": 64, "D": 128},
        "keras-mmoe 8 x 4": {"B": 1024, "T": 2, "E": 8, "D": 4},
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

# (E, B): what there is of experts, and rows such that the experts' outputs of the widest shape stay below 1 GiB.
_ROWS = (1, 16, 256, 4096, 65536)
_EXPERTS = ((4, 4096), (32, 1024), (256, 256), (1024, 128), (4096, 64))
_TASKS = (1, 2, 16, 64)
_WIDTHS = {"K": 128, "N": 64, "D": 64}

# Letters of bench.papers.Sizes that differ from its default.
NETWORKS: dict[str, dict[str, int]] = {
    "industrial": {},
    "AdaTT Census": {"B": 4096, "K": 128, "N": 128, "D": 64, "T": 3, "E": 6},
    "industrial, 8 tasks": {"T": 8, "E": 16},
    "MMoE 8 x 16": {"B": 1024, "K": 100, "N": 16, "D": 8, "T": 2},
    "PLE EasyRec": {"B": 2048, "K": 256, "N": 256, "D": 64, "T": 4, "m": 3, "s": 3},
    "MTReclib": {"B": 2048, "K": 2176, "N": 512, "D": 256, "T": 2},
    "MMLRec": {"B": 4096, "K": 128, "N": 128, "D": 128, "T": 2, "E": 4, "m": 3, "s": 2},
    "DeepCTR-Torch": {"B": 4096, "K": 256, "N": 256, "D": 128, "T": 2, "E": 3},
    "FuxiCTR": {"B": 128, "K": 640, "N": 256, "D": 128, "T": 2, "m": 1, "s": 8, "E": 8},
    "32 tasks": {"B": 1024, "T": 32, "m": 2, "E": 64},
}

# What expert_mix saves grows with the number of experts.
SWEEP = {f"E={experts}": {"B": 4096, "T": 4, "E": experts, "K": 256, "N": 128} for experts in (8, 16, 32, 64, 128, 256)}


def odd(shape: dict[str, int]) -> dict[str, int]:
    """Small too, but over a tile of the kernels in every direction, the last tile not full."""
    return tiny(shape) | {name: size for name, size in {"B": 131, "K": 37, "N": 69, "D": 69}.items() if name in shape}


def tiny(shape: dict[str, int]) -> dict[str, int]:
    """A shape of the same kind in which nothing takes time: for dry runs and tests."""
    least = {"B": 24, "K": 12, "N": 8, "D": 8, "I": 2, "J": 3, "P": 2, "U": 2, "T": 2, "E": 6, "channels": 1}
    found = {name: min(size, least[name]) for name, size in shape.items()}
    return found | ({"E": found["E"] // found["U"] * found["U"]} if "U" in found else {})


def operator_shapes(name: str, which: str = "default") -> dict[str, dict[str, int]]:
    """The shapes of a subject: its second published one (its only one), all published, or these and the grid.

    ValueError for another `which`.
    """
    published = SHAPES[name]
    if which == "papers":
        return published
    if which == "all":
        return published | _grid(name)
    return dict(list(published.items())[_chosen(which, published)])


def network_shapes(which: str = "default", letters: Iterable[str] = "") -> dict[str, dict[str, int]]:
    """What differs from `bench.papers.Sizes`, by name, as `operator_shapes`. letters: those a network depends on."""
    if which == "papers":
        return NETWORKS
    if which != "all":
        return dict(list(NETWORKS.items())[_chosen(which, NETWORKS)])
    grid = {f"B={rows}": {"B": rows, "K": 128, "N": 64, "D": 32} for rows in _ROWS}
    if "E" in letters:
        grid |= {f"E={experts}": {"E": experts, "B": rows, "K": 64, "N": 32, "D": 32} for experts, rows in _EXPERTS}
    if "T" in letters:
        grid |= {f"T={tasks}": {"T": tasks, "B": 512, "K": 128, "N": 64, "D": 32} for tasks in _TASKS if tasks > 1}
    return NETWORKS | grid


def _chosen(which: str, published: dict[str, dict[str, int]]) -> slice:
    if which != "default":
        raise ValueError(f"which: got {which!r}, expected 'default', 'papers' or 'all'")
    return slice(1, 2) if len(published) > 1 else slice(0, 1)


def _grid(name: str) -> dict[str, dict[str, int]]:
    """One letter moved at a time, the others as in the first published shape, no wider than _WIDTHS."""
    base = next(iter(SHAPES[name].values()))
    widths = _WIDTHS if "P" not in base else dict.fromkeys(_WIDTHS, 32)  # the plain formula gathers a matrix a row
    base = base | {letter: min(size, widths[letter]) for letter, size in base.items() if letter in widths}
    grid = {f"B={rows}": base | {"B": rows} for rows in _ROWS if "B" in base}
    if "E" in base:
        grid |= {f"E={experts}": base | {"B": rows, "E": _whole(name, base, experts)} for experts, rows in _EXPERTS}
    for tasks in _TASKS if "T" in base else ():
        moved = base | {"T": tasks}
        grid[f"T={tasks}"] = moved | ({"E": _whole(name, moved, max(base["E"], tasks))} if "E" in base else {})
    return grid


def _whole(name: str, shape: dict[str, int], experts: int) -> int:
    """About so many experts that every unit has equally many."""
    units = {"mix/adatt": shape.get("T", 1), "mix/routed": shape.get("T", 1) + 1}.get(name, shape.get("U", 1))
    return max(units, experts // units * units)
