"""The tables of a store: every column with its type, meaning and unit.

The same description is in the Parquet files, in SQL (`COMMENT`) and in the documentation.
"""

import pyarrow as pa

SCHEMA_VERSION = 3
"""1: every graph in a folder of its own. 2: also many in one file, as `trace compact` makes them. 3: `input_size`."""
LATER_COLUMNS: dict[str, dict[str, float | tuple | None]] = {
    "graphs": {"row_share": 1.0, "tags": ()},
    "nodes": {"remainder": None, "input_size": None, "reached_from": None, "reaches_answer": None},
}
"""Per table the columns that graphs saved before there were any lack, and what is read in their place."""

_TOKEN_VALUES = pa.list_(pa.struct([("token", pa.string()), ("value", pa.float32())]))
_EXAMPLES = pa.list_(
    pa.struct([("tokens", pa.list_(pa.string())), ("activations", pa.list_(pa.float32())), ("position", pa.int32())])
)
_TIME = pa.timestamp("us", tz="UTC")


def _column(name: str, kind: pa.DataType, description: str, unit: str = "") -> pa.Field:
    return pa.field(name, kind, metadata={"description": description, "unit": unit})


def _table(description: str, *columns: pa.Field) -> pa.Schema:
    return pa.schema(columns, metadata={"description": description})


_GRAPH_ID = _column("graph_id", pa.string(), "Name of the graph in the store.")

_GRAPHS = _table(
    "One row per attribution graph: what was traced, with what, and how good the explanation is.",
    _GRAPH_ID,
    _column("prompt", pa.string(), "The text that was traced."),
    _column("tokens", pa.list_(pa.string()), "Text of each token of the prompt."),
    _column("token_ids", pa.list_(pa.int32()), "Number of each token in the vocabulary."),
    _column("words", pa.list_(pa.string()), "Per token the word of the prompt that holds it; '' for special tokens."),
    _column("model", pa.string(), "Name or path of the language model."),
    _column("model_revision", pa.string(), "Which version of the model."),
    _column("transcoder", pa.string(), "Name or path of the transcoder whose features the nodes are."),
    _column("transcoder_revision", pa.string(), "Which version of the transcoder."),
    _column("created_at", _TIME, "When the prompt was traced.", "UTC"),
    _column("schema_version", pa.int32(), "Version of these tables that the graph was written with."),
    _column("tool_version", pa.string(), "Version of the program that traced the prompt."),
    _column("n_layers", pa.int32(), "Layers of the model; what is explained of its output has this layer.", "layers"),
    _column("n_active_features", pa.int32(), "Features active on the prompt, in the graph or not.", "features"),
    _column("n_nodes", pa.int32(), "Nodes of the stored graph.", "nodes"),
    _column("n_edges", pa.int64(), "Edges of the stored graph.", "edges"),
    _column(
        "replacement_score",
        pa.float64(),
        "Influence of tokens over that of tokens and errors, before pruning; 1 means that no path starts at an error.",
        "share",
    ),
    _column(
        "completeness_score",
        pa.float64(),
        "Mean share of a node's inputs that are no errors, weighted by influence, before pruning.",
        "share",
    ),
    _column("pruned_replacement_score", pa.float64(), "The same with removed features counted as errors.", "share"),
    _column("pruned_completeness_score", pa.float64(), "The same with removed features counted as errors.", "share"),
    _column("row_share", pa.float64(), "Share of each target's inputs that its edges hold at least.", "share"),
    _column(
        "coverage", pa.float64(), "1 less the largest share of a layer's influence that attribution left out.", "share"
    ),
    _column(
        "skipped_influence", pa.float64(), "Influence that ends at features without a row of edges.", "probability"
    ),
    _column(
        "logits_error",
        pa.float64(),
        "Largest difference of the linear model's logits from the model's.",
        "largest logit",
    ),
    _column(
        "conservation_error",
        pa.float64(),
        "Largest difference between a pre-activation and the edges and bias that make it up.",
        "share of Σ|edge| + |bias|",
    ),
    _column("seconds", pa.float64(), "Time the trace took.", "seconds"),
    _column("peak_memory_mb", pa.float64(), "Most memory the trace used.", "MB"),
    _column("config", pa.string(), "The settings of the trace.", "JSON"),
    # a map, not JSON text: tags['group'] is then text that groups and compares, without functions to take it apart
    _column("tags", pa.map_(pa.string(), pa.string()), "What else a file of prompts said about this one, by column."),
)

