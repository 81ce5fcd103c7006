"""`trace sql`: where the query comes from, what its parameters are, what it is asked of, and where the answer goes."""

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tracer.options import DEFAULT_STORE, StoreFolder, existing_store, warn_of_damage

if TYPE_CHECKING:
    import pyarrow as pa

    from graphs import GraphStore
    from graphs.content import Limits

RUN, METRICS = "run.json", "metrics.parquet"
"""In the folder of a training run. `transcoders.progress` names them too, but imports torch, which takes seconds."""


SAFE_SECONDS, SAFE_ROWS = 20.0, 100_000
_FORMS = {".csv": "csv", ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


@click.command("sql")
@click.argument("arguments", nargs=-1, metavar="[FOLDER] [QUERY]")
@click.option("--file", "source", type=click.Path(path_type=Path), help="Read the query from this file.")
@click.option("--saved", metavar="NAME", help="Ask the query that was saved under this name.")
@click.option("--save", metavar="NAME", help="Save the query under this name, if it could be answered.")
@click.option(
    "--safe", is_flag=True, help="For a query of somebody else: a process answers it that may read the store and "
    f"nothing else, and that is stopped after {SAFE_SECONDS:.0f} s or where it takes too much memory."
)  # fmt: skip
@click.option("--list-saved", is_flag=True, help="List the saved queries.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "csv", "json", "jsonl", "parquet"]),
    help="[default: as --output ends; table on a terminal, csv on a pipe]",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write to this file instead of stdout."
)
@click.option(
    "--param",
    "values",
    multiple=True,
    metavar="NAME=VALUE",
    help="Value of $NAME in the query: a number, true, false, null, or text; in double quotes always text. Repeatable.",
)
@click.option(
    "-p", "--parameter", "texts", multiple=True, metavar="NAME=TEXT", help="The same, but always text. Repeatable."
)
def sql(
    arguments: tuple[str, ...], source: Path | None, saved: str | None, save: str | None, list_saved: bool,
    form: str | None, output: Path | None, values: tuple[str, ...], texts: tuple[str, ...], safe: bool,
) -> None:  # fmt: skip
    """Query all saved graphs with one read-only DuckDB SELECT.

    QUERY is SQL in quotes, or - to read it from stdin. Without a query, a shell opens on a terminal, and stdin is
    read otherwise. Tables: graphs, nodes, edges, features, supernodes, interventions, validations, tokens, logits,
    comparisons, comparison_nodes, comparison_edges; for them and the macros see docs/schema.md. Of a training run's
    folder, the one table is metrics.

    \b
    Examples:
      trace sql "SELECT graph_id, prompt, replacement_score FROM graphs"
      trace sql "FROM strongest_circuit('Dallas')"
      trace sql my-graphs "SELECT label, count(*) FROM nodes WHERE token = \\$t GROUP BY 1" -p t=is
      trace sql "FROM common_features(NULL, \\$k)" --param k=20 --format json -o features.json
      trace sql --file question.sql --save question
      trace sql --saved question
      trace sql --safe --file theirs.sql
      trace sql s3://bucket/graphs "SELECT count(*) FROM edges"
      trace sql my-run "SELECT step, loss, l0 FROM metrics"
      trace sql
    """
    from graphs.answers import parameter_value
    from tracer.tables import write_table

    form = _form(form, output)
    parameters = {**_parameters(texts, str), **_parameters(values, parameter_value)}
    folder, query = _split(arguments, has_query=bool(source or saved or list_saved))
    if _is_run(folder):
        if saved or save or list_saved or safe:
            raise click.ClickException(
                f"{folder} is a training run, which saves no queries and has one table; leave --save… and --safe out."
            )
        table = _of_metrics(folder, _query(query, source), parameters, _limits(form))
        write_table(table, form, output)
        return
    store = existing_store(folder)
    warn_of_damage(store)
    if list_saved:
        write_table(_listed(store), form, output)
        return
    if source is not None and saved is not None:
        raise click.ClickException("--file and --saved are two queries; give one of them.")
    text = _query(query, source) if saved is None else store.saved_query(saved)
    if text is None and safe:
        raise click.ClickException("--safe is for one query, not for the shell; give the query too.")
    if text is None:
        from tracer.sql_shell import run_shell

        run_shell(store, parameters)
        return
    table = _safe_answer(store, text, parameters) if safe else store.query(text, parameters, _limits(form))
    if save is not None:
        store.save_query(save, text)
    write_table(table, form, output)


def _safe_answer(store: "GraphStore", query: str, parameters: dict[str, object]) -> "pa.Table":
    """The answer of a process that may do little, as it comes: what is no number is text."""
    from graphs.sandbox import query as ask

    answer = ask(store, query, parameters, seconds=SAFE_SECONDS, max_rows=SAFE_ROWS, max_cells=2_000_000,
                 max_bytes=64 << 20)  # fmt: skip
    if answer.truncated:
        click.echo(f"trace: only the first {len(answer.table)} rows of the answer are told.", err=True)
    return answer.table


def _split(arguments: tuple[str, ...], *, has_query: bool) -> tuple[Path, str | None]:
    """The folder, and the query if it is among the arguments."""
    expected = 1 if has_query else 2
    if len(arguments) > expected:
        raise click.ClickException(
            f"{len(arguments)} arguments were given; expected an optional folder"
            + (", as the query comes from an option." if has_query else " and one query in quotes.")
        )
    if has_query and arguments and not _is_folder(arguments[0]) and " " in arguments[0].strip():
        raise click.ClickException(
            f"{arguments[0]!r} is a second query, as one comes from an option; give one of them."
        )
    if (
        len(arguments) == 1
        and not has_query
        and re.fullmatch(r"[^\s-]\S*", arguments[0])
        and not _is_folder(arguments[0])
    ):
        raise click.ClickException(
            f"there is no folder {arguments[0]}, and a query has more than one word; name a store of graphs or a "
            'training run, or give a query in quotes, as in "FROM graphs".'
        )
    if len(arguments) == 2 or has_query or (arguments and _is_folder(arguments[0])):
        folder = arguments[0] if arguments else DEFAULT_STORE
        query = arguments[1] if len(arguments) == 2 else None
        return StoreFolder(read_only=True).convert(folder, None, None), query
    return Path(DEFAULT_STORE), arguments[0] if arguments else None


def _is_folder(text: str) -> bool:
    """Whether the one argument is not SQL."""
    return os.path.isdir(text) or re.fullmatch(r"[A-Za-z0-9+.-]+://\S+", text) is not None


def _query(query: str | None, source: Path | None) -> str | None:
    """The SQL, wherever it is; None if a person is to type it."""
    if source is not None:
        try:
            return source.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise click.ClickException(f"{source} cannot be read ({error}); name a text file with SQL.") from error
    if query == "-" or (query is None and not sys.stdin.isatty()):
        return sys.stdin.read()
    return query


def _is_run(folder: Path) -> bool:
    """Whether this is the folder of a training run; an error if it holds something that is neither that nor a store."""
    from graphs.description import is_foreign

    if not folder.is_dir() or not is_foreign(folder):
        return False
    if not (folder / RUN).is_file() or not (folder / METRICS).is_file():
        raise click.ClickException(
            f"{folder} is neither a store of graphs, which has store.json, nor a training run that has reported, which "
            f"has {RUN} and {METRICS}; name another folder."
        )
    return True


def _of_metrics(folder: Path, query: str | None, parameters: dict[str, object], limits: "Limits") -> "pa.Table":
    """The answer of a training run's metrics; a training that goes on puts new ones in their place whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from graphs.database import query_table

    if query is None:
        raise click.ClickException(f'{folder} is a training run; give a query too, as in "FROM metrics".')
    try:
        with pq.ParquetFile(folder / METRICS) as file:
            metrics = file.read()
    except (pa.ArrowException, OSError) as error:
        raise click.ClickException(f"{folder / METRICS} cannot be read ({error}); it is damaged.") from error
    return query_table("metrics", metrics, query, parameters, limits)


def _parameters(pairs: tuple[str, ...], value: Any) -> dict[str, object]:
    found = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not (name.isidentifier() and equals):
            raise click.ClickException(f"{pair!r} is no parameter; write it as NAME=VALUE.")
        found[name] = value(text)
    return found


def _form(form: str | None, output: Path | None) -> str:
    if form is None and output is not None:
        form = _FORMS.get(output.suffix.lower())
    return form or ("table" if sys.stdout.isatty() and output is None else "csv")


def _limits(form: str) -> "Limits":
    """Parquet keeps the types that DuckDB gives; all other forms show what they do not know as text."""
    from graphs.content import Limits

    return Limits(plain=form != "parquet")


def _listed(store: "GraphStore") -> "pa.Table":
    import pyarrow as pa

    from graphs import GraphError

    rows = []
    for name in store.saved_query_names():
        try:
            rows.append({"name": name, "query": store.saved_query(name).strip()})
        except GraphError as error:
            click.echo(f"trace: left out {name}: {error}", err=True)
    return pa.Table.from_pylist(rows, pa.schema([("name", pa.string()), ("query", pa.string())]))
