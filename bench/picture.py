"""The picture of a training step: time and peak memory of every variant, ours first."""

from pathlib import Path
from typing import Any

from bench.contest import COMPILED, OURS, SLICED
from bench.timing import is_noisy

LABELS = {
    OURS: "mtlkernels",
    SLICED: "mtlkernels, 512 rows at a time",
    "slices": "per-expert modules, slices of x",
    "unbind": "per-expert modules, eager",
    "batched": "stacked weights, baddbmm and bmm",
    COMPILED: "per-expert modules, torch.compile",
}


def draw(records: list[dict[str, Any]], machine: dict[str, Any], path: Path) -> None:
    """Step time and peak memory as horizontal bars, a row of panels a network."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ours, other, ink = "#0b4f8a", "#c4c4c4", "#222222"  # dark and light: they differ in grey and to every eye
    plt.rcParams.update({"font.size": 10, "text.color": ink, "font.family": "sans-serif"})
    several = len({record["task"]["tasks"] for record in records}) > 1
    names = {id(r): r["task"]["network"] + (f", {r['task']['tasks']} tasks" if several else "") for r in records}
    tallest = max(len(record["rows"]) for record in records)
    figure, grid = plt.subplots(
        len(records), 2, figsize=(10, 1.05 + (0.4 + 0.35 * tallest) * len(records)), squeeze=False
    )
    for axes, record in zip(grid, records, strict=True):
        rows = record["rows"]
        for axis, head in zip(axes, ("ms", "peak_mib"), strict=True):
            values = [row["ms"]["median"] if head == "ms" else row["peak_mib"] for row in rows]
            known = [0.0 if v is None else v for v in values]
            colours = [ours if row["variant"] in (OURS, SLICED) else other for row in rows]
            axis.barh(range(len(rows)), known, color=colours, height=0.72)
            end = max(known) or 1.0
            for place, (row, v) in enumerate(zip(rows, values, strict=True)):
                text = "not measured" if v is None else f"{v:.0f}"
                if head == "ms" and row["variant"] != OURS and row["ratio"] is not None:
                    text += f"   {row['ratio']:.2f}x as long"
                reach = known[place]
                if head == "ms":
                    spread = [row["ms"]["q20"], row["ms"]["q80"]]
                    axis.plot(spread, [place, place], color="white", linewidth=3, solid_capstyle="butt")
                    axis.plot(spread, [place, place], color=ink, linewidth=1.2, solid_capstyle="butt")
                    reach = max(reach, row["ms"]["q80"])
                weight = "bold" if row["variant"] == OURS else "normal"
                axis.text(reach + 0.015 * end, place, text, va="center", weight=weight)
            axis.set_xlim(0, end * 1.32)
            axis.set_yticks(range(len(rows)), [LABELS[row["variant"]] for row in rows] if head == "ms" else [])
            axis.invert_yaxis()
            axis.set_xticks([])
            axis.tick_params(length=0)
            axis.spines[["top", "right", "bottom"]].set_visible(False)
            axis.spines["left"].set_color("#888888")
            what = "training step, ms" if head == "ms" else "peak memory, MiB"
            axis.set_title(f"{names[id(record)]}: {what}", loc="left", fontsize=11, weight="bold")
    task = records[0]["task"]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    where = machine["gpu"] if task["device"] == "cuda" else f"{machine['cpu']}, {threads}"
    noise = max(record["control_difference"] for record in records)
    control = f"The first one timed twice differs by {noise:.0%}" + (": noisy." if is_noisy(noise) else ".")
    experts = f"{task['experts_per_task']} experts {list(task['dims'])}"
    what_runs = f"{experts} a task" if several else f"{task['tasks']} tasks x {experts}"
    figure.suptitle(
        f"One training step: {what_runs}, "
        f"batch {task['batch']}, {task['in_features']} inputs with gradient, {task['dtype']}",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    figure.text(
        0.01,
        0.015,
        f"{where}, torch {machine['torch']}. Medians of variants timed in turn, lines from 20 % to 80 %. {control}",
        fontsize=8.5,
        color="#555555",
    )
    figure.tight_layout(rect=(0, 0.05, 1, 0.98), w_pad=2.0, h_pad=1.2)
    figure.savefig(path, dpi=150)
    plt.close(figure)
