"""One HTML page with its pictures inside it: it needs no other file, no script and no network."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from bench import style

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1080px; margin: 2em auto;
  padding: 0 1em; }
h1 { font-size: 1.5em; margin-bottom: 0; } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd; }
p.where { color: #666; margin-top: .2em; }
img { max-width: 100%; height: auto; }
pre { background: #f4f4f4; border-left: 3px solid #0b4f8a; padding: .7em 1em; overflow-x: auto; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .2em .7em; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #888; } td { border-bottom: 1px solid #e4e4e4; }
.left { text-align: left; }
"""


class Page:
    """A page that is filled from top to bottom, and written."""

    def __init__(self, title: str, where: str) -> None:
        self._parts = [f"<h1>{escape(title)}</h1>", f'<p class="where">{escape(where)}</p>']
        self._title = title

    def heading(self, text: str) -> None:
        """Begins a section."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{escape(text)}</p>")

    def code(self, text: str) -> None:
        """Lines to paste."""
        self._parts.append(f"<pre>{escape(text)}</pre>")

    def picture(self, figure: Figure, says: str) -> None:
        """A picture, with what it says for who does not see it."""
        data = base64.b64encode(style.png(figure)).decode()
        self._parts.append(f'<p><img alt="{escape(says)}" src="data:image/png;base64,{data}"></p>')

    def table(self, heads: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> None:
        """A table; the columns `left` are words."""

        def line(cells: Sequence[str], tag: str) -> str:
            made = (
                f"<{tag}{' class=left' if i in left else ''}>{escape(cell)}</{tag}>" for i, cell in enumerate(cells)
            )
            return f"<tr>{''.join(made)}</tr>"

        body = "\n".join(line(row, "td") for row in rows)
        self._parts.append(f'<div class="wide"><table>\n{line(heads, "th")}\n{body}\n</table></div>')

    def write(self, path: Path) -> Path:
        """Writes the page."""
        head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        head += f"<title>{escape(self._title)}</title><style>{_STYLE}</style>"
        body = "\n".join(self._parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"<!doctype html>\n<html lang=en><head>{head}</head><body>\n{body}\n</body></html>\n")
        return path
