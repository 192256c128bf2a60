"""The lines that `run` and `sweep` write: one JSON record a line, appended as soon as it is measured.

The first line says where and what was measured, every other line is one figure:

    {"kind": "machine", "format": FORMAT, "created", "machine": {...}, "commit", "changed", "sources",
     "program": "run" | "sweep", "ceilings": [...]}
    {"kind": "figure", "subject", "shape": {"B": ...}, "name", "dtype", "device", "what", "variant", "ours",
     "backend", "mode", "ms": {"median", "q20", "q80", "samples"}, "check": {"output", "gradient", "worst", "ok"},
     "ratio", "control_difference", "noisy", "flops", "bytes", "floor_ms", "floor_by", "share", "peak_mib",
     "axis", "at", "note"}
    {"kind": "remark", "text", "subject", "shape", "dtype", "device", "what", "variant"}

subject             an operator ("mix/gated"), a network ("MMoE") or, of a sweep, SWEPT
name                of the shape in `bench.shapes`; of a sweep "experts=32"
what                "forward" (without gradients), "backward" or "fwd + bwd"
variant, ours       who was timed, and whether it is ours; "ours" where the backend was left to auto
backend, mode       on which backend ours ran (else None); "clock", "graph" or "events (why no graph)"
ratio               its time over ours in the same run, None for ours and unless the checks of both are green
control_difference  how far ours, timed twice in these rounds, lies from itself; noisy: more than 5 %
flops, bytes, floor_ms, floor_by, share
                    of ours alone: what the call has to do, the least time for it on this machine, and what of it
                    is reached; None where there is no formula
peak_mib            MiB at the peak beyond the operands and results, of a network beyond what stays between its steps;
                    None unless measured
axis, at            of a sweep: what varies ("experts", "tasks", "batch", "width"), and its value here; else None
note                why something of the figure is missing; else None
remark              why a variant has no figure there: not installed, does not fit, cannot be compiled

A run that is cut off leaves whole lines, and maybe half of a last one, which `read` drops. Called again with the same
file it goes on: `Lines.has` knows what is there. Figures of two machines, or versions of the sources, do not mix.
"""

import datetime
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench import record

FORMAT = "mtlkernels lines 1"
SWEPT = "expert mixture"
FIGURE, MACHINE, REMARK = "figure", "machine", "remark"
_DEFAULTS = dict.fromkeys(
    ("backend", "ratio", "flops", "bytes", "floor_ms", "floor_by", "share", "peak_mib", "axis", "at", "note")
)
_SAME = ("gpu", "cpu", "threads", "torch")  # of the machine: what makes figures differ
Key = tuple[str, ...]


def figure(**fields: Any) -> dict[str, Any]:
    """A figure's record, with None for what was left out."""
    return {"kind": FIGURE} | _DEFAULTS | fields


def remark(text: str, **fields: Any) -> dict[str, Any]:
    """Why there is no figure of `fields`: subject, shape, dtype, device, what and variant."""
    return {"kind": REMARK, "text": text} | fields


def key(entry: dict[str, Any]) -> Key:
    """What a figure is a figure of, or a remark about: equal for the same in another file, or measured again."""
    shape = json.dumps(entry["shape"], sort_keys=True)
    return (entry["subject"], shape, entry["dtype"], entry["device"], entry["what"], entry["variant"])


def is_lines(path: Path) -> bool:
    """Whether the file begins as this format does."""
    with path.open("rb") as file:
        start = file.readline(1 << 20)
    try:
        first = json.loads(start)
    except ValueError:
        return False
    return isinstance(first, dict) and first.get("format") == FORMAT


def read(path: Path) -> list[dict[str, Any]]:
    """Every record of the file. Half of a last line is dropped; of figures with one key the last counts.

    Raises ResultsFileError where the file is of another format, or a line before the last is no JSON.
    """
    if not is_lines(path):
        raise record.ResultsFileError(f"{path} is no file of the format {FORMAT!r}")
    found: dict[Any, dict[str, Any]] = {}
    lines = path.read_text().split("\n")
    for number, line in enumerate(lines):
        try:
            entry = json.loads(line) if line else None
        except ValueError:
            if number < len(lines) - 1:
                raise record.ResultsFileError(f"{path}: line {number + 1} is no JSON") from None
            continue
        if entry is not None:
            found[number if entry["kind"] == MACHINE else key(entry)] = entry
    return list(found.values())


def figures(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures among the records."""
    return [entry for entry in records if entry["kind"] == FIGURE]


class Lines:
    """A file of lines that a run adds to.

    `machine` and what `ceilings()` measures head a new file. An existing one is gone on with; `again` begins it anew.
    Raises ResultsFileError where it comes from another machine or other sources, or is no such file.
    """

    def __init__(
        self,
        path: Path,
        program: str,
        machine: dict[str, Any],
        ceilings: Callable[[], list[dict[str, Any]]],
        again: bool = False,
    ) -> None:
        self.path, sources = path, record.sources()
        self.records: list[dict[str, Any]] = []
        if path.exists() and path.stat().st_size and not again:
            self.records = read(path)
            _same(path, self.records[0], machine, sources)
            _drop_half_line(path)
        else:
            rates = ceilings()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
            created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
            head = {"kind": MACHINE, "format": FORMAT, "created": created, "machine": machine}
            self.add([head | sources | {"program": program, "ceilings": rates}])
        self._note()

    @property
    def ceilings(self) -> list[dict[str, Any]]:
        """Those of the head: a run that goes on keeps them, so that its shares compare."""
        return self.records[0]["ceilings"]

    @property
    def figures(self) -> list[dict[str, Any]]:
        """What the file holds by now."""
        return figures(self.records)

    def has(self, **fields: Any) -> bool:
        """Whether the figure of this subject, shape, dtype, device, what and variant is there, or why it is not."""
        return key(fields) in self._keys

    def add(self, records: list[dict[str, Any]]) -> None:
        """Appends the records in one go, and has the system keep them."""
        with self.path.open("a") as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in records))
            file.flush()
            os.fsync(file.fileno())
        self.records += records
        self._note()

    def _note(self) -> None:
        self._keys = {key(entry) for entry in self.records if entry["kind"] != MACHINE}


def _same(path: Path, head: dict[str, Any], machine: dict[str, Any], sources: dict[str, Any]) -> None:
    differ = {name: (head["machine"].get(name), machine.get(name)) for name in _SAME}
    differ["sources"] = (head["sources"], sources["sources"])
    said = ", ".join(f"{name} {a} there, {b} here" for name, (a, b) in differ.items() if a != b)
    if said:
        raise record.ResultsFileError(f"{path} was measured elsewhere ({said}): name another file, or begin it --again")


def _drop_half_line(path: Path) -> None:
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])
