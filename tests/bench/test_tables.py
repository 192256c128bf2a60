"""The reports' tables where rich is not installed."""

import runpy
import sys

import pytest

from bench import tables


@pytest.fixture
def plain(monkeypatch):
    """bench.tables as it is without rich."""
    monkeypatch.setitem(sys.modules, "rich.console", None)
    return runpy.run_path(tables.__file__)


def test_a_table_without_rich(plain, capsys):
    table = plain["Table"](title="a title", caption="a caption")
    table.add_column("name", no_wrap=True)
    table.add_column("time /\nours", justify="right")
    table.add_row("one", "1.00x", style="bold")
    table.add_row("longer name", "12.00x")
    table.caption += "\nmore"
    console = plain["Console"](width=110)
    with console.status("at work"):
        console.print(table, markup=False)
    assert capsys.readouterr().out.splitlines() == [
        "at work",
        "a title",
        "name         time / ours",
        "one                1.00x",
        "longer name       12.00x",
        "a caption",
        "more",
    ]
    assert not console.is_terminal


def test_rich_is_used_where_it_is():
    pytest.importorskip("rich")
    assert tables.Table.__module__ == "rich.table"
