"""Compaction: the same graphs in fewer files, whatever else happens to the store meanwhile."""

import json
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pyarrow.parquet as pq
import pytest

from graphs import Annotations, Comparison, GraphError, GraphStore, Supernode, merge_graphs
from graphs.compact import compact_folder
from graphs.files import reading
from graphs.packs import PARTS
from tests.graphs.conftest import drop_columns

PROMPTS = ("a b c", "d e f", "g h i")


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def packed_files(store):
    return [path for path in (store.folder / "packs").iterdir() if path.suffix == ".parquet"]


@pytest.fixture
def graphs(random_graph):
    return [random_graph(seed, prompt=prompt) for seed, prompt in enumerate(PROMPTS)]


@pytest.fixture
def store(tmp_path, graphs):
    store = GraphStore(tmp_path / "store")
    for graph in graphs:
        store.save(graph)
    return store


def ids(store):
    return {stored.info.prompt: stored.graph_id for stored in store.list()}


def in_sql(store):
    """How many rows each graph has in every table."""
    return {
        name: {
            row["graph_id"]: row["n"]
            for row in store.sql(f"SELECT graph_id, count(*) AS n FROM {name} GROUP BY 1").to_pylist()
        }
        for name in PARTS
    }


# the same store


def test_compacted_graphs_are_the_same_in_every_way_they_are_asked_for(store, graphs):
    listed, counted, rows = store.list(), in_sql(store), store.sql("FROM nodes ORDER BY ALL")
    done = store.compact()
    assert (done.n_moved, done.n_graphs, done.damaged) == (3, 3, {})
    assert done.n_edges == sum(graph.n_edges for graph in graphs)
    assert done.n_bytes == sum(path.stat().st_size for path in packed_files(store))
    assert files_below(store.folder / "graphs") == []
    assert len(packed_files(store)) == 3
    for reader in (store, GraphStore(store.folder)):
        assert reader.list() == listed
        assert reader.damaged() == []
        assert in_sql(reader) == counted
        assert reader.sql("FROM nodes ORDER BY ALL") == rows
        assert reader.resolve("a-b") == ids(store)["a b c"]
        for graph in graphs:
            assert reader.load(ids(store)[graph.info.prompt]) == graph


def test_empty_graphs_and_both_precisions_come_back_as_they_were(tmp_path, make_graph, make_info):
    store = GraphStore(tmp_path)
    graphs = [
        make_graph("", [], info=make_info("")),
        make_graph("tl", [], info=make_info("x")),
        make_graph("tl", [(0, 1, 0.1)], weight=np.float32([0.1]), info=make_info("y")),
        make_graph("tl", [(0, 1, 0.1)], weight=np.float64([0.1]), info=make_info("z")),
    ]
    found = [store.save(graph) for graph in graphs]
    store.compact()
    for graph_id, graph in zip(found, graphs, strict=True):
        loaded = store.load(graph_id)
        assert loaded == graph
        assert loaded.weight.dtype == graph.weight.dtype


def test_compacting_again_changes_nothing(store):
    store.compact()
    before = files_below(store.folder)
    done = store.compact()
    assert (done.n_moved, done.n_graphs) == (0, 3)
    assert files_below(store.folder) == before


def test_an_empty_store_can_be_compacted(tmp_path):
    store = GraphStore(tmp_path / "new")
    store.save_query("all", "FROM graphs")
    done = store.compact()
    assert (done.n_moved, done.n_graphs, done.n_bytes) == (0, 0, 0)
    assert store.list() == []


@pytest.mark.parametrize("place", ["graphs", "packs/deleted", "../new"])
def test_compaction_makes_no_store_where_there_is_none(store, place):
    store.compact()
    before = files_below(store.folder.parent)
    with pytest.raises(
        GraphError, match=r"is no store: it has no store\.json; name a folder that graphs were saved in"
    ):
        GraphStore(store.folder / place).compact()
    assert files_below(store.folder.parent) == before
    assert not (store.folder / "../new").exists()


