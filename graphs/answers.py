"""Answers to SQL as other programs read them, and the values that people give to a query's parameters."""

import io
import json
import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.csv

from graphs.errors import GraphError

_LARGEST = (1 << 127) - 1
"""Integer that SQL has."""


def csv_text(answer: pa.Table) -> str:
    """The answer as CSV with a line of names; lists and structs are JSON, as CSV has no nested values."""
    buffer = io.BytesIO()
    pyarrow.csv.write_csv(_flat(answer), buffer)
    return buffer.getvalue().decode()


def json_text(answer: pa.Table) -> str:
    """The answer as a JSON list of objects."""
    return json.dumps(list(_objects(answer)), ensure_ascii=False, indent=2) + "\n"


def jsonl_text(answer: pa.Table) -> str:
    """The answer as one JSON object in each line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _objects(answer))


def columns_of(answer: pa.Table) -> list[list[Any]]:
    """The values of each column."""
    return [column.to_pylist(maps_as_pydicts="strict") for column in answer.columns]


def is_number(kind: pa.DataType) -> bool:
    """Whether a column of the type is one of numbers, which stand at the right."""
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)


def plain(value: Any) -> Any:
    """The value as JSON has it: there is no NaN and no infinity, null stands for both."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Decimal):
        return float(value) if value.as_tuple().exponent else int(value)
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value


def parameter_value(text: str) -> object:
    """A number, a truth value, null or a text, as JSON writes them; what is no JSON, or too large, is text."""
    try:
        value = json.loads(text, parse_constant=str)
    except (ValueError, RecursionError):
        return text
    too_large = abs(value) == math.inf if isinstance(value, float) else isinstance(value, int) and abs(value) > _LARGEST
    return text if too_large or isinstance(value, dict | list) else value


def _objects(answer: pa.Table) -> Iterator[dict[str, Any]]:
    names = answer.column_names
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise GraphError(f"two columns are named {twice!r}, which JSON cannot hold; rename one with AS.")
    return (dict(zip(names, map(plain, row), strict=True)) for row in zip(*columns_of(answer), strict=True))


def _flat(answer: pa.Table) -> pa.Table:
    for i, column in enumerate(answer.schema):
        if pa.types.is_nested(column.type):
            values = answer[i].to_pylist(maps_as_pydicts="strict")
            texts = [None if value is None else json.dumps(plain(value), ensure_ascii=False) for value in values]
            answer = answer.set_column(i, column.name, pa.array(texts, pa.string()))
    return answer
