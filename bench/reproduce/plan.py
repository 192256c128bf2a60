"""What is trained: settings by name, the studies that they make up, and the runs of each.

Nothing is chosen by the test rows. Every setting gets the same treatment: a run with each learning rate of one grid, on
a seed of its own, of which the least validation loss says the rate; then the seeds, each keeping the epoch of the least
validation loss.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

EXPERTS = 6  # of a level, over all tasks (AdaTT, section 4.3)
WIDTHS = (128, 64)  # of an expert's layers, or of the levels
TOWERS = (32,)
LEVELS = [[width] for width in WIDTHS]
CORRELATIONS = (0.5, 0.9, 1.0)
SYNTHETICS = {"synthetic": 0.3, "bent": 1.0}  # studies of synthetic tasks: the scale of their weights
LOGISTIC = "logistic regression"
TUNING_SEED = 1000  # of the runs that choose a learning rate; the others count from 0


@dataclass(frozen=True)
class Budget:
    """What every run of a kind of data may use."""

    epochs: int
    batch: int
    rates: tuple[float, ...]
    seeds: int


CENSUS = Budget(epochs=8, batch=1024, rates=(2e-3, 5e-3), seeds=5)
SYNTHETIC = Budget(epochs=10, batch=250, rates=(1e-3, 3e-3, 1e-2), seeds=10)
SYNTHETIC_ROWS = (50_000, 5_000, 5_000)


@dataclass(frozen=True)
class Setting:
    """One network on one kind of data.

    Attributes:
        network: an architecture of python_models.train.registry, or LOGISTIC.
        options: of its constructor.
        data: "census", "census by domain" (every row once a task, the task as its domain), "funnel" (two tasks, the
            second only where the first is), or "synthetic 0.5" with the tasks' correlation and, where it is not 0.3,
            the scale of their weights: "synthetic 0.5 1.0".
        towers: hidden widths.
    """

    network: str
    options: dict[str, Any] = field(default_factory=dict)
    data: str = "census"
    towers: tuple[int, ...] = TOWERS

    @property
    def budget(self) -> Budget:
        """Of its kind of data."""
        return SYNTHETIC if self.data.startswith("synthetic") else CENSUS


def _sp(experts: int, widths: tuple[int, ...] = WIDTHS, **options: Any) -> Setting:
    """AdaTT-sp with `experts` a task on every level."""
    dims = [[width] for width in widths]
    return Setting("AdaTT", {"task_experts": experts, "shared_experts": 0, "expert_dims": dims, **options})


_HALF = {"task_experts": 1, "shared_experts": EXPERTS - 3}
_SYNTHETIC = {
    "SharedBottom": ("SharedBottom", {"dims": [113]}),  # as many parameters as 8 experts of 16 with their gates
    "OMoE": ("MMoE", {"num_experts": 8, "expert_dims": [[16]], "omoe": True}),
    "MMoE": ("MMoE", {"num_experts": 8, "expert_dims": [[16]]}),
}

TABLE = {
    LOGISTIC: Setting(LOGISTIC),
    "SharedBottom": Setting("SharedBottom", {"dims": [*WIDTHS]}),
    "MMoE": Setting("MMoE", {"num_experts": EXPERTS, "expert_dims": [[*WIDTHS]]}),
    "ML-MMoE": Setting("MMoE", {"num_experts": EXPERTS, "expert_dims": LEVELS}),
    "CGC": Setting("CGC", {**_HALF, "expert_dims": [*WIDTHS]}),
    "PLE": Setting("PLE", {**_HALF, "expert_dims": LEVELS}),
    "AdaTT-sp": _sp(EXPERTS // 3),
    "AdaTT": Setting("AdaTT", {**_HALF, "expert_dims": LEVELS}),
    "CrossStitch": Setting("CrossStitch", {"expert_dims": LEVELS}),
    "Sluice": Setting("Sluice", {"expert_dims": [[WIDTHS[1]]] * 2}),
    "SNRTrans": Setting("SNRTrans", {"num_experts": EXPERTS, "expert_dims": LEVELS}),
    "SNRAver": Setting("SNRAver", {"num_experts": EXPERTS, "expert_dims": LEVELS}),
    "MTAN": Setting("MTAN", {"dims": [*WIDTHS]}),
    "STAR": Setting("STAR", {"dims": [*WIDTHS, *TOWERS]}, "census by domain"),
    "MRN": Setting("MRN", {"dims": [WIDTHS[0]], "head_dims": [WIDTHS[1], *TOWERS]}),
    "UberNet": Setting("UberNet", {"dims": [*WIDTHS]}),
    "BranchedMTL": Setting("BranchedMTL", {"expert_dims": LEVELS}),
    "LearnedBranching": Setting("LearnedBranching", {"num_experts": EXPERTS, "expert_dims": LEVELS}),
    "SoftOrdering": Setting("SoftOrdering", {"width": WIDTHS[1], "num_modules": 3}),
    "AdaShare": Setting("AdaShare", {"expert_dims": LEVELS}),
    "SoftSharing": Setting("SoftSharing", {"dims": [*WIDTHS]}),
}
STUDIES: dict[str, dict[str, Setting]] = {
    "table": TABLE,
    "synthetic": {
        f"{name} {p}": Setting(network, options, f"synthetic {p}", (8,))
        for p in CORRELATIONS
        for name, (network, options) in _SYNTHETIC.items()
    },
    # The paper does not say how large the weights are. At 0.3 the sines are hardly bent, and every task is easy.
    "bent": {
        f"{name} {p}": Setting(network, options, f"synthetic {p} 1.0", (8,))
        for p in CORRELATIONS
        for name, (network, options) in _SYNTHETIC.items()
    },
    "residual": {
        "AdaTT-sp": TABLE["AdaTT-sp"],
        "AdaTT-sp without": _sp(EXPERTS // 3, residual=False),
        "AdaTT": TABLE["AdaTT"],
        "AdaTT without": Setting("AdaTT", {**TABLE["AdaTT"].options, "residual": False}),
    },
    "experts": {f"{n} a task": _sp(n) for n in (1, 2, 3, 4)},
    "funnel": {
        "ESMM": Setting("ESMM", {"dims": [*WIDTHS, *TOWERS]}, "funnel"),
        "SharedBottom": replace(TABLE["SharedBottom"], data="funnel"),
    },
    # The paper's widths, [256, 128] to [2048, ..., 128], by four, and its one expert a task.
    "levels": {f"{n} levels": _sp(1, tuple(32 << i for i in reversed(range(n)))) for n in (2, 3, 4, 5)},
}


@dataclass(frozen=True)
class Run:
    """One training run. `lr` is None until the tuning runs of its setting say it."""

    study: str
    name: str
    setting: Setting
    seed: int
    lr: float | None

    def key(self, data: str) -> str:
        """What makes it this run and no other: setting, budget, seed, rate and the fingerprint of its data."""
        budget = self.setting.budget
        parts = {"setting": asdict(self.setting), "seed": self.seed, "lr": self.lr, "data": data}
        parts |= {"epochs": budget.epochs, "batch": budget.batch}
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).hexdigest()


def runs(studies: list[str], seeds: int | None = None) -> Iterator[Run]:
    """All of them, in the order in which they are trained: of a study the rates, then seed by seed.

    So what there is at any time compares like with like. A setting that two studies share appears once.
    """
    seen: list[Setting] = []
    for study in studies:
        fresh = {name: setting for name, setting in STUDIES[study].items() if setting not in seen}
        seen += fresh.values()
        tuned = {name: setting for name, setting in fresh.items() if setting.network != LOGISTIC}
        for name, setting in tuned.items():
            for lr in setting.budget.rates:
                yield Run(study, name, setting, TUNING_SEED, lr)
        for name in fresh.keys() - tuned.keys():
            yield Run(study, name, fresh[name], 0, None)
        count = max((s.budget.seeds for s in tuned.values()), default=0) if seeds is None else seeds
        for seed in range(count):
            for name, setting in tuned.items():
                yield Run(study, name, setting, seed, None)
