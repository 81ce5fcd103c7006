"""Options that commands share, with the defaults of `TraceConfig`, and the store that they name."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from graphs import GraphStore

DEFAULT_STORE = "graphs-store"
DTYPES = ("float32", "bfloat16", "float16", "float64")

_Command = TypeVar("_Command", bound=Callable[..., Any])


def model_options(command: _Command) -> _Command:
    """What to load and where to save: model, transcoder, device, dtype, store."""
    return _with(command, _MODEL)


def trace_options(command: _Command) -> _Command:
    """What to explain and how much to keep: the fields of `TraceConfig`."""
    return _with(command, _TRACE)


class StoreFolder(click.Path):
    """A folder of saved graphs; where it is only read also the address of one, which is fetched first."""

    def __init__(self, *, read_only: bool) -> None:
        super().__init__(path_type=Path)
        self.read_only = read_only

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if "://" not in str(value):
            return super().convert(value, param, ctx)
        if not self.read_only:
            self.fail(f"{value} is no folder; trace into a folder, and then: trace push FOLDER {value}", param, ctx)
        from tracer.remote import fetched

        copy = fetched(value)
        if ctx is not None:
            ctx.meta[_address_key(copy)] = value
        return copy


def store_argument(command: _Command) -> _Command:
    """The argument FOLDER of commands that only read."""
    return click.argument("folder", default=DEFAULT_STORE, type=StoreFolder(read_only=True))(command)


def store_option(
    text: str = "Folder or address of saved graphs.", *, read_only: bool = True
) -> Callable[[_Command], _Command]:
    """The option --store."""
    folder = StoreFolder(read_only=read_only)
    return click.option("--store", default=DEFAULT_STORE, show_default=True, type=folder, help=text)


def existing_store(folder: Path) -> "GraphStore":
    """The store in the folder, which must be there."""
    from graphs import GraphStore

    store = GraphStore(folder)
    if not folder.exists():
        raise click.ClickException(f'{folder} does not exist; trace a prompt first, as in trace "calc: 36+59=".')
    return store


def writable_store(folder: Path) -> "GraphStore":
    """The store in the folder, or one that will be made there: refused now rather than after the work."""
    from graphs import GraphStore

    store = GraphStore(folder)
    store.check_writable()
    return store


def place(store: "GraphStore") -> str:
    """The store's folder, or the address from which this command fetched it: what another command would be given."""
    context = click.get_current_context(silent=True)
    folder = str(store.folder)
    return folder if context is None else context.meta.get(_address_key(store.folder), folder)


def warn_of_damage(store: "GraphStore") -> None:
    """Name on stderr what is left out: graphs, and files beside them."""
    for graph in store.damaged():
        click.echo(f"trace: left out {graph.graph_id}: {graph.reason}; delete it with trace rm.", err=True)
    for file in store.damaged_files():
        click.echo(
            f"trace: left out the rows of {file.path}: {file.reason}; restore it from a copy, or delete it.", err=True
        )


def _address_key(copy: Path) -> str:
    return f"{__name__}.address of {copy}"


def _with(command: _Command, options: tuple[Callable[[_Command], _Command], ...]) -> _Command:
    for option in reversed(options):  # the help shows the last one applied first
        command = option(command)
    return command


_MODEL = (
    click.option("--model", help="Hugging Face model directory or NAME[@REVISION].  [default: the bundled lab model]"),
    click.option("--transcoder", help="Transcoder for that model: a folder in any known layout, or a Hub id."),
    click.option("--tokenizer", help="Tokenizer directory or NAME[@REVISION].  [default: the model's]"),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or mps."),
    click.option(
        "--dtype",
        default="float32",
        show_default=True,
        type=click.Choice(DTYPES),
        help="Of the weights; sums are float32 or better.",
    ),
    store_option("Folder to save the graph in.", read_only=False),
)
_TRACE = (
    click.option(
        "--target",
        metavar="TOKEN",
        multiple=True,
        help="Explain this token instead of the most probable ones; repeatable.",
    ),
    click.option("--target-minus", metavar="TOKEN", help="Explain each --target less this token."),
    click.option(
        "--target-difference",
        nargs=2,
        metavar="TOKEN OTHER",
        multiple=True,
        help="Explain this token less the other, beside whatever else is named; repeatable.",
    ),
    click.option(
        "--target-feature",
        metavar="LAYER/FEATURE[@POSITION]",
        multiple=True,
        help="Explain this active feature; repeatable.",
    ),
    click.option(
        "--target-direction",
        metavar="FILE",
        multiple=True,
        help="Explain this direction at the final norm's output: a .npy or .safetensors file of one vector; "
        "repeatable.",
    ),
    click.option(
        "--position",
        default="-1",
        show_default=True,
        help="Explain what follows this token: a number, from the end if negative, or a word of the prompt.",
    ),
    click.option("--max-logits", default=10, show_default=True, help="Explain at most this many tokens."),
    click.option("--logit-mass", default=0.95, show_default=True, help="… until their probabilities sum to this."),
    click.option(
        "--coverage",
        default=0.99,
        show_default=True,
        help="Share of each layer's influence to follow; 1 attributes all features.",
    ),
    click.option("--max-features", type=int, help="Attribute at most this many features."),
    click.option(
        "--row-share",
        type=float,
        help="Keep of each target's inputs the largest that hold this share; by default all that fit into memory.",
    ),
    click.option(
        "--node-threshold", default=0.8, show_default=True, help="Keep nodes that hold this share of the influence."
    ),
    click.option(
        "--edge-threshold", default=0.98, show_default=True, help="Keep edges that hold this share between them."
    ),
    click.option("--no-prune", is_flag=True, help="Save every node and edge."),
)
