"""Stores in remote folders: what is pushed is what is read, whole, by whoever comes, also while it is pushed again."""

import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import fsspec
import pytest
from moto.server import ThreadedMotoServer

from graphs import Annotations, GraphError, GraphStore, Supernode
from graphs.remote import fetch, push
from tests.graphs.conftest import _random_graph

COUNTS = "SELECT (SELECT count(*) FROM graphs) AS graphs, (SELECT count(*) FROM edges) AS edges"


@pytest.fixture(scope="module")
def s3_server():
    """A server that speaks S3's own protocol, on this machine."""
    server = ThreadedMotoServer(port=0)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(s3_server, monkeypatch) -> str:
    for name, value in (("ENDPOINT_URL", s3_server), ("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b")):
        monkeypatch.setenv(f"AWS_{name}", value)
    client = boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket="graphs")
    yield "s3://graphs/store"
    for found in client.list_objects_v2(Bucket="graphs").get("Contents", []):
        client.delete_object(Bucket="graphs", Key=found["Key"])


@pytest.fixture(params=["memory", "file", "s3"])
def address(request, tmp_path) -> str:
    if request.param == "s3":
        return request.getfixturevalue("bucket")
    fsspec.filesystem("memory").store.clear()
    return "memory://there/store" if request.param == "memory" else f"file://{tmp_path}/there/store"


@pytest.fixture
def store(tmp_path) -> GraphStore:
    """Two graphs in packs, one in a folder of its own."""
    store = GraphStore(tmp_path / "here")
    for seed in range(2):
        store.save(_random_graph(seed))
    store.compact()
    store.save(_random_graph(2))
    return store


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_fetched_is_what_was_pushed(store, address, tmp_path):
    graph_id = store.ids()[0]
    store.annotate(graph_id, Annotations((Supernode("Texas", (0,)),)))
    expected = store.sql(COUNTS).to_pylist()
    before = files(store.folder)
    sent = push(store.folder, address)
    assert (sent.n_files, sent.n_bytes) == (len(before), sum(map(len, before.values())))
    fetch(address, tmp_path / "copy")
    assert {name: content for name, content in files(tmp_path / "copy").items() if name != "files.json"} == before
    copy = GraphStore(tmp_path / "copy")
    assert copy.sql(COUNTS).to_pylist() == expected
    assert copy.load(graph_id).info == store.load(graph_id).info
    assert copy.annotations(graph_id) == store.annotations(graph_id)


def test_only_changes_travel_and_what_is_gone_goes_there_too(store, address, tmp_path):
    copy = tmp_path / "copy"
    push(store.folder, address)
    fetch(address, copy)
    stamps = {path: path.stat().st_mtime_ns for path in copy.rglob("*.parquet")}
    fourth = store.save(_random_graph(3))
    sent = push(store.folder, address)
    assert (sent.n_files, sent.n_removed) == (3, 0)
    fetch(address, copy)
    assert fourth in GraphStore(copy).ids()
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    store.delete(fourth)
    store.compact()
    sent = push(store.folder, address)
    assert sent.n_removed == 9  # three files each of the graph, of the one that is now packed, and of the old pack
    fetch(address, copy)
    assert GraphStore(copy).ids() == store.ids()
    assert push(store.folder, address).n_files == 0


def test_a_copy_is_only_read(store, tmp_path):
    address = f"file://{tmp_path}/there"
    push(store.folder, address)
    fetch(address, tmp_path / "copy")
    copy = GraphStore(tmp_path / "copy")
    before = files(copy.folder)
    for write in (
        lambda: copy.save(_random_graph(5)),
        lambda: copy.delete(copy.ids()[0]),
        lambda: copy.annotate(copy.ids()[0], Annotations()),
        lambda: copy.save_query("name", "SELECT 1"),
        copy.compact,
    ):
        with pytest.raises(GraphError, match="is a copy of a store that was pushed, and only read"):
            write()
    assert files(copy.folder) == before
    with pytest.raises(GraphError, match=r"belongs to something else: it has no store\.json"):
        GraphStore(tmp_path / "there")


def test_what_another_pushed_is_not_replaced_unasked(store, address, tmp_path):
    other = GraphStore(tmp_path / "other")
    other.save(_random_graph(7))
    push(other.folder, address)
    with pytest.raises(GraphError, match=r"holds 4 files that were not pushed from .*; give another address, or --rep"):
        push(store.folder, address)
    fetch(address, tmp_path / "copy")
    assert GraphStore(tmp_path / "copy").ids() == other.ids()
    push(store.folder, address, replace=True)
    fetch(address, tmp_path / "copy")
    assert GraphStore(tmp_path / "copy").ids() == store.ids()
    with pytest.raises(GraphError, match="were not pushed from"):
        push(other.folder, address)


