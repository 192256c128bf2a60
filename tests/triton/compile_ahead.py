"""Compiles the kernels for one GPU architecture, without a GPU, and prints what came out as JSON lines.

    python compile_ahead.py 90 [all]

Run in a process of its own, without TRITON_INTERPRET: test_ahead.py does.
"""

import json
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mtlkernels.triton import (
    esmm_loss,
    expert_linear,
    hard_concrete,
    losses,
    masked_bce,
    mix,
    mix_channels,
    partitioned_norm,
    snr_linear,
    star_linear,
)
from mtlkernels.triton.config import pick_gemm, pick_mix, power_of_two

FLOAT32 = {f"{name}_ptr" for name in ("logit", "static", "lse", "g_lse", "da", "dlogit", "partial", "bias", "dw", "db",
                                      "partial_bias", "gate", "dgate", "noise", "s", "slope", "total")}  # fmt: skip
INT32, INT64 = {"map_ptr", "offset_ptr", "tile_ptr", "chunk_ptr"}, {"order_ptr"}
TILE = {"BB", "TP", "BE", "BD", "UNROLL", "BM", "BN", "BK", "GROUP"}  # sizes that a pick function chooses
# As for a real call: sizes and strides that are multiples of 16 are known to be, batch, T, E and counts are not.
ALIGNED = {"D", "K", "N", "span", "total", "h_b", "h_e", "g_b", "g_t", "x_b", "x_u", "x_j", "dx_b"}


def build(kernel, target, dtype, warps, constants, stages=3, weight=None, ones=(), types=None, **labels):
    """Compile one kernel and print its registers, stack, shared memory and tensor-core instructions.

    ones: integer arguments that are 1, which Triton makes constants. types: of pointers, where the name does not say.
    """
    constants = {**constants, **{name: 1 for name in ones if name in kernel.arg_names}}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            short = "i32" if name in INT32 else "i64" if name in INT64 else "fp32" if name in FLOAT32 else dtype
            short = (types or {}).get(name, short)
            signature[name] = "*" + (weight if weight and name in ("w_ptr", "own_ptr") else short)
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif name == "weight":
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name in ALIGNED:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True)
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout).groups()
    ptx = compiled.asm["ptx"]
    flags = {name: value for name, value in constants.items() if name not in TILE}
    found = dict(
        module=kernel.fn.__module__.rpartition(".")[2], kernel=kernel.fn.__name__, target=target, dtype=dtype,
        weight=weight, ones=list(ones), flags=flags, tile={k: v for k, v in constants.items() if k in TILE},
        **labels, warps=warps, registers=int(registers),
        stack=int(stack), local=int(local), shared=compiled.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"), tcgen05=ptx.count("tcgen05.mma"), mma=ptx.count("mma.sync"),
    )  # fmt: skip
    print(json.dumps(found), flush=True)


def build_mix(target, dtype, shape, static, routes, ones=()):
    num_rows, num_experts, width = shape
    tile = pick_mix(num_rows, num_experts, width, 4 if dtype == "fp32" else 2)
    common = {"BB": tile.rows, "TP": power_of_two(num_rows), "BD": tile.width}
    if static == "channels":
        build(mix_channels.channel_forward_kernel, target, dtype, tile.warps, common, shape=shape, ones=ones)
        build(mix_channels.channel_backward_kernel, target, dtype, tile.warps,
              {**common, "NEED_H": True, "NEED_S": True}, shape=shape, ones=ones)  # fmt: skip
        return
    common.update(LOGITS=True, STATIC=static, MAP=routes, BE=tile.experts)
    build(mix.forward_kernel, target, dtype, tile.warps, {**common, "UNROLL": tile.unroll}, shape=shape, ones=ones)
    common.update(G_LSE=False, NEED_H=True, NEED_L=True, NEED_S=static != mix.STATIC_NONE, ONE=width <= tile.width)
    build(mix.backward_kernel, target, dtype, tile.warps, common, shape=shape, ones=ones)


def build_linear(target, dtype, shape, activation, weight=None, precision="ieee", ones=()):
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


def build_losses(target, dtype, num_tasks):
    tile = losses.pick_loss(num_tasks)
    if num_tasks == 1:
        build(esmm_loss.esmm_kernel, target, dtype, tile.warps, {"BB": tile.rows})
    sizes = {"BB": tile.rows, "BT": tile.tasks}
    ones = ("T",) if num_tasks == 1 else ()
    build(losses.scale_kernel, target, "fp32", tile.warps, sizes, shape=(num_tasks,), ones=ones)
    build(masked_bce.mask_sum_kernel, target, "fp32", tile.warps, sizes, shape=(num_tasks,), ones=ones)
    for masked in (False, True):
        build(masked_bce.bce_kernel, target, dtype, tile.warps, {**sizes, "MASK": masked}, shape=(num_tasks,),
              ones=ones)  # fmt: skip


