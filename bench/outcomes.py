"""What a pytest run came to, from its JUnit file."""

import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

_BAD = ("failure", "error")


def outcomes(path: Path) -> dict[str, Any]:
    """{counts, files, bad, skipped}.

    How many tests ended how, in all and in each file; every test that failed, with the first line of its message; the
    reasons for skipping, with how many tests each kept out.

    Raises ValueError where `path` is no JUnit file.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: {error}") from None
    counts: Counter[str] = Counter()
    files: dict[str, Counter[str]] = {}
    skipped: Counter[str] = Counter()
    bad = {}
    for case in root.iter("testcase"):
        what = next((child for child in case if child.tag in (*_BAD, "skipped")), None)
        outcome = "passed" if what is None else "skipped" if what.tag == "skipped" else "failed"
        counts[outcome] += 1
        files.setdefault(case.get("classname", ""), Counter())[outcome] += 1
        if what is None:
            continue
        lines = (what.get("message") or what.text or "").strip().splitlines() or [""]
        if outcome == "skipped":
            skipped[lines[0][:160]] += 1
        else:
            bad[f"{case.get('classname')}::{case.get('name')}"] = lines[0][:300]
    found = {"counts": dict(counts), "files": {name: dict(count) for name, count in sorted(files.items())}}
    return found | {"bad": bad, "skipped": dict(skipped)}
