"""Records of a run as tables."""

from collections.abc import Sequence
from typing import Any

from bench.contest import COMPILED, OURS
from bench.parts import PLAIN
from bench.subjects import FORMULA
from bench.tables import Console, Table
from bench.timing import NOISE_LIMIT, is_noisy
from mtlkernels.backend import BACKENDS


def console() -> Console:
    """Where the tables go; wide enough for them where the output is a file."""
    found = Console()
    return found if found.is_terminal else Console(width=110)


def step_table(record: dict[str, Any], labels: dict[str, str] | None = None) -> Table:
    """The variants of one training step, side by side. A time is set against ours only if its check is green."""
    task, rows = record["task"], record["rows"]
    inputs = "B,T,K" if task["network"] == "AdaTT" else "B,K"
    experts = f"{task['tasks']} tasks x {task['experts_per_task']} experts {list(task['dims'])}"
    data = f"{task['dtype']}, x [{inputs}] with gradient, B={task['batch']}, K={task['in_features']}"
    title = f"{task['network']} training step: {experts},\n{data}"
    table = Table(title=title, caption=_noise(record["control_difference"]))
    with_floor = any(row["floor_share"] is not None for row in rows)
    table.add_column("variant", no_wrap=True)
    for head in ("ms", "20-80 %", "time /\nours", "peak\nMiB") + (("GEMM\nfloor",) if with_floor else ()) + ("check",):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        ms, ratio, peak, floor = row["ms"], row["ratio"], row["peak_mib"], row["floor_share"]
        cells = [
            (labels or {}).get(row["variant"], row["variant"]),
            f"{ms['median']:.1f}",
            f"{ms['q20']:.1f}-{ms['q80']:.1f}",
            "" if ratio is None else f"{ratio:.2f}x",
            "" if peak is None else f"{peak:.0f}",
        ]
        if with_floor:
            cells.append(f"{floor:.0%}")
        cells.append("ok" if row["check"]["ok"] else "FAILED")
        table.add_row(*cells, style="bold" if row["variant"] == OURS else None)
    for row in rows:
        if not row["check"]["ok"]:
            check = row["check"]
            errors = f"output off by {check['output']:.0e}, {check['worst']} by {check['gradient']:.0e}"
            table.caption += f"\n{row['variant']} is not the same network: {errors}"
    return table


def mix_table(rows: list[dict[str, Any]]) -> Table:
    """mix alone beside the plain one."""
    first = rows[0]
    title = f"mix alone: B={first['batch']}, D={first['width']}, {first['dtype']}, experts and logits with gradient"
    table = Table(title=title, caption=_noise(max(row["control_difference"] for row in rows)))
    for head in ("operator", "what", "T", "E", "ours\nms", f"{PLAIN}\nms", "time /\nours"):
        table.add_column(head, justify="left" if head in ("operator", "what") else "right", no_wrap=True)
    for row in rows:
        ours, plain = row["ms"][OURS]["median"], row["ms"][PLAIN]["median"]
        ratio = "check FAILED" if row["ratio"] is None else f"{row['ratio']:.2f}x"
        if is_noisy(row["control_difference"]):
            ratio = f"noisy {ratio}"
        shape = (str(row["tasks"]), str(row["experts"]))
        table.add_row(row["mix"], row["what"], *shape, f"{ours:.2f}", f"{plain:.2f}", ratio)
    return table


def overhead_table(rows: list[dict[str, Any]]) -> Table:
    """Microseconds a call."""
    table = Table(title="one forward call on tiny tensors, microseconds")
    for head in ("call", "without gradient", "with gradient"):
        table.add_column(head, justify="left" if head == "call" else "right")
    for row in rows:
        table.add_row(row["call"], f"{row['us']:.1f}", f"{row['us_with_gradient']:.1f}")
    return table


def _noise(difference: float) -> str:
    text = f"ours timed twice differs by {difference:.1%}"
    if not is_noisy(difference):
        return text
    return f"NOISY: {text}, more than {NOISE_LIMIT:.0%}: run again on a quiet machine"


def operator_table(rows: list[dict[str, Any]], dtype: str) -> Table:
    """Every operator beside the plain ways to compute the same."""
    noise = [row["control_difference"] for row in rows if is_noisy(row["control_difference"])]
    caption = f"{len(noise)} of {len(rows)} rows are noisy (~): ours timed twice differs by more than {NOISE_LIMIT:.0%}"
    table = Table(title=f"operators, {dtype}", caption=caption)
    others = [name for name in ("native", "triton") if any(name in row["ratio"] for row in rows)]
    ratio_heads = [f"{name} /\nours" for name in ("formula", "rival", *others)]
    heads = ["ours\nms", *ratio_heads, "share", "beyond\nMiB"]
    for head in ("operator", "shape", "what", *heads):
        table.add_column(head, justify="right" if head in heads else "left", no_wrap=True)
    before = None
    for row in rows:
        name = f"{row['op']}/{row['form']}" if row["form"] else row["op"]
        rival = next((name for name in row["ratio"] if name not in (FORMULA, *BACKENDS)), None)
        ratios = [_ratio(row["ratio"], variant) for variant in (FORMULA, rival, *others)]
        beyond = (row["beyond_mib"] or {}).get(OURS)
        table.add_row(
            name if name != before else "",
            row["name"],
            row["what"],
            ("~" if is_noisy(row["control_difference"]) else "") + f"{row['ms'][OURS]['median']:.3f}",
            *ratios,
            "" if row["share"] is None else f"{row['share']:.0%}",
            "" if beyond is None else f"{beyond:.0f}",
        )
        before = name
    return table


