"""What `trace export` and `trace import` do."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from graphs import AttributionGraph, GraphStore, prune
from graphs.annotations import NOTHING, Annotations
from graphs.dashboards import read_dashboards
from graphs.graphml import write_graphml
from graphs.interchange import from_json, validate_json, write_json
from graphs.interchange_content import content_digest, info_with_content
from graphs.names import graph_id_of
from tracer.commands import progress
from tracer.errors import TraceError

FORMATS = {".json": "json", ".graphml": "graphml"}


@dataclass(frozen=True)
class Wanted:
    """How files are imported."""

    tokenizer: str | None = None
    """Folder or name of the tokenizer that gives tokens of `.pt` graphs their texts."""
    node_threshold: float | None = None
    edge_threshold: float | None = None


def export_graph(store: GraphStore, graph_id: str, path: Path, form: str | None, scan: str | None) -> str:
    """Write a graph to a file, and say what was written."""
    form = form or FORMATS.get(path.suffix.lower())
    if form is None:
        raise TraceError(f"{path} does not say its format; end it in .json or .graphml, or give --format.")
    graph = store.load(graph_id)
    if form == "graphml":
        write_graphml(graph, path)
    else:
        write_json(graph, path, store.annotations(graph_id), slug=graph_id, scan=scan)
    return f"Wrote    {path}: {graph.n_nodes} nodes, {graph.n_edges} edges"


def check_file(path: Path) -> str:
    """Say that a file is right, or raise."""
    if _is_pt(path):
        graph = _read_pt(path, Wanted())
    else:
        with progress() as step:
            graph = validate_json(path, on_progress=_told(step, path))
    return f"Valid    {path}: {graph.n_nodes} nodes, {graph.n_edges} edges"


def import_file(store: GraphStore, path: Path, wanted: Wanted) -> str:
    """Save the graph in a file, and say what was found and where it was saved."""
    lines = []
    if _is_pt(path):
        graph, annotations = _read_pt(path, wanted), NOTHING
    else:
        with progress() as step:
            found = from_json(path, on_progress=_told(step, path))
        graph, annotations = found.graph, found.annotations
        lines = [f"Note     {text}" for text in found.deviations[:5]]
        if len(found.deviations) > 5:
            lines.append(f"Note     {len(found.deviations) - 5} more; trace import --check tells the first")
    graph = _pruned(graph, annotations, wanted)
    asked = graph_id_of(graph.info)
    if _is_another(store, asked, graph):
        graph = replace(graph, info=info_with_content(graph))
        lines.append(
            f"Note     {asked} in {store.folder} has other nodes or edges; it stays, and this is a graph beside it"
        )
    graph_id = store.save(graph, annotations)
    said = f"Saved    {graph_id} in {store.folder}: {graph.n_nodes} nodes, {graph.n_edges} edges"
    if annotations.supernodes or annotations.pinned:
        said += f", {len(annotations.supernodes)} supernodes, {len(annotations.pinned)} pins"
    return "\n".join([*lines, said])


def import_features(store: GraphStore, folder: Path, transcoder: str) -> str:
    """Save the feature dashboards in a folder as what the store knows of a transcoder."""
    with progress() as step:
        table = read_dashboards(folder, transcoder, on_progress=lambda done, n: step("reading features", done, n))
    store.save_features(table, transcoder)
    return f"Saved    {table.num_rows} features of {transcoder} in {store.folder}"


def _told(step: Callable[[str, int, int], None], path: Path) -> Callable[[int, int], None]:
    return lambda done, size: step(f"reading {path.name}", done, size)


def _read_pt(path: Path, wanted: Wanted) -> AttributionGraph:
    from tracer.circuit_tracer import read_circuit_tracer_graph

    if wanted.tokenizer is None:
        return read_circuit_tracer_graph(path)
    from tracer.replacement import load_tokenizer

    tokenizer = load_tokenizer(wanted.tokenizer)
    return read_circuit_tracer_graph(path, lambda number: str(tokenizer.decode([number])))


def _pruned(graph: AttributionGraph, annotations: Annotations, wanted: Wanted) -> AttributionGraph:
    given = {name: value for name, value in vars(wanted).items() if name.endswith("threshold") and value is not None}
    if not given:
        return graph
    if annotations.supernodes or annotations.pinned:
        raise TraceError("a graph with supernodes or pins cannot be pruned on the way in; leave the thresholds out.")
    settings = {"node_threshold": 1.0, "edge_threshold": 1.0} | given
    left = prune(graph, **settings)
    info = info_with_content(left, node_threshold=settings["node_threshold"], pruning_settings=settings)
    return replace(left, info=info)


def _is_another(store: GraphStore, graph_id: str, graph: AttributionGraph) -> bool:
    """Whether the store has a graph of other content under this id: the same question traced, or its export changed."""
    return store.find(graph_id) is not None and content_digest(store.load(graph_id)) != content_digest(graph)


def _is_pt(path: Path) -> bool:
    return path.suffix.lower() == ".pt"