def test_graphs_saved_later_join_the_others_in_one_pack(store, random_graph):
    store.compact()
    later = random_graph(7, prompt="j k l")
    graph_id = store.save(later)
    assert len(store.list()) == 4
    assert store.compact().n_moved == 1
    assert len(packed_files(store)) == 3
    assert store.load(graph_id) == later


def test_full_packs_are_left_as_they_are_and_graphs_are_split_over_packs(store, graphs, random_graph, monkeypatch):
    monkeypatch.setattr("graphs.compact.PACK_EDGES", graphs[0].n_edges)
    store.compact()
    full = {path.name for path in packed_files(store)}
    assert len(full) == 6  # a pack is closed by the graph that passes the limit
    store.save(random_graph(7, prompt="j k l"))
    store.compact()
    assert len({path.name for path in packed_files(store)} & full) >= 3
    assert len(in_sql(store)["edges"]) == len(store.list()) == 4
    for graph in graphs:
        assert store.load(ids(store)[graph.info.prompt]) == graph


def test_row_groups_bound_what_is_read_to_open_one_graph(store, graphs, monkeypatch):
    monkeypatch.setattr("graphs.pack_files.ROW_GROUP", {"nodes": 1, "edges": 10})
    store.compact()
    [edges] = (store.folder / "packs").glob("edges-*")
    footer = pq.read_metadata(edges)
    assert footer.num_row_groups > 3
    assert max(footer.row_group(group).num_rows for group in range(footer.num_row_groups)) <= 40
    for graph in graphs:
        assert store.load(ids(store)[graph.info.prompt]) == graph


# changes after compaction


def test_a_graph_saved_again_takes_the_place_of_the_packed_one(store, graphs):
    store.compact()
    again = replace(graphs[0], weight=graphs[0].weight * 2)
    graph_id = store.save(again)
    for _ in range(2):
        assert store.load(graph_id) == again
        assert len(store.list()) == 3
        assert in_sql(store)["edges"][graph_id] == again.n_edges
        [total] = store.sql("SELECT sum(weight) AS w FROM edges WHERE graph_id = $g", g=graph_id)["w"].to_pylist()
        assert total == pytest.approx(again.weight.sum())
        store.compact()


def test_a_deleted_graph_stays_deleted_wherever_it_was(store, graphs):
    names = ids(store)
    store.compact()
    store.delete(names["a b c"])
    store.save(replace(graphs[1], weight=graphs[1].weight * 2))
    store.delete(names["d e f"])  # a newer version in a folder, an older one in the pack
    for _ in range(2):
        assert ids(store) == {"g h i": names["g h i"]}
        assert set(in_sql(store)["nodes"]) == {names["g h i"]}
        assert [*store.ids()] == [names["g h i"]]
        for gone in ("a b c", "d e f"):
            with pytest.raises(GraphError, match="there is no graph"):
                store.load(names[gone])
            with pytest.raises(GraphError, match="there is no graph"):
                store.delete(names[gone])
        store.compact()
    assert files_below(store.folder / "packs" / "deleted") == []
    store.save(graphs[0])
    assert store.load(names["a b c"]) == graphs[0]


def test_a_store_of_which_all_was_deleted_is_empty(store):
    store.compact()
    for graph_id in ids(store).values():
        store.delete(graph_id)
    assert store.list() == []
    assert store.sql("SELECT count(*) AS n FROM edges").to_pylist() == [{"n": 0}]
    assert store.compact().n_graphs == 0
    assert packed_files(store) == []


def test_what_others_put_beside_a_graph_survives_compaction_and_goes_with_the_graph(store):
    graph_id = ids(store)["a b c"]
    (store.folder / "graphs" / graph_id / "notes.txt").write_text("mine")
    store.compact()
    assert files_below(store.folder / "graphs") == [f"{graph_id}/notes.txt"]
    store.delete(graph_id)
    assert files_below(store.folder / "graphs") == []


# what happens meanwhile: between the reading of the graphs and the commit


def meanwhile(store, act):
    """Compact, and act once when every graph is written but nothing is committed."""

    def at_the_end(done, total):
        if done == total:
            act()

    return compact_folder(store.folder, at_the_end)


