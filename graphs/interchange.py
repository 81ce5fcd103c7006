"""Graphs as circuit-tracer / Neuronpedia JSON (schema version 1) and back.

Files are read in pieces and written in pieces: one of 16 million links needs no more memory than its columns.
Reading accepts what circuit-tracer ever wrote; `validate_json` also asks for what Neuronpedia accepts.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy import ndarray

from graphs.annotations import NOTHING, Annotations, Supernode
from graphs.errors import GraphError
from graphs.files import file_errors_as_graph_errors, write_atomically
from graphs.graph import AttributionGraph, NodeKind, logit_weights
from graphs.influence import cumulative_share, influence_over, score
from graphs.interchange_content import info_with_content
from graphs.interchange_fields import is_whole, shown
from graphs.interchange_links import Links, read_links, told_apart
from graphs.interchange_metadata import (
    annotations_record,
    check_metadata,
    info_of,
    metadata_deviations,
    metadata_record,
    read_annotations,
)
from graphs.interchange_nodes import MOST_LAYERS, OURS, ROUNDING, Nodes, logit_text, node_ids, node_records
from graphs.interchange_text import ignore, members
from graphs.shapes import Bool, Float64, Int

MOST_NODES = 2_000_000
_BATCH = 100_000
_REQUIRED = ("metadata", "qParams", "nodes", "links")


@dataclass(frozen=True)
class Imported:
    """A graph from a file, and what people added to it."""

    graph: AttributionGraph
    annotations: Annotations
    deviations: tuple[str, ...]
    """What Neuronpedia would refuse or show wrongly, one line each."""


def to_json(
    graph: AttributionGraph, annotations: Annotations = NOTHING, *, slug: str = "graph", scan: str | None = None
) -> dict[str, Any]:
    """The graph as one JSON object; `scan` names the transcoders to who looks for their features."""
    ids = node_ids(graph)
    return {
        "metadata": metadata_record(graph.info, slug, scan),
        "qParams": annotations_record(annotations, ids),
        "nodes": node_records(graph, ids),
        "links": [link for batch in _link_batches(graph, ids) for link in batch],
    }


def write_json(
    graph: AttributionGraph, path: Path, annotations: Annotations = NOTHING, *, slug: str = "", scan: str | None = None
) -> None:
    """Write the same to a file, which is there whole or not at all."""
    ids = node_ids(graph)
    parts = (
        ("metadata", [metadata_record(graph.info, slug or path.stem, scan)]),
        ("qParams", [annotations_record(annotations, ids)]),
        ("nodes", [node_records(graph, ids)]),
        ("links", _link_batches(graph, ids)),
    )

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            _write_parts(file, parts)

    with file_errors_as_graph_errors(f"write {path}"):
        write_atomically(path, write)


def from_json(source: Path | Mapping[str, Any], *, on_progress: Callable[[int, int], None] = ignore) -> Imported:
    """The graph in a file or an object of this format. Raises `GraphError` that names the node and field.

    `on_progress` is told how much of a file was read, and its size.
    """
    name = source.name if isinstance(source, Path) else "the object"
    metadata, view, nodes, links, number = _read(source, on_progress)
    for part, found in zip(_REQUIRED, (metadata, view, nodes, links), strict=True):
        if found is None:
            raise GraphError(f"{name} has no {part}; it is no graph in circuit-tracer's format.")
    assert nodes is not None and links is not None, "just checked"
    record = check_metadata(metadata)
    annotations, labels, deviations = read_annotations(view, number)
    n_layers = _n_layers(record, nodes)
    graph, order = _graph(record, nodes, links, labels, n_layers)
    deviations += [*metadata_deviations(record), *_node_deviations(nodes)]
    return Imported(graph, _renumbered(annotations, order), tuple(deviations))


def validate_json(
    source: Path | Mapping[str, Any], *, on_progress: Callable[[int, int], None] = ignore
) -> AttributionGraph:
    """The graph, if Neuronpedia would take the file and show it. Raises `GraphError` that names node and field."""
    found = from_json(source, on_progress=on_progress)
    if found.deviations:
        first, *others = found.deviations
        raise GraphError(first + (f" ({len(others)} more)" if others else ""))
    return found.graph


def _link_batches(graph: AttributionGraph, ids: list[str]) -> Iterator[list[dict[str, Any]]]:
    for first in range(0, max(graph.n_edges, 1), _BATCH):
        part = slice(first, first + _BATCH)
        yield [
            {"source": ids[source], "target": ids[target], "weight": weight}
            for source, target, weight in zip(
                graph.source[part].tolist(), graph.target[part].tolist(), graph.weight[part].tolist(), strict=True
            )
        ]


def _write_parts(file: TextIO, parts: Iterable[tuple[str, Iterable[Any]]]) -> None:
    """The members of the object; of arrays every item on a line of its own."""
    dump = partial(json.dumps, ensure_ascii=False, allow_nan=False)
    begin = "{\n"
    for name, batches in parts:
        file.write(f"{begin}{dump(name)}: ")
        begin = ",\n"
        between = "[\n"
        for batch in batches:
            if not isinstance(batch, list):
                file.write(dump(batch))
                continue
            text = ",\n".join(map(dump, batch))
            file.write(between + text if text else between)
            between = ",\n"
        if between == ",\n":
            file.write("\n]")
    file.write("\n}\n")


def _read(
    source: Path | Mapping[str, Any], on_progress: Callable[[int, int], None]
) -> tuple[object, object, Nodes | None, Links | None, dict[str, int]]:
    """Metadata, viewer state, nodes, links, and the place of each id among the nodes."""
    found: dict[str, Any] = {}
    nodes, links, number = None, None, dict[str, int]()
    early = False
    for name, value in _members(source, on_progress):
        if name == "nodes":
            nodes = _nodes(value, number)
        elif name == "links" and nodes is None:
            early = True
            for _ in value:
                pass  # they can be checked when the nodes are known
        elif name == "links":
            links = read_links(value, number)
        else:
            found[name] = value
    if early and nodes is not None:
        links = next(read_links(value, number) for name, value in _members(source, on_progress) if name == "links")
    return found.get("metadata"), found.get("qParams"), nodes, links, number


def _members(source: Path | Mapping[str, Any], on_progress: Callable[[int, int], None]) -> Iterator[tuple[str, Any]]:
    if isinstance(source, Path):
        yield from members(source, ("nodes", "links"), on_progress)
        return
    for name, value in source.items():
        if name in ("nodes", "links") and not isinstance(value, list):
            raise GraphError(f"{name} is no list; expected a list of objects.")
        yield name, [value] if name in ("nodes", "links") else value


def _nodes(batches: Iterable[list[Any]], number: dict[str, int]) -> Nodes:
    nodes = Nodes()
    for batch in batches:
        # a loop, because the fields of every node are checked by name
        for node in batch:
            nodes.add(node, number)
        if len(nodes) > MOST_NODES:
            raise GraphError(f"the file has more than {MOST_NODES:,} nodes; prune the graph and export it again.")
    return nodes


def _n_layers(record: Mapping[str, Any], nodes: Nodes) -> int:
    """Layers of the model: circuit-tracer's logits are one above the last layer and one more."""
    kind, layer = np.array(nodes.kind, np.int64), np.array(nodes.layer, np.int64)
    logits = layer[kind == NodeKind.LOGIT]
    above = int(layer[kind != NodeKind.LOGIT].max(initial=-1)) + 1
    if len(logits) and logits.min() != logits.max():
        raise GraphError(f"the layers of logits are {logits.min()} and {logits.max()}; expected one for all.")
    if len(logits) and logits[0] < above:
        raise GraphError(f"the logits are in layer {logits[0]}, below the last layer {above - 1} of features.")
    ours = record[OURS].get("n_layers", -1) if OURS in record else -1
    if is_whole(ours) and 0 <= ours <= MOST_LAYERS:  # any other is refused with the rest of the metadata
        return int(ours)
    return max(above, int(logits[0]) - 1 if len(logits) else 0)


