"""Options of `trace export` and `trace import`."""

from pathlib import Path
from typing import Any

import click

from tracer.options import existing_store, store_option, writable_store


@click.command("export")
@click.argument("graph_id")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--format", "form", type=click.Choice(["json", "graphml"]), help="[default: as FILE ends]")
@click.option("--scan", help="Name of the transcoders, or on Neuronpedia of the model, to write into JSON.")
@store_option()
def export(graph_id: str, file: Path, form: str | None, scan: str | None, store: Path) -> None:
    """Write a saved graph into FILE: circuit-tracer's and Neuronpedia's JSON, or GraphML.

    GRAPH_ID may be shortened. Supernodes, pins and labels go along.

    \b
    Examples:
      trace export the-capital-of dallas.json
      trace export the-capital-of dallas.json --scan gemma-2-2b
      trace export calc dallas.graphml
    """
    from tracer import exchange

    folder = existing_store(store)
    click.echo(exchange.export_graph(folder, folder.resolve(graph_id), file, form, scan))


@click.command("import")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path, dir_okay=False, exists=True), metavar="FILE…")
@click.option("--check", is_flag=True, help="Only say whether the files are right and Neuronpedia would take them.")
@click.option(
    "--features", type=click.Path(path_type=Path, file_okay=False, exists=True), metavar="DIR",
    help="Import feature dashboards from a folder with index.json.gz.",
)  # fmt: skip
@click.option("--transcoder", metavar="NAME", help="Whose features those are, as table graphs names it.")
@click.option("--tokenizer", metavar="DIR", help="Tokenizer that gives tokens of .pt graphs their texts.")
@click.option("--node-threshold", type=float, help="Keep nodes that hold this share of the influence.  [default: all]")
@click.option("--edge-threshold", type=float, help="Keep edges that hold this share.  [default: all]")
@store_option("Folder to save in.", read_only=False)
def import_(files: tuple[Path, ...], check: bool, features: Path | None, transcoder: str | None, store: Path,
            **wanted: Any) -> None:  # fmt: skip
    """Save graphs of other programs: circuit-tracer's and Neuronpedia's JSON of any size, circuit-tracer's .pt.

    Nothing in a file is run. A file is saved whole or not at all.

    \b
    Examples:
      trace import dallas.json austin.json
      trace import dallas.json --check
      trace import graph.pt --tokenizer gemma-2-2b --node-threshold 0.8 --edge-threshold 0.98
      trace import --features my-transcoder/features --transcoder mntss/clt-gemma-2-2b-426k
    """
    from tracer import exchange

    if (features is None) != (transcoder is None):
        raise click.UsageError("--features and --transcoder belong together; give both or neither.")
    if not files and features is None:
        raise click.UsageError("nothing to import was named; give a FILE, or --features DIR.")
    for file in files:
        if file.suffix.lower() not in (".json", ".pt"):
            raise click.UsageError(f"{file} is no .json or .pt file; export the graph as one of these.")
    if check:
        for file in files:
            click.echo(exchange.check_file(file))
        return
    folder = writable_store(store)
    for file in files:
        click.echo(exchange.import_file(folder, file, exchange.Wanted(**wanted)))
    if features is not None and transcoder is not None:
        click.echo(exchange.import_features(folder, features, transcoder))
