"""SQL over graphs: a fresh in-memory DuckDB per question that can read the tables and nothing else.

The tables reach DuckDB as Arrow datasets over an explicit list of files, never as paths: in DuckDB 2.0 a path that may
be read may also be written (`WITH x AS (COPY … TO 'path') SELECT 1` counts as a SELECT). So file access is off.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds
from pyarrow.fs import LocalFileSystem

from graphs.errors import GraphError
from graphs.schema import description, macro_description, macros, tables

MEMORY_LIMIT = "4GB"

# python_enable_replacements: a table name must never mean a variable of this process
_CONFIG: dict[str, str | bool | int | float | list[str]] = {
    "memory_limit": MEMORY_LIMIT,
    "temp_directory": "",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "allow_community_extensions": "false",
    "python_enable_replacements": "false",
}


Content = pa.Table | Sequence[tuple[Path, str]]
"""Rows, or files, each with the one value of the table's first column in it: a condition on it opens no other file."""


def query(contents: Mapping[str, Content], sql: str, parameters: Mapping[str, object]) -> pa.Table:
    """The answer to one SELECT over the tables with these contents; the others are empty.

    Raises `GraphError` with DuckDB's message.
    """
    with _told_in_one_line(), duckdb.connect(":memory:", config=_CONFIG) as connection:
        for text in (sql, *parameters.values()):
            if isinstance(text, str):
                text.encode()  # DuckDB takes text with lone surrogates for no text at all
        statement = _checked(connection, sql)
        _create_tables(connection, contents)
        for lock in (
            "SET TimeZone = 'UTC'",
            "SET enable_external_access = false",
            "SET lock_configuration = true",
            "BEGIN TRANSACTION READ ONLY",
        ):
            connection.execute(lock)
        return connection.sql(statement, params=dict(parameters)).to_arrow_table()


def _checked(connection: duckdb.DuckDBPyConnection, sql: str) -> duckdb.Statement:
    """The one statement of the text, if it only reads. This is for good messages; the lock is what protects."""
    statements = connection.extract_statements(sql)
    # versions of DuckDB differ in what they make of a PIVOT that has to look for its values
    if len(statements) != 1 or statements[0].type == duckdb.StatementType.MULTI:
        raise GraphError(
            f"the query has {len(statements) or 'no'} statements, or a PIVOT without its values; give exactly one "
            "SELECT, or PIVOT … ON kind IN ('token', 'feature') …"
        )
    [statement] = statements
    if statement.type == duckdb.StatementType.EXPLAIN:
        explained = re.sub(r"\s*EXPLAIN\b", "", statement.query, count=1, flags=re.IGNORECASE)
        if re.match(r"\s*(ANALYZE\b|\()", explained, flags=re.IGNORECASE):
            raise GraphError("only plain EXPLAIN is allowed, without ANALYZE or options; write EXPLAIN SELECT …")
        _checked(connection, explained)
    elif statement.type != duckdb.StatementType.SELECT:
        raise GraphError(
            f"{statement.type.name} statements are not allowed, the store is only read; use SELECT, DESCRIBE, SHOW "
            "TABLES, SUMMARIZE or EXPLAIN."
        )
    return statement


def _create_tables(connection: duckdb.DuckDBPyConnection, contents: Mapping[str, Content]) -> None:
    for name, schema in tables().items():
        connection.register(name, _readable(schema, contents.get(name, ())))
        connection.execute(f"COMMENT ON VIEW {name} IS {_literal(description(schema))}")
        for field in schema:
            connection.execute(f"COMMENT ON COLUMN {name}.{field.name} IS {_literal(description(field))}")
    for name, sql in macros().items():
        connection.execute(sql)
        connection.execute(f"COMMENT ON MACRO TABLE {name} IS {_literal(macro_description(sql))}")


def _readable(schema: pa.Schema, content: Content) -> ds.Dataset | pa.Table:
    if isinstance(content, pa.Table):
        return content
    if not content:
        return schema.empty_table()
    first = ds.field(schema.names[0])
    return ds.FileSystemDataset.from_paths(
        [str(path) for path, _ in content],
        schema=schema.remove_metadata(),
        format=ds.ParquetFileFormat(),
        filesystem=LocalFileSystem(),
        partitions=[first == value for _, value in content],
    )


def _literal(text: str) -> str:
    """Our own descriptions as SQL text; COMMENT takes no parameters."""
    return "'" + text.replace("'", "''") + "'"


@contextmanager
def _told_in_one_line() -> Iterator[None]:
    try:
        yield
    except GraphError:
        raise
    except (duckdb.Error, pa.ArrowException, OSError, UnicodeError) as error:
        lines = (line.strip() for line in str(error).splitlines())
        raise GraphError(" ".join(line for line in lines if line.strip("^"))) from error