def _graph(
    record: Mapping[str, Any], nodes: Nodes, links: Links, labels: Mapping[int, str], n_layers: int
) -> tuple[AttributionGraph, Int[ndarray, "node"]]:
    """The graph, and the number of each node of the file in it."""
    columns = _columns(record, nodes, labels, n_layers)
    links = told_apart(links, nodes.colliding, columns["layer"], nodes.ids)
    order = _order(columns, nodes, links)
    kept = np.argsort(order)
    columns = {name: column[kept] for name, column in columns.items()}
    source, target, weight = order[links.source], order[links.target], links.weight
    with np.errstate(over="ignore"):  # such weights stay as they are
        single = weight.astype(np.float32)
    if np.array_equal(single, weight):
        weight = single
    if not np.array_equal(kept, np.arange(len(kept))):
        # millions of edges take least memory, later too, in the order of their targets
        by_target = np.lexsort((source, target))
        source, target, weight = source[by_target], target[by_target], weight[by_target]
    kind, position = columns["kind"], columns["position"]
    token_ids = np.full(len(record["prompt_tokens"]), -1)
    token_ids[position[kind == NodeKind.TOKEN]] = columns["token_id"][kind == NodeKind.TOKEN]
    info = info_of(record, token_ids.tolist(), n_layers, int((kind == NodeKind.FEATURE).sum()))
    graph = AttributionGraph(info=info, **_with_texts(columns, info), source=source, target=target, weight=weight)  # type: ignore[arg-type]
    return graph if OURS in record else with_influence(graph), order


