"""Attribution graphs: the graph itself, its files, and SQL over them. Never imports torch."""

from graphs.errors import GraphError
from graphs.graph import AttributionGraph, GraphInfo, NodeKind, logit_weights, subgraph
from graphs.influence import (
    Scores,
    cumulative_share,
    edge_influence,
    node_influence,
    score,
    score_from,
)
from graphs.paths import Path, path_length_distribution, strongest_paths
from graphs.peer import completeness_counting_leaves, with_unscaled_tokens
from graphs.pruning import keep_largest, prune
from graphs.store import DamagedGraph, GraphStore, StoredGraph, graph_id_of

__all__ = [
    "AttributionGraph",
    "DamagedGraph",
    "GraphError",
    "GraphInfo",
    "GraphStore",
    "NodeKind",
    "Path",
    "Scores",
    "StoredGraph",
    "completeness_counting_leaves",
    "cumulative_share",
    "edge_influence",
    "graph_id_of",
    "keep_largest",
    "logit_weights",
    "node_influence",
    "path_length_distribution",
    "prune",
    "score",
    "score_from",
    "strongest_paths",
    "subgraph",
    "with_unscaled_tokens",
]