def _ratio(ratios: dict[str, float | None], variant: str | None) -> str:
    if variant not in ratios:
        return ""
    return "check FAILED" if ratios[variant] is None else f"{ratios[variant]:.2f}x"


def tile_table(rows: list[dict[str, Any]]) -> Table:
    """The best tile found beside the usual one. A gain below the control's difference is none."""
    table = Table(title="tiles of the Triton kernels", caption="~: no more than the usual tile differs from itself")
    for head in ("kernel", "shape", "dtype", "usual", "best", "ms", "gain", "tried"):
        table.add_column(head, justify="right" if head in ("ms", "gain") else "left", no_wrap=True)
    for row in rows:
        start = (row["kernel"], row["shape_name"], row["dtype"], "/".join(map(str, row["usual"])))
        tried = f"{row['tried']}/{row['of']}" + (f", {len(row['wrong'])} WRONG" if row["wrong"] else "")
        if row["best"] is None:
            table.add_row(*start, "usual is WRONG", "", "", tried)
            continue
        best = next(r["ms"]["median"] for r in row["rows"] if tuple(r["tile"]) == tuple(row["best"]))
        gain = ("~" if row["gain"] - 1 <= row["control_difference"] else "") + f"{row['gain']:.2f}x"
        table.add_row(*start, "/".join(map(str, row["best"])), f"{best:.4f}", gain, tried)
    return table


def architecture_table(rows: list[dict[str, Any]], rivals: Sequence[str] = ("plain", COMPILED)) -> Table:
    """Every architecture's training step beside those of these rivals that were timed; one dtype."""
    noise = sum(is_noisy(row["control_difference"]) for row in rows)
    sizes, dtype = rows[0]["sizes"], rows[0]["dtype"]
    title = f"training step, {dtype}: B={sizes['B']}, {sizes['K']} inputs with gradient, {sizes['T']} tasks"
    caption = f"{noise} of {len(rows)} rows are noisy (~): ours timed twice differs by more than {NOISE_LIMIT:.0%}"
    table = Table(title=title, caption=caption)
    rivals = [name for name in rivals if any(name in row["ms"] for row in rows)]
    heads = ["ours\nms", *(head for name in rivals for head in (f"{name}\nms", "time /\nours")), "parameters"]
    for head in ("architecture", *heads, "check"):
        table.add_column(head, justify="right" if head in heads else "left", no_wrap=True)
    for row in rows:
        ms, check, counts = row["ms"], row["check"], row["parameters"]
        cells = [f"{'~' if is_noisy(row['control_difference']) else ''}{ms[OURS]['median']:.2f}"]
        for name in rivals:
            cells += [f"{ms[name]['median']:.2f}" if name in ms else "", _ratio(row["ratio"], name)]
        agrees = len(set(counts.values())) == 1
        cells.append(f"{counts[OURS]:,}" + ("" if agrees else f" NOT {counts['formula']:,}"))
        bad = [
            f"{who}: output {c['output']:.0e}, {c['worst']} {c['gradient']:.0e}"
            for who, c in check.items()
            if not c["ok"]
        ]
        table.add_row(row["architecture"], *cells, "\n".join(bad) or "ok")
    return table


def architecture_markdown(rows: list[dict[str, Any]]) -> str:
    """The README's table: what there is, by which paper, how long, held by what, how much faster."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    steps = [f"plain modules' step / ours, {d}" for d in dtypes]
    heads = ["architecture", "paper", "file", "checked against", *steps, "parameters, ours and the paper's"]
    lines = [heads, ["---"] * len(heads)]
    for name in dict.fromkeys(row["architecture"] for row in rows):
        own = {row["dtype"]: row for row in rows if row["architecture"] == name}
        about = next(iter(own.values()))["about"]
        links = [f"[{path.rsplit('/', 1)[1]}]({path})" for path in (about["file"], about["test"])]
        cells = [name, about["paper"], f"{links[0]}, {about['lines']} lines", f"numpy and plain torch, {links[1]}"]
        cells += [_ratios(own[dtype]) if dtype in own else "" for dtype in dtypes]
        lines.append([*cells, _parameters(next(iter(own.values())))])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _parameters(row: dict[str, Any]) -> str:
    """The formula and its number; where ours is another one, that too."""
    ours, paper = row["parameters"][OURS], row["parameters"]["formula"]
    return f"`{row['about']['formula']}` = {paper:,}" + ("" if ours == paper else f", NOT ours: {ours:,}")


def repository_markdown(rows: list[dict[str, Any]], variants: tuple[str, ...]) -> str:
    """Every structure of facebookresearch/AdaTT, as it is and over unbind, beside ours; milliseconds, times ours."""
    lines = [["structure", "dtype", "mtlkernels", *variants]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        noisy = "~" if is_noisy(row["control_difference"]) else ""
        theirs = [f"{row['ms'][name]['median']:.1f} ({_ratio(row['ratio'], name)})" for name in variants]
        ours = f"{noisy}{row['ms'][OURS]['median']:.1f}"
        lines.append([row["architecture"], row["dtype"], ours, *theirs])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _ratios(row: dict[str, Any]) -> str:
    noisy = "~" if is_noisy(row["control_difference"]) else ""
    compiled = f" ({_ratio(row['ratio'], COMPILED)} compiled)" if COMPILED in row["ratio"] else ""
    return noisy + _ratio(row["ratio"], "plain") + compiled
