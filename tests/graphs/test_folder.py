"""What becomes of a store when files break, saves are killed, disks fill up and others write at the same time."""

import base64
import subprocess
import sys
import threading
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graphs import GraphError, GraphStore
from graphs.files import reading
from tests.graphs.conftest import drop_columns

HERE = Path(__file__).parent


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def one_line(error):
    return "\n" not in str(error.value) and len(str(error.value)) > 20


# damage


def truncate(folder, pattern):
    [path] = folder.glob(pattern)
    path.write_bytes(path.read_bytes()[:-20])


def garble(folder, pattern):
    [path] = folder.glob(pattern)
    content = bytearray(path.read_bytes())
    content[-40:-12] = b"x" * 28
    path.write_bytes(content)


def remove(folder, pattern):
    [path] = folder.glob(pattern)
    path.unlink()


def empty(folder, pattern):
    [path] = folder.glob(pattern)
    path.write_bytes(b"")


def exchange(folder, pattern):
    [path] = folder.glob(pattern)
    pq.write_table(pa.table({"a": [1]}), path)


def cut_rows(folder, pattern):
    [path] = folder.glob(pattern)
    pq.write_table(pq.read_table(path).slice(1), path)


@pytest.mark.parametrize("pattern", ["graph.parquet", "nodes-*", "edges-*"])
@pytest.mark.parametrize("damage", [truncate, garble, remove, empty, exchange, cut_rows])
def test_a_damaged_graph_among_good_ones_is_left_out_and_named(tmp_path, random_graph, damage, pattern):
    store = GraphStore(tmp_path)
    good, bad = store.save(random_graph(0)), store.save(random_graph(1, prompt="Dallas is in"))
    damage(tmp_path / "graphs" / bad, pattern)
    assert [stored.graph_id for stored in store.list()] == [good]
    assert store.sql("SELECT DISTINCT graph_id FROM nodes").to_pylist() == [{"graph_id": good}]
    assert store.load(good) == random_graph(0)
    no_graph_left = pattern == "graph.parquet" and damage is remove
    assert [found.graph_id for found in store.damaged()] == ([] if no_graph_left else [bad])
    with pytest.raises(GraphError, match="there is no graph" if no_graph_left else f"graph {bad} is damaged") as error:
        store.load(bad)
    assert one_line(error)

    assert store.save(random_graph(1, prompt="Dallas is in")) == bad  # saving again mends it
    assert store.load(bad) == random_graph(1, prompt="Dallas is in")
    assert store.damaged() == []


def test_flipped_bytes_in_the_middle_are_noticed_when_the_graph_is_loaded(tmp_path, random_graph):
    store = GraphStore(tmp_path)
    graph_id = store.save(random_graph(0))
    [path] = (tmp_path / "graphs" / graph_id).glob("edges-*")
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(GraphError, match="is damaged"):
        store.load(graph_id)


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row[:200] + (b"A" if row[200:201] != b"A" else b"B") + row[201:],
        lambda row: with_checksum(b"not base64" * 3 + b"x"),
        lambda row: with_checksum(base64.b64encode(b"no batch of Arrow")),
        lambda row: with_checksum(base64.b64encode(base64.b64decode(row.partition(b":")[2])[::-1])),
        lambda row: b"",
    ],
)
def test_a_wrong_row_in_the_footer_of_a_head_is_noticed(tmp_path, random_graph, change):
    store = GraphStore(tmp_path)
    graph_id, good = store.save(random_graph(0)), store.save(random_graph(1, prompt="Dallas is in"))
    path = tmp_path / "graphs" / graph_id / "graph.parquet"
    with pq.ParquetFile(path) as file:
        table, noted = file.read(), file.metadata.metadata
    del noted[b"ARROW:schema"]
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(noted | {b"row": change(noted[b"row"])})
    assert [found.graph_id for found in store.damaged()] == [graph_id]
    assert [stored.graph_id for stored in store.list()] == [good]


def with_checksum(content: bytes) -> bytes:
    return b"%d:%b" % (zlib.crc32(content), content)


