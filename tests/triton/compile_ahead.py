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

from mtlkernels.triton import expert_linear, expert_mix, mix, mix_channels
from mtlkernels.triton.config import pick_expert_mix, pick_gemm, pick_mix, power_of_two

FLOAT32 = {f"{name}_ptr" for name in ("logit", "static", "lse", "g_lse", "da", "dlogit", "partial", "bias", "dw", "db")}
INT32 = {"map_ptr", "offset_ptr", "unit_ptr"}
# As for a real call: sizes and strides that are multiples of 16 are known to be, batch, T, E and counts are not.
ALIGNED = {"D", "K", "N", "span", "total", "h_b", "h_e", "g_b", "g_t", "x_b", "x_u", "dx_b"}


def build(kernel, target, dtype, warps, constants, stages=3, weight=None, ones=(), **labels):
    """Compile one kernel and print its registers, stack, shared memory and tensor-core instructions.

    ones: integer arguments that are 1, which Triton makes constants.
    """
    constants = {**constants, **{name: 1 for name in ones if name in kernel.arg_names}}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            short = "i32" if name in INT32 else "fp32" if name in FLOAT32 else dtype
            signature[name] = "*" + (weight if weight and name == "w_ptr" else short)
            attributes[(i,)] = [["tt.divisibility", 16]]
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
    found = dict(
        kernel=kernel.fn.__name__, target=target, dtype=dtype, **labels, warps=warps, registers=int(registers),
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


def build_expert_mix(target, dtype, shape, tasks, activation, routes=mix.MAP_NONE, weight=None, precision="ieee"):
    features, width = shape
    itemsize, cores = 4 if dtype == "fp32" else 2, dtype != "fp32" or precision == "tf32"
    tile = pick_expert_mix(tasks, features, itemsize, cores, target)
    constants = dict(INPUT=expert_mix.INPUT_MAP, BIAS=True, ACTIVATION=activation, LOGITS=True,
                     STATIC=mix.STATIC_TABLE, MAP=routes, TASKS=tile.tasks, PRECISION=precision, UPCAST=False,
                     EVEN_K=width % tile.k == 0, BM=tile.m, BN=tile.n, BK=tile.k)  # fmt: skip
    build(expert_mix.forward_kernel, target, dtype, tile.warps, constants, tile.stages, weight, shape=shape,
          tasks=tasks, activation=activation, precision=precision)  # fmt: skip


def main(target: int, everything: bool) -> None:
    table, native = mix.STATIC_TABLE, mix.STATIC_NATIVE
    build_mix(target, "bf16", (4, 8, 256), native, mix.MAP_NONE)
    build_mix(target, "fp32", (3, 12, 128), table, mix.MAP_COLUMNS)
    build_mix(target, "bf16", (2, 2, 64), "channels", mix.MAP_NONE)
    build_linear(target, "bf16", (256, 256), "gelu")
    build_linear(target, "fp32", (64, 128), "relu")
    build_linear(target, "bf16", (1, 64), "", ones=("N", "span"))
    build_expert_mix(target, "bf16", (128, 128), 4, "gelu")
    build_expert_mix(target, "fp32", (128, 128), 8, "relu", mix.MAP_COLUMNS)
    if not everything:
        return
    for dtype in ("bf16", "fp32"):
        for tasks in (1, 2, 4):
            for activation in ("relu", "gelu", "tanh"):
                build_expert_mix(target, dtype, (256, 256), tasks, activation)
            build_expert_mix(target, dtype, (128, 100), tasks, "silu", mix.MAP_COLUMNS)
            build_expert_mix(target, dtype, (20, 64), tasks, "", mix.MAP_MASK)
    for tasks in (1, 2, 4):
        build_expert_mix(target, "bf16", (256, 256), tasks, "gelu", weight="fp32")
        build_expert_mix(target, "fp32", (256, 256), tasks, "gelu", precision="tf32")
    for dtype in ("bf16", "fp32"):
        for shape in ((4, 8, 256), (2, 16, 64), (8, 16, 128), (16, 32, 256), (64, 64, 256), (4, 8, 1000), (1, 4, 16)):
            build_mix(target, dtype, shape, mix.STATIC_NONE, mix.MAP_MASK)
            build_mix(target, dtype, shape, native, mix.MAP_NONE)
            build_mix(target, dtype, shape, table, mix.MAP_COLUMNS)
        build_mix(target, dtype, (4, 8, 256), "channels", mix.MAP_NONE)
        for shape in ((256, 256), (64, 128), (16, 64)):
            for activation in ("", "relu", "gelu", "silu", "tanh"):
                build_linear(target, dtype, shape, activation)
    for activation in ("relu", "gelu"):
        build_linear(target, "bf16", (256, 256), activation, weight="fp32")
        build_linear(target, "fp32", (256, 256), activation, precision="tf32")

    build_linear(target, "bf16", (1, 1), "relu", ones=("N", "K", "span", "total", "x_b", "x_u", "dx_b"))
    ones = ("T", "E", "D", "h_b", "h_e", "g_b", "g_t", "logit_b", "logit_t", "dlogit_b", "dlogit_t", "static_t",
            "partial_b")  # fmt: skip
    build_mix(target, "fp32", (1, 1, 1), table, mix.MAP_MASK, ones=ones)
    build_mix(target, "fp32", (1, 1, 1), "channels", mix.MAP_NONE, ones=ones)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:] == ["all"])
