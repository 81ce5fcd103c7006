"""What `trace list` prints: apart from the other commands, for who lists graphs waits for nothing else."""

import pyarrow as pa
import pyarrow.compute as pc

from graphs import GraphStore
from graphs.answers import json_text
from tracer.tables import table_text

PROMPT_LENGTH = 60
"""Characters of a prompt that are shown to people."""
_LISTED = {
    "graph_id": "graph_id", "prompt": "prompt", "model": "model", "nodes": "n_nodes", "edges": "n_edges",
    "replacement": "replacement_score", "completeness": "completeness_score", "created_at": "created_at",
}  # fmt: skip
"""What is shown, and the columns of table `graphs` that hold it."""


def graph_list(store: GraphStore, *, as_json: bool) -> str:
    """All saved graphs, newest first."""
    # column by column: an object for each of ten thousand graphs takes longer than all else
    graphs = store.table()
    seconds = graphs["created_at"].cast(pa.timestamp("s"), safe=False)
    times = pc.call_function("strftime", [seconds], pc.StrftimeOptions("%Y-%m-%dT%H:%M:%S+00:00"))
    columns = {shown: graphs[name] for shown, name in _LISTED.items()} | {"created_at": times}
    if as_json:
        return json_text(pa.table(columns)).rstrip()
    columns["prompt"] = _shortened(graphs["prompt"])
    return table_text(pa.table(columns)) if len(graphs) else "no graphs yet"


def _shortened(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """The texts, the end of long ones left out: one of megabytes would make every row of the table as long."""
    options = pc.ReplaceSubstringOptions(rf"(?s)^(.{{{PROMPT_LENGTH - 1}}}).{{2,}}$", r"\1…")
    return pc.call_function("replace_substring_regex", [texts], options)