def test_a_reader_in_the_middle_of_a_push_finds_the_old_store(store, tmp_path, monkeypatch):
    """Also if files are replaced, as by compaction and annotation: none that it reads is overwritten."""
    there = fsspec.filesystem("memory")
    there.store.clear()
    address, copies = "memory://there", []
    push(store.folder, address)
    expected = store.ids()

    def look(path: str) -> None:
        copies.append(tmp_path / f"copy-{len(copies)}")
        fetch(address, copies[-1])
        found = GraphStore(copies[-1])
        assert (found.damaged(), found.ids()) == ([], expected)

    send = type(there).put_file
    monkeypatch.setattr(type(there), "put_file", lambda self, *args, **more: (send(self, *args, **more), look(args[1])))
    store.save(_random_graph(3))
    push(store.folder, address)
    assert len(copies) == 3
    expected = store.ids()
    store.annotate(expected[0], Annotations((Supernode("Texas", (0,)),)))
    store.compact()
    push(store.folder, address)
    assert len(copies) == 3 + 5  # the annotation, three files of a pack, packs.json
    monkeypatch.undo()
    look("")
    assert GraphStore(copies[-1]).annotations(expected[0]) == store.annotations(expected[0])


def test_a_push_that_was_killed_is_made_good_by_the_next(store, tmp_path, monkeypatch):
    """After each of its steps in turn: readers find the old store or the new one, and nobody has to say --replace."""
    there = fsspec.filesystem("memory")
    there.store.clear()
    address = "memory://there"
    push(store.folder, address)
    states = [store.ids()]
    for step in ("put_file", "pipe_file", "rm_file"):
        store.save(_random_graph(3 + len(states)))
        store.compact()
        states.append(store.ids())
        done = getattr(type(there), step)

        def killed(self, *args, done=done, **more):
            done(self, *args, **more)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(type(there), step, killed)
            with pytest.raises(KeyboardInterrupt):
                push(store.folder, address)
        fetch(address, tmp_path / step)
        assert GraphStore(tmp_path / step).ids() == (states[-2] if step == "put_file" else states[-1])
        push(store.folder, address)
        fetch(address, tmp_path / step)
        assert (GraphStore(tmp_path / step).ids(), GraphStore(tmp_path / step).damaged()) == (states[-1], [])


def test_a_changed_or_missing_file_is_noticed(store, tmp_path):
    address = f"file://{tmp_path}/there"
    push(store.folder, address)
    [edges] = (tmp_path / "there" / "packs").glob("edges-*")
    edges.write_bytes(edges.read_bytes()[:-1] + b"x")
    with pytest.raises(GraphError, match=r"does not hold what its files.json says; push the store again"):
        fetch(address, tmp_path / "copy")
    edges.unlink()
    with pytest.raises(GraphError, match=r"does not hold what its files.json says; push the store again"):
        fetch(address, tmp_path / "copy")
    assert not list((tmp_path / "copy").glob("packs/packs.json"))


@pytest.mark.parametrize("name", ["../escaped", "/etc/escaped", "a/../../escaped", ".hidden", "a//b", "a\\..\\b"])
def test_names_that_lead_elsewhere_are_refused(tmp_path, name):
    there = tmp_path / "there"
    there.mkdir()
    (there / "files.json").write_text(json.dumps({"format": "clt-tracer files 1", "files": {name: [0, "0" * 64]}}))
    with pytest.raises(GraphError, match="which is no file of a store; do not trust it"):
        fetch(f"file://{there}", tmp_path / "copy")
    assert not list(tmp_path.glob("**/escaped*"))


FILE = '{"format": "clt-tracer files 1", "files": {"store.json": %s}}'


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[" * 200_000, "maximum recursion depth exceeded"),
        (FILE % "[1e999, 0]", "cannot convert float infinity to integer"),
        (FILE % "[NaN, 0]", "cannot convert float NaN to integer"),
        (FILE % "7", "cannot unpack non-iterable int object"),
        ('{"format": "photos"}', "its format is 'photos', not 'clt-tracer files 1'"),
    ],
)
def test_a_strange_list_of_files_is_told_in_one_line(tmp_path, content, told):
    (tmp_path / "files.json").write_text(content)
    with pytest.raises(GraphError, match=rf"files\.json is unreadable \({told}.*\); push the store again\.$"):
        fetch(f"file://{tmp_path}", tmp_path / "copy")


def test_errors_are_one_line(store, tmp_path, bucket):
    with pytest.raises(GraphError, match=r"has no files.json, so no store was pushed there; use trace push"):
        fetch("s3://graphs/nothing", tmp_path / "copy")
    with pytest.raises(GraphError, match=r"^cannot push .* to s3://no-such-bucket/x: .*; check the address"):
        push(store.folder, "s3://no-such-bucket/x")
    with pytest.raises(GraphError, match=r"^cannot fetch nonsense://x into .*Protocol not known"):
        fetch("nonsense://x", tmp_path / "copy")
    with pytest.raises(GraphError, match=r"^cannot fetch http://127.0.0.1:9/x into "):
        fetch("http://127.0.0.1:9/x", tmp_path / "copy")
    with pytest.raises(GraphError, match="nowhere does not exist; push a folder of graphs"):
        push(tmp_path / "nowhere", "memory://x")


def test_a_plain_web_server_is_read_but_not_pushed_to(store, tmp_path):
    push(store.folder, f"file://{tmp_path}/site/graphs")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "site"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/graphs"
        fetch(address, tmp_path / "copy")
        assert GraphStore(tmp_path / "copy").sql(COUNTS) == store.sql(COUNTS)
        with pytest.raises(GraphError, match=rf"^cannot push .* to {address}"):
            push(store.folder, address, replace=True)
        server.shutdown()