def build_norm(target, dtype, width, ones=()):
    tile = partitioned_norm.pick_norm(width, 4 if dtype == "fp32" else 2)
    common, merge = {"BR": tile.rows, "BD": tile.width}, {"BC": 32, "BD": tile.width}
    types = dict.fromkeys(("id_ptr", "domain_ptr", "order_ptr", "bound_ptr", "count_ptr"), "i64")
    activations = {"x_ptr", "g_ptr", "out_ptr", "dx_ptr"}
    for kernel, constants in (
        (partitioned_norm.bounds_kernel, {"BLOCK": 128}),
        (partitioned_norm.statistics_kernel, common),
        (partitioned_norm.merge_kernel, {**merge, "TRAINING": True}),
        (partitioned_norm.forward_kernel, {**common, "EPS": 1e-5, "GROUPED": True}),
        (partitioned_norm.forward_kernel, {**common, "BR": tile.loose_rows, "EPS": 1e-5, "GROUPED": False}),
        (partitioned_norm.sums_kernel, common),
        (partitioned_norm.merge_sums_kernel, {**merge, "EPS": 1e-5}),
        (partitioned_norm.backward_kernel, {**common, "EPS": 1e-5, "TRAINING": True}),
    ):
        floats = {n: "fp32" for n in kernel.arg_names if n.endswith("_ptr") and n not in activations | types.keys()}
        build(kernel, target, dtype, tile.warps, constants, shape=(width,), ones=ones, types={**floats, **types})


def build_star(target, dtype, shape, activation, weight=None, precision="ieee", ones=()):
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


def build_snr(target, dtype, shape, activation, weight=None, precision="ieee", skip=True):
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


def build_hard_concrete(target, dtype):
    constants = {"BETA": 2 / 3, "GAMMA": -0.1, "ZETA": 1.1, "BLOCK": hard_concrete.BLOCK}
    build(hard_concrete.sample_kernel, target, dtype, 4, {**constants, "SAMPLED": True, "LOW": 1e-6, "HIGH": 1 - 1e-6})
    del constants["BETA"]
    build(hard_concrete.backward_kernel, target, dtype, 4, {**constants, "SCALE": 1.8})
    build(hard_concrete.l0_kernel, target, dtype, 4, {"SHIFT": -1.6, "BLOCK": hard_concrete.BLOCK})


def main(target: int, everything: bool) -> None:
    table, native = mix.STATIC_TABLE, mix.STATIC_NATIVE
    build_mix(target, "bf16", (4, 8, 256), native, mix.MAP_NONE)
    build_mix(target, "fp32", (3, 12, 128), table, mix.MAP_COLUMNS)
    build_mix(target, "bf16", (2, 2, 64), "channels", mix.MAP_NONE)
    build_linear(target, "bf16", (256, 256), "gelu")
    build_linear(target, "fp32", (64, 128), "relu")
    build_linear(target, "bf16", (1, 64), "", ones=("N", "span"))
    build_losses(target, "bf16", 1)
    build_losses(target, "fp32", 4)
    build_norm(target, "bf16", 256)
    build_norm(target, "fp32", 256)
    build_star(target, "bf16", (256, 256), "gelu")
    build_star(target, "fp32", (128, 512), "relu")
    build_snr(target, "bf16", (256, 256), "gelu")
    build_snr(target, "fp32", (64, 128), "relu", skip=False)
    build_hard_concrete(target, "bf16")
    if not everything:
        return
    for dtype in ("bf16", "fp32"):
        for shape in ((256, 256), (64, 128), (16, 64)):
            for activation in ("", "relu", "gelu", "silu", "tanh"):
                build_star(target, dtype, shape, activation)
    for activation in ("relu", "gelu"):
        build_star(target, "bf16", (256, 256), activation, weight="fp32")
        build_star(target, "fp32", (256, 256), activation, precision="tf32")
    build_star(target, "bf16", (1, 1), "relu", ones=("N", "K", "x_b", "numel"))
    for dtype in ("bf16", "fp32"):
        for num_tasks in (1, 3, 16, 100):
            build_losses(target, dtype, num_tasks)
        for width in (16, 1000):
            build_norm(target, dtype, width)
        build_norm(target, dtype, 1, ones=("D", "x_b", "g_b"))
        for shape in ((4, 8, 256), (2, 16, 64), (8, 16, 128), (16, 32, 256), (64, 64, 256), (4, 8, 1000), (1, 4, 16)):
            build_mix(target, dtype, shape, mix.STATIC_NONE, mix.MAP_MASK)
            build_mix(target, dtype, shape, native, mix.MAP_NONE)
            build_mix(target, dtype, shape, table, mix.MAP_COLUMNS)
        build_mix(target, dtype, (4, 8, 256), "channels", mix.MAP_NONE)
        for shape in ((256, 256), (64, 128), (16, 64)):
            for activation in ("", "relu", "gelu", "silu", "tanh"):
                build_linear(target, dtype, shape, activation)
                build_snr(target, dtype, shape, activation)
        build_hard_concrete(target, dtype)
    for activation in ("relu", "gelu"):
        build_linear(target, "bf16", (256, 256), activation, weight="fp32")
        build_linear(target, "fp32", (256, 256), activation, precision="tf32")
        build_snr(target, "bf16", (256, 256), activation, weight="fp32", skip=False)
        build_snr(target, "fp32", (256, 256), activation, precision="tf32")

    build_linear(target, "bf16", (1, 1), "relu", ones=("N", "K", "span", "total", "x_b", "x_u", "dx_b"))
    ones = ("T", "E", "D", "h_b", "h_e", "g_b", "g_t", "logit_b", "logit_t", "dlogit_b", "dlogit_t", "static_t",
            "partial_b")  # fmt: skip
    build_mix(target, "fp32", (1, 1, 1), table, mix.MAP_MASK, ones=ones)
    build_mix(target, "fp32", (1, 1, 1), "channels", mix.MAP_NONE, ones=ones)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:] == ["all"])
