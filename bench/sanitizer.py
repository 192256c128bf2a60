"""compute-sanitizer over `bench.small_calls`: bad addresses, races in shared memory, unset memory, bad barriers.

python -m bench.sanitizer [--tools memcheck,racecheck,initcheck,synccheck] [--out bench/out/sanitizer.json]
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

TOOLS = "memcheck,racecheck,initcheck,synccheck"
_FOUND = 99  # the exit status we ask for where a tool found something
_PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")


def program() -> str | None:
    """The path of compute-sanitizer, from PATH or where CUDA puts it."""
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *_PLACES]))


def verdict(returncode: int | None, output: str) -> dict[str, Any]:
    """What one tool's run says: status, number of errors, the kernels named, and the end of what it printed.

    returncode None stands for a run that was stopped at its time limit.
    """
    counts = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+)", output)
    errors = sum(int(count) for count in counts) if counts else None
    kernels = sorted(set(re.findall(r"^=+ +at (?:void )?([\w:<>, ]+?)(?:\(|\+)", output, re.MULTILINE)))
    found: dict[str, Any] = {"errors": errors, "kernels": kernels[:20], "tail": output.splitlines()[-12:]}
    if "Device not supported" in output:
        return {"status": "skipped", "reason": "compute-sanitizer does not support this device or its runtime", **found}
    if returncode is None:
        return {"status": "failed", "reason": "stopped at the time limit", **found}
    if returncode == 0 and errors == 0:
        return {"status": "passed", **found}
    reason = f"{errors} errors" if errors else f"exit status {returncode}"
    reason += "" if counts else ", and no summary of errors"
    return {"status": "failed", "reason": reason, **found}


def run(path: str, tool: str, limit: float) -> dict[str, Any]:
    """One tool over the small calls."""
    command = [path, "--tool", tool, "--error-exitcode", str(_FOUND), sys.executable, "-m", "bench.small_calls"]
    # Else torch's allocator hands out parts of one large block, and a wrong address inside it goes unseen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    output = subprocess.PIPE, subprocess.STDOUT
    process = subprocess.Popen(command, stdout=output[0], stderr=output[1], text=True, env=environment)
    try:
        text, _ = process.communicate(timeout=limit)
        return verdict(process.returncode, text)
    except subprocess.TimeoutExpired:
        process.kill()
        text, _ = process.communicate()
        return verdict(None, text)


def main() -> int:
    """Runs the tools, writes JSON; 1 where one found something."""
    parser = argparse.ArgumentParser(prog="python -m bench.sanitizer", description=__doc__.splitlines()[0])
    parser.add_argument("--tools", default=TOOLS)
    parser.add_argument("--limit", type=float, default=140, help="seconds for each tool (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench/out/sanitizer.json"))
    args = parser.parse_args()
    path = program()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if path is None:
        found: dict[str, Any] = {"status": "skipped", "reason": "compute-sanitizer is not installed here"}
        print(found["reason"])
    else:
        # Triton's compiler takes minutes under a tool, and each tool has its limit: what it makes stays on the disk.
        try:
            subprocess.run([sys.executable, "-m", "bench.small_calls"], stdout=subprocess.DEVNULL, timeout=args.limit)
        except subprocess.TimeoutExpired:
            print("compiling the kernels took longer than the limit")
        tools: dict[str, Any] = {}
        found = {"tools": tools}
        for tool in args.tools.split(","):
            tools[tool] = run(path, tool, args.limit)
            print(tool, tools[tool]["status"], tools[tool].get("reason", ""), *tools[tool]["tail"], sep="\n  ")
            args.out.write_text(json.dumps(found, indent=1) + "\n")  # after each: the next may be cut off
        if all(tool["status"] == "skipped" for tool in tools.values()):
            found |= {"status": "skipped", "reason": next(iter(tools.values()))["reason"]}
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if any(tool["status"] == "failed" for tool in found.get("tools", {}).values()) else 0


if __name__ == "__main__":
    sys.exit(main())