def test_a_head_without_a_row_in_its_footer_is_read_as_any_other_table(tmp_path, random_graph):
    store = GraphStore(tmp_path)
    graph_id = store.save(random_graph(0))
    path = tmp_path / "graphs" / graph_id / "graph.parquet"
    with pq.ParquetFile(path) as file:
        table, noted = file.read(), file.metadata.metadata
    [stored] = GraphStore(tmp_path).list()
    pq.write_table(table.replace_schema_metadata({key: noted[key] for key in (b"nonce", b"tails")}), path)
    assert GraphStore(tmp_path).list() == [stored]


def test_a_graph_saved_before_a_column_was_added_opens_with_what_held_then(tmp_path, random_graph):
    store = GraphStore(tmp_path)
    graph = random_graph(0)
    graph_id = store.save(graph)
    folder = tmp_path / "graphs" / graph_id
    drop_columns(folder / "graph.parquet", ["row_share", "tags"])
    drop_columns(next(folder.glob("nodes-*")), ["remainder"])
    assert store.damaged() == []
    assert [stored.graph_id for stored in store.list()] == [graph_id]
    loaded = store.load(graph_id)
    assert loaded.info.row_share == 1.0
    assert loaded.info.tags == ()
    assert np.isnan(loaded.remainder).all()
    assert loaded.weight.tolist() == graph.weight.tolist()
    assert store.sql("SELECT row_share FROM graphs").to_pylist() == [{"row_share": 1.0}]
    assert store.sql("SELECT tags['group'] AS tag FROM graphs").to_pylist() == [{"tag": None}]
    assert store.sql("SELECT count(*) AS n, count(remainder) AS known FROM nodes").to_pylist() == [
        {"n": graph.n_nodes, "known": 0}
    ]


def test_a_graph_without_a_column_that_always_was_there_is_damaged(tmp_path, random_graph):
    store = GraphStore(tmp_path)
    graph_id = store.save(random_graph(0))
    drop_columns(next((tmp_path / "graphs" / graph_id).glob("nodes-*")), ["activation"])
    assert [found.graph_id for found in store.damaged()] == [graph_id]


def test_a_copied_folder_does_not_pass_for_another_graph(tmp_path, make_graph):
    store = GraphStore(tmp_path)
    graph_id = store.save(make_graph("tl", []))
    (tmp_path / "graphs" / graph_id).rename(tmp_path / "graphs" / "mine")
    [damaged] = store.damaged()
    assert (damaged.graph_id, damaged.reason) == ("mine", f"graph.parquet holds graph {graph_id}")


def test_a_damaged_graph_can_be_deleted(tmp_path, make_graph):
    store = GraphStore(tmp_path)
    graph_id = store.save(make_graph("tl", []))
    remove(tmp_path / "graphs" / graph_id, "nodes-*")
    store.delete(graph_id)
    assert store.damaged() == []


# atomic saves


def test_a_save_that_fails_leaves_the_old_graph_and_no_litter(tmp_path, make_graph, monkeypatch):
    store = GraphStore(tmp_path)
    graph_id = store.save(make_graph("tl", [(0, 1, 1.0)]))
    before = files_below(tmp_path)
    for error in (KeyboardInterrupt, OSError(28, "No space left on device")):
        # the last step before the commit
        monkeypatch.setattr(Path, "replace", lambda *_, error=error: (_ for _ in ()).throw(error))
        with pytest.raises((KeyboardInterrupt, GraphError)):
            store.save(make_graph("tl", [(0, 1, 2.0)]))
        monkeypatch.undo()
        assert files_below(tmp_path) == before
        assert store.load(graph_id).weight.tolist() == [1.0]


