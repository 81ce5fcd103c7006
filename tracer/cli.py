"""The `trace` command: the only file that knows all four packages.

Nothing heavy is imported before a command needs it: `trace --help` must answer at once.
"""

import difflib
import errno
import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tracer.batch_command import batch
from tracer.compare_command import diff, merge, stability
from tracer.errors import INTERRUPTED
from tracer.evaluate_command import evaluate
from tracer.exchange_command import export, import_
from tracer.options import (
    DEFAULT_STORE,
    StoreFolder,
    existing_store,
    model_options,
    store_argument,
    store_option,
    trace_options,
    warn_of_damage,
    writable_store,
)
from tracer.sql_command import sql
from tracer.train_command import train

if TYPE_CHECKING:
    from graphs import GraphStore

EXPECTED_ERRORS = (
    ("graphs.errors", "GraphError"), ("tracer.errors", "TraceError"),
    ("transcoders.errors", "TranscoderError"), ("viewer.serve", "ViewerError"),
)  # fmt: skip


CANNOT_BE_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)
"""What writing to stdout may end with, but for a reader that has left."""


class CommandError(click.ClickException):
    """One line on stderr, exit status 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"trace: {' '.join(self.message.split())}", err=True)


class PromptGroup(click.Group):
    """A group whose default command takes the first words as a prompt."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h", "--version"):
            _check_is_prompt(args[0])
            args = ["prompt", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:  # click would begin with an empty line
            raise CommandError(INTERRUPTED) from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in self.commands if name != "prompt"]


@click.group(cls=PromptGroup, no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="clt-tracer", prog_name="trace")
def cli() -> None:
    """Which words and features of a prompt caused a language model's answer?

    \b
    trace "PROMPT" [OPTIONS]   trace a prompt; its options: trace prompt --help
    \b
    Examples:
      trace "the capital of the state containing Dallas is"
      trace "calc: 36+59="
      trace view
      trace sql "SELECT * FROM strongest_circuit('Dallas')"
    """


@cli.command("prompt")
@click.argument("text", metavar="PROMPT")
@model_options
@trace_options
@click.option("--json", "as_json", is_flag=True, help="Print the same as one JSON object, its paths node by node.")
@click.option("--open", "open_viewer", is_flag=True, help="Show the graph in the viewer afterwards.")
def trace_prompt(
    text: str, model: str | None, transcoder: str | None, tokenizer: str | None, device: str, dtype: str, store: Path,
    no_prune: bool, as_json: bool, open_viewer: bool, **settings: Any,
) -> None:  # fmt: skip
    """Trace PROMPT, print the circuit behind the answer, and save the graph.

    \b
    Examples:
      trace "the capital of the state containing Dallas is"
      trace "the capital of Texas is" --target Austin --target-minus Boston
      trace "the capital of the state containing Dallas is" --position Dallas
      trace "the capital of the state containing Dallas is" --target-feature 2/961@Dallas
      trace "calc: 36+59=" --json
    """
    from tracer.loading import Source

    source = Source(model, transcoder, device, dtype, tokenizer)

    folder = writable_store(store)

    from tracer import commands
    from tracer.config import TraceConfig

    config = TraceConfig(prune=not no_prune, **settings)
    printed = commands.trace_and_save(text, folder, config, source, as_json=as_json)
    click.echo(printed.text)
    if printed.doubt:
        click.echo(f"trace: {printed.doubt}", err=True)
    if open_viewer:
        _serve(folder, port=0, graph_id=printed.graph_id, open_browser=True)


@cli.command("view")
@store_argument
@click.option("--port", default=8030, show_default=True, help="Port on 127.0.0.1; 0 takes any free one.")
@click.option("--open", "open_browser", is_flag=True, help="Open the page in a browser.")
def view(folder: Path, port: int, open_browser: bool) -> None:
    """Explore saved graphs in a browser, served on 127.0.0.1 only.

    \b
    Examples:
      trace view
      trace view my-graphs --port 8031 --open
    """
    _serve(existing_store(folder), port, None, open_browser)


