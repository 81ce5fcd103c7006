"""What tells an imported graph from others: its content. An id made of the question alone would be the same for all."""

import hashlib
import json
from dataclasses import replace
from typing import Any

import numpy as np
from numpy import ndarray

from graphs.graph import EDGE_COLUMNS, NODE_COLUMNS, AttributionGraph, GraphInfo
from graphs.interchange_metadata import imported_record, settings_of

_AT_ONCE = 1 << 18
"""Values made bytes at once: those of millions of edges would take as much memory as the graph."""


def content_digest(graph: AttributionGraph) -> str:
    """Sixteen characters that differ where the nodes or edges of two graphs do.

    JSON keeps every digit of a double, so nothing is rounded; weights that came back in single precision are equal.
    """
    found = hashlib.sha256(json.dumps([graph.n_nodes, graph.n_edges]).encode())
    for name in NODE_COLUMNS + EDGE_COLUMNS:
        column = getattr(graph, name)
        for first in range(0, len(column), _AT_ONCE):
            found.update(_as_bytes(column[first : first + _AT_ONCE]))
    return found.hexdigest()[:16]


def info_with_content(graph: AttributionGraph, **said: Any) -> GraphInfo:
    """What is known of the graph, with a digest of its content among its settings and so in its id.

    `said` is kept beside it: what is known of how the graph came about.
    """
    settings = settings_of(graph.info)
    imported = imported_record(settings) | said | {"content": content_digest(graph)}
    return replace(graph.info, config=json.dumps(settings | {"imported": imported}, sort_keys=True))


def _as_bytes(values: ndarray) -> bytes:
    match values.dtype.kind:
        case "O":
            return json.dumps(values.tolist()).encode()
        case "f":
            # NaN has many bit patterns, and zero two
            return (np.where(np.isnan(values), np.nan, values) + 0.0).astype("<f8").tobytes()
        case _:
            return values.astype("<i8").tobytes()
