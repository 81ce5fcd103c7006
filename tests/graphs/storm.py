"""Processes that save, delete, compact and read one store at the same time, to be killed at any moment.

Each writer has graphs of its own and one that all write, and a log of what it began and what was acknowledged; a
version of a graph is its weights times a number, and no two writers save the same.
"""

import importlib.util
import itertools
import os
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from graphs import AttributionGraph, GraphError, GraphStore
from graphs.names import graph_id_of

N_WRITERS = 2
SHARED = "s t u"
PROMPTS = {0: ("a b c", "d e f", "g h i", SHARED), 1: ("j k l", "m n o", "p q r", SHARED)}
EVERY = tuple(dict.fromkeys(itertools.chain(*PROMPTS.values())))


def originals(prompts: Sequence[str] = EVERY) -> dict[str, AttributionGraph]:
    """Every graph as version 1, by its prompt."""
    spec = importlib.util.spec_from_file_location("builders", Path(__file__).with_name("conftest.py"))
    assert spec is not None
    assert spec.loader is not None
    builders = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builders)
    return {prompt: builders._random_graph(seed, prompt=prompt) for seed, prompt in enumerate(prompts)}


def version_of(graph: AttributionGraph, original: AttributionGraph) -> int:
    """Which version the graph is; an AssertionError if it is none."""
    version = round(float(graph.weight[0] / original.weight[0]))
    assert graph == replace(original, weight=original.weight * version), f"{graph.info.prompt} is torn"
    return version


def write(folder: str, log: str, number: int, seed: int) -> None:
    """Save and delete for ever; a line of the log is "begin PROMPT VERSION" (0 is deletion) or "done"."""
    store, random, graphs = GraphStore(folder), np.random.default_rng([seed, number]), originals()
    ids = {prompt: graph_id_of(graph.info) for prompt, graph in graphs.items()}
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for version in itertools.count(seed * 1000 + number + 1, N_WRITERS):
        prompt = PROMPTS[number][random.integers(len(PROMPTS[number]))]
        graph = replace(graphs[prompt], weight=graphs[prompt].weight * version)
        deletes = random.random() < 0.3
        os.write(handle, f"begin {prompt} {0 if deletes else version}\n".encode())
        if deletes:
            try:
                store.delete(ids[prompt])
            except GraphError as error:
                assert "there is no graph" in str(error)
        else:
            store.save(graph)
        os.write(handle, b"done\n")


def compact(folder: str, pause: float) -> None:
    """Compact for ever."""
    while True:
        GraphStore(folder).compact()
        time.sleep(pause)


def read(folder: str, errors: str, prompts: Sequence[str] = EVERY) -> None:
    """Read for ever, and write down what was wrong: an error, a torn graph, one that is there twice."""
    graphs = originals(prompts)
    try:
        for turn in itertools.count():
            store = GraphStore(folder)
            listed = store.list()
            assert len({stored.graph_id for stored in listed}) == len(listed), "a graph is listed twice"
            assert store.damaged() == []
            rows = store.sql(COUNTS).to_pylist()
            for row in rows:
                original = graphs[row["prompt"]]
                assert row["n"] == original.n_edges, f"{row} is doubled or torn"
                assert row["n_nodes"] == original.n_nodes, f"{row} is doubled or torn"
                assert row["n_graphs"] == 1, f"{row} is doubled"
                assert row["most"] == 1, f"{row} has an edge twice"
            for stored in listed:
                try:
                    version_of(store.load(stored.graph_id), graphs[stored.info.prompt])
                except GraphError as error:
                    assert "there is no graph" in str(error), error
            Path(errors + ".turns.new").write_text(str(turn + 1))
            os.replace(errors + ".turns.new", errors + ".turns")  # or it might be read while it is empty
    except (AssertionError, ValueError, OSError, KeyError):
        Path(errors).write_text(traceback.format_exc())
        raise


COUNTS = """
WITH sums AS (SELECT graph_id, count(*) AS n FROM edges GROUP BY 1),
counted AS (SELECT graph_id, count(*) AS n_nodes FROM nodes GROUP BY 1),
pairs AS (SELECT graph_id, source, target, count(*) AS k FROM edges GROUP BY ALL)
SELECT g.prompt, count(DISTINCT g.graph_id) AS n_graphs, any_value(s.n) AS n, any_value(c.n_nodes) AS n_nodes,
    max(f.k) AS most
FROM graphs AS g JOIN sums AS s USING (graph_id) JOIN counted AS c USING (graph_id) JOIN pairs AS f USING (graph_id)
GROUP BY g.prompt
"""