def test_an_interrupt_just_after_the_commit_keeps_the_new_graph(tmp_path, make_graph, monkeypatch):
    store = GraphStore(tmp_path)
    graph_id = store.save(make_graph("tl", [(0, 1, 1.0)]))
    original = Path.replace

    def interrupted(path, target):
        original(path, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.save(make_graph("tl", [(0, 1, 2.0)]))
    monkeypatch.undo()
    assert store.load(graph_id).weight.tolist() == [2.0]
    store.save(make_graph("tl", [(0, 1, 3.0)]))
    assert len(files_below(tmp_path / "graphs")) == 3  # and the next save sweeps the old version


SAVE_FOR_EVER = """
import importlib.util, itertools, sys, time
from dataclasses import replace
spec = importlib.util.spec_from_file_location("builders", sys.argv[2])
builders = importlib.util.module_from_spec(spec)
spec.loader.exec_module(builders)
from graphs import GraphStore
graphs = [builders._random_graph(seed, prompt=prompt) for seed, prompt in enumerate(["a b c", "d e f"])]
versions = [[replace(g, weight=g.weight * scale) for scale in (1.0, 2.0)] for g in graphs]
store = GraphStore(sys.argv[1])
print("ready", flush=True)
for i in itertools.count():
    store.save(versions[i % 2][i // 2 % 2])
    if i < 2:
        print("saved", flush=True)
    time.sleep(float(sys.argv[3]))
"""


def saver(store, script=SAVE_FOR_EVER, pause=0.0):
    command = [sys.executable, "-c", script, str(store), str(HERE / "conftest.py"), str(pause)]
    root = str(HERE.parent.parent)
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def assert_untorn(store, random_graph):
    """Every graph is one that was saved: the weights are once or twice those of the seed."""
    for stored in store.list():
        graph = store.load(stored.graph_id)
        original = random_graph(*{"a": (0,), "d": (1,)}[stored.info.prompt[0]], prompt=stored.info.prompt)
        assert graph in (original, replace(original, weight=original.weight * 2.0))


@pytest.mark.slow
def test_kill_9_at_any_moment_tears_no_graph(tmp_path, random_graph):
    store, random, kills = GraphStore(tmp_path), np.random.default_rng(0), 8
    for left in reversed(range(kills)):
        process = saver(tmp_path)
        assert process.stdout.readline() == "ready\n"
        if not left:  # both are saved at least once, however slow the disk
            assert [process.stdout.readline() for _ in range(2)] == ["saved\n"] * 2
        time.sleep(random.uniform(0.0, 0.4))
        process.kill()
        process.communicate()
        assert store.damaged() == []
        assert_untorn(store, random_graph)
    assert len(store.list()) == 2
    for seed, prompt in enumerate(["a b c", "d e f"]):
        store.save(random_graph(seed, prompt=prompt))
    assert len(files_below(tmp_path / "graphs")) == 6


@pytest.mark.slow
def test_readers_see_whole_graphs_while_others_replace_them(tmp_path, random_graph):
    store = GraphStore(tmp_path)
    for seed, prompt in enumerate(["a b c", "d e f"]):
        store.save(random_graph(seed, prompt=prompt))
    writers = [saver(tmp_path, pause=0.05), saver(tmp_path, pause=0.05)]
    try:
        for process in writers:
            assert process.stdout.readline() == "ready\n"
        totals = {
            round(scale * float(np.abs(random_graph(seed, prompt=prompt).weight).sum()), 6)
            for seed, prompt in enumerate(["a b c", "d e f"])
            for scale in (1.0, 2.0)
        }
        until = time.monotonic() + 3
        while time.monotonic() < until:
            assert len(store.list()) == 2
            assert store.damaged() == []
            assert_untorn(store, random_graph)
            answer = store.sql("SELECT round(sum(abs(weight)), 6) AS total FROM edges GROUP BY graph_id")
            assert set(answer["total"].to_pylist()) <= totals
            assert answer.num_rows == 2
    finally:
        for process in writers:
            process.kill()
            process.communicate()


def test_what_a_query_reads_stays_until_it_ends(tmp_path, make_graph):
    store = GraphStore(tmp_path)
    store.save(make_graph("tl", [(0, 1, 1.0)]))
    with reading(tmp_path / "graphs"):
        store.save(make_graph("tl", [(0, 1, 2.0)]))
        assert len(files_below(tmp_path / "graphs")) == 5  # nodes and edges of both versions, one head
    store.save(make_graph("tl", [(0, 1, 3.0)]))
    assert len(files_below(tmp_path / "graphs")) == 3


def test_threads_may_save_one_graph_at_the_same_time(tmp_path, make_graph):
    store = GraphStore(tmp_path)
    graphs = [make_graph("tl", [(0, 1, float(weight))]) for weight in range(1, 9)]
    threads = [threading.Thread(target=store.save, args=(graph,)) for graph in graphs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [stored] = store.list()
    assert store.load(stored.graph_id) in graphs
    assert len(files_below(tmp_path / "graphs")) == 3


FULL_DISK = (
    """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # no file may grow beyond 2 kB
"""
    + SAVE_FOR_EVER
)


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits")
def test_a_full_disk_is_told_in_one_line_and_leaves_the_store_as_it_was(tmp_path, random_graph):
    store = GraphStore(tmp_path)
    first = replace(random_graph(0, prompt="a b c"), weight=random_graph(0, prompt="a b c").weight)
    graph_id = store.save(first)
    before = files_below(tmp_path)
    process = saver(tmp_path, FULL_DISK)
    _, stderr = process.communicate()
    assert process.returncode == 1
    last = stderr.strip().splitlines()[-1]
    assert last.startswith(f"graphs.errors.GraphError: cannot save graph {graph_id} to {tmp_path}: ")
    assert "File too large" in last
    assert files_below(tmp_path) == before
    assert store.load(graph_id) == first


def test_a_file_in_the_way_is_told_in_one_line(tmp_path, make_graph):
    GraphStore(tmp_path).save(make_graph("tl", []))
    for path in (tmp_path / "graphs").iterdir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    (tmp_path / "graphs").rmdir()
    (tmp_path / "graphs").write_text("in the way")
    store = GraphStore(tmp_path)
    assert store.list() == []
    with pytest.raises(GraphError, match="cannot save graph the-capital-of-") as error:
        store.save(make_graph("tl", []))
    assert one_line(error)


def test_a_read_only_store_can_be_read(tmp_path, random_graph, read_only):
    store = GraphStore(tmp_path)
    graph_id = store.save(random_graph(0))
    read_only(tmp_path)
    reader = GraphStore(tmp_path)
    assert reader.load(graph_id) == random_graph(0)
    assert reader.sql("SELECT count(*) AS n FROM graphs").to_pylist() == [{"n": 1}]
    assert len(reader.list()) == 1
    for write in (lambda: reader.save(random_graph(0)), lambda: reader.delete(graph_id)):
        with pytest.raises(GraphError, match=f"^{tmp_path} cannot be written to: no permission in {tmp_path}; allow"):
            write()
    assert reader.load(graph_id) == random_graph(0)


@pytest.mark.parametrize("part", ["graphs", "features"])
def test_a_read_only_folder_in_a_store_is_found_before_anything_is_computed(tmp_path, random_graph, read_only, part):
    store = GraphStore(tmp_path)
    store.save(random_graph(0))
    (tmp_path / part).mkdir(exist_ok=True)
    store.check_writable()
    read_only(tmp_path / part)
    place = tmp_path / part
    with pytest.raises(GraphError, match=f"{tmp_path} cannot be written to: no permission in {place}; allow it, or"):
        store.check_writable()
    store.save_query("q", "FROM graphs")  # goes elsewhere


def test_a_save_survives_the_deletion_of_its_folder_meanwhile(tmp_path, make_graph):
    store, stop = GraphStore(tmp_path), threading.Event()
    graph = make_graph("tl", [(0, 1, 1.0)])
    graph_id = store.save(graph)

    def delete_again_and_again():
        while not stop.is_set():
            try:
                store.delete(graph_id)
            except GraphError as error:
                assert "there is no graph" in str(error)

    thread = threading.Thread(target=delete_again_and_again)
    thread.start()
    try:
        for _ in range(100):
            assert store.save(graph) == graph_id
    finally:
        stop.set()
        thread.join()
    store.save(graph)
    assert store.load(graph_id) == graph
