"""Damage outside of graphs: every file whose rows no query finds is named, and no other."""

from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graphs import Annotations, GraphStore, Supernode, merge_graphs
from graphs.comparisons import Comparison
from graphs.schema import tables


@pytest.fixture
def store(tmp_path, random_graph):
    """One graph, and one file of each kind beside it."""
    store = GraphStore(tmp_path / "store")
    graph_id = store.save(random_graph(0))
    store.save_features(pa.Table.from_pylist([], schema=tables()["features"]), "tiny-clt")
    about = Comparison("pair", "diff", ("a", "b"), "diff", datetime(2025, 1, 2, tzinfo=UTC))
    store.save_comparison(about, merge_graphs([random_graph(0), random_graph(1)]))
    row = {"graph_id": graph_id, "validation": "ablate", "source": 0, "target": 1, "predicted": 1.0, "measured": 0.9}
    store.save_rows("validations", graph_id, pa.Table.from_pylist([row | {"is_control": False}]))
    store.annotate(graph_id, Annotations((Supernode("Texas", (0,)),)))
    return store


def cut(folder: Path, pattern: str) -> Path:
    [path] = folder.glob(pattern)
    path.write_bytes(path.read_bytes()[:-10])
    return path


def test_of_a_whole_store_no_file_is_named(store, tmp_path):
    assert store.damaged_files() == []
    assert GraphStore(tmp_path / "nothing").damaged_files() == []
    store.compact()
    assert store.damaged_files() == []


@pytest.mark.parametrize(
    ("pattern", "reason", "table"),
    [
        ("features/*.parquet", "Parquet magic bytes not found in footer", "features"),
        ("comparisons/pair.parquet", "Parquet magic bytes not found in footer", "comparisons"),
        ("comparisons/pair.*.nodes.parquet", "Parquet magic bytes not found in footer", "comparison_nodes"),
        ("comparisons/pair.*.edges.parquet", "Parquet magic bytes not found in footer", "comparison_edges"),
        ("graphs/*/validations.parquet", "Parquet magic bytes not found in footer", "validations"),
        ("annotations/*.json", "it does not hold what is written there", "supernodes"),
    ],
)
def test_a_cut_file_is_named_and_its_rows_are_left_out(store, pattern, reason, table):
    path = cut(store.folder, pattern)
    [found] = store.damaged_files()
    assert found.path == path
    assert reason in found.reason
    assert "\n" not in found.reason
    assert store.sql(f"SELECT count(*) AS n FROM {table}").to_pylist() == [{"n": 0}]
    assert store.damaged() == []


def test_a_comparison_without_its_nodes_and_one_of_other_columns_are_named(store):
    [nodes] = (store.folder / "comparisons").glob("pair.*.nodes.parquet")
    nodes.unlink()
    head = store.folder / "comparisons" / "pair.parquet"
    assert [(one.path, one.reason) for one in store.damaged_files()] == [
        (head, "it does not fit its nodes and edges, or these are gone")
    ]
    [added] = (store.folder / "graphs").glob("*/validations.parquet")
    pq.write_table(pa.table({"graph_id": ["a"]}), added)
    assert [(one.path, one.reason) for one in store.damaged_files()][1:] == [
        (added, "it does not have the columns of its table")
    ]