def _columns(record: Mapping[str, Any], nodes: Nodes, labels: Mapping[int, str], n_layers: int) -> dict[str, ndarray]:
    """The columns of the nodes in the file's order; texts that the prompt gives are None."""
    n_tokens = len(record["prompt_tokens"])
    position = np.array(nodes.position, np.int64)
    if len(position) and position.max() >= n_tokens:
        where = nodes.ids[int(position.argmax())]
        raise GraphError(f"node '{where}': ctx_idx is {position.max()}; the prompt has positions 0 … {n_tokens - 1}.")
    columns: dict[str, ndarray] = {
        "kind": np.array(nodes.kind, np.uint8),
        "position": position,
        "activation": np.array(nodes.activation, np.float64),
        "cumulative_influence": np.array(nodes.cumulative, np.float64),
        "probability": np.array(nodes.probability, np.float64),
    }
    is_logit = columns["kind"] == NodeKind.LOGIT
    layer = np.where(is_logit, n_layers, np.array(nodes.layer, np.int64))
    for name, usual in (("layer", layer), ("feature", np.array(nodes.feature)), ("token_id", np.array(nodes.token_id))):
        columns[name] = np.array(
            [ours.get(name, own) for ours, own in zip(nodes.ours, usual.tolist(), strict=True)], int
        )
    for name in ("influence", "pre_activation", "bias", "remainder", "input_size"):
        columns[name] = np.array([_or_nan(ours.get(name)) for ours in nodes.ours], np.float64)
    said = [logit_text(text) if logit else None for text, logit in zip(nodes.clerp, is_logit.tolist(), strict=True)]
    own = ["" if logit else text for text, logit in zip(nodes.clerp, is_logit.tolist(), strict=True)]
    columns["token"] = _texts("token", nodes, said)
    columns["word"] = _texts("word", nodes, [None if text is None else text.strip() for text in said])
    columns["label"] = _texts("label", nodes, [labels.get(place, text) for place, text in enumerate(own)])
    return columns


