from mtlkernels.triton import star_linear
from mtlkernels.triton.config import pick_gemm

from .build import build


def every_kernel(target, dtype, shape, activation, weight=None, precision="ieee", ones=()):
    features, width = shape
    cores = dtype != "fp32" or precision == "tf32"
    for kernel, m, n, extra in (
        (star_linear.forward_kernel, None, features, {"BIAS": True, "OWN_BIAS": True, "SAVE": activation == "gelu"}),
        (star_linear.dx_kernel, None, width, {}),
        (star_linear.sums_kernel, features, width, {"NEED_W": True, "NEED_B": True}),
    ):
        tile = pick_gemm(m, n, width, 4 if dtype == "fp32" else 2, cores, target, through_registers=True)
        constants = dict(ACTIVATION=activation, PRECISION=precision, UPCAST=False, BM=tile.m, BN=tile.n, BK=tile.k,
                         GROUP=8, **extra)  # fmt: skip
        build(kernel, target, dtype, tile.warps, constants, tile.stages, weight, shape=shape, activation=activation,
              precision=precision, ones=ones)  # fmt: skip
    for scale in (True, False):
        constants = dict(SCALE=scale, NEED_SHARED=True, NEED_OWN=True, BLOCK=512)
        build(star_linear.combine_kernel, target, dtype, 4, constants, weight=weight, shape=shape, ones=ones)


def usual(target):
    every_kernel(target, "bf16", (256, 256), "gelu")
    every_kernel(target, "fp32", (128, 512), "relu")


def rest(target):
    for dtype in ("bf16", "fp32"):
        for shape in ((256, 256), (64, 128), (16, 64)):
            for activation in ("", "relu", "gelu", "silu", "tanh"):
                every_kernel(target, dtype, shape, activation)
    for activation in ("relu", "gelu"):
        every_kernel(target, "bf16", (256, 256), activation, weight="fp32")
        every_kernel(target, "fp32", (256, 256), activation, precision="tf32")
    every_kernel(target, "bf16", (1, 1), "relu", ones=("N", "K", "x_b", "numel"))
