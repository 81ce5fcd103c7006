"""Tables of results as people and other programs read them."""

import io
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from graphs.answers import csv_text, json_text, jsonl_text
from graphs.files import file_errors_as_graph_errors, write_atomically
from tracer.errors import TraceError

_WRAPPED_ROWS = 200  # more are not wrapped to the width of the terminal: it would take seconds


def write_table(table: pa.Table, form: str, output: Path | None) -> None:
    """Write a query's result to stdout, or to a file that is there whole or not at all."""
    if form == "parquet" and output is None:
        raise TraceError("--format parquet writes binary data; name a file with -o.")
    if output is None:
        sys.stdout.write(_text(table, form))
        return
    write: Callable[[Path], Any] = partial(pq.write_table, table, compression="zstd")
    if form != "parquet":
        write = partial(Path.write_text, data=_text(table, form), encoding="utf-8")
    with file_errors_as_graph_errors(f"write {output}"):
        write_atomically(output, write)


def table_text(table: pa.Table) -> str:
    """A table for people: as wide as it needs to be when not on a terminal."""
    numbers = [pa.types.is_integer(column.type) or pa.types.is_floating(column.type) for column in table.schema]
    columns = [map(_cell, column.to_pylist(maps_as_pydicts="strict")) for column in table.columns]
    rows = [list(row) for row in zip(*columns, strict=True)]
    if not sys.stdout.isatty() or len(rows) > _WRAPPED_ROWS:
        return _aligned(table.column_names, rows, numbers)
    shown = Table(show_edge=False, header_style="bold")
    for name, number in zip(table.column_names, numbers, strict=True):
        shown.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    console = Console(file=io.StringIO(), force_terminal=True, markup=False)
    console.print(shown)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _text(table: pa.Table, form: str) -> str:
    match form:
        case "csv":
            return csv_text(table)
        case "json":
            return json_text(table)
        case "jsonl":
            return jsonl_text(table)
        case _:
            return table_text(table) + "\n"


def _aligned(names: list[str], rows: list[list[str]], numbers: list[bool]) -> str:
    """The table as rich draws it, but quick for thousands of rows."""
    lines = [names, *([cell if cell.isprintable() else " ".join(cell.splitlines()) for cell in row] for row in rows)]
    columns = [_padded(column, number) for column, number in zip(zip(*lines, strict=True), numbers, strict=True)]
    head, *body = zip(*columns, strict=True)
    rule = "╇".join("━" * (cell_len(cell) + 2) for cell in head)
    return "\n".join([f" {' ┃ '.join(head)}".rstrip(), rule, *(f" {' │ '.join(row)}".rstrip() for row in body)])


def _padded(cells: Sequence[str], number: bool) -> list[str]:
    lengths = [len(cell) if cell.isascii() and cell.isprintable() else cell_len(cell) for cell in cells]
    widest = max(lengths)
    spaces = [" " * (widest - length) for length in lengths]
    pairs = zip(spaces, cells, strict=True) if number else zip(cells, spaces, strict=True)
    return [first + second for first, second in pairs]


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