cli.add_command(sql)


@cli.command("list")
@store_argument
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list instead of a table.")
def list_graphs(folder: Path, as_json: bool) -> None:
    """List the saved graphs, newest first.

    \b
    Example:
      trace list
    """
    from tracer.listing import graph_list

    store = existing_store(folder)
    warn_of_damage(store)
    click.echo(graph_list(store, as_json=as_json))


@cli.command("show")
@click.argument("graph_id")
@store_option()
@click.option("--json", "as_json", is_flag=True, help="Print the same as one JSON object, its paths node by node.")
def show(graph_id: str, store: Path, as_json: bool) -> None:
    """Print the circuit of a saved graph; GRAPH_ID may be shortened.

    \b
    Example:
      trace show calc-36
    """
    from tracer import commands

    folder = existing_store(store)
    click.echo(commands.show_graph(folder, folder.resolve(graph_id), as_json=as_json))


@cli.command("rm")
@click.argument("graph_ids", nargs=-1)
@click.option("--comparison", "comparisons", multiple=True, metavar="NAME", help="Delete this comparison. Repeatable.")
@click.option("--query", "queries", multiple=True, metavar="NAME", help="Delete this saved query. Repeatable.")
@store_option("Folder of saved graphs.", read_only=False)
def remove(graph_ids: tuple[str, ...], comparisons: tuple[str, ...], queries: tuple[str, ...], store: Path) -> None:
    """Delete saved graphs, damaged ones too, or what `trace diff`, `merge`, `stability` and `sql --save` saved.

    GRAPH_IDS may be shortened as long as each is that of one graph.

    \b
    Examples:
      trace rm calc-36
      trace rm --comparison cities --query question
    """
    if not (graph_ids or comparisons or queries):
        raise click.UsageError("nothing was named; give the id of a graph, --comparison NAME or --query NAME.")
    folder = existing_store(store)
    damaged = {graph.graph_id for graph in folder.damaged()}
    chosen = [text if text in damaged else folder.resolve(text) for text in graph_ids]
    # now all graphs are known to exist, and the rest is checked first, or else nothing is deleted
    folder.delete_saved(comparisons, queries)
    for graph_id in dict.fromkeys(chosen):
        folder.delete(graph_id)
    for name in (*comparisons, *queries, *dict.fromkeys(chosen)):
        click.echo(f"deleted {name}", err=True)


@cli.command("compact")
@click.argument("folder", default=DEFAULT_STORE, type=StoreFolder(read_only=False))
def compact(folder: Path) -> None:
    """Move all saved graphs into few files: smaller, and quick to query when there are thousands.

    Nothing changes otherwise. Others may save, delete and read at the same time; it may be interrupted at any moment.

    \b
    Example:
      trace compact my-graphs
    """
    from tracer import commands

    click.echo(commands.compact_store(existing_store(folder)))


@cli.command("push")
@click.argument("arguments", nargs=-1, required=True, metavar="[FOLDER] ADDRESS")
@click.option("--replace", is_flag=True, help="Put this store in the place of what somebody else pushed there.")
def push(arguments: tuple[str, ...], replace: bool) -> None:
    """Copy saved graphs to a remote folder, where others can read them: ADDRESS is anything that fsspec knows.

    Only files that changed are sent. Compact first: few large files travel better than many. By their address,
    trace sql, list, show, view and export read them, also from a web server. s3:// needs the package s3fs, http://
    aiohttp, gs:// gcsfs, az:// adlfs.

    \b
    Examples:
      trace push s3://bucket/graphs
      trace push my-graphs s3://bucket/graphs
      trace sql s3://bucket/graphs "SELECT count(*) FROM edges"
    """
    from tracer.remote import push_store

    if len(arguments) > 2:
        raise CommandError(f"{len(arguments)} arguments were given; expected an optional folder and an address.")
    *given, address = list(arguments)
    folder = Path(*given or (DEFAULT_STORE,))
    existing_store(folder)
    click.echo(push_store(folder, address, replace=replace))


