"""Many graphs as one object, on the bundled lab model: writes docs/many-graphs.md.

    python -m examples.many_graphs            # trace, compare and write the page
    python -m examples.many_graphs --store S  # and keep the graphs

Run it again whenever the lab model changes: every number and table on the page is what the queries answered.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from graphs import GraphStore
from graphs.comparisons import Comparison
from graphs.merge import merge_graphs
from tracer import lab
from tracer.pipeline import trace
from tracer.replacement import ReplacementModel

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "many-graphs.md"
STATES = ("Texas", "California", "Illinois", "Ohio", "Florida", "Alabama", "Alaska", "Arizona", "Colorado", "Georgia")
PHRASINGS = ("the capital of the state containing {city} is", "the state containing {city} has the capital")

SHARED_STATE = """
SELECT layer, feature, label, n_graphs AS phrasings, round(mean_influence, 3) AS influence
FROM comparison_nodes
WHERE comparison = $comparison AND kind = 'feature' AND label LIKE '%' || $state || '%' AND n_graphs = 2
ORDER BY mean_influence DESC LIMIT 6
"""
EVERY_STATE = """
WITH about AS (
    SELECT comparison[11:] AS state, n_graphs, mean_influence * share AS influence
    FROM comparison_nodes
    WHERE comparison LIKE 'phrasings-%' AND kind = 'feature' AND label ILIKE '%' || comparison[11:] || '%'
)
SELECT state, count(*) AS features, count(*) FILTER (n_graphs = 2) AS in_both_phrasings,
    round(sum(influence) FILTER (n_graphs = 2) / sum(influence), 2) AS of_their_influence
FROM about GROUP BY state ORDER BY state
"""
CAPITAL = """
SELECT layer, feature, label, token, n_graphs AS states, round(mean_influence, 3) AS influence,
    round(sd_influence, 3) AS deviation
FROM comparison_nodes
WHERE comparison = 'capitals' AND kind = 'feature' AND share >= 0.9 AND token = $token
ORDER BY mean_influence DESC LIMIT 8
"""
CONSENSUS = """
SELECT n_graphs AS in_states, count(*) AS edges, round(avg(abs(mean_weight)), 3) AS mean_weight
FROM comparison_edges WHERE comparison = 'capitals'
GROUP BY n_graphs ORDER BY n_graphs DESC
"""
OVERLAP = """
SELECT comparison, n_graphs, alignment, round(node_overlap, 2) AS nodes, round(edge_overlap, 2) AS edges
FROM comparisons ORDER BY comparison
"""
ANSWERS = """
SELECT DISTINCT ON (graph_id) graph_id, trim(word) AS answer
FROM nodes WHERE kind = 'logit' ORDER BY graph_id, probability DESC
"""
TEXT = """# Many graphs as one object

Written by `python -m examples.many_graphs` on {date} from the lab model in the package; every table is what the store
answered. Write it again when the model changes.

The same from the command line: trace the prompts, then

```sh
trace merge FIRST SECOND --align anywhere --name phrasings-texas
trace merge --query "SELECT graph_id FROM graphs WHERE prompt LIKE 'the capital of%'" --name capitals
trace diff DALLAS OAKLAND
trace stability DALLAS
```

`--align` says which places of two prompts are the same: by the tokens they have in common (`diff`), counted from the
`end` or the `start`, or all (`anywhere`: a feature is the same wherever it fires). A comparison is rows of three
tables, `comparisons`, `comparison_nodes` and `comparison_edges`; `share` is the part of the graphs
that have a node or edge, so `share = 1` is the consensus, and no condition the union.

## What was asked

Of {n} states, by one city each: “{one}” and “{other}”.

| state | city | answer to the first | answer to the second |
|---|---|---|---|
{prompts}

## The state feature is shared by the phrasings of one question

Features about {state} that both phrasings about {city} use (`$comparison` is `{comparison}`, `$state` is `{state}`):

{shared}

For every state: the features whose label names it, how many of them both phrasings use, and the part of the influence
of all of them that these have:

{every}

## The capital feature is shared over the states

Features at the last word, “{word}”, that at least nine tenths of the graphs have, with mean and standard deviation of
their influence:

{capital}

Edges by the number of states that have them. What all have belongs to the question, what one has to its answer:

{consensus}

## How alike the graphs are

The share of nodes and of edges of two graphs that are in both, as a mean over all pairs:

{overlap}
"""


@dataclass(frozen=True)
class Asked:
    """One state, the city that stands for it, and the ids of its graphs by phrasing."""

    state: str
    city: str
    graph_ids: tuple[str, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="keep the graphs in this folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        store = GraphStore(options.store or Path(temporary) / "store")
        asked = trace_states(store)
        compare(store, asked)
        PAGE.write_text(page(store, asked), encoding="utf-8")


def trace_states(store: GraphStore, names: Sequence[str] = STATES) -> list[Asked]:
    """Ask for the capital of one city's state in two phrasings, for every state named."""
    folder = lab.folder()
    replacement = ReplacementModel.load(folder / "model", folder / "transcoder", name=lab.NAME)
    features = lab.features()
    labels = lab.labels(features)
    store.save_features(features, replacement.origin.transcoder)
    known = set((folder / "words.txt").read_text(encoding="utf-8").split())
    states = json.loads((ROOT / "examples" / "lab" / "data" / "states.json").read_text(encoding="utf-8"))
    cities = {state["name"]: next(city for city in state["cities"] if city in known) for state in states}
    return [
        Asked(state, cities[state], tuple(
            store.save(trace(phrasing.format(city=cities[state]), replacement, labels=labels).graph)
            for phrasing in PHRASINGS
        ))
        for state in names
    ]  # fmt: skip


def compare(store: GraphStore, asked: list[Asked]) -> None:
    """Per state its two phrasings, wherever a feature stands; and all states in the first phrasing, place by place."""
    for one in asked:
        _save(store, f"phrasings-{one.state.lower()}", one.graph_ids, "anywhere")
    _save(store, "capitals", [one.graph_ids[0] for one in asked], "diff")


def page(store: GraphStore, asked: list[Asked]) -> str:
    """The page, with every answer as the store gives it."""
    first = asked[0]
    comparison, word = f"phrasings-{first.state.lower()}", store.load(first.graph_ids[0]).info.tokens[-1]
    said = {row["graph_id"]: row["answer"] for row in store.sql(ANSWERS).to_pylist()}
    prompts = [
        f"| {one.state} | {one.city} | {' | '.join(said[graph_id] for graph_id in one.graph_ids)} |" for one in asked
    ]
    return TEXT.format(
        date=f"{datetime.now(UTC):%Y-%m-%d}", n=len(asked), state=first.state, city=first.city, word=word.strip(),
        one=PHRASINGS[0].format(city="CITY"), other=PHRASINGS[1].format(city="CITY"), prompts="\n".join(prompts),
        comparison=comparison, shared=_answered(store, SHARED_STATE, comparison=comparison, state=first.state),
        every=_answered(store, EVERY_STATE), capital=_answered(store, CAPITAL, token=word),
        consensus=_answered(store, CONSENSUS), overlap=_answered(store, OVERLAP),
    )  # fmt: skip


def _save(store: GraphStore, name: str, graph_ids: Sequence[str], alignment: str) -> None:
    merged = merge_graphs([store.load(graph_id) for graph_id in graph_ids], alignment=alignment)
    store.save_comparison(Comparison(name, "merge", graph_ids, alignment, datetime.now(UTC)), merged)


def _answered(store: GraphStore, query: str, **parameters: str) -> str:
    """A query and its answer in Markdown."""
    table = store.sql(query, **parameters)
    rows = [f"| {' | '.join(str(value) for value in row.values())} |" for row in table.to_pylist()]
    head = [f"| {' | '.join(table.column_names)} |", "|" + "---|" * table.num_columns]
    return "\n".join(["```sql", query.strip(), "```", "", *head, *rows])


if __name__ == "__main__":
    main()
