"""SQL over graphs: a fresh in-memory DuckDB per question that can read the tables and nothing else.

In DuckDB 2.0 a path that may be read may also be written (`WITH x AS (COPY … TO 'path') SELECT 1` counts as a SELECT).
So access to files is off. Graphs in folders of their own reach DuckDB as Arrow datasets over an explicit list of
files, and packs through a file system of ours that cannot write.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds
from pyarrow.fs import LocalFileSystem

from graphs.content import NOTHING, UNLIMITED, Content, Limits
from graphs.errors import GraphError
from graphs.filesystem import PROTOCOL, ReadOnlyFiles
from graphs.schema import description, tables
from graphs.statements import is_table_macro, macro_description, macros, view_columns, views

# python_enable_replacements: a table name must never mean a variable of this process
_CONFIG: dict[str, str | bool | int | float | list[str]] = {
    "temp_directory": "",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "allow_community_extensions": "false",
    "python_enable_replacements": "false",
}
_PLAIN = (
    "boolean", "tinyint", "smallint", "integer", "bigint", "hugeint", "utinyint", "usmallint", "uinteger", "ubigint",
    "float", "double", "decimal", "varchar", "null",
)  # fmt: skip


def query(
    contents: Mapping[str, Content], sql: str, parameters: Mapping[str, object], limits: Limits = UNLIMITED
) -> pa.Table:
    """The answer to one SELECT over the tables with these contents; the others are empty.

    Raises `GraphError` with DuckDB's message.
    """
    return _answer(partial(_create_tables, contents=contents), _packed_files(contents), sql, parameters, limits)


def query_table(
    name: str, rows: pa.Table, sql: str, parameters: Mapping[str, object], limits: Limits = UNLIMITED
) -> pa.Table:
    """The answer to one SELECT over a table that is none of a store's, which may do as little. Raises `GraphError`."""
    return _answer(lambda connection: connection.from_arrow(rows).create_view(name), (), sql, parameters, limits)


def _answer(
    create_tables: Callable[[duckdb.DuckDBPyConnection], object],
    paths: Iterable[str],
    sql: str,
    parameters: Mapping[str, object],
    limits: Limits,
) -> pa.Table:
    config = _CONFIG | {"memory_limit": limits.memory}
    if limits.threads is not None:
        config["threads"] = limits.threads
    with _told_in_one_line(), duckdb.connect(":memory:", config=config) as connection:
        for text in (sql, *parameters.values()):
            if isinstance(text, str):
                text.encode()  # DuckDB takes text with lone surrogates for no text at all
        statement = _checked(connection, sql)
        create_tables(connection)
        connection.execute("SET allowed_paths = $paths", {"paths": [*paths]})
        for lock in (
            "SET TimeZone = 'UTC'",
            "SET enable_external_access = false",
            "SET lock_configuration = true",
            "BEGIN TRANSACTION READ ONLY",
        ):
            connection.execute(lock)

        def ask() -> pa.Table:
            answer = connection.sql(statement, params=dict(parameters))
            if limits.plain:
                answer = _plain(answer)
            return answer.to_arrow_table() if limits.max_rows is None else _first_rows(answer, limits.max_rows)

        return _interruptibly(connection, ask)


def parameter_names(sql: str) -> set[str]:
    """The parameters of a query; none if it is no SQL. Raises no error: who answers the query tells what is wrong."""
    try:
        sql.encode()
        return set().union(*(statement.named_parameters for statement in duckdb.extract_statements(sql)))
    except (duckdb.Error, UnicodeError):
        return set()


def is_complete(sql: str) -> bool:
    """Whether the text ends with a semicolon that is neither in a text nor in a comment, or is no text at all."""
    try:
        sql.encode()
    except UnicodeError:  # who answers it tells what is wrong
        return True
    places = [place for place, kind in duckdb.tokenize(sql) if kind != duckdb.token_type.comment]
    return bool(places) and sql.encode()[places[-1] :].startswith(b";")


def _plain(answer: duckdb.DuckDBPyRelation) -> duckdb.DuckDBPyRelation:
    """The answer with columns of other types as text."""
    kinds = [_is_plain(kind) for kind in answer.types]
    if all(kinds):
        return answer
    columns = (
        f"{f'#{i}' if plain else f'CAST(#{i} AS VARCHAR)'} AS {_quoted(name)}"
        for i, (name, plain) in enumerate(zip(answer.columns, kinds, strict=True), 1)
    )
    return answer.project(", ".join(columns))


def _is_plain(kind: Any) -> bool:
    """Whether Arrow, Python and JSON know all values of the type."""
    match kind.id:
        case "list" | "array" | "struct":
            return all(_is_plain(part) for name, part in kind.children if name != "size")
        case "map":
            (_, key), (_, value) = kind.children
            return key.id == "varchar" and _is_plain(value)
        case name:
            return name in _PLAIN


