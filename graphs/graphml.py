"""Graphs for other programs: GraphML, and networkx graphs."""

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from graphs.errors import GraphError
from graphs.files import file_errors_as_graph_errors, write_atomically
from graphs.graph import NODE_COLUMNS, AttributionGraph, NodeKind

if TYPE_CHECKING:
    import networkx

_HEAD = (
    '<?xml version="1.0" encoding="UTF-8"?>\n<graphml xmlns="http://graphml.graphdrawing.org/xmlns" '
    'xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" xsi:schemaLocation="http://graphml.graphdrawing.org/xmlns '
    'http://graphml.graphdrawing.org/xmlns/1.0/graphml.xsd">\n'
)
_ABOUT = (
    "prompt",
    "model",
    "model_revision",
    "transcoder",
    "transcoder_revision",
    "n_layers",
    "tool_version",
    "config",
)
_UNWRITABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_TYPES = {bool: "boolean", int: "long", float: "double", str: "string"}


def write_graphml(graph: AttributionGraph, path: Path) -> None:
    """Write all columns of nodes and edges; the file is there whole or not at all.

    What XML cannot hold, such as NUL, is written as Python escapes it.
    """

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            _write(file, graph)

    with file_errors_as_graph_errors(f"write {path}"):
        write_atomically(path, write)


def to_networkx(graph: AttributionGraph) -> "networkx.DiGraph":
    """The graph with its columns as attributes; a column without meaning for a node is not there."""
    try:
        import networkx
    except ImportError as error:
        raise GraphError("networkx is not installed; pip install networkx, or export to GraphML.") from error
    made = networkx.DiGraph(**{name: getattr(graph.info, name) for name in _ABOUT})
    made.add_nodes_from(enumerate(_node_attributes(graph)))
    made.add_weighted_edges_from(zip(graph.source.tolist(), graph.target.tolist(), graph.weight.tolist(), strict=True))
    return made


def _node_attributes(graph: AttributionGraph) -> Iterator[dict[str, Any]]:
    columns = {name: getattr(graph, name).tolist() for name in NODE_COLUMNS}
    columns["kind"] = [NodeKind(kind).text for kind in columns["kind"]]
    # -1, NaN and "" stand for what has no meaning, but a token's layer is -1
    nothing = {"layer": None, **dict.fromkeys(("position", "feature", "token_id"), -1)}
    for node in range(graph.n_nodes):
        row = {name: column[node] for name, column in columns.items()}
        yield {
            name: value
            for name, value in row.items()
            if value != nothing.get(name, "") and not (isinstance(value, float) and np.isnan(value))
        }


def _write(file: TextIO, graph: AttributionGraph) -> None:
    about = {name: getattr(graph.info, name) for name in _ABOUT}
    rows = list(_node_attributes(graph))
    file.write(_HEAD)
    keys: dict[tuple[str, str], str] = {}
    for domain, attributes in (("graph", [about]), ("node", rows), ("edge", [{"weight": 0.0}])):
        for name, kind in {name: type(value) for row in attributes for name, value in row.items()}.items():
            keys[domain, name] = f"{domain[0]}_{name}"
            file.write(f'<key id="{domain[0]}_{name}" for="{domain}" attr.name="{name}" attr.type="{_TYPES[kind]}"/>\n')
    file.write('<graph edgedefault="directed">\n')
    file.write("".join(_data(keys["graph", name], value) + "\n" for name, value in about.items()))
    for node, row in enumerate(rows):
        file.write(
            f'<node id="{node}">{"".join(_data(keys["node", name], value) for name, value in row.items())}</node>\n'
        )
    for edge in range(graph.n_edges):
        file.write(
            f'<edge source="{graph.source[edge]}" target="{graph.target[edge]}">'
            f"{_data(keys['edge', 'weight'], float(graph.weight[edge]))}</edge>\n"
        )
    file.write("</graph>\n</graphml>\n")


def _data(key: str, value: Any) -> str:
    text = repr(value) if isinstance(value, float) else str(value)
    shown = _UNWRITABLE.sub(lambda found: found.group().encode("unicode_escape").decode(), text)
    # a bare carriage return would be read as a line feed
    return f'<data key="{key}">{html.escape(shown, quote=False).replace(chr(13), "&#13;")}</data>'
