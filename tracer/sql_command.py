"""`trace sql`: where the query comes from, what its parameters are, and where the answer goes."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import pyarrow as pa

    from graphs import GraphStore

DEFAULT_STORE = "graphs-store"


@click.command("sql")
@click.argument("arguments", nargs=-1, metavar="[FOLDER] [QUERY]")
@click.option("--file", "source", type=click.Path(path_type=Path), help="Read the query from this file.")
@click.option("--saved", metavar="NAME", help="Ask the query that was saved under this name.")
@click.option("--save", metavar="NAME", help="Save the query under this name, if it could be answered.")
@click.option("--list-saved", is_flag=True, help="List the saved queries.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "csv", "json", "jsonl", "parquet"]),
    help="[default: table on a terminal, csv on a pipe]",
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
    form: str | None, output: Path | None, values: tuple[str, ...], texts: tuple[str, ...],
) -> None:  # fmt: skip
    """Query all saved graphs with one read-only DuckDB SELECT.

    QUERY is SQL in quotes, or - to read it from stdin. Without a query, a shell opens on a terminal, and stdin is
    read otherwise. Tables: graphs, nodes, edges, features, supernodes, interventions, validations, tokens, logits; for
    them and the macros see docs/schema.md.

    \b
    Examples:
      trace sql "SELECT graph_id, prompt, replacement_score FROM graphs"
      trace sql "FROM strongest_path('Dallas')"
      trace sql my-graphs "SELECT label, count(*) FROM nodes WHERE token = \\$t GROUP BY 1" -p t=is
      trace sql "FROM common_features(NULL, \\$k)" --param k=20 --format json -o features.json
      trace sql --file question.sql --save question
      trace sql --saved question
      trace sql
    """
    from graphs import GraphStore
    from tracer.tables import write_table

    parameters = {**_parameters(texts, str), **_parameters(values, _value)}
    folder, query = _split(arguments, has_query=bool(source or saved or list_saved))
    store = GraphStore(folder)
    if not store.folder.exists():
        raise click.ClickException(f'{folder} does not exist; trace a prompt first, as in trace "calc: 36+59=".')
    _warn_of_damage(store)
    if list_saved:
        write_table(_listed(store), _form(form, output), output)
        return
    text = _query(store, query, source, saved)
    if text is None:
        from tracer.sql_shell import run_shell

        run_shell(store, parameters)
        return
    table = store.sql(text, **parameters)
    if save is not None:
        store.save_query(save, text)
    write_table(table, _form(form, output), output)


def _split(arguments: tuple[str, ...], *, has_query: bool) -> tuple[Path, str | None]:
    """The folder, and the query if it is among the arguments."""
    expected = 1 if has_query else 2
    if len(arguments) > expected:
        raise click.ClickException(
            f"{len(arguments)} arguments were given; expected an optional folder"
            + (", as the query comes from an option." if has_query else " and one query in quotes.")
        )
    if len(arguments) == 2:
        return Path(arguments[0]), arguments[1]
    if has_query or (arguments and Path(arguments[0]).is_dir()):
        return Path(*(arguments or (DEFAULT_STORE,))), None
    return Path(DEFAULT_STORE), arguments[0] if arguments else None


def _query(store: "GraphStore", query: str | None, source: Path | None, saved: str | None) -> str | None:
    """The SQL, wherever it is; None if a person is to type it."""
    if source is not None and saved is not None:
        raise click.ClickException("--file and --saved are two queries; give one of them.")
    if saved is not None:
        return store.saved_query(saved)
    if source is not None:
        try:
            return source.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise click.ClickException(f"{source} cannot be read ({error}); name a text file with SQL.") from error
    if query == "-" or (query is None and not sys.stdin.isatty()):
        return sys.stdin.read()
    return query


def _parameters(pairs: tuple[str, ...], value: Any) -> dict[str, object]:
    found = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not (name.isidentifier() and equals):
            raise click.ClickException(f"{pair!r} is no parameter; write it as NAME=VALUE.")
        found[name] = value(text)
    return found


def _value(text: str) -> object:
    """A number, a truth value or a text, as JSON writes them; what is no JSON is text."""
    try:
        value = json.loads(text, parse_constant=str)
    except ValueError:
        return text
    return text if isinstance(value, dict | list) else value


def _form(form: str | None, output: Path | None) -> str:
    return form or ("table" if sys.stdout.isatty() and output is None else "csv")


def _listed(store: "GraphStore") -> "pa.Table":
    import pyarrow as pa

    rows = [{"name": name, "query": text.strip()} for name, text in store.saved_queries().items()]
    return pa.Table.from_pylist(rows, pa.schema([("name", pa.string()), ("query", pa.string())]))


def _warn_of_damage(store: "GraphStore") -> None:
    for graph in store.damaged():
        click.echo(f"trace: left out {graph.graph_id}: {graph.reason}; delete it with trace rm.", err=True)
