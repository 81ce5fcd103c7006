import json
import re
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs import GraphError, GraphStore, graph_id_of
from graphs.schema import SCHEMA_VERSION


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def one_line(error):
    return "\n" not in str(error.value) and len(str(error.value)) > 20


# round trip


@pytest.mark.parametrize("seed", range(4))
def test_what_is_loaded_equals_what_was_saved(tmp_path, random_graph, seed):
    store, graph = GraphStore(tmp_path / "store"), random_graph(seed)
    assert store.load(store.save(graph)) == graph
    assert GraphStore(str(tmp_path / "store")).load(store.save(graph)) == graph


def test_empty_graphs_and_single_precision_come_back_as_they_were(tmp_path, make_graph, make_info):
    store = GraphStore(tmp_path)
    for graph in (
        make_graph("", [], info=make_info("")),
        make_graph("tl", []),
        make_graph("tl", [(0, 1, 0.1)], weight=np.float32([0.1])),
    ):
        loaded = store.load(store.save(graph))
        assert loaded == graph
        assert loaded.weight.dtype == graph.weight.dtype


def test_every_field_of_the_info_comes_back(tmp_path, make_graph, make_info):
    info = make_info(
        "a b",
        words=("", "b"),
        replacement_score=0.1,
        completeness_score=0.2,
        pruned_replacement_score=0.3,
        pruned_completeness_score=0.4,
        coverage=0.99,
        skipped_influence=0.01,
        logits_error=1e-6,
        conservation_error=1e-7,
        seconds=12.5,
        peak_memory_mb=100.0,
        config='{"coverage": 0.99}',
        tags=(("group", "states"), ("a 'quoted' name", "")),
    )
    store = GraphStore(tmp_path)
    loaded = store.load(store.save(make_graph("tl", [], info=info))).info
    assert loaded == info
    assert loaded.created_at.tzinfo is not None
    assert loaded.created_at.microsecond == 678901


# tags


def test_tags_group_graphs_in_sql(tmp_path, make_graph, make_info):
    store = GraphStore(tmp_path)
    for prompt, group, score in (("a", "x", 0.5), ("b", "x", 1.0), ("c", "y", 0.25)):
        store.save(make_graph("tl", [], info=make_info(prompt, replacement_score=score, tags=(("group", group),))))
    store.save(make_graph("tl", [], info=make_info("d", replacement_score=0.125)))
    query = "SELECT tags['group'] AS tag, avg(replacement_score) AS score FROM graphs GROUP BY 1 ORDER BY 1 NULLS LAST"
    assert [tuple(row.values()) for row in store.sql(query).to_pylist()] == [("x", 0.75), ("y", 0.25), (None, 0.125)]


def test_tags_are_no_part_of_the_question(make_info):
    assert graph_id_of(make_info("a")) == graph_id_of(make_info("a", tags=(("group", "x"),)))


def test_a_tag_is_given_once(make_info):
    with pytest.raises(GraphError, match="tags has a name twice"):
        make_info("a", tags=(("group", "x"), ("group", "y")))


def test_one_graph_is_found_by_its_id(tmp_path, random_graph):
    store = GraphStore(tmp_path)
    graph_id = graph_id_of(random_graph(0).info)
    assert store.find(graph_id) is None
    assert store.save(random_graph(0)) == graph_id
    assert [store.find(graph_id)] == store.list()
    (tmp_path / "graphs" / graph_id / "graph.parquet").write_bytes(b"torn")
    assert store.find(graph_id) is None


HOSTILE = [
    "'; DROP TABLE nodes; --",
    '"',
    "\0",
    "../../etc/passwd",
    "\n\r\t",
    "{}",
    "$word",
    "\U0001d518\U0001d52b",
    "\u202e",
    "NULL",
    " ",
]
hostile_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(HOSTILE)


def graph_of_texts(make_graph, make_info, texts, prompt):
    info = make_info(
        prompt, tokens=tuple(texts[:2]), token_ids=(3, 4), words=tuple(texts[1:3]), model=texts[3], transcoder=texts[4]
    )
    return make_graph("tfl", [(0, 1, 1.0), (1, 2, 1.0)], info=info, label=np.array(texts[:3], dtype=object))


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(hostile_texts, min_size=5, max_size=5), prompt=hostile_texts)
def test_any_text_comes_back_as_it_was(tmp_path_factory, make_graph, make_info, texts, prompt):
    store = GraphStore(tmp_path_factory.mktemp("hostile") / "store")
    graph = graph_of_texts(make_graph, make_info, texts, prompt)
    graph_id = store.save(graph)
    assert re.fullmatch("[a-z0-9][a-z0-9-]{0,63}", graph_id)
    assert store.load(graph_id) == graph


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_never_taken_for_sql(tmp_path, make_graph, make_info, text):
    store = GraphStore(tmp_path)
    store.save(graph_of_texts(make_graph, make_info, [text] * 5, text))
    [row] = store.sql("SELECT prompt, model, tokens FROM graphs WHERE prompt = $prompt", prompt=text).to_pylist()
    assert row == {"prompt": text, "model": text, "tokens": [text] * 2}
    assert store.sql("FROM strongest_path($word)", word=text)["strength"].to_pylist() == [1.0]


