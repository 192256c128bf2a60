"""Compiles one kernel for one GPU architecture, without a GPU."""

import json
import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

FLOAT32 = {f"{name}_ptr" for name in ("logit", "static", "lse", "g_lse", "da", "dlogit", "partial", "bias", "dw", "db",
                                      "partial_bias", "gate", "dgate", "noise", "s", "slope", "total")}  # fmt: skip
INT32, INT64 = {"map_ptr", "offset_ptr", "unit_ptr", "tile_ptr", "chunk_ptr"}, {"order_ptr"}
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
