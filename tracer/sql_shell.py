"""The shell of `trace sql`: SQL line by line until a semicolon, with history and completion."""

from collections.abc import Mapping
from pathlib import Path

import click
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.output import Output

from graphs import GraphError, GraphStore
from graphs.content import Limits
from graphs.database import is_complete, parameter_names
from graphs.schema import tables
from graphs.statements import macro_signature, macros, views
from tracer.tables import table_text

HELP = "end a query with ;   .help lists tables and macros   .quit or Ctrl-D leaves"

_KEYWORDS = "SELECT FROM WHERE GROUP BY ORDER LIMIT JOIN USING AS AND OR NOT NULL count sum avg DESC DISTINCT".split()


def run_shell(
    store: GraphStore,
    parameters: Mapping[str, object],
    *,
    history: Path | None = None,
    input: Input | None = None,
    output: Output | None = None,
) -> None:
    """Answer queries until the end of the input; an error is told and the shell goes on.

    `history` is a file, by default one of the user's own; `input` and `output` are a terminal's.
    """
    session: PromptSession[str] = PromptSession(
        history=_history(history or Path(click.get_app_dir("trace")) / "sql_history"),
        completer=WordCompleter(_words(), ignore_case=True),
        complete_while_typing=False,
        input=input,
        output=output,
    )
    click.echo(f"{store.folder}: {len(store.ids())} graphs; {HELP}")
    query = ""
    while True:
        try:
            line = session.prompt("  ... " if query else "sql> ")
        except KeyboardInterrupt:
            query = ""
            continue
        except EOFError:
            return
        if not query and line.strip() in (".quit", ".exit"):
            return
        if not query and line.strip() == ".help":
            click.echo(_help())
            continue
        query = f"{query}\n{line}".strip()
        if is_complete(query):
            _answer(store, query, parameters)
            query = ""


def _answer(store: GraphStore, query: str, parameters: Mapping[str, object]) -> None:
    named = parameter_names(query)
    used = {name: value for name, value in parameters.items() if name in named}
    try:
        click.echo(table_text(store.query(query, used, Limits(plain=True))))
    except GraphError as error:
        click.echo(f"error: {error}", err=True)
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)


def _help() -> str:
    calls = [macro_signature(name, sql) for name, sql in sorted(macros().items())]
    return (
        f"{HELP}\ntables  {', '.join([*tables(), *views()])}\nmacros  {', '.join(calls)}\nDESCRIBE nodes; tells columns"
    )


def _history(path: Path) -> History:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        click.echo(f"trace: no history is kept: {path} cannot be written ({error.strerror}).", err=True)
        return InMemoryHistory()
    return FileHistory(str(path))


def _words() -> list[str]:
    columns = {column for schema in tables().values() for column in schema.names}
    return sorted({*tables(), *views(), *macros(), *columns, *_KEYWORDS})
