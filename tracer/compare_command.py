"""Options of `trace diff`, `trace merge` and `trace stability`."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from tracer.options import existing_store, store_option

if TYPE_CHECKING:
    from graphs import GraphStore


def _shared(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that all of them have."""
    for option in (
        store_option("Folder of saved graphs.", read_only=False),
        click.option("--name", help="Name of the comparison in the store.  [default: made from what is compared]"),
        click.option("--align", "alignment", type=click.Choice(["diff", "end", "start", "anywhere"]), default="diff",
                     show_default=True, help="Which places are the same: by the tokens, counted from the end or start, "
                     "or all."),
    ):  # fmt: skip
        command = option(command)
    return command


def _store(options: dict[str, Any]) -> "GraphStore":
    """The store that is asked for; a comparison is saved there, too."""
    store = existing_store(options.pop("store"))
    store.check_writable()
    return store


def _least(of: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    text = f"Print what at least this share of the {of} have."
    return click.option("--least", type=click.FloatRange(0, 1), default=0.9, show_default=True, help=text)


@click.command("diff")
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@_shared
def diff(first: str, second: str, **options: Any) -> None:
    """Compare two saved graphs: what only one has, and what both have with other influence.

    A and B may be shortened. The result is in tables comparisons, comparison_nodes and comparison_edges.

    \b
    Examples:
      trace diff dallas-1a2b oakland-3c4d
      trace diff dallas-1a2b oakland-3c4d --align end --name cities
    """
    from tracer import compare

    click.echo(compare.diff(_store(options), first, second, **options))


@click.command("merge")
@click.argument("graphs", nargs=-1, metavar="[GRAPH]…")
@click.option("--query", help="Merge the graphs whose graph_id this SELECT finds.")
@_least("graphs")
@_shared
def merge(graphs: tuple[str, ...], query: str | None, **options: Any) -> None:
    """Merge saved graphs: how many have each node and edge, and how much weights vary.

    The union is in tables comparisons, comparison_nodes and comparison_edges; the consensus is WHERE share = 1.

    \b
    Examples:
      trace merge dallas-1a2b dallas-3c4d dallas-5e6f --align anywhere
      trace merge --query "SELECT graph_id FROM graphs WHERE prompt LIKE '%Dallas%'" --name dallas
    """
    from tracer import compare

    store = _store(options)
    click.echo(compare.merge(store, compare.chosen_graphs(store, graphs, query), **options))


@click.command("stability")
@click.argument("graphs", nargs=-1, metavar="[GRAPH]…")
@click.option("--query", help="Use the graphs whose graph_id this SELECT finds.")
@click.option("--node-thresholds", "nodes", default="0.5,0.6,0.7,0.8,0.9", show_default=True, metavar="SHARE,…")
@click.option("--edge-thresholds", "edges", default="0.9,0.95,0.98,0.99", show_default=True, metavar="SHARE,…")
@_least("results")
@_shared
def stability(graphs: tuple[str, ...], query: str | None, nodes: str, edges: str, **options: Any) -> None:
    """Prune graphs at many thresholds: which nodes and edges do not depend on the choice.

    Give graphs traced with --no-prune; of one that was pruned, only what is left can be seen. Several graphs, as of
    paraphrases, are taken together.

    \b
    Examples:
      trace stability dallas-1a2b
      trace stability dallas-1a2b dallas-3c4d --align anywhere --node-thresholds 0.6,0.8
    """
    from tracer import compare

    store = _store(options)
    chosen = compare.chosen_graphs(store, graphs, query)
    if not chosen:
        raise click.UsageError("no graph was named; give a GRAPH, or --query.")
    grid = (_shares("--node-thresholds", nodes), _shares("--edge-thresholds", edges))
    click.echo(compare.stability(store, chosen, *grid, **options))


def _shares(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise click.UsageError(f"{option} is {text!r}; expected numbers with commas between, as 0.6,0.8.") from None
