"""Operators and networks beside their rivals, chosen by name, into a file of lines.

    python -m bench run [--operators mix,expert_mix] [--networks MMoE] [--backends native,reference] [--shapes papers]

Without names it takes every operator and every network. All variants of one shape, dtype and direction run in turn on
the same data, after a check of each against float64; a speed-up is given only where both checks are green. Ctrl-C keeps
what was measured, and the same command goes on.
"""

import functools
import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from bench import architectures, calibrate, libraries, operators
from bench.contest import AUTOTUNED, COMPILED, OURS
from bench.jobs import Job
from bench.lines import figure, remark
from bench.papers import ARCHITECTURES, TINY, Sizes
from bench.shapes import network_shapes, operator_shapes, tiny
from bench.subjects import BATCHED, PLAIN, Subject, available
from bench.tables import Table
from bench.timing import is_noisy

COMPILERS = (COMPILED, AUTOTUNED)
RIVALS = (PLAIN, BATCHED, *COMPILERS, *libraries.LIBRARIES)  # each of what has it
EAGER = tuple(name for name in RIVALS if name not in COMPILERS)


def chosen(wanted: str | None, there: list[str], word: str) -> list[str]:
    """The names of a comma-separated list; "mix" takes "mix/gated" and its kin. ValueError names one that is none.

    None or "all" takes all, "none" none.
    """
    if wanted in (None, "all"):
        return there
    found = []
    for name in wanted.split(",") if wanted != "none" else ():
        own = [other for other in there if other == name or other.partition("/")[0] == name]
        if not own:
            raise ValueError(f"{word}: got {name!r}, expected some of {', '.join(there)}")
        found += own
    return list(dict.fromkeys(found))


def named(shapes: dict[str, dict[str, int]], name: str | None) -> dict[str, dict[str, int]]:
    """Those whose name begins with `name`."""
    return {key: shape for key, shape in shapes.items() if name is None or key.startswith(name)}


def shapes_of(which: str) -> tuple[str, str | None]:
    """A set of the registry, and the beginning of the name where `which` is one."""
    return (which, None) if which in ("default", "papers", "all") else ("all", which)


def operator_jobs(
    names: list[str], which: str, rivals: tuple[str, ...], small: bool = False, **options: Any
) -> Iterator[Job]:
    """A job for each operator, shape, dtype and direction. rivals: beside the natural plain way, where there are."""
    dtypes, whats = options.pop("dtypes"), options.pop("whats")
    which, name = shapes_of(which)
    for subject in (subject for subject in available() if subject.name in names):
        found = tuple(who for who in operators.rivals_of(subject) if who in rivals)
        for dtype in dtypes:
            for label, shape in named(operator_shapes(subject.name, which), name).items():
                for what in whats:
                    shape = tiny(shape) if small else shape
                    about = {"subject": subject.name, "shape": shape, "dtype": dtype, "device": options["device"]}
                    about["what"] = what
                    variants = (*operators.variants(subject), *options["backends"], *found)
                    go = functools.partial(_operator, subject, label, about, rivals=found, **options)
                    yield Job(f"{subject.name}, {label}, {dtype}, {what}", about, variants, go)


def _operator(
    subject: Subject, label: str, about: dict[str, Any], *, device: str, backends: tuple[str, ...], **options: Any
) -> list[dict[str, Any]]:
    dtype, what = getattr(torch, about["dtype"]), about["what"]
    options |= {"device": device, "backends": backends, "whats": (what,)}
    (row,) = operators.measure(subject, about["shape"], dtype=dtype, **options)
    found = figures(row | {"peak_mib": row["beyond_mib"]}, about, label, backends)
    words = {name: "the backend does not run it here" for name in backends}
    words |= {name: "cannot be compiled here" for name in options["rivals"]}
    return found + [remark(text, **about, variant=name) for name, text in words.items() if name not in row["ms"]]


