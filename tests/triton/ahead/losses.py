from mtlkernels.triton import esmm_loss, losses, masked_bce

from .build import build


def both(target, dtype, num_tasks):
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


def usual(target):
    both(target, "bf16", 1)
    both(target, "fp32", 4)


def rest(target):
    for dtype in ("bf16", "fp32"):
        for num_tasks in (1, 3, 16, 100):
            both(target, dtype, num_tasks)