def test_what_is_deleted_while_it_is_compacted_stays_deleted(store):
    names = ids(store)
    meanwhile(store, lambda: store.delete(names["a b c"]))
    assert set(ids(store)) == {"d e f", "g h i"}
    store.save(store.load(names["g h i"]))
    meanwhile(store, lambda: [store.delete(names["g h i"]), store.delete(names["d e f"])])
    assert ids(store) == {}
    assert set(in_sql(store)["edges"]) == set()
    assert store.compact().n_graphs == 0


def test_what_is_saved_while_it_is_compacted_counts(store, graphs, random_graph):
    again, new = replace(graphs[0], weight=graphs[0].weight * 2), random_graph(8, prompt="m n o")
    meanwhile(store, lambda: [store.save(again), store.save(new)])
    for _ in range(2):
        assert store.load(ids(store)["a b c"]) == again
        assert store.load(ids(store)["m n o"]) == new
        assert len(in_sql(store)["graphs"]) == len(store.list()) == 4
        store.compact()


def test_while_somebody_reads_folders_and_old_packs_stay_and_nothing_is_doubled(store, graphs, monkeypatch):
    monkeypatch.setattr("graphs.compact._PATIENCE", 0.05)
    counted = in_sql(store)
    with reading(store.folder / "graphs"):
        store.compact()
        assert len(files_below(store.folder / "graphs")) == 9
        assert in_sql(store) == counted
        assert len(store.list()) == 3
    assert store.compact().n_moved == 0
    assert files_below(store.folder / "graphs") == []
    assert in_sql(store) == counted


@pytest.mark.parametrize("moment", ["_commit", "_remove_folders", "sync_folder", "write_atomically"])
def test_a_compaction_that_ends_anywhere_leaves_every_graph_once(store, graphs, monkeypatch, moment):
    counted = in_sql(store)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"graphs.compact.{moment}", full)
    with pytest.raises(GraphError, match=r"cannot compact .*: No space left on device"):
        store.compact()
    monkeypatch.undo()
    for _ in range(2):
        assert in_sql(store) == counted
        for graph in graphs:
            assert store.load(ids(store)[graph.info.prompt]) == graph
        store.compact()
    assert len(packed_files(store)) == 3


# damage and versions


def test_a_damaged_graph_stays_where_it_is_and_is_named(store):
    bad = ids(store)["d e f"]
    [path] = (store.folder / "graphs" / bad).glob("edges-*")
    path.write_bytes(path.read_bytes()[:-20])
    done = store.compact()
    assert list(done.damaged) == [bad]
    assert [found.graph_id for found in store.damaged()] == [bad]
    assert len(store.list()) == done.n_graphs == 2


@pytest.mark.parametrize("part", PARTS)
def test_a_truncated_pack_is_named_and_the_rest_of_the_store_opens(store, random_graph, part):
    names = sorted(ids(store).values())
    store.compact()
    later = store.save(random_graph(7, prompt="j k l"))
    [path] = (store.folder / "packs").glob(f"{part}-*")
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    damaged = store.damaged()
    assert [found.graph_id for found in damaged] == ([f"packs/{path.stem[7:]}"] if part == "graphs" else names)
    assert all(found.reason.startswith("pack ") and "is damaged" in found.reason for found in damaged)
    assert [stored.graph_id for stored in store.list()] == [later]
    assert store.sql("SELECT DISTINCT graph_id FROM edges").to_pylist() == [{"graph_id": later}]
    if part == "graphs":
        with pytest.raises(GraphError, match=r"restore .*graphs-"):
            store.compact()
    else:
        store.compact()
        with pytest.raises(GraphError, match="is damaged"):
            store.load(names[0])
    path.write_bytes(whole)  # restored from a copy
    assert len(store.list()) == 4
    assert store.damaged() == []


