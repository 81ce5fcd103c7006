"""The page for SQL: a link only fills in its form; what the form sends is answered in a process that may do little."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlencode

from flask import Flask, Response, render_template, request
from flask.typing import ResponseReturnValue

from graphs import GraphError, GraphStore
from graphs.answers import columns_of, csv_text, is_number, parameter_value, plain
from graphs.names import is_graph_id
from graphs.sandbox import query
from graphs.schema import description, tables
from graphs.statements import macro_description, macro_example, macros, view_columns, views

SECONDS = 20.0
"""That a query may take."""

_MOST_ROWS, _MOST_ROWS_OF_FILE = 1_000, 100_000
_MOST_CELLS_OF_FILE, _MOST_BYTES_OF_FILE = 2_000_000, 64 << 20
_MOST_AT_ONCE = 2  # each takes a thread of the server, which has others for the pages
_LONGEST_TEXT = 500
_FIRST = "SELECT graph_id, prompt, n_nodes, n_edges, replacement_score\nFROM graphs\nORDER BY created_at DESC"


@dataclass(frozen=True)
class Cell:
    """One value of an answer as it is shown, and the page that it names."""

    text: str | None
    """None for NULL."""
    link: str | None = None


@dataclass(frozen=True)
class Shown:
    """An answer as it is shown."""

    columns: tuple[tuple[str, bool], ...]
    """Name of each, and whether it has numbers."""
    rows: list[list[Cell]]
    truncated: bool
    seconds: float
    n_damaged: int
    """Graphs that are left out."""


def add_sql_page(app: Flask, store: GraphStore) -> None:
    """Add `/sql`: a form with the query and a field for each `$name` in it, and the answer to what it sends."""
    free = threading.BoundedSemaphore(_MOST_AT_ONCE)

    @app.get("/sql")
    def show_form() -> ResponseReturnValue:
        try:
            saved = request.args.get("saved")
            sql = request.args.get("q") or (store.saved_query(saved) if saved else _FIRST)
            return _page(store, sql, _given(request.args))
        except GraphError as error:
            return _page(store, _FIRST, {}, error=str(error)), 404

    @app.post("/sql")
    def answer() -> ResponseReturnValue:
        sql, given = request.form.get("q", ""), _given(request.form)
        try:
            with _one_of(free):
                if request.form.get("as") == "csv":
                    return _file(store, sql, _values(given))
                return _page(store, sql, given, shown=_ask(store, sql, _values(given)))
        except GraphError as error:
            return _page(store, sql, given, error=str(error)), 400


def nodes_address(graph_id: str) -> str:
    """Address of the page with a query for the graph's most influential nodes."""
    sql = (
        "SELECT graph_id, node, kind, layer, token, feature, label, activation, influence\n"
        "FROM nodes\nWHERE graph_id = $graph\nORDER BY influence DESC NULLS LAST\nLIMIT 50"
    )
    return _address(sql, graph=graph_id)


@contextmanager
def _one_of(free: threading.BoundedSemaphore) -> Iterator[None]:
    if not free.acquire(blocking=False):
        raise GraphError(f"{_MOST_AT_ONCE} queries are being answered already; wait for one of them, then ask again.")
    try:
        yield
    finally:
        free.release()


def _page(
    store: GraphStore, sql: str, given: Mapping[str, str], *, shown: Shown | None = None, error: str | None = None
) -> str:
    return render_template(
        "sql.html",
        sql=sql,
        fields=[(name, given.get(name, "")) for name in _names(sql)],
        shown=shown,
        error=error,
        describe=description,
        tables=[(name, description(table), list(table)) for name, table in tables().items()]
        + [(name, macro_description(text), view_columns(name)) for name, text in views().items()],
        examples=[
            (macro_example(text), macro_description(text), _address(macro_example(text)))
            for _, text in sorted(macros().items())
        ],
        saved=[(name, "/sql?" + urlencode({"saved": name})) for name in store.saved_query_names()],
    )


def _address(sql: str, **given: str) -> str:
    return "/sql?" + urlencode({"q": sql} | {f"p_{name}": text for name, text in given.items()})


def _given(fields: Mapping[str, str]) -> dict[str, str]:
    return {name.removeprefix("p_"): text for name, text in fields.items() if name.startswith("p_")}


def _names(sql: str) -> list[str]:
    """What looks like parameters, also in texts and comments: what the query does not name is not passed on."""
    return list(dict.fromkeys(re.findall(r"(?<!\$)\$(\w+)", sql)))


def _values(given: Mapping[str, str]) -> dict[str, object]:
    return {name: parameter_value(text) for name, text in given.items() if text}


def _ask(store: GraphStore, sql: str, parameters: Mapping[str, object]) -> Shown:
    started = time.perf_counter()
    answer = query(store, sql, parameters, seconds=SECONDS, max_rows=_MOST_ROWS, is_wanted=_somebody_waits())
    seconds = time.perf_counter() - started
    columns = tuple((_text(column.name) or "", is_number(column.type)) for column in answer.table.schema)
    names = answer.table.column_names
    rows = [[_cell(names, row, i) for i in range(len(row))] for row in zip(*columns_of(answer.table), strict=True)]
    return Shown(columns, rows, answer.truncated, seconds, len(store.damaged()))


def _somebody_waits() -> Callable[[], bool]:
    """Whether the browser still waits for the answer; servers other than Waitress do not tell."""
    disconnected = request.environ.get("waitress.client_disconnected", lambda: False)
    return lambda: not disconnected()


def _file(store: GraphStore, sql: str, parameters: Mapping[str, object]) -> Response:
    answer = query(
        store, sql, parameters, seconds=SECONDS, max_rows=_MOST_ROWS_OF_FILE, max_cells=_MOST_CELLS_OF_FILE,
        max_bytes=_MOST_BYTES_OF_FILE, is_wanted=_somebody_waits(),
    )  # fmt: skip
    if answer.truncated:
        raise GraphError(
            f"the answer has more than {_MOST_ROWS_OF_FILE:,} rows; trace sql writes any number: --output FILE."
        )
    headers = {"Content-Disposition": 'attachment; filename="answer.csv"'}
    return Response(csv_text(answer.table), content_type="text/csv; charset=utf-8", headers=headers)


def _cell(names: list[str], row: tuple, i: int) -> Cell:
    return Cell(_text(row[i]), _link(names, row, i))


def _text(value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, float):
        return f"{value:.6g}"
    text = json.dumps(plain(value), ensure_ascii=False) if isinstance(value, list | dict) else str(value)
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} … ({len(text):,} characters)"


def _link(names: list[str], row: tuple, i: int) -> str | None:
    """The page of a graph for its id, and of one of its nodes for the node's number."""
    if names[i] not in ("graph_id", "node") or "graph_id" not in names:
        return None
    graph_id, value = row[names.index("graph_id")], row[i]
    if not isinstance(graph_id, str) or not is_graph_id(graph_id):
        return None
    if names[i] == "graph_id":
        return f"/g/{graph_id}"
    return f"/g/{graph_id}?n={value}" if type(value) is int and value >= 0 else None