_NODES = _table(
    "One row per node: a token of the prompt, an active feature, what the features miss at a place, or a target.",
    _GRAPH_ID,
    _column("node", pa.int32(), "Number within the graph; edges run from lower to higher numbers."),
    _column("kind", pa.string(), "'token', 'feature', 'error' or 'logit': any target, also a difference or a feature."),
    _column(
        "layer",
        pa.int32(),
        "Layer that a feature reads; -1 for tokens, n_layers of the graph for logits other than explained features.",
        "layer",
    ),
    _column("position", pa.int32(), "Place in the prompt, from 0.", "tokens"),
    _column("feature", pa.int32(), "Number within its layer of a feature, explained or not; NULL for other nodes."),
    _column("token_id", pa.int32(), "Number in the vocabulary of a token or logit; NULL for what is no token."),
    _column("token", pa.string(), "The prompt's token at the position; of a logit the token or target it stands for."),
    _column("word", pa.string(), "The prompt's word that holds the token; of a logit its token without spaces."),
    _column("activation", pa.float64(), "How strongly a feature fires.", "activation"),
    _column(
        "pre_activation",
        pa.float64(),
        "A feature's value before its nonlinearity; a token's logit less the mean logit; a target's value.",
        "pre-activation",
    ),
    _column("bias", pa.float64(), "The part of the pre-activation that no edge brings.", "pre-activation"),
    _column(
        "remainder",
        pa.float64(),
        "The part of the bias that is inputs pruned away or too small to be edges.",
        "pre-activation",
    ),
    _column(
        "input_size",
        pa.float64(),
        "Σ|input|, edges or not; NULL if unknown, or if nothing is input.",
        "pre-activation",
    ),
    _column("influence", pa.float64(), "Absolute influence on the targets; NULL for logits.", "probability"),
    _column(
        "cumulative_influence",
        pa.float64(),
        "Share of all influence held by nodes at least as influential: small means important.",
        "share",
    ),
    _column(
        "probability",
        pa.float64(),
        "Weight of a logit: the model's probability of its token, or 1 if it is no token; NULL for other kinds.",
        "probability",
    ),
    _column("label", pa.string(), "What the node is about, in words; NULL if nobody said."),
    _column(
        "reached_from",
        pa.list_(pa.int32()),
        "Positions of the tokens from which a path leads to the node, not through errors; NULL if saved by version 1.",
        "tokens",
    ),
    _column(
        "reaches_answer",
        pa.bool_(),
        "Whether a path leads to the logit of most weight, not through errors; NULL if saved by version 1.",
    ),
)

_EDGES = _table(
    "One row per direct effect of a node on a later one.",
    _GRAPH_ID,
    _column("source", pa.int32(), "Node that acts."),
    _column("target", pa.int32(), "Node that is acted on; its number is higher."),
    _column("weight", pa.float64(), "Direct effect on the target.", "the target's pre-activation, or logits"),
)

_FEATURES = _table(
    "One row per feature of a transcoder: what it fires on and what it promotes.",
    _column("transcoder", pa.string(), "The transcoder, as in table graphs."),
    _column("layer", pa.int32(), "Layer that the feature reads.", "layer"),
    _column("feature", pa.int32(), "Number within the layer."),
    _column("density", pa.float64(), "Share of tokens on which the feature fires.", "share"),
    _column("max_activation", pa.float64(), "Strongest activation seen.", "activation"),
    _column("top_logits", _TOKEN_VALUES, "Tokens that the feature promotes most, directly.", "logits per activation"),
    _column("bottom_logits", _TOKEN_VALUES, "Tokens that the feature suppresses most.", "logits per activation"),
    _column("examples", _EXAMPLES, "Texts on which the feature fires, and where it fires most.", "activation"),
    _column(
        "histogram",
        pa.list_(pa.int64()),
        "Activations in 20 equal bins of (0, max_activation], or as imported.",
        "tokens",
    ),
    _column("label", pa.string(), "What the feature is about, in words."),
    _column(
        "label_source",
        pa.string(),
        "Where the label comes from: what it 'fires on', 'fires strongly on' or 'promotes', a 'user', a 'dashboard', …",
    ),
    _column(
        "label_precision",
        pa.float64(),
        "Of its activation, the part on tokens that the label describes; in the lab question families weigh alike. "
        "Where it fires strongly on them, activations from half the strongest on count, here and in the recall.",
        "share",
    ),
    _column(
        "label_recall",
        pa.float64(),
        "Of the tokens that the label describes, those on which it fires; weighed in the same way.",
        "share",
    ),
)

