"""What checks add to a graph: tables in its folder, wherever the graph itself is.

graphs/<graph_id>/interventions.parquet, validations.parquet
"""

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from graphs.errors import GraphError
from graphs.files import write_atomically
from graphs.folder import DAMAGE, check_columns
from graphs.names import is_graph_id, one_line, some
from graphs.schema import tables

ADDITIONS = ("interventions", "validations")


def fitted(table: str, rows: pa.Table, graph_id: str) -> pa.Table:
    """The rows in the columns of the table. Raises `GraphError` if they do not fit or are of other graphs."""
    if table not in ADDITIONS:
        raise GraphError(f"table {table} is not added to graphs; expected {', '.join(ADDITIONS)}.")
    schema = tables()[table]
    try:
        found = rows.select(schema.names).cast(schema)
    except (KeyError, ValueError) as error:  # Arrow's own errors are of these kinds
        raise GraphError(f"the rows do not fit table {table}: {one_line(error)}.") from error
    others = sorted({str(name) for name in found["graph_id"].unique().to_pylist()} - {graph_id})
    if others:
        raise GraphError(f"rows of {some(others)} were given as those of {graph_id}; save each on its own.")
    return found


def write_rows(folder: Path, table: str, rows: pa.Table) -> None:
    """Put the rows in place of those that the graph had in the table; no rows take the file away."""
    path = folder / f"{table}.parquet"
    if len(rows):
        write_atomically(path, partial(pq.write_table, rows.replace_schema_metadata(None), compression="zstd"))
    else:
        path.unlink(missing_ok=True)


def added_files(parent: Path) -> Iterator[tuple[str, Path, str]]:
    """Table, file and graph of everything that was added to graphs and can be read."""
    for folder in sorted(parent.iterdir()) if parent.is_dir() else ():
        for table in ADDITIONS if is_graph_id(folder.name) else ():
            path = folder / f"{table}.parquet"
            if path.is_file():
                with suppress(*DAMAGE):
                    check_columns(pq.read_metadata(path).schema.to_arrow_schema(), table, path.name)
                    yield table, path, folder.name
