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
from textwrap import fill

from click.testing import CliRunner

from graphs import GraphStore
from graphs.comparisons import Comparison
from graphs.merge import merge_graphs
from tracer import lab
from tracer.cli import cli
from tracer.config import TraceConfig
from tracer.pipeline import trace
from tracer.replacement import ReplacementModel

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "many-graphs.md"
STATES = ("Texas", "California", "Illinois", "Ohio", "Florida", "Alabama", "Alaska", "Arizona", "Colorado", "Georgia")
PHRASINGS = ("the {relation} of the state containing {city} is", "the state containing {city} has the {relation}")
RELATIONS = ("nickname", "region", "bird", "flower", "tree", "statehood", "abbreviation")
"""What else the lab knows of states."""
BY_NAME = ("the capital of {place} is", "{place} has the capital")
OF_COUNTRIES = ("the capital of the country containing {city} is", "the country containing {city} has the capital")
PARAPHRASES = (
    "the capital of the state containing {city} is",
    "the state containing {city} has the capital",
    "the capital of the state containing the city of {city} is",
    "the state containing the city of {city} has the capital",
    "the capital of the state of {city} is",
    "the state of {city} has the capital",
)
"""The lab model was trained on questions like the first two."""

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
CONCERNS = """
WITH shared AS (
    SELECT layer, feature FROM comparison_nodes
    WHERE comparison = 'capitals' AND kind = 'feature' AND share >= 0.9 AND token = $token
), named AS (
    SELECT DISTINCT graph_id FROM nodes JOIN graphs USING (graph_id)
    WHERE kind = 'feature' AND label LIKE '%' || tags['place'] || '%'
)
SELECT tags['asked'] AS asked, shared.layer, shared.feature, count(DISTINCT graphs.graph_id) AS graphs,
    count(DISTINCT nodes.graph_id) AS with_this_feature, count(DISTINCT named.graph_id) AS with_one_named_as_the_place
FROM graphs CROSS JOIN shared LEFT JOIN named USING (graph_id) LEFT JOIN nodes
    ON nodes.graph_id = graphs.graph_id AND nodes.kind = 'feature'
    AND nodes.layer = shared.layer AND nodes.feature = shared.feature
WHERE tags['asked'] IS NOT NULL
GROUP BY ALL ORDER BY shared.layer, shared.feature, with_this_feature DESC, asked
"""
CONSENSUS = """
SELECT n_graphs AS in_states, count(*) AS edges, round(avg(abs(mean_weight)), 3) AS mean_weight
FROM comparison_edges WHERE comparison = 'capitals'
GROUP BY n_graphs ORDER BY n_graphs DESC
"""
OVERLAP = """
SELECT comparison, n_graphs, alignment, round(node_overlap, 2) AS nodes, round(edge_overlap, 2) AS edges
FROM comparisons WHERE kind = 'merge' ORDER BY comparison
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
trace merge --query "FROM graphs WHERE prompt LIKE 'the capital of the state containing %'" --name capitals
trace diff DALLAS OAKLAND
trace "the capital of the state containing Dallas is" --no-prune    # stability prunes, so it needs the whole graph
trace stability WHOLE
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

## One feature is shared by the states' capitals

Features at the last word, “{word}”, that at least nine tenths of the graphs have, with mean and standard deviation of
their influence:

{capital}

Its label says where it fires on the lab's questions, not in which graphs it matters. So the same states, by the same
cities, are asked for other things, and states by their names and countries by a city for their capitals, in two
phrasings each. Of how many graphs is the feature a node, at any word, and how many have a feature whose label names the
state or country?

{concerns}

{verdict}

Edges by the number of states that have them. What all have belongs to the question, what one has to its answer:

{consensus}

## What the thresholds do not decide

Which nodes are left depends on how much is pruned. `trace stability` prunes a whole graph at many pairs of thresholds
and counts; what all have is there whatever one chooses.

{thresholds}

Over paraphrases, too, wherever a feature stands. All six are answered “{answers}”; the last four are not of a form that
the lab model was trained on:

{paraphrases}

## How alike the graphs are

The share of nodes and of edges of two graphs that are in both, as a mean over all pairs:

{overlap}
"""
LIMITS = """
The last column is the control: what names the state is there whatever is asked, so the first difference is not one of
how much was pruned away. What is shared is little: one word's worth of "what is asked", in an early layer, while nearly
all edges differ from state to state. And all of this is occurrence: nothing was switched off to see what follows.
"""