def test_text_that_is_no_unicode_is_refused_and_nothing_is_left(tmp_path, make_graph, make_info):
    store = GraphStore(tmp_path)
    with pytest.raises(GraphError, match="no valid Unicode"):
        store.save(make_graph("tl", [], label=np.array(["", "\ud800"], dtype=object)))
    with pytest.raises(GraphError, match="cannot be stored"):
        store.save(make_graph("tl", [], info=make_info(model="\ud800")))
    assert files_below(tmp_path) == ["store.json"]


# ids


def test_an_id_begins_with_the_prompts_words(tmp_path, make_graph, make_info):
    def id_of(prompt, **changes):
        return GraphStore(tmp_path).save(make_graph("tl", [], info=make_info(prompt, **changes)))

    assert re.fullmatch("the-capital-of-texas-is-[0-9a-f]{8}", id_of("The capital of Texas is"))
    assert re.fullmatch("cafe-au-lait-[0-9a-f]{8}", id_of("  Café, au\tlait! "))
    assert re.fullmatch("graph-[0-9a-f]{8}", id_of("日本"))
    special = id_of("<bos> hello", tokens=("<bos>", "hello"), words=("", "hello"))
    assert re.fullmatch("hello-[0-9a-f]{8}", special)
    long = id_of("one two three four five six seven eight nine ten")
    assert re.fullmatch("one-two-three-four-five-six-seven-eight-[0-9a-f]{8}", long)
    assert re.fullmatch("x{40}-[0-9a-f]{8}", id_of("x" * 70))


def test_the_same_question_replaces_its_graph_and_another_does_not(tmp_path, make_graph, make_info):
    store = GraphStore(tmp_path)
    first = store.save(make_graph("tl", [(0, 1, 1.0)]))
    again = store.save(make_graph("tfl", [(0, 1, 1.0)], info=make_info(seconds=9.0)))
    assert first == again
    assert store.load(first).n_nodes == 3
    assert len(list((tmp_path / "graphs" / first).iterdir())) == 3
    others = [make_info(model_revision="2"), make_info(transcoder="x"), make_info(config='{"coverage": 1}')]
    assert len({store.save(make_graph("tl", [], info=info)) for info in others} | {first}) == 4


@pytest.mark.parametrize("graph_id", ["../other", "", "/etc", "a/b", ".hidden", "UPPER", "a" * 65, "a\n", "ü"])
def test_what_is_no_id_never_becomes_a_path(tmp_path, graph_id):
    store = GraphStore(tmp_path / "store")
    (tmp_path / "other").mkdir()
    for use in (store.load, store.delete):
        with pytest.raises(GraphError, match="is no graph id"):
            use(graph_id)
    assert (tmp_path / "other").exists()


def test_an_id_may_be_shortened_while_it_is_the_only_one(tmp_path, make_graph, make_info):
    store = GraphStore(tmp_path)
    dallas, paris = (store.save(make_graph("tl", [], info=make_info(p))) for p in ("Dallas is in", "Paris is in"))
    assert store.resolve(dallas) == dallas
    assert store.resolve("dal") == dallas
    other = store.save(make_graph("tl", [], info=make_info("Dallas was in")))
    with pytest.raises(GraphError, match=f"'dallas' could be {dallas}, {other}; give more of the id"):
        store.resolve("dallas")
    with pytest.raises(GraphError, match=f"there is no graph 'pariss'; the closest are {paris}"):
        store.resolve("pariss")
    with pytest.raises(GraphError, match="there is no graph ''"):
        store.resolve("")
    with pytest.raises(GraphError, match=f"there is no graph 'paris-is'; the closest are {paris}"):
        store.load("paris-is")


def test_other_files_in_a_graphs_folder_survive_its_replacement(tmp_path, make_graph):
    store = GraphStore(tmp_path)
    folder = tmp_path / "graphs" / store.save(make_graph("tl", []))
    (folder / "supernodes.json").write_text("[]")
    (folder / "folder").mkdir()
    store.save(make_graph("tl", []))
    assert (folder / "supernodes.json").exists()
    store.delete(folder.name)
    assert not folder.exists()


# folders