def network_jobs(
    names: list[str], which: str, rivals: tuple[str, ...], small: bool = False, **options: Any
) -> Iterator[Job]:
    """A job for each network, shape, dtype and direction. rivals: beside the plain network, these where there are."""
    dtypes, whats = options.pop("dtypes"), options.pop("whats")
    which, label_start = shapes_of(which)
    for name in names:
        letters = re.findall("[A-Za-z]+", ARCHITECTURES[name].parameters)
        found = tuple(who for who in architectures.rivals_of(name) if who == PLAIN or who in rivals)
        for dtype in dtypes:
            for label, changes in named(network_shapes(which, letters), label_start).items():
                for what in whats:
                    sizes = TINY if small else Sizes(**changes)
                    about = {"subject": name, "shape": asdict(sizes), "dtype": dtype, "device": options["device"]}
                    about["what"] = what
                    go = functools.partial(_network, label, about, found, **options)
                    yield Job(f"{name}, {label}, {dtype}, {what}", about, (OURS, *found), go)


def _network(label: str, about: dict[str, Any], rivals: tuple[str, ...], **options: Any) -> list[dict[str, Any]]:
    words = {who: libraries.missing(who) for who in rivals if who in libraries.LIBRARIES}
    there = tuple(who for who in rivals if words.get(who) is None)
    sizes, dtype = Sizes(**about["shape"]), getattr(torch, about["dtype"])
    row = architectures.measure(about["subject"], sizes, dtype=dtype, rivals=there, what=about["what"], **options)
    for who in there:
        if who not in row["ms"]:
            words[who] = "cannot be compiled here" if who in COMPILERS else "left out"
    remarks = [remark(text, **about, variant=who) for who, text in words.items() if text is not None]
    return figures(row | {"mode": {}}, about, label, ()) + remarks


def figures(row: dict[str, Any], about: dict[str, Any], label: str, backends: tuple[str, ...]) -> list[dict[str, Any]]:
    """A figure for each variant of a row of `bench.operators` or `bench.architectures`."""
    found = []
    for variant, ms in row["ms"].items():
        ours = variant == OURS or variant in backends
        fields = about | {"name": label, "variant": variant, "ours": ours, "ms": ms, "check": row["check"][variant]}
        fields |= {"ratio": row["ratio"].get(variant), "control_difference": row["control_difference"]}
        fields["noisy"] = is_noisy(row["control_difference"])
        default = "clock" if about["device"] == "cpu" else "events"
        fields |= {"mode": row["mode"].get(variant, default), "peak_mib": (row["peak_mib"] or {}).get(variant)}
        if variant == OURS:
            fields |= {name: row[name] for name in ("backend", "flops", "bytes", "floor_ms", "floor_by", "share")}
        elif ours:
            fields["backend"] = variant
        found.append(figure(**fields))
    return found


def ceilings(dtypes: tuple[str, ...], device: str, seconds: float, small: bool) -> list[dict[str, Any]]:
    """Those of the dtypes, and of float32."""
    found = tuple(dict.fromkeys([torch.float32, *(getattr(torch, name) for name in dtypes)]))
    sizes = calibrate.SMALL_SIZES if small else None
    return calibrate.ceilings(found, device, seconds=seconds / 5, sizes=sizes)


def table(figures: list[dict[str, Any]], last: int | None = None) -> Table:
    """Ours and every rival, a row a variant; the `last` rows alone where that is given."""
    noisy = sum(entry["noisy"] and entry["variant"] == OURS for entry in figures)
    found = Table(caption=f"~: ours timed twice differs by more than 5 % ({noisy})")
    for head in ("subject", "shape", "what", "variant", "ms", "time /\nours", "share", "MiB"):
        number = head in ("ms", "time /\nours", "share", "MiB")
        found.add_column(
            head, justify="right" if number else "left", overflow="fold" if head == "shape" else "ellipsis"
        )
    before = None
    for entry in figures[-last:] if last else figures:
        group = (entry["subject"], entry["name"], f"{entry['what']}, {entry['dtype']}")
        bad = not entry["check"]["ok"]
        found.add_row(
            *(group if group != before else ("", "", "")),
            entry["variant"],
            ("~" if entry["noisy"] else "") + f"{entry['ms']['median']:.4g}",
            "check FAILED" if bad else "" if entry["ratio"] is None else f"{entry['ratio']:.2f}x",
            "" if entry["share"] is None else f"{entry['share']:.0%}",
            "" if entry["peak_mib"] is None else f"{entry['peak_mib']:.0f}",
        )
        before = group
    return found