@cli.command("convert")
@click.argument("source")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of the matrices.  [default: as in SOURCE]"
)
@click.option("--reads", metavar="HOOK", help="What it reads, where SOURCE does not say or is wrong.")
@click.option("--writes", metavar="HOOK", help="What it writes, where SOURCE does not say or is wrong.")
@click.option("--model-name", metavar="NAME", help="The model it belongs to, where SOURCE does not say.")
def convert(source: str, folder: Path, dtype: str | None, **overrides: str | None) -> None:
    """Write the transcoder SOURCE, in any known layout, into FOLDER in circuit-tracer's.

    SOURCE is a folder, a pattern that matches one folder per layer, or hf://ORG/REPO[/PATH][@REVISION]. Layouts:
    circuit-tracer, Gemma Scope, CLT-Forge, Language-Model-SAEs, crosslayer-transcoder, sparsify; see docs/formats.md.

    \b
    Examples:
      trace convert my-clt-forge-run my-transcoder
      trace convert "hf://google/gemma-scope-2-1b-pt/transcoder_all/layer_*_width_16k_l0_small" gemma-3-1b
    """
    from tracer import commands

    given = {name: value for name, value in overrides.items() if value is not None}
    click.echo(commands.convert_transcoder(source, folder, dtype, given))


for command in (batch, train, evaluate, export, import_, diff, merge, stability):
    cli.add_command(command)


def main() -> None:
    """Run the command line; every expected error is one line and exit status 2."""
    gc.set_threshold(100_000)  # importing makes many objects and no garbage: looking for it takes a tenth of the start
    try:
        cli(standalone_mode=False)
        sys.stdout.flush()
    except click.UsageError as error:
        hint = f" Try: {error.ctx.command_path} --help" if error.ctx else ""
        CommandError(f"{error.format_message()}{hint}").show()
        sys.exit(2)
    except click.ClickException as error:
        CommandError(error.format_message()).show()
        sys.exit(2)
    except click.Abort:
        CommandError(INTERRUPTED).show()
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has left, as in `trace sql … | head`
        sys.exit(0)
    except OSError as error:
        if error.errno not in CANNOT_BE_WRITTEN or error.filename is not None:
            raise
        CommandError(f"the output cannot be written: {error.strerror}; send it elsewhere.").show()
        os._exit(2)  # or else Python would try to write the rest of it once more
    except ValueError as error:
        if not isinstance(error, _expected_errors()):
            raise
        CommandError(str(error)).show()
        sys.exit(2)


def _expected_errors() -> tuple[type[ValueError], ...]:
    """Error classes of those packages that were loaded; the others cannot have raised any."""
    loaded = ((sys.modules.get(module), name) for module, name in EXPECTED_ERRORS)
    return tuple(getattr(module, name) for module, name in loaded if module is not None)


def _check_is_prompt(text: str) -> None:
    """Refuse a single word that looks like a mistyped command."""
    names = [name for name in cli.commands if name != "prompt"]
    close = difflib.get_close_matches(text.lower(), names, n=1, cutoff=0.6)
    if close and " " not in text.strip():
        raise CommandError(
            f"{text!r} is no command; did you mean 'trace {close[0]}'? If it is a prompt, write trace prompt {text!r}."
        )


def _serve(store: "GraphStore", port: int, graph_id: str | None, open_browser: bool) -> None:
    from viewer.serve import serve

    def ready(url: str) -> None:
        page = f"{url.rstrip('/')}/g/{graph_id}" if graph_id else url
        click.echo(f"Serving {store.folder} at {page} (Ctrl-C stops)", err=True)
        if open_browser:
            click.launch(page)

    serve(store, port=port, on_ready=ready)