def _texts(name: str, nodes: Nodes, usual: list[str | None]) -> ndarray:
    return np.array([ours.get(name, text) for ours, text in zip(nodes.ours, usual, strict=True)], object)


def _order(columns: Mapping[str, ndarray], nodes: Nodes, links: Links) -> Int[ndarray, "node"]:
    """The number of each node: its place in the file if all links run forward there, or else by layers."""
    place = np.arange(len(nodes))
    if (links.source < links.target).all():
        return place
    order = np.empty(len(nodes), np.int32)
    order[np.lexsort((place, columns["kind"], columns["layer"]))] = place
    level = columns["layer"]
    backward = np.flatnonzero(level[links.source] >= level[links.target])
    if len(backward):
        first = int(backward[0])
        source, target = nodes.ids[links.source[first]], nodes.ids[links.target[first]]
        raise GraphError(f"link {first} ({source} → {target}) does not lead to a later layer; expected no cycles.")
    return order


def _with_texts(columns: dict[str, ndarray], info: Any) -> dict[str, ndarray]:
    """The columns with the prompt's texts where the file had none of its own."""
    place = columns["position"]
    for name, texts in (("token", info.tokens), ("word", info.words)):
        own = columns[name]
        usual = np.array([*texts, ""], object)[place]
        columns[name] = np.where([text is None for text in own], usual, own)
    return columns


def with_influence(graph: AttributionGraph) -> AttributionGraph:
    """A graph of another program with what the format does not hold: influence and scores of the graph as it is.

    Its id is that of its content as it was given: nothing else in such files tells two graphs of one question apart.
    """
    influence = np.where(graph.kind == NodeKind.LOGIT, np.nan, influence_over(graph.incoming, logit_weights(graph)))
    given = graph.cumulative_influence
    known = _is_share(given[graph.kind != NodeKind.LOGIT]).all()
    cumulative = given if known else cumulative_share(influence)
    scores = score(graph)
    info = info_with_content(graph)
    info = replace(info, replacement_score=scores.replacement, completeness_score=scores.completeness)
    return replace(graph, info=info, influence=influence, cumulative_influence=cumulative)


def _node_deviations(nodes: Nodes) -> Iterator[str]:
    """What is read here, but not by the viewers this format is for."""
    for feature in nodes.colliding:
        yield f"node '{nodes.ids[feature]}': node_id is that of a feature and of an error; export the graph again."
    for node_id, kind, clerp in zip(nodes.ids, nodes.kind, nodes.clerp, strict=True):
        if kind == NodeKind.LOGIT and clerp and logit_text(clerp) == clerp:
            yield f"node '{node_id}': clerp has no 'Output \"token\" (p=0.5)', which viewers look for."
    shares = np.array(nodes.cumulative, np.float64)
    for node in np.flatnonzero(~np.isnan(shares) & ~_is_share(shares)).tolist():
        yield (
            f"node '{nodes.ids[node]}': influence is {shown(nodes.cumulative[node])}; expected the share of all "
            "influence held by nodes at least as influential, 0 to 1."
        )
    if not any(layer > 0 for layer, kind in zip(nodes.layer, nodes.kind, strict=True) if kind != NodeKind.LOGIT):
        yield "nodes: no node but logits has a layer above 0, and Neuronpedia's page needs one."


def _is_share(values: Float64[ndarray, "node"]) -> Bool[ndarray, "node"]:
    return (values >= 0) & (values <= 1 + ROUNDING)


def _renumbered(annotations: Annotations, order: Int[ndarray, "node"]) -> Annotations:
    groups = (
        Supernode(group.name, tuple(int(order[node]) for node in group.nodes)) for group in annotations.supernodes
    )
    return replace(annotations, supernodes=tuple(groups), pinned=tuple(int(order[node]) for node in annotations.pinned))


def _or_nan(value: int | float | None) -> float:
    return float("nan") if value is None else float(value)
