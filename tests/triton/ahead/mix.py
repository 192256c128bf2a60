from mtlkernels.triton import mix, mix_channels
from mtlkernels.triton.config import pick_mix, power_of_two

from .build import build

TABLE, NATIVE = mix.STATIC_TABLE, mix.STATIC_NATIVE


def both(target, dtype, shape, static, routes, ones=()):
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


def usual(target):
    both(target, "bf16", (4, 8, 256), NATIVE, mix.MAP_NONE)
    both(target, "fp32", (3, 12, 128), TABLE, mix.MAP_COLUMNS)
    both(target, "bf16", (2, 2, 64), "channels", mix.MAP_NONE)


def rest(target):
    for dtype in ("bf16", "fp32"):
        for shape in ((4, 8, 256), (2, 16, 64), (8, 16, 128), (16, 32, 256), (64, 64, 256), (4, 8, 1000), (1, 4, 16)):
            both(target, dtype, shape, mix.STATIC_NONE, mix.MAP_MASK)
            both(target, dtype, shape, NATIVE, mix.MAP_NONE)
            both(target, dtype, shape, TABLE, mix.MAP_COLUMNS)
        both(target, dtype, (4, 8, 256), "channels", mix.MAP_NONE)
    ones = ("T", "E", "D", "h_b", "h_e", "g_b", "g_t", "logit_b", "logit_t", "dlogit_b", "dlogit_t", "static_t",
            "partial_b")  # fmt: skip
    both(target, "fp32", (1, 1, 1), TABLE, mix.MAP_MASK, ones=ones)
    both(target, "fp32", (1, 1, 1), "channels", mix.MAP_NONE, ones=ones)