def _interruptibly(connection: duckdb.DuckDBPyConnection, ask: Callable[[], pa.Table]) -> pa.Table:
    """Ask in another thread: a thread that is in a long step of DuckDB's own hears of no Ctrl-C."""
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(ask)
        try:
            return asked.result()
        except KeyboardInterrupt:
            while not asked.done():
                connection.interrupt()
                wait([asked], timeout=0.1)
            raise


def _first_rows(answer: duckdb.DuckDBPyRelation, count: int) -> pa.Table:
    """Batch by batch, so that no more is computed than is wanted."""
    with answer.to_arrow_reader(count) as reader:
        batches, found = [], 0
        while found < count:
            try:
                batches.append(reader.read_next_batch())
            except StopIteration:
                break
            found += len(batches[-1])
        return pa.Table.from_batches(batches, reader.schema).slice(0, count)


def _checked(connection: duckdb.DuckDBPyConnection, sql: str) -> duckdb.Statement:
    """The one statement of the text, if it only reads. This is for good messages; the lock is what protects."""
    statements = connection.extract_statements(sql)
    if not statements:
        raise GraphError("the query is empty; give one SELECT, as SELECT prompt FROM graphs.")
    # versions of DuckDB differ in what they make of a PIVOT that has to look for its values
    if len(statements) != 1 or statements[0].type == duckdb.StatementType.MULTI:
        raise GraphError(
            f"the query has {len(statements)} statements, or a PIVOT without its values; give exactly one "
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


def _packed_files(contents: Mapping[str, Content]) -> dict[str, Path]:
    """Files of packs by the names under which DuckDB reads them."""
    return {
        f"{PROTOCOL}://{name}-{number}.parquet": path
        for name, content in contents.items()
        for number, path in enumerate(content.packs)
    }


def _create_tables(connection: duckdb.DuckDBPyConnection, contents: Mapping[str, Content]) -> None:
    files = _packed_files(contents)
    if files:
        names = {name.removeprefix(f"{PROTOCOL}://"): path for name, path in files.items()}
        connection.register_filesystem(ReadOnlyFiles(names))
    for name, schema in tables().items():
        content = contents.get(name, NOTHING)
        packs = [packed for packed in files if packed.startswith(f"{PROTOCOL}://{name}-")]
        relation = _packed_rows(connection, schema, packs, content) if packs else None
        if relation is None or content.rows is not None or content.files:
            others = connection.from_arrow(_readable(schema, content))
            relation = others.union(relation) if relation is not None else others
        relation.create_view(name)
        _comment_on_view(connection, name, description(schema), schema)
    for name, sql in views().items():
        connection.execute(sql)
        _comment_on_view(connection, name, macro_description(sql), view_columns(name))
    for name, sql in macros().items():
        connection.execute(sql)
        kind = "MACRO TABLE" if is_table_macro(sql) else "MACRO"
        connection.execute(f"COMMENT ON {kind} {name} IS {_literal(macro_description(sql))}")


def _comment_on_view(connection: duckdb.DuckDBPyConnection, name: str, text: str, columns: Iterable[pa.Field]) -> None:
    connection.execute(f"COMMENT ON VIEW {name} IS {_literal(text)}")
    for column in columns:
        connection.execute(f"COMMENT ON COLUMN {name}.{column.name} IS {_literal(description(column))}")


def _packed_rows(
    connection: duckdb.DuckDBPyConnection, schema: pa.Schema, packs: list[str], content: Content
) -> duckdb.DuckDBPyRelation:
    listed = ", ".join(map(_literal, packs))
    columns = ", ".join(f"NULL AS {name}" if name in content.absent else name for name in schema.names)
    sql = f"SELECT {columns} FROM read_parquet([{listed}], union_by_name = true)"
    if content.hidden:
        sql += f" WHERE {schema.names[0]} NOT IN ({', '.join(map(_literal, sorted(content.hidden)))})"
    return connection.sql(sql)


def _readable(schema: pa.Schema, content: Content) -> ds.Dataset | pa.Table:
    if content.rows is not None:
        return content.rows
    if not content.files:
        return schema.empty_table()
    first = ds.field(schema.names[0])
    return ds.FileSystemDataset.from_paths(
        [str(path) for path, _ in content.files],
        schema=schema.remove_metadata(),
        format=ds.ParquetFileFormat(),
        filesystem=LocalFileSystem(),
        partitions=[first == value for _, value in content.files],
    )


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _literal(text: str) -> str:
    """A text of ours as SQL text, where no parameters are taken."""
    return "'" + text.replace("'", "''") + "'"


@contextmanager
def _told_in_one_line() -> Iterator[None]:
    try:
        yield
    except GraphError:
        raise
    except RuntimeError as error:
        if str(error) != "Query interrupted":
            raise
        raise KeyboardInterrupt from error  # DuckDB has taken the signal
    except (duckdb.Error, pa.ArrowException, OSError, UnicodeError) as error:
        lines = (line.strip() for line in str(error).splitlines())
        raise GraphError(" ".join(line for line in lines if line.strip("^"))) from error
