from mtlkernels.triton import partitioned_norm

from .build import build


def every_kernel(target, dtype, width, ones=()):
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


def usual(target):
    every_kernel(target, "bf16", 256)
    every_kernel(target, "fp32", 256)


def rest(target):
    for dtype in ("bf16", "fp32"):
        for width in (16, 1000):
            every_kernel(target, dtype, width)
        every_kernel(target, dtype, 1, ones=("D", "x_b", "g_b"))
