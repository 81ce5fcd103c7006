"""Answers to SQL as other programs read them, and the values that people give to a query's parameters."""

import io
import json
import math
from typing import Any

import pyarrow as pa
import pyarrow.csv


def csv_text(answer: pa.Table) -> str:
    """The answer as CSV with a line of names; lists and structs are JSON, as CSV has no nested values."""
    buffer = io.BytesIO()
    pyarrow.csv.write_csv(_flat(answer), buffer)
    return buffer.getvalue().decode()


def json_text(answer: pa.Table) -> str:
    """The answer as a JSON list of objects."""
    return json.dumps(_rows(answer), ensure_ascii=False, indent=2, default=str) + "\n"


def jsonl_text(answer: pa.Table) -> str:
    """The answer as one JSON object in each line."""
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in _rows(answer))


def plain(value: Any) -> Any:
    """The value as JSON has it: there is no NaN and no infinity, null stands for both."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value


def parameter_value(text: str) -> object:
    """A number, a truth value, null or a text, as JSON writes them; what is no JSON is text."""
    try:
        value = json.loads(text, parse_constant=str)
    except ValueError:
        return text
    return text if isinstance(value, dict | list) else value


def _rows(answer: pa.Table) -> list[dict[str, Any]]:
    return plain(answer.to_pylist(maps_as_pydicts="strict"))


def _flat(answer: pa.Table) -> pa.Table:
    for i, column in enumerate(answer.schema):
        if pa.types.is_nested(column.type):
            texts = [
                None if value is None else json.dumps(plain(value), ensure_ascii=False, default=str)
                for value in answer[i].to_pylist(maps_as_pydicts="strict")
            ]
            answer = answer.set_column(i, column.name, pa.array(texts, pa.string()))
    return answer