def test_flipped_bytes_in_a_pack_are_noticed_when_the_graph_is_loaded(store):
    store.compact()
    [path] = (store.folder / "packs").glob("edges-*")
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(GraphError, match="is damaged"):
        for graph_id in ids(store).values():
            store.load(graph_id)


def test_damage_inside_a_pack_stops_its_compaction_and_changes_nothing(store, random_graph):
    store.compact()
    [path] = (store.folder / "packs").glob("nodes-*")
    content = bytearray(path.read_bytes())
    content[50] ^= 0xFF
    path.write_bytes(content)
    store.save(random_graph(7, prompt="j k l"))
    before = files_below(store.folder)
    with pytest.raises(GraphError, match=r"graph .* in pack .* is damaged: .*; restore the pack from a copy"):
        store.compact()
    assert files_below(store.folder) == before


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"packs": ["../x"]}', '{"packs": [1]}', "{}", pytest.param("[" * 200_000, id="deep")]
)
def test_a_broken_list_of_packs_is_told_in_one_line(store, content):
    store.compact()
    (store.folder / "packs" / "packs.json").write_text(content)
    for use in (store.list, lambda: store.sql("SELECT 1"), store.compact):
        with pytest.raises(GraphError, match=r"packs\.json is unreadable"):
            use()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("write", [GraphStore.compact, lambda store: store.save(store.load(ids(store)["a b c"]))])
def test_an_older_store_opens_and_is_one_of_this_version_once_it_is_written_to(store, write, version):
    description = store.folder / "store.json"
    description.write_text(f'{{"format": "clt-tracer store", "schema_version": {version}}}')
    old = GraphStore(store.folder)
    assert len(old.list()) == 3
    assert json.loads(description.read_text())["schema_version"] == version
    write(old)
    assert len(old.list()) == 3
    assert json.loads(description.read_text())["schema_version"] == 3


def test_compaction_gives_graphs_of_version_1_their_later_columns(store, graphs):
    expected = store.sql("FROM nodes ORDER BY ALL")
    for path in store.folder.rglob("nodes-*.parquet"):
        drop_columns(path, ["reached_from", "reaches_answer"])
    assert store.sql("SELECT count(reached_from) AS n FROM nodes").to_pylist() == [{"n": 0}]
    store.compact()
    assert store.sql("FROM nodes ORDER BY ALL") == expected


def test_a_pack_written_before_a_column_was_added_opens(store, graphs, random_graph):
    store.compact()
    [path] = (store.folder / "packs").glob("nodes-*")
    drop_columns(path, ["reached_from"])
    assert store.sql("SELECT count(*) AS n, count(reached_from) AS k FROM nodes").to_pylist() == [
        {"n": sum(graph.n_nodes for graph in graphs), "k": 0}
    ]
    assert store.load(ids(store)["a b c"]) == graphs[0]
    store.save(random_graph(7, prompt="j k l"))
    store.compact()
    assert store.sql("SELECT count(*) AS n FROM nodes WHERE reached_from IS NULL").to_pylist() == [{"n": 0}]


def test_a_pack_holds_tags_and_one_written_before_there_were_any_opens(store, make_graph, make_info):
    tags = (("group", "a"), ("n", "7"))
    tagged = store.save(make_graph("tl", [], info=make_info("tagged", tags=tags)))
    drop_columns(store.folder / "graphs" / ids(store)["a b c"] / "graph.parquet", ["tags"])
    store.compact()
    assert store.find(tagged) == next(stored for stored in store.list() if stored.graph_id == tagged)
    assert store.load(tagged).info.tags == store.find(tagged).info.tags == tags
    query = "SELECT prompt FROM graphs WHERE tags['group'] = 'a'"
    assert store.sql(query).to_pylist() == [{"prompt": "tagged"}]
    [index] = (store.folder / "packs").glob("graphs-*")
    drop_columns(index, ["tags", "row_share"])
    new = store.save(make_graph("tl", [], info=make_info("new", tags=tags)))
    reader = GraphStore(store.folder)
    assert {stored.info.prompt: (stored.info.tags, stored.info.row_share) for stored in reader.list()} == {
        "a b c": ((), 1.0), "d e f": ((), 1.0), "g h i": ((), 1.0), "tagged": ((), 1.0), "new": (tags, 1.0),
    }  # fmt: skip
    assert reader.load(tagged).info.tags == ()
    reader.compact()
    assert reader.sql("SELECT prompt FROM graphs WHERE tags['n'] = '7'").to_pylist() == [{"prompt": "new"}]
    assert reader.find(new) is not None


