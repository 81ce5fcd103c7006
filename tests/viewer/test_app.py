"""Pages and JSON through the test client: what they show, and whom they refuse."""

import json
from dataclasses import replace

import numpy as np
import pytest

from graphs import NodeKind
from tests.viewer.samples import make_features, make_graph
from viewer.app import create_app

HOSTILE = '"><img src=x onerror=window.__pwned=1>'


@pytest.fixture
def client(store):
    return create_app(store).test_client()


@pytest.fixture
def graph_id(store):
    graph = make_graph()
    store.save_features(make_features(graph), graph.info.transcoder)
    return store.save(graph)


def test_the_library_shows_prompt_answer_and_scores(client, graph_id):
    page = client.get("/").text
    assert f'<a href="/g/{graph_id}">the capital of</a>' in page
    assert "<strong>Austin</strong>" in page
    assert "75 %" in page
    assert "0.50 → 0.25" in page


def test_an_empty_store_shows_how_to_trace(client):
    assert 'trace "the capital of the state containing Dallas is"' in client.get("/").text


def test_a_damaged_graph_is_listed_with_its_reason_among_good_ones(client, store, graph_id):
    broken = store.save(make_graph("another prompt"))
    for file in (store.folder / "graphs" / broken).rglob("*nodes*"):
        file.write_bytes(b"broken")
    page = client.get("/").text
    assert f'href="/g/{graph_id}"' in page
    assert f'href="/g/{broken}"' not in page
    assert f"<code>{broken}</code>" in page
    answer = client.get(f"/g/{broken}")
    assert answer.status_code == 404
    assert f"graph {broken} is damaged" in answer.text


def test_the_page_of_a_graph_names_it(client, graph_id):
    page = client.get(f"/g/{graph_id}").text
    assert f'data-graph="{graph_id}"' in page
    assert "<title>the capital of</title>" in page


def test_what_is_shown_is_what_the_store_has_now(client, store, graph_id):
    last = store.load(graph_id).n_nodes - 1

    def weights() -> list[float]:
        return [edge["weight"] for edge in client.get(f"/api/graphs/{graph_id}/nodes/{last}").json["incoming"]]

    graph, before = store.load(graph_id), weights()
    assert weights() == before
    assert store.save(replace(graph, weight=graph.weight * 2)) == graph_id
    assert weights() == pytest.approx([2 * weight for weight in before])
    store.compact()
    assert weights() == pytest.approx([2 * weight for weight in before])
    store.delete(graph_id)
    assert client.get(f"/api/graphs/{graph_id}").status_code == 404


def test_an_unknown_graph_is_told_in_one_line(client):
    answer = client.get("/api/graphs/nothing")
    assert answer.status_code == 404
    assert answer.json["error"].startswith("there is no graph 'nothing'")
    assert "there is no graph" in client.get("/g/nothing").text


def test_the_data_of_a_graph_has_all_nodes(client, store, graph_id):
    graph = store.load(graph_id)
    answer = client.get(f"/api/graphs/{graph_id}").json
    assert [node["data"]["node"] for node in answer["nodes"]] == list(range(graph.n_nodes))
    assert answer["n_edges"] == graph.n_edges
    assert len(answer["edges"]) == min(graph.n_edges, 300)


def test_a_node_comes_with_its_edges_and_its_features_record(client, store, graph_id):
    graph = store.load(graph_id)
    node = int(np.flatnonzero((graph.kind == NodeKind.FEATURE) & (graph.layer == 1))[0])
    answer = client.get(f"/api/graphs/{graph_id}/nodes/{node}").json
    assert {entry["node"] for entry in answer["incoming"]} == set(graph.source[graph.target == node].tolist())
    assert {entry["node"] for entry in answer["outgoing"]} == set(graph.target[graph.source == node].tolist())
    assert sum(entry["share"] for entry in answer["incoming"]) == pytest.approx(0.8)  # of the whole input
    assert sum(answer["input_by_kind"].values()) == pytest.approx(0.8)
    shares = [entry["share"] for entry in answer["incoming"]]
    assert shares == sorted(shares, reverse=True)
    assert answer["record"]["label_source"] == "fires on"
    assert answer["record"]["examples"][0]["tokens"] == ["in", " Texas", " and"]


def test_a_feature_without_record_and_a_token_have_none(client, store):
    graph_id = store.save(make_graph())
    node = int(np.flatnonzero(store.load(graph_id).kind == NodeKind.FEATURE)[0])
    assert client.get(f"/api/graphs/{graph_id}/nodes/{node}").json["record"] is None
    assert client.get(f"/api/graphs/{graph_id}/nodes/0").json["record"] is None


def test_a_node_that_does_not_exist_is_not_found(client, graph_id):
    answer = client.get(f"/api/graphs/{graph_id}/nodes/999")
    assert answer.status_code == 404
    assert "has no node 999; its nodes are 0 … " in answer.json["error"]


def test_what_has_no_value_is_null(client, graph_id):
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    text = client.get(f"/api/graphs/{graph_id}/nodes/0").text
    assert json.loads(text, parse_constant=refuse)["activation"] is None
    whole = json.loads(client.get(f"/api/graphs/{graph_id}").text, parse_constant=refuse)
    assert whole["nodes"][-1]["data"]["influence"] is None


