"""What circuit-tracer 0.5.0 computes where it is known to be wrong: for comparison only."""

from dataclasses import replace

import numpy as np

from graphs.graph import AttributionGraph, NodeKind, logit_weights
from graphs.influence import cumulative_share, influence_over, input_share, node_influence, ratio


def completeness_counting_leaves(graph: AttributionGraph) -> float:
    """Completeness as circuit-tracer computes it, for comparison only.

    Its mean runs over tokens and errors too, which have no inputs and so count as perfectly explained; the value is
    never below `score(graph).completeness`.
    """
    weight = logit_weights(graph)
    reach = influence_over(graph.incoming, weight) + weight
    share = input_share(graph.target, graph.weight, graph.n_nodes)
    from_error = graph.kind[graph.source] == NodeKind.ERROR
    error_share = np.bincount(graph.target[from_error], share[from_error], minlength=graph.n_nodes)
    return ratio((reach * (1 - error_share)).sum(), reach.sum())


def with_unscaled_tokens(graph: AttributionGraph, d_model: int) -> AttributionGraph:
    """A Gemma-3 graph as its nnsight back end gives it: token vectors lack the √d_model that the model multiplies by.

    Edges from tokens are too small by that factor, so edges and bias no longer add up, and tokens lose influence.
    """
    from_token = graph.kind[graph.source] == NodeKind.TOKEN
    weight = np.where(from_token, graph.weight / d_model**0.5, graph.weight)
    influence = node_influence(graph.source, graph.target, weight, logit_weights(graph))
    influence = np.where(graph.kind == NodeKind.LOGIT, np.nan, influence)
    return replace(
        graph, weight=weight, influence=influence, cumulative_influence=cumulative_share(influence),
        input_size=np.full(graph.n_nodes, np.nan),
    )  # fmt: skip
