"""Tables and a console: rich's, or where it is not installed, as on a bare machine with a GPU, plain text."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

try:
    from rich.console import Console
    from rich.table import Table
except ImportError:

    class Table:
        """As much of rich.table.Table as the reports use."""

        def __init__(self, title: str = "", caption: str = "", **_: Any) -> None:
            self.title, self.caption = title, caption
            self._heads: list[str] = []
            self._right: list[bool] = []
            self._rows: list[tuple[str, ...]] = []

        def add_column(self, head: str = "", justify: str = "left", **_: Any) -> None:
            self._heads.append(" ".join(head.split()))
            self._right.append(justify == "right")

        def add_row(self, *cells: str, **_: Any) -> None:
            self._rows.append(cells)

        def __str__(self) -> str:
            rows = [tuple(self._heads), *self._rows]
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            lines = [
                "  ".join(f"{c:>{w}}" if r else f"{c:<{w}}" for c, w, r in zip(row, widths, self._right, strict=True))
                for row in rows
            ]
            return "\n".join(line.rstrip() for line in (self.title, *lines, self.caption) if line)

    class Console:
        """As much of rich.console.Console as the reports use."""

        is_terminal = False

        def __init__(self, **_: Any) -> None:
            pass

        def print(self, *things: Any, **_: Any) -> None:
            print(*things, flush=True)

        def status(self, text: str) -> AbstractContextManager:
            print(text, flush=True)
            return nullcontext()


__all__ = ["Console", "Table"]