def test_hostile_text_is_escaped(client, store):
    graph_id = store.save(make_graph(f"say {HOSTILE}", label=HOSTILE, answer=HOSTILE))
    for path in ("/", f"/g/{graph_id}"):
        page = client.get(path).text
        assert "<img" not in page
        assert "&lt;img" in page
    assert client.get(f"/api/graphs/{graph_id}").content_type == "application/json"


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", "/", 200),
        ("HEAD", "/", 200),
        ("GET", "/healthz", 200),
        ("GET", "/favicon.ico", 200),
        ("GET", "/static/style.css", 200),
        ("GET", "/g/none", 404),
        ("GET", "/api/graphs/none", 404),
        ("GET", "/static/none.js", 404),
        ("GET", "/none", 404),
        ("POST", "/", 405),
        ("DELETE", "/api/graphs/none", 405),
        ("OPTIONS", "/", 405),
        ("PUT", "/none", 405),
    ],
)
def test_every_response_carries_the_protecting_headers(client, method, path, code):
    answer = client.open(path, method=method)
    assert answer.status_code == code
    _assert_protected(answer)


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "10.0.0.1", "[::1]:80", ""]
)
@pytest.mark.parametrize("path", ["/", "/healthz", "/static/style.css", "/api/graphs/none", "/none"])
def test_a_foreign_host_is_refused_everywhere(client, host, path):
    answer = client.get(path, headers={"Host": host})
    assert answer.status_code == 400
    _assert_protected(answer)


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "localhost:8000"])
def test_own_hosts_are_served(client, host):
    assert client.get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    ("site", "code"), [("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)]
)
def test_other_sites_may_not_ask_for_data(client, graph_id, site, code):
    answer = client.get(f"/api/graphs/{graph_id}", headers={"Sec-Fetch-Site": site})
    assert answer.status_code == code
    _assert_protected(answer)


@pytest.mark.parametrize(
    "path",
    [
        "/g/..",
        "/g/../secret",
        "/g/%2e%2e",
        "/g/..%2fsecret",
        "/g/%00",
        "/g/UPPER",
        "/g/" + "a" * 65,
        "/api/graphs/..%2f..%2fetc",
        "/api/graphs/.hidden",
        "/api/graphs/x/nodes/-1",
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/..%2fapp.py",
    ],
)
def test_paths_lead_nowhere_outside(client, path):
    assert client.get(path).status_code == 404


def test_only_the_current_version_of_a_static_file_is_kept(client):
    address = next(part for part in client.get("/").text.split('"') if part.startswith("/static/style.css?v="))
    assert client.get(address).headers["Cache-Control"] == "private, max-age=31536000, immutable"
    assert client.get("/static/style.css?v=old").headers["Cache-Control"] == "no-cache"
    assert client.get("/static/none.css").headers["Cache-Control"] == "no-cache"


def test_a_token_moves_from_the_address_to_a_cookie(store, graph_id):
    client = create_app(store, token="sesame").test_client()
    for path in ("/", "/static/style.css", f"/api/graphs/{graph_id}", "/?token=wrong", "/?token=Ω"):
        answer = client.get(path)
        assert answer.status_code == 403
        _assert_protected(answer)
    assert client.get("/healthz").status_code == 200

    answer = client.get(f"/g/{graph_id}?token=sesame&n=3")
    assert answer.status_code == 302
    assert answer.headers["Location"] == f"/g/{graph_id}?n=3"
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert client.get(f"/g/{graph_id}?n=3").status_code == 200


def test_a_token_never_leads_to_another_site(store):
    client = create_app(store, token="sesame").test_client()
    answer = client.get("//evil.example/?token=sesame", base_url="http://localhost")
    assert not answer.headers.get("Location", "").startswith("//")


def _assert_protected(answer) -> None:
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self';")
    assert "unsafe" not in answer.headers["Content-Security-Policy"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["X-Frame-Options"] == "DENY"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert answer.headers["Content-Type"]
    assert "Access-Control-Allow-Origin" not in answer.headers


def test_a_graph_too_large_to_draw_is_sent_in_part_under_its_own_numbers(client, store, monkeypatch):
    graph = make_graph(per_cell=9)
    graph_id = store.save(graph)
    monkeypatch.setattr("viewer.details.MOST_NODES", 5)
    monkeypatch.setattr("viewer.details.MOST_CONNECTIONS", 3)
    answer = client.get(f"/api/graphs/{graph_id}").json
    numbers = [node["data"]["node"] for node in answer["nodes"]]
    assert len(numbers) == 5 + 3 + 2
    assert answer["n_nodes"] == graph.n_nodes
    assert [node["data"]["kind"] for node in answer["nodes"]] == [NodeKind(graph.kind[n]).text for n in numbers]
    known = {f"n{number}" for number in numbers}
    assert {edge["data"][end] for edge in answer["edges"] for end in ("source", "target")} <= known
    details = client.get(f"/api/graphs/{graph_id}/nodes/{graph.n_nodes - 1}").json
    assert details["n_incoming"] == (graph.target == graph.n_nodes - 1).sum() > 3
    assert len(details["incoming"]) == 3
