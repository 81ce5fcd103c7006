"""What a graph of many edges takes, in files and in memory."""

import numpy as np
import pyarrow as pa
import pytest

from graphs import AttributionGraph, GraphStore, graph_id_of
from graphs.columns import edges_to_table
from graphs.folder import read_saved

N_EDGES = 100_000


@pytest.fixture
def graph(make_info):
    """Edges in single precision with weights that do not compress."""
    n, random = 2000, np.random.default_rng(0)
    info = make_info("x", n_layers=1)
    nothing, text = np.full(n + 1, np.nan), np.full(n + 1, "x", dtype=object)
    is_logit = np.arange(n + 1) == n
    return AttributionGraph(
        info=info,
        kind=np.where(is_logit, 3, 1).astype(np.uint8),
        layer=is_logit.astype(np.int32),
        position=np.zeros(n + 1, np.int32),
        feature=np.arange(n + 1, dtype=np.int32),
        token_id=np.full(n + 1, -1, np.int32),
        **dict.fromkeys(
            ("activation", "pre_activation", "bias", "remainder", "input_size", "influence", "cumulative_influence"),
            nothing,
        ),
        probability=np.where(is_logit, 1.0, np.nan),
        **dict.fromkeys(("token", "word", "label"), text),
        source=np.repeat(np.arange(1000, dtype=np.int32), 100),
        target=np.tile(np.arange(1000, 1100, dtype=np.int32), 1000),
        weight=random.normal(size=N_EDGES).astype(np.float32),
    )


def test_a_stored_graph_takes_little_room_for_single_precision(tmp_path, graph):
    store = GraphStore(tmp_path)
    graph_id = store.save(graph)
    [edges] = (tmp_path / "graphs" / graph_id).glob("edges-*")
    assert edges.stat().st_size < N_EDGES * 5
    assert store.load(graph_id) == graph


def test_the_name_of_the_graph_takes_no_room_for_each_edge_in_memory(tmp_path, graph):
    graph_id = graph_id_of(graph.info)
    before = pa.total_allocated_bytes()
    table = edges_to_table(graph, graph_id)
    assert table["graph_id"].unique().to_pylist() == [graph_id]
    assert pa.total_allocated_bytes() - before < (1 << 16) * (len(graph_id) + 5)  # other columns are the graph's own
    GraphStore(tmp_path).save(graph)
    before = pa.total_allocated_bytes()
    read = read_saved(tmp_path / "graphs" / graph_id)[-1]
    assert read["graph_id"].unique().to_pylist() == [graph_id]
    assert pa.total_allocated_bytes() - before < N_EDGES * (4 + 4 + 8 + 5)  # source, target, weight and a number