def test_looking_at_a_folder_that_does_not_exist_creates_nothing(tmp_path):
    store = GraphStore(tmp_path / "new" / "store")
    assert (store.list(), store.damaged()) == ([], [])
    assert store.sql("SELECT count(*) AS n FROM nodes").to_pylist() == [{"n": 0}]
    assert not store.has_features("x")
    with pytest.raises(GraphError, match="there is no graph 'x'"):
        store.load("x")
    assert files_below(tmp_path) == []
    assert not (tmp_path / "new").exists()


def test_the_first_save_says_what_the_folder_is(tmp_path, make_graph):
    GraphStore(tmp_path / "store").save(make_graph("tl", []))
    assert json.loads((tmp_path / "store" / "store.json").read_text()) == {
        "format": "clt-tracer store",
        "schema_version": 3,
    }


def test_folders_of_others_are_refused(tmp_path, make_graph):
    (tmp_path / "file").write_text("x")
    with pytest.raises(GraphError, match="is a file, not a folder of graphs"):
        GraphStore(tmp_path / "file")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("x")
    with pytest.raises(GraphError, match="belongs to something else"):
        GraphStore(tmp_path / "photos")
    store = GraphStore(tmp_path / "later")  # the folder fills up after the store was made
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "cat.jpg").write_text("x")
    with pytest.raises(GraphError, match="belongs to something else"):
        store.save(make_graph("tl", []))


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (
            '{"format": "clt-tracer store", "schema_version": 4}',
            "schema version 4, and this program .* up to 3; upgrade",
        ),
        (
            '{"format": "photos", "schema_version": 1}',
            "belongs to something else: store.json is of another program",
        ),
        ("{", "store.json is unreadable"),
        ("[]", "belongs to something else: store.json is of another program"),
        ('{"a": 1}', "belongs to something else: store.json is of another program"),
        ('{"format": "clt-tracer store"}', "store.json is unreadable"),
        ('{"format": "clt-tracer store", "schema_version": "new"}', "store.json is unreadable"),
        ('{"format": "clt-tracer store", "schema_version": 1e400}', "store.json is unreadable"),
        pytest.param("[" * 200_000, "store.json is unreadable", id="deep"),
    ],
)
def test_descriptions_that_are_not_ours_are_refused(tmp_path, description, message):
    (tmp_path / "store.json").write_text(description)
    with pytest.raises(GraphError, match=message) as error:
        GraphStore(tmp_path)
    assert one_line(error)


def test_the_left_over_of_a_killed_first_save_is_no_stranger(tmp_path, make_graph):
    (tmp_path / ".store.json.0123.tmp").write_text("{")
    store = GraphStore(tmp_path)
    store.save(make_graph("tl", []))
    assert len(store.list()) == 1


# lists and deletion


def test_lists_are_newest_first_and_tell_sizes(tmp_path, make_graph, make_info):
    store, start = GraphStore(tmp_path), datetime(2025, 1, 1, tzinfo=UTC)
    for day, prompt in enumerate(["first", "third", "second"]):
        age = timedelta(days=[0, 2, 1][day])
        info = make_info(prompt, created_at=start + age)
        store.save(make_graph("tfl", [(0, 1, 1.0)], info=info))
    assert [stored.info.prompt for stored in store.list()] == ["third", "second", "first"]
    assert [(stored.n_nodes, stored.n_edges) for stored in store.list()] == [(3, 1)] * 3
    assert store.list()[0].graph_id.startswith("third-")


def test_a_deleted_graph_is_gone_and_the_others_stay(tmp_path, make_graph, make_info):
    store = GraphStore(tmp_path)
    gone, stays = (store.save(make_graph("tl", [], info=make_info(p))) for p in ("gone", "stays"))
    store.delete(gone)
    assert [stored.graph_id for stored in store.list()] == [stays]
    assert not (tmp_path / "graphs" / gone).exists()
    with pytest.raises(GraphError, match="there is no graph"):
        store.delete(gone)


def test_strange_folders_among_the_graphs_are_ignored(tmp_path, make_graph):
    store = GraphStore(tmp_path)
    graph_id = store.save(make_graph("tl", []))
    (tmp_path / "graphs" / ".DS_Store").write_text("x")
    (tmp_path / "graphs" / "Not An Id").mkdir()
    (tmp_path / "graphs" / "empty").mkdir()
    assert [stored.graph_id for stored in store.list()] == [graph_id]


def test_the_version_of_the_schema_is_with_every_graph(tmp_path, make_graph):
    store = GraphStore(tmp_path)
    store.save(make_graph("tl", []))
    assert store.sql("SELECT schema_version FROM graphs").to_pylist() == [{"schema_version": SCHEMA_VERSION}]
