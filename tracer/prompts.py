"""Prompts out of a file: text with one a line, CSV, JSONL or Parquet; the other columns are tags."""

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tracer.errors import TraceError

DEFAULT_COLUMN = "prompt"
DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSONL = (".jsonl", ".ndjson")
PARQUET = (".parquet", ".pq")


@dataclass(frozen=True)
class Row:
    """One prompt of a file."""

    number: int
    """Its line or row, from 1."""
    prompt: str
    """"" where the file has none."""
    tags: tuple[tuple[str, str], ...] = ()
    """Names and values of the other columns, as text; a column without a value here is left out."""
    problem: str = ""
    """Why there is no prompt, where it is not just lacking."""


_Record = tuple[int, dict[str, Any]]
"""A row's number, and its values by column."""


def read_prompts(path: Path, column: str | None = None, *, limit: int | None = None) -> list[Row]:
    """The first `limit` prompts of the file, from this column, by default `prompt` or the only one that is text.

    In a text file blank lines are no prompts.
    """
    records = _read(path)[:limit]
    if not records:
        raise TraceError(f"{path} holds no prompts; give text with a prompt a line, CSV, JSONL or Parquet.")
    name = _column(path, records, column)
    return [_row(path, number, values, name) for number, values in records]


def _row(path: Path, number: int, values: dict[str, Any], name: str) -> Row:
    prompt, tags = values.get(name), _tags(path, number, values, name)
    if isinstance(prompt, str | None):
        return Row(number, prompt or "", tags)
    return Row(number, "", tags, f"the prompt is no text, but {str(prompt)[:40]!r}; write it as text.")


def distinct(rows: Iterable[Row]) -> list[Row]:
    """The first row of each prompt, and every row without one: each of them is a failure of its own."""
    first: dict[str | int, Row] = {}
    for row in rows:
        first.setdefault(row.prompt or row.number, row)
    return list(first.values())


def longest_first(rows: Iterable[Row]) -> list[Row]:
    """The rows by length: too little memory shows at once, and no worker has a long prompt left at the end."""
    return sorted(rows, key=lambda row: len(row.prompt), reverse=True)


def _read(path: Path) -> list[_Record]:
    kind = path.suffix.lower()
    if kind == ".json":
        raise TraceError(f"{path} is JSON, which is not read; give JSONL, one object a line, in a file named *.jsonl.")
    try:
        if kind in PARQUET:
            return _rows(path, pq.read_table(path))
        if kind in DELIMITERS:
            return _fields(path, DELIMITERS[kind])
        lines = path.read_text("utf-8-sig").split("\n")  # splitlines would also split at rarer characters
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        expected = "Parquet" if kind in PARQUET else "CSV in UTF-8" if kind in DELIMITERS else "text in UTF-8"
        raise TraceError(f"{path} cannot be read as {expected}: {' '.join(str(error).split())}.") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if kind in JSONL:
        return [(number, _object(path, number, line)) for number, line in numbered]
    return [(number, {DEFAULT_COLUMN: line}) for number, line in numbered]


def _rows(path: Path, table: pa.Table) -> list[_Record]:
    columns = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        try:
            columns[name] = column.to_pylist(maps_as_pydicts="strict")
        # keys that come twice or are lists, and times that Python has not
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise TraceError(
                f"column {name!r} of {path} holds what is no tag ({' '.join(str(error).split())}); leave it out, or "
                "write it as text."
            ) from error
    return [
        (number, dict(zip(columns, values, strict=True)))
        for number, values in enumerate(zip(*columns.values(), strict=True), 1)
    ]


def _fields(path: Path, delimiter: str) -> list[_Record]:
    """Rows of text under a header; a row's number is the line on which it ends."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        # strict, or else a quote that is never closed would take all that follows into one prompt
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            raise TraceError(f"{path} names a column twice: {_some(list(names))}; give each its own name.")
        records = []
        for record in reader:
            if None in record:
                raise TraceError(
                    f"{path} line {reader.line_num} has more fields than the header's {len(names)}; put texts with "
                    "separators in quotes."
                )
            records.append((reader.line_num, {name: text or None for name, text in record.items()}))
        return records


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{path} line {number} is no JSON ({error}); give one object a line.") from error
    if not isinstance(value, dict):
        raise TraceError(f'{path} line {number} is no JSON object; give lines as {{"prompt": "calc: 36+59="}}.')
    return value


def _column(path: Path, records: list[_Record], asked: str | None) -> str:
    """The column that holds the prompts."""
    values: dict[str, list[Any]] = {}
    for _, record in records:
        for name, value in record.items():
            values.setdefault(name, []).append(value)
    texts = [name for name in values if _is_text(values[name])]
    if asked is None and DEFAULT_COLUMN not in values and len(texts) != 1:
        raise TraceError(
            f"{path} has no column {DEFAULT_COLUMN!r} and {len(texts) or 'no'} columns of text"
            f"{': ' + _some(texts) if texts else ''}; name one with --column."
        )
    name = asked or (DEFAULT_COLUMN if DEFAULT_COLUMN in values else texts[0])
    if name not in values:
        raise TraceError(f"{path} has no column {name!r}; it has {_some(list(values)) or 'none'}.")
    if not any(isinstance(value, str) for value in values[name]):
        other = next((value for value in values[name] if not isinstance(value, str | None)), None)
        raise TraceError(
            f"column {name!r} of {path} is no text, it holds {str(other)[:40]!r}; name another with --column."
        )
    return name


def _is_text(values: list[Any]) -> bool:
    return all(isinstance(value, str | None) for value in values) and any(value is not None for value in values)


def _tags(path: Path, number: int, values: dict[str, Any], prompt: str) -> tuple[tuple[str, str], ...]:
    given = [(name, value) for name, value in values.items() if name != prompt and value is not None]
    try:
        return tuple((_text(name), _text(value)) for name, value in given)
    except (TypeError, ValueError, RecursionError) as error:
        raise TraceError(
            f"{path} row {number} has a value that is no tag ({error}); leave its column out, or write it as text."
        ) from error


def _text(value: Any) -> str:
    """Text as it is, what JSON knows as JSON, anything else (a date, say) as it prints."""
    plain = isinstance(value, bool | int | float | list | dict)
    text = json.dumps(value, ensure_ascii=False, default=str) if plain else str(value)
    text.encode()  # the store keeps no text with lone surrogates
    return text


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (" …" if len(names) > 5 else "")
