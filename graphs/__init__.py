"""Attribution graphs: the graph itself, its files, and SQL over them. Never imports torch."""

from graphs.annotations import Annotations, Supernode
from graphs.compact import Compacted
from graphs.comparisons import Comparison
from graphs.dashboards import read_dashboards
from graphs.errors import GraphError
from graphs.graph import AttributionGraph, GraphInfo, NodeKind, logit_weights, subgraph, without_edges
from graphs.graphml import to_networkx, write_graphml
from graphs.influence import (
    Scores,
    cumulative_share,
    edge_influence,
    node_influence,
    score,
    score_from,
)
from graphs.interchange import Imported, from_json, to_json, validate_json, write_json
from graphs.merge import Merged, merge_graphs, threshold_grid
from graphs.names import graph_id_of
from graphs.paths import Path, path_length_distribution, strongest_paths
from graphs.peer import completeness_counting_leaves, with_unscaled_tokens
from graphs.pruning import keep_largest, prune
from graphs.store import DamagedGraph, GraphStore, StoredGraph

__all__ = [
    "Annotations",
    "AttributionGraph",
    "Compacted",
    "Comparison",
    "DamagedGraph",
    "GraphError",
    "GraphInfo",
    "GraphStore",
    "Imported",
    "Merged",
    "NodeKind",
    "Path",
    "Scores",
    "StoredGraph",
    "Supernode",
    "completeness_counting_leaves",
    "cumulative_share",
    "edge_influence",
    "from_json",
    "graph_id_of",
    "keep_largest",
    "logit_weights",
    "merge_graphs",
    "node_influence",
    "path_length_distribution",
    "prune",
    "read_dashboards",
    "score",
    "score_from",
    "strongest_paths",
    "subgraph",
    "threshold_grid",
    "to_json",
    "to_networkx",
    "validate_json",
    "with_unscaled_tokens",
    "without_edges",
    "write_graphml",
    "write_json",
]
