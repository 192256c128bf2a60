from mtlkernels.triton import snr_linear
from mtlkernels.triton.config import pick_gemm

from .build import build


def every_kernel(target, dtype, shape, activation, weight=None, precision="ieee", skip=True):
    features, width = shape
    cores = dtype != "fp32" or precision == "tf32"
    itemsize = 4 if dtype == "fp32" else 2
    for kernel, tile, extra in (
        (snr_linear.forward_kernel, snr_linear.pick_forward(features, width, itemsize, cores, target),
         {"BIAS": True, "SAVE": activation == "gelu"}),
        (snr_linear.dx_kernel, snr_linear.pick_dx(width, itemsize, cores, target), {}),
        (snr_linear.dw_kernel, pick_gemm(features, width, None, itemsize, cores, target, through_registers=True),
         {"NEED_W": True, "NEED_G": True}),
    ):  # fmt: skip
        constants = dict(SKIP=skip, ACTIVATION=activation, PRECISION=precision, UPCAST=False, BM=tile.m, BN=tile.n,
                         BK=tile.k, GROUP=8, **extra)  # fmt: skip
        build(kernel, target, dtype, tile.warps, constants, tile.stages, weight, shape=shape, activation=activation,
              precision=precision)  # fmt: skip
    rows, columns = snr_linear.BIAS_TILE
    build(snr_linear.db_kernel, target, dtype, 4, {"ACTIVATION": activation, "BM": rows, "BN": columns})


def usual(target):
    every_kernel(target, "bf16", (256, 256), "gelu")
    every_kernel(target, "fp32", (64, 128), "relu", skip=False)


def rest(target):
    for dtype in ("bf16", "fp32"):
        for shape in ((256, 256), (64, 128), (16, 64)):
            for activation in ("", "relu", "gelu", "silu", "tanh"):
                every_kernel(target, dtype, shape, activation)
    for activation in ("relu", "gelu"):
        every_kernel(target, "bf16", (256, 256), activation, weight="fp32", skip=False)
        every_kernel(target, "fp32", (256, 256), activation, precision="tf32")
