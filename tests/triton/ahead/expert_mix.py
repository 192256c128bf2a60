from mtlkernels.triton import expert_mix, mix
from mtlkernels.triton.config import pick_expert_mix

from .build import build


def forward(target, dtype, shape, tasks, activation, routes=mix.MAP_NONE, weight=None, precision="ieee"):
    features, width = shape
    itemsize, cores = 4 if dtype == "fp32" else 2, dtype != "fp32" or precision == "tf32"
    tile = pick_expert_mix(tasks, features, itemsize, cores, target)
    constants = dict(INPUT=expert_mix.INPUT_MAP, BIAS=True, ACTIVATION=activation, LOGITS=True,
                     STATIC=mix.STATIC_TABLE, MAP=routes, TASKS=tile.tasks, PRECISION=precision, UPCAST=False,
                     EVEN_K=width % tile.k == 0, BM=tile.m, BN=tile.n, BK=tile.k)  # fmt: skip
    build(expert_mix.forward_kernel, target, dtype, tile.warps, constants, tile.stages, weight, shape=shape,
          tasks=tasks, activation=activation, precision=precision)  # fmt: skip


def usual(target):
    forward(target, "bf16", (128, 128), 4, "gelu")
    forward(target, "fp32", (128, 128), 8, "relu", mix.MAP_COLUMNS)


def rest(target):
    for dtype in ("bf16", "fp32"):
        for tasks in (1, 2, 4):
            for activation in ("relu", "gelu", "tanh"):
                forward(target, dtype, (256, 256), tasks, activation)
            forward(target, dtype, (128, 100), tasks, "silu", mix.MAP_COLUMNS)
            forward(target, dtype, (20, 64), tasks, "", mix.MAP_MASK)
    for tasks in (1, 2, 4):
        forward(target, "bf16", (256, 256), tasks, "gelu", weight="fp32")
        forward(target, "fp32", (256, 256), tasks, "gelu", precision="tf32")
