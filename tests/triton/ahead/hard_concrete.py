from mtlkernels.triton import hard_concrete

from .build import build


def every_kernel(target, dtype):
    constants = {"BETA": 2 / 3, "GAMMA": -0.1, "ZETA": 1.1, "BLOCK": hard_concrete.BLOCK}
    build(hard_concrete.sample_kernel, target, dtype, 4, {**constants, "SAMPLED": True, "LOW": 1e-6, "HIGH": 1 - 1e-6})
    del constants["BETA"]
    build(hard_concrete.backward_kernel, target, dtype, 4, {**constants, "SCALE": 1.8})
    build(hard_concrete.l0_kernel, target, dtype, 4, {"SHIFT": -1.6, "BLOCK": hard_concrete.BLOCK})


def usual(target):
    every_kernel(target, "bf16")


def rest(target):
    every_kernel(target, "fp32")
