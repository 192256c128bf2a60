"""Work that is measured piece by piece into a file of lines, and can be cut off and gone on with."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from bench.lines import Lines, remark

DONE, STOPPED = 0, 130  # exit statuses; the second is what a shell gives a command that Ctrl-C ended


@dataclass(frozen=True)
class Job:
    """What is measured in one go, its variants in turn.

    Attributes:
        title: for the eye.
        about: subject, shape, dtype, device and what of its figures.
        variants: what it measures.
        measure: gives the records.
    """

    title: str
    about: dict[str, Any]
    variants: tuple[str, ...]
    measure: Callable[[], list[dict[str, Any]]]

    def done(self, lines: Lines) -> bool:
        """Whether every variant has its figure, or the remark why not."""
        return all(lines.has(**self.about, variant=variant) for variant in self.variants)


def work_off(jobs: Iterable[Job], lines: Lines, show: Callable[[str], None]) -> int:
    """Measures what the file does not have yet; `show` is called with what comes next and, at the end, with "".

    A job that fails leaves a remark for each variant. Returns STOPPED after Ctrl-C, else DONE.
    """
    try:
        for job in jobs:
            if job.done(lines):
                continue
            show(job.title)
            try:
                records = job.measure()
            except Exception as error:  # a rival's library may raise anything
                text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                records = [remark(text, **job.about, variant=variant) for variant in job.variants]
            lines.add(records)
    except KeyboardInterrupt:
        return STOPPED
    finally:
        show("")
    return DONE
