"""The results file of a machine: one JSON file a run of gpu-check, made of parts that are measured one by one.

    {"format": FORMAT, "created": ..., "machine": {...}, "parts": {name: {"status", "seconds", "commit", ...}}}

A part that is measured again replaces its older self; the others stay. `status` is "passed", or "failed" or "skipped"
with a reason. What a part measured lies under "result".
"""

import datetime
import hashlib
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

FORMAT = "mtlkernels results 1"
ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path("bench/results")
_SOURCES = ("mtlkernels/**/*.py", "csrc/**/*.c*", "csrc/**/*.h", "setup.py")


class ResultsFileError(ValueError):
    """A file that is no results file of this format, or one of another machine."""


def read(path: Path) -> dict[str, Any]:
    """The results in `path`. Raises ResultsFileError where it holds something else, FileNotFoundError without it."""
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ResultsFileError(f"{path} is no JSON file: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("parts"), dict):
        said = found.get("format") if isinstance(found, dict) else None
        raise ResultsFileError(f"{path} is of format {said!r}, expected {FORMAT!r}")
    return found


def name_for(machine: dict[str, Any], day: datetime.date) -> str:
    """<date>-<gpu>.json; the processor's name where there is no GPU."""
    device = machine.get("gpu") or f"cpu-{machine['cpu']}"
    return f"{day.isoformat()}-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def merge(path: Path, machine: dict[str, Any], parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Puts `parts` into the results file, which is made where it is missing, and returns all of it.

    Raises ResultsFileError where the file is none, or comes from another GPU: figures of two machines do not mix.
    """
    if path.exists():
        found = read(path)
        ours, theirs = (m.get("gpu") or m.get("cpu") for m in (machine, found["machine"]))
        if ours != theirs:
            raise ResultsFileError(f"{path} was measured on {theirs}, not on {ours}: name another file")
    else:
        created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        found = {"format": FORMAT, "created": created, "parts": {}}
    found["machine"] = machine
    found["parts"] |= parts
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(json.dumps(found, indent=1) + "\n")
    scratch.replace(path)
    return found


def combine(first: Path, second: Path, out: Path) -> dict[str, Any]:
    """Writes to `out` the parts of both files, the second's where both have one."""
    later = read(second)
    earlier = read(first)
    if out not in (first, second):
        out.unlink(missing_ok=True)
    merge(out, earlier["machine"], earlier["parts"])
    return merge(out, later["machine"], later["parts"])


def sources() -> dict[str, Any]:
    """What was measured: the commit, where git knows it, and a digest of the sources that run."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _SOURCES for path in ROOT.glob(pattern) if path.is_file()}):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    commit = os.environ.get("MTLKERNELS_COMMIT") or _git("rev-parse", "HEAD")
    changed = bool(_git("status", "--porcelain", "--untracked-files=no"))
    return {"commit": commit, "changed": changed, "sources": digest.hexdigest()[:16]}


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
