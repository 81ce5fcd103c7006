"""Tables of results as people and other programs read them."""

import io
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.cells import cell_len

from graphs.answers import columns_of, csv_text, is_number, json_text, jsonl_text
from graphs.files import file_errors_as_graph_errors, write_atomically
from tracer.errors import TraceError

_NARROWEST = 9  # characters of a column and its rule; where there are less the rows stand below each other
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
    try:
        with file_errors_as_graph_errors(f"write {output}"):
            write_atomically(output, write)
    except pa.ArrowException as error:
        reason = " ".join(str(error).split())
        raise TraceError(f"{output} cannot hold the answer ({reason}); cast that column to VARCHAR.") from error


def table_text(table: pa.Table) -> str:
    """A table for people: as wide as it needs to be when not on a terminal."""
    numbers = [is_number(column.type) for column in table.schema]
    columns = [_cells(values) for values in columns_of(table)]
    if not sys.stdout.isatty() or len(table) > _WRAPPED_ROWS:
        return _aligned(table.column_names, columns, numbers)
    rows = [*zip(*columns, strict=True)]
    from rich.console import Console  # on a pipe nobody waits for them
    from rich.table import Table

    console = Console(file=io.StringIO(), force_terminal=True, markup=False)
    if len(numbers) * _NARROWEST > console.width:
        return _records(table.column_names, rows)
    shown = Table(show_edge=False, header_style="bold")
    for name, number in zip(table.column_names, numbers, strict=True):
        shown.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def on_one_line(text: str) -> str:
    """The text with its line ends as signs."""
    return text if text.isprintable() else "↵".join(text.splitlines())


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


def _aligned(names: list[str], columns: list[list[str]], numbers: list[bool]) -> str:
    """The table as rich draws it, but quick for thousands of rows."""
    padded = [
        _padded([name, *_on_one_line_each(cells)], number)
        for name, cells, number in zip(names, columns, numbers, strict=True)
    ]
    head, *body = zip(*padded, strict=True)
    rule = "╇".join("━" * (cell_len(cell) + 2) for cell in head)
    return "\n".join([f" {' ┃ '.join(head)}".rstrip(), rule, *(f" {' │ '.join(row)}".rstrip() for row in body)])


def _on_one_line_each(cells: list[str]) -> list[str]:
    return cells if "".join(cells).isprintable() else [on_one_line(cell) for cell in cells]


def _records(names: list[str], rows: list[tuple[str, ...]]) -> str:
    """A row below the other, a value a line: for more columns than fit side by side."""
    widest = max(map(cell_len, names), default=0)
    return "\n".join(
        line
        for number, row in enumerate(rows, 1)
        for line in [
            f"━━ row {number} ━━",
            *(f"{name:>{widest}}  {on_one_line(cell)}" for name, cell in zip(names, row, strict=True)),
        ]
    )


def _padded(cells: list[str], number: bool) -> list[str]:
    together = "".join(cells)
    lengths = [*map(len if together.isascii() and together.isprintable() else cell_len, cells)]
    widest = max(lengths)
    spaces = [" " * (widest - length) for length in lengths]
    pairs = zip(spaces, cells, strict=True) if number else zip(cells, spaces, strict=True)
    return [first + second for first, second in pairs]


def _cells(values: list[Any]) -> list[str]:
    return ["" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]