_SUPERNODES = _table(
    "One row per node of a group that a person made or accepted.",
    _GRAPH_ID,
    _column("supernode", pa.string(), "Name of the group."),
    _column("node", pa.int32(), "A node of the group."),
)

_INTERVENTIONS = _table(
    "One row per feature that was changed in the running model.",
    _GRAPH_ID,
    _column("intervention", pa.int32(), "Number of the experiment; one may change several features."),
    _column("node", pa.int32(), "The node that was changed; NULL if the graph lacks it."),
    _column("layer", pa.int32(), "Layer of the feature.", "layer"),
    _column("position", pa.int32(), "Place in the prompt.", "tokens"),
    _column("feature", pa.int32(), "Number of the feature within its layer."),
    _column("operation", pa.string(), "'set', 'scale', 'ablate', 'add' or 'swap'."),
    _column("value", pa.float64(), "What it was set to, scaled by or added.", "activation, or a factor"),
    _column("created_at", _TIME, "When it was done.", "UTC"),
)

_VALIDATIONS = _table(
    "One row per effect that the graph predicts and an intervention measured.",
    _GRAPH_ID,
    _column("validation", pa.string(), "Name of the check."),
    _column("source", pa.int32(), "Node that was changed."),
    _column("target", pa.int32(), "Node whose change was measured."),
    _column("predicted", pa.float64(), "Change that the graph predicts.", "the target's pre-activation, or logits"),
    _column("measured", pa.float64(), "Change in the running model.", "the target's pre-activation, or logits"),
    _column("is_control", pa.bool_(), "Whether the changed feature is a matched random one."),
)


_COMPARISON = _column("comparison", pa.string(), "Name of the comparison.")

_COMPARISONS = _table(
    "One row per comparison of graphs: trace diff, trace merge and trace stability.",
    _COMPARISON,
    _column("kind", pa.string(), "'diff' of two graphs, 'merge' of several, or 'stability' under pruning thresholds."),
    _column("graph_ids", pa.list_(pa.string()), "The graphs that were compared; each threshold counts as a graph."),
    _column("alignment", pa.string(), "How places were told to be the same: 'diff', 'end', 'start' or 'anywhere'."),
    _column("created_at", _TIME, "When they were compared.", "UTC"),
    _column("n_graphs", pa.int32(), "How many were compared.", "graphs"),
    _column("n_nodes", pa.int32(), "Nodes that any of them has.", "nodes"),
    _column("n_edges", pa.int64(), "Edges that any of them has.", "edges"),
    _column("node_overlap", pa.float64(), "Mean over pairs of graphs of nodes in both by nodes in either.", "share"),
    _column("edge_overlap", pa.float64(), "The same of edges.", "share"),
    _column("config", pa.string(), "The settings of the comparison.", "JSON"),
)