@dataclass(frozen=True)
class Asked:
    """One state, the city that stands for it, and the ids of its graphs by phrasing."""

    state: str
    city: str
    graph_ids: tuple[str, ...]


@dataclass(frozen=True)
class Lab:
    """The lab model, what its features are called, and where its graphs go."""

    store: GraphStore
    replacement: ReplacementModel
    labels: dict[tuple[int, int], str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="keep the graphs in this folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        opened = open_lab(GraphStore(options.store or Path(temporary) / "store"))
        asked = trace_states(opened, STATES)
        trace_other_questions(opened, STATES)
        compare(opened.store, asked)
        PAGE.write_text(page(opened, asked), encoding="utf-8")


def open_lab(store: GraphStore) -> Lab:
    """The bundled model, its features known to the store."""
    folder = lab.folder()
    replacement = ReplacementModel.load(folder / "model", folder / "transcoder", name=lab.NAME)
    features = lab.features()
    store.save_features(features, replacement.origin.transcoder)
    return Lab(store, replacement, lab.labels(features))


def trace_states(opened: Lab, states: Sequence[str]) -> list[Asked]:
    """Ask for the capital of one city's state in two phrasings, for every state named."""
    cities = first_cities("states")
    return [
        Asked(state, cities[state], tuple(
            _traced(opened, phrasing.format(relation="capital", city=cities[state]), "capital of a city's state", state)
            for phrasing in PHRASINGS
        ))
        for state in states
    ]  # fmt: skip


def trace_other_questions(opened: Lab, states: Sequence[str]) -> None:
    """Ask for other things of the same states, and for other capitals: as many countries' as there are states."""
    cities, abroad = first_cities("states"), first_cities("countries")
    for state in states:
        for relation in RELATIONS:
            for phrasing in PHRASINGS:
                prompt = phrasing.format(relation=relation, city=cities[state])
                _traced(opened, prompt, f"{relation} of a city's state", state)
        for phrasing in BY_NAME:
            _traced(opened, phrasing.format(place=state), "capital of a state by name", state)
    for country in list(abroad)[: len(states)]:
        for phrasing in OF_COUNTRIES:
            _traced(opened, phrasing.format(city=abroad[country]), "capital of a city's country", country)


def first_cities(kind: str) -> dict[str, str]:
    """Of every place of this kind the first city that the lab model knows."""
    known = set((lab.folder() / "words.txt").read_text(encoding="utf-8").split())
    places = json.loads((ROOT / "examples" / "lab" / "data" / f"{kind}.json").read_text(encoding="utf-8"))
    return {place["name"]: next(city for city in place["cities"] if city in known) for place in places}


def compare(store: GraphStore, asked: list[Asked]) -> None:
    """Per state its two phrasings, wherever a feature stands; and all states in the first phrasing, place by place."""
    for one in asked:
        _save(store, f"phrasings-{one.state.lower()}", one.graph_ids, "anywhere")
    _save(store, "capitals", [one.graph_ids[0] for one in asked], "diff")


def page(opened: Lab, asked: list[Asked]) -> str:
    """The page, with every answer as the store gives it."""
    store, first = opened.store, asked[0]
    comparison, word = f"phrasings-{first.state.lower()}", store.load(first.graph_ids[0]).info.tokens[-1]
    said = {row["graph_id"]: row["answer"] for row in store.sql(ANSWERS).to_pylist()}
    prompts = [
        f"| {one.state} | {one.city} | {' | '.join(said[graph_id] for graph_id in one.graph_ids)} |" for one in asked
    ]
    whole = [_traced(opened, phrasing.format(city=first.city), None, first.state) for phrasing in PARAPHRASES]
    answers = {row["graph_id"]: row["answer"] for row in store.sql(ANSWERS).to_pylist()}
    return TEXT.format(
        date=f"{datetime.now(UTC):%Y-%m-%d}", n=len(asked), state=first.state, city=first.city, word=word.strip(),
        one=PHRASINGS[0].format(relation="capital", city="CITY"), prompts="\n".join(prompts),
        other=PHRASINGS[1].format(relation="capital", city="CITY"),
        comparison=comparison, shared=_answered(store, SHARED_STATE, comparison=comparison, state=first.state),
        every=_answered(store, EVERY_STATE), capital=_answered(store, CAPITAL, token=word),
        concerns=_answered(store, CONCERNS, token=word), verdict=verdict(store, word),
        consensus=_answered(store, CONSENSUS), overlap=_answered(store, OVERLAP),
        thresholds=_ran(store, whole[:1]), paraphrases=_ran(store, whole, "--align", "anywhere"),
        answers="”, “".join(sorted({answers[graph_id] for graph_id in whole})),
    )  # fmt: skip


def verdict(store: GraphStore, word: str) -> str:
    """What the numbers say of the shared features, and what they do not."""
    lines = []
    rows = store.sql(CONCERNS, token=word).to_pylist()
    for layer, feature in dict.fromkeys((row["layer"], row["feature"]) for row in rows):
        counts = {
            row["asked"]: (row["with_this_feature"], row["graphs"])
            for row in rows
            if (row["layer"], row["feature"]) == (layer, feature)
        }
        (found, of), by_name, abroad = (
            counts.pop(f"capital of a {asked}") for asked in ("city's state", "state by name", "city's country")
        )
        others, graphs = (sum(column) for column in zip(*counts.values(), strict=True))
        lines.append(
            f"Feature {feature} of layer {layer} is in {found} of {of} graphs about the capital of a city's state, and "
            f"in {others} of {graphs} about anything else of the same states. It does not stand for capitals as such: "
            f"it is in {by_name[0]} of {by_name[1]} graphs where the state is named, and in {abroad[0]} of {abroad[1]} "
            "about capitals of countries."
        )
    return "\n\n".join(fill(text, 120) for text in [*lines, LIMITS.strip()])


def _traced(opened: Lab, prompt: str, asked: str | None, place: str) -> str:
    """The id of the prompt's graph: pruned, with what was asked as a tag; or whole and without one."""
    tags = (("asked", asked), ("place", place)) if asked else ()
    config = TraceConfig(prune=asked is not None)
    return opened.store.save(trace(prompt, opened.replacement, config, labels=opened.labels, tags=tags).graph)


def _save(store: GraphStore, name: str, graph_ids: Sequence[str], alignment: str) -> None:
    merged = merge_graphs([store.load(graph_id) for graph_id in graph_ids], alignment=alignment)
    store.save_comparison(Comparison(name, "merge", graph_ids, alignment, datetime.now(UTC)), merged)


def _answered(store: GraphStore, query: str, **parameters: str) -> str:
    """A query and its answer in Markdown."""
    table = store.sql(query, **parameters)
    rows = [f"| {' | '.join(str(value) for value in row.values())} |" for row in table.to_pylist()]
    head = [f"| {' | '.join(table.column_names)} |", "|" + "---|" * table.num_columns]
    return "\n".join(["```sql", query.strip(), "```", "", *head, *rows])


def _ran(store: GraphStore, graph_ids: Sequence[str], *options: str) -> str:
    """`trace stability` and what it prints in Markdown, without where it was saved."""
    result = CliRunner().invoke(cli, ["stability", *graph_ids, *options, "--store", str(store.folder)])
    assert result.exit_code == 0, result.output
    printed = result.stdout.rstrip().rsplit("\n", 1)[0].rstrip()
    lines = [line.rstrip() for line in printed.splitlines()]
    names = " ".join(["WHOLE", *(f"WHOLE{number}" for number in range(2, len(graph_ids) + 1))])
    return "\n".join(["```text", f"$ trace stability {' '.join([names, *options])}", *lines, "```"])


if __name__ == "__main__":
    main()
