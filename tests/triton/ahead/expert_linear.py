from mtlkernels.triton import expert_linear
from mtlkernels.triton.config import pick_gemm

from .build import build


def all_three(target, dtype, shape, activation, weight=None, precision="ieee", ones=()):
    features, width = shape
    cores = dtype != "fp32" or precision == "tf32"
    for kernel, m, n, extra in (
        (expert_linear.forward_kernel, None, features, {"BIAS": True, "SAVE": activation == "gelu", "EVEN_K": True}),
        (expert_linear.dx_kernel, None, width, {}),
        (expert_linear.dw_kernel, features, width, {"NEED_W": True, "NEED_B": True}),
    ):
        gradient = kernel is not expert_linear.forward_kernel
        tile = pick_gemm(m, n, width, 4 if dtype == "fp32" else 2, cores, target, through_registers=gradient)
        constants = dict(EVEN=True, ACTIVATION=activation, PRECISION=precision, UPCAST=False, BM=tile.m, BN=tile.n,
                         BK=tile.k, GROUP=8, **extra)  # fmt: skip
        build(kernel, target, dtype, tile.warps, constants, tile.stages, weight, shape=shape, activation=activation,
              precision=precision, ones=ones)  # fmt: skip


def usual(target):
    all_three(target, "bf16", (256, 256), "gelu")
    all_three(target, "fp32", (64, 128), "relu")
    all_three(target, "bf16", (1, 64), "", ones=("N", "span"))


def rest(target):
    for dtype in ("bf16", "fp32"):
        for shape in ((256, 256), (64, 128), (16, 64)):
            for activation in ("", "relu", "gelu", "silu", "tanh"):
                all_three(target, dtype, shape, activation)
    for activation in ("relu", "gelu"):
        all_three(target, "bf16", (256, 256), activation, weight="fp32")
        all_three(target, "fp32", (256, 256), activation, precision="tf32")
    all_three(target, "bf16", (1, 1), "relu", ones=("N", "K", "span", "total", "x_b", "x_u", "dx_b"))