# what is beside a graph, wherever it is


ADDED = Annotations((Supernode("Texas", (6, 7)),), (6,), {"linkType": "both"})
SUPERNODES = "SELECT graph_id, node FROM supernodes ORDER BY ALL"


def test_a_packed_graph_is_found(store, random_graph):
    found = {graph_id: store.find(graph_id) for graph_id in ids(store).values()}
    store.compact()
    for graph_id, stored in found.items():
        assert stored is not None
        assert store.find(graph_id) == GraphStore(store.folder).find(graph_id) == stored
    store.delete(ids(store)["a b c"])
    assert [store.find(graph_id) is None for graph_id in sorted(found)] == [True, False, False]
    assert store.find("missing") is None
    for path in (store.folder / "packs").glob("edges-*"):
        path.write_bytes(b"PAR1")
    assert not any(store.find(graph_id) for graph_id in found)


def test_annotations_of_a_packed_graph_are_kept_read_replaced_and_deleted(store, graphs):
    first, second = ids(store)["a b c"], ids(store)["d e f"]
    store.annotate(first, ADDED)
    store.compact()
    assert store.annotations(first) == ADDED
    assert store.annotations(second) == Annotations()
    store.annotate(second, Annotations((Supernode("x", (9,)),)))
    expected = [{"graph_id": first, "node": 6}, {"graph_id": first, "node": 7}, {"graph_id": second, "node": 9}]
    assert store.sql(SUPERNODES).to_pylist() == expected
    assert files_below(store.folder / "graphs") == []
    store.annotate(first, Annotations((Supernode("y", (8,)),)))
    assert store.annotations(first).supernodes == (Supernode("y", (8,)),)
    store.save(graphs[0])  # again, in a folder that hides the pack
    assert store.annotations(first).supernodes == (Supernode("y", (8,)),)
    store.compact()
    store.delete(first)
    assert files_below(store.folder / "annotations") == [f"{second}.json"]
    assert store.sql(SUPERNODES).to_pylist() == [{"graph_id": second, "node": 9}]
    for use in (store.annotations, lambda graph_id: store.annotate(graph_id, ADDED)):
        with pytest.raises(GraphError, match=f"there is no graph '{first}'"):
            use(first)
    assert files_below(store.folder / "annotations") == [f"{second}.json"]


def test_a_graph_that_was_in_a_pack_and_is_saved_with_annotations_has_these(store, graphs):
    store.compact()
    graph_id = store.save(graphs[1], ADDED)
    assert store.annotations(graph_id) == ADDED
    store.compact()
    assert GraphStore(store.folder).annotations(graph_id) == ADDED


def test_comparisons_of_packed_graphs_are_those_of_the_graphs_in_folders(store, graphs):
    names = list(ids(store).values())
    in_folders = merge_graphs([store.load(graph_id) for graph_id in names])
    store.compact()
    packed = merge_graphs([store.load(graph_id) for graph_id in names])
    created_at = datetime(2025, 1, 2, tzinfo=UTC)
    for name, merged in (("before", in_folders), ("after", packed)):
        store.save_comparison(Comparison(name, "merge", names, "diff", created_at), merged)
    store.compact()
    columns = "* EXCLUDE comparison"
    before, after = (
        store.sql(f"SELECT {columns} FROM comparison_edges WHERE comparison = $c ORDER BY ALL", c=name).to_pylist()
        for name in ("before", "after")
    )
    assert before == after
    assert len(before) == len(in_folders.source)
    query = "SELECT comparison, graph_id FROM comparisons, graphs WHERE list_contains(graph_ids, graph_id)"
    assert store.sql(query).num_rows == 6