_COMPARISON_NODES = _table(
    "One row per node that any of the compared graphs has.",
    _COMPARISON,
    _column("node", pa.int32(), "Number within the comparison; edges run from lower to higher numbers."),
    _column("kind", pa.string(), "As in table nodes."),
    _column("layer", pa.int32(), "As in table nodes.", "layer"),
    _column("position", pa.int32(), "Place in the aligned prompts; NULL where places do not count.", "tokens"),
    _column("feature", pa.int32(), "As in table nodes."),
    _column("token_id", pa.int32(), "As in table nodes."),
    _column("token", pa.string(), "As in table nodes, of a graph that has the node."),
    _column("label", pa.string(), "As in table nodes."),
    _column("n_graphs", pa.int32(), "Graphs that have the node.", "graphs"),
    _column("share", pa.float64(), "The part of the graphs that have it: 1 in all of them.", "share"),
    _column("mean_activation", pa.float64(), "Mean over the graphs that have it.", "activation"),
    _column("sd_activation", pa.float64(), "Standard deviation over them.", "activation"),
    _column("activation_a", pa.float64(), "In the first graph of a diff.", "activation"),
    _column("activation_b", pa.float64(), "In the second graph of a diff.", "activation"),
    _column("mean_influence", pa.float64(), "Mean over the graphs that have it.", "probability"),
    _column("sd_influence", pa.float64(), "Standard deviation over them.", "probability"),
    _column("influence_a", pa.float64(), "In the first graph of a diff.", "probability"),
    _column("influence_b", pa.float64(), "In the second graph of a diff.", "probability"),
    _column("in_a", pa.bool_(), "Whether the first graph of a diff has it; NULL for other comparisons."),
    _column("in_b", pa.bool_(), "Whether the second graph of a diff has it."),
)

_COMPARISON_EDGES = _table(
    "One row per edge that any of the compared graphs has.",
    _COMPARISON,
    _column("source", pa.int32(), "Node of the comparison that acts."),
    _column("target", pa.int32(), "Node of the comparison that is acted on."),
    _column("n_graphs", pa.int32(), "Graphs that have the edge.", "graphs"),
    _column("share", pa.float64(), "The part of the graphs that have it: 1 in all of them.", "share"),
    _column(
        "mean_weight", pa.float64(), "Mean over the graphs that have it.", "the target's pre-activation, or logits"
    ),
    _column("sd_weight", pa.float64(), "Standard deviation over them.", "the target's pre-activation, or logits"),
    _column("weight_a", pa.float64(), "In the first graph of a diff; NULL if it lacks the edge."),
    _column("weight_b", pa.float64(), "In the second graph of a diff; NULL if it lacks the edge."),
)


def tables() -> dict[str, pa.Schema]:
    """Every public table by name; metadata holds the descriptions, and of columns the units."""
    return {
        "graphs": _GRAPHS,
        "nodes": _NODES,
        "edges": _EDGES,
        "features": _FEATURES,
        "supernodes": _SUPERNODES,
        "interventions": _INTERVENTIONS,
        "validations": _VALIDATIONS,
        "comparisons": _COMPARISONS,
        "comparison_nodes": _COMPARISON_NODES,
        "comparison_edges": _COMPARISON_EDGES,
    }


def table_examples() -> dict[str, str]:
    """For every table a query that shows what it is for."""
    return {
        "graphs": "SELECT prompt, n_edges, replacement_score FROM graphs ORDER BY replacement_score",
        "nodes": "SELECT kind, count(*) AS n, sum(influence) AS influence FROM nodes GROUP BY kind",
        "edges": "SELECT target, max(abs(weight)) AS strongest FROM edges WHERE graph_id = $graph GROUP BY target",
        "features": "SELECT layer, feature, label FROM features WHERE density > 0.1",
        "supernodes": "SELECT supernode, sum(n.influence) AS influence\n"
        "FROM supernodes AS s JOIN nodes AS n USING (graph_id, node) GROUP BY ALL",
        "interventions": "SELECT graph_id, count(*) AS n FROM interventions GROUP BY graph_id",
        "validations": "SELECT graph_id, count(*) AS n FROM validations GROUP BY graph_id",
        "comparisons": "SELECT comparison, kind, node_overlap FROM comparisons",
        "comparison_nodes": "SELECT layer, feature, label, share FROM comparison_nodes WHERE share = 1",
        "comparison_edges": "SELECT source, target, mean_weight, sd_weight FROM comparison_edges WHERE share >= 0.9",
    }


def description(described: pa.Schema | pa.Field) -> str:
    """One sentence on the table or column, with the unit if it has one."""
    metadata = described.metadata or {}
    text, unit = metadata.get(b"description", b"").decode(), metadata.get(b"unit", b"").decode()
    return f"{text} [{unit}]" if unit else text
