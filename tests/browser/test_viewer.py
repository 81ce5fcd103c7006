"""The viewer in a real Chromium: what a reader does, without an error and without a request to anywhere else."""

import os
import queue
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from graphs import AttributionGraph, GraphStore, NodeKind
from tests.viewer.samples import make_features, make_graph
from viewer.serve import serve

playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs the package playwright")

pytestmark = pytest.mark.browser

HOSTILE = '"><img src=x onerror=window.__pwned=1>'
ARGUMENTS = [
    "--no-sandbox",  # a container has no user namespaces for it, and only our own pages are opened
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@dataclass
class Visit:
    """A page and everything that went wrong on it."""

    page: object
    problems: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def graphs() -> list[AttributionGraph]:
    """A plain graph, one whose every text is an attack, and one of many layers and tokens."""
    plain = make_graph("the capital of the state containing Dallas is", n_layers=3, per_cell=2)
    hostile = make_graph(f"say {HOSTILE} now", label=HOSTILE, answer=HOSTILE)
    large = make_graph(" ".join(f"internationalization{place}" for place in range(24)), n_layers=26)
    return [plain, replace(hostile, info=replace(hostile.info, transcoder=f"clt {HOSTILE}", model=HOSTILE)), large]


@pytest.fixture(scope="module")
def store(tmp_path_factory, graphs) -> GraphStore:
    store = GraphStore(tmp_path_factory.mktemp("viewer") / "store")
    for graph, text in zip(graphs, (" Texas", HOSTILE, " Texas"), strict=True):
        store.save(graph)
        store.save_features(make_features(graph, text=text, label=text.strip()), graph.info.transcoder)
    return store


@pytest.fixture(scope="module")
def address(store) -> str:
    ready = queue.Queue()
    threading.Thread(target=serve, args=(store,), kwargs={"port": 0, "on_ready": ready.put}, daemon=True).start()
    return ready.get(timeout=20)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        tell = pytest.fail if os.environ.get("REQUIRE_BROWSER") == "1" else pytest.skip
        tell("no Chromium on the PATH; install one to run the browser tests")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture(params=[(1440, 900), (390, 844)], ids=["wide", "narrow"])
def visit(browser, request) -> Iterator[Visit]:
    width, height = request.param
    context = browser.new_context(viewport={"width": width, "height": height})
    context.add_init_script(
        "document.addEventListener('securitypolicyviolation', (event) => console.error('CSP', event.blockedURI))"
    )
    visit = Visit(context.new_page())
    visit.page.on("console", lambda message: message.type == "error" and visit.problems.append(message.text))
    visit.page.on("pageerror", lambda error: visit.problems.append(str(error)))

    def keep_inside(route) -> None:
        if urlsplit(route.request.url).hostname == "127.0.0.1":
            route.continue_()
        else:
            visit.foreign.append(route.request.url)
            route.abort()

    context.route("**/*", keep_inside)
    yield visit
    assert visit.page.evaluate("window.__pwned") is None
    assert visit.problems == []
    assert visit.foreign == []
    context.close()


@pytest.mark.parametrize("number", [0, 1], ids=["plain", "hostile"])
def test_a_reader_explores_a_graph(visit, address, graphs, number):
    page, graph = visit.page, graphs[number]
    _open(page, address, graph)
    assert page.locator("header h1").text_content() == graph.info.prompt

    node = _most_connected_feature(graph)
    _click(page, node)
    page.wait_for_selector("#promoted")
    _assert_lists_neighbours(page, graph, node)
    assert "not in this graph 20" in page.locator("#panel").inner_text()
    assert _inside(page.locator("#promoted").inner_text(), "Austin", "+1.50")
    assert _inside(page.locator("#suppressed").inner_text(), "the", "−0.750")
    assert page.locator(".examples li").count() == 1
    assert page.locator(".examples .hot.peak").inner_text().strip() == (" Texas", HOSTILE)[number].strip()
    assert page.locator("svg.histogram rect").count() == 20

    page.reload()
    page.wait_for_selector('[data-ready="1"]')
    assert f"n={node}" in page.url
    _assert_lists_neighbours(page, graph, node)


def test_a_connection_leads_on_and_back(visit, address, graphs):
    page, graph = visit.page, graphs[0]
    node = _most_connected_feature(graph)
    _open(page, address, graph, f"?n={node}")
    link = page.locator("#incoming button").first
    following = int(link.get_attribute("data-node"))
    link.focus()
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile(rf"n={following}\b"))
    page.wait_for_selector("#panel h2:focus")
    _assert_lists_neighbours(page, graph, following)

    page.go_back()
    page.wait_for_url(re.compile(rf"n={node}\b"))
    page.wait_for_selector(f'#panel[data-node="{node}"]')
    _assert_lists_neighbours(page, graph, node)

    page.keyboard.press("Escape")
    page.wait_for_selector("#panel:not([data-node])")
    assert page.evaluate("__trace.cy.$('.picked, .dim, .lit, .added').length") == 0
    assert "n=" not in page.url
    assert page.locator("#incoming").count() == 0


def test_the_slider_hides_the_less_influential(visit, address, graphs):
    page, graph = visit.page, graphs[0]
    _open(page, address, graph)
    assert f"{graph.n_nodes} of {graph.n_nodes} nodes shown" in page.locator("#shown").text_content()
    page.locator("#threshold").fill("0.5")
    always = (graph.kind == NodeKind.TOKEN) | (graph.kind == NodeKind.LOGIT)
    expected = np.flatnonzero(always | (graph.cumulative_influence <= 0.5)).tolist()
    assert len(expected) < graph.n_nodes
    assert _displayed(page) == expected
    assert f"{len(expected)} of {graph.n_nodes} nodes shown" in page.locator("#shown").text_content()
    assert "thr=0.5" in page.url

    page.reload()
    page.wait_for_selector('[data-ready="1"]')
    assert _displayed(page) == expected


def test_the_list_of_nodes_is_a_way_in_without_the_picture(visit, address, graphs):
    page, graph = visit.page, graphs[0]
    _open(page, address, graph)
    page.locator(".list summary").focus()
    page.keyboard.press("Enter")
    node = _most_connected_feature(graph)
    page.locator(f'#nodes button[data-node="{node}"]').focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#promoted")
    _assert_lists_neighbours(page, graph, node)
    assert f"{np.count_nonzero(graph.target == node)} incoming" in page.locator("#status").text_content()


def test_a_node_that_does_not_exist_is_told(visit, address, graphs):
    page = visit.page
    _open(page, address, graphs[0], "?n=9999")
    assert "has no node 9999" in page.locator("#panel").inner_text()
    # the browser itself reports every 404 in its console
    assert [text for text in visit.problems if "404" not in text] == []
    visit.problems.clear()


def test_of_a_graph_too_large_to_draw_the_rest_is_reached_over_connections(visit, address, graphs, monkeypatch):
    page, graph = visit.page, graphs[0]
    monkeypatch.setattr("viewer.details.MOST_NODES", 4)
    _open(page, address, graph)
    always = int(np.count_nonzero((graph.kind == NodeKind.TOKEN) | (graph.kind == NodeKind.LOGIT)))
    assert len(_displayed(page)) == always + 4
    assert f"the most important of {graph.n_nodes}" in page.locator("#shown").text_content()
    hidden = sorted(set(range(graph.n_nodes)) - set(_displayed(page)))
    node = next(one for one in hidden if graph.kind[one] == NodeKind.FEATURE)
    page.goto(f"{page.url}?n={node}")
    page.wait_for_selector(f'#panel[data-node="{node}"]')
    _assert_lists_neighbours(page, graph, node)
    answer = graph.n_nodes - 1
    page.goto(page.url.replace(f"n={node}", f"n={answer}"))
    page.wait_for_selector(f'#panel[data-node="{answer}"]')
    drawn = set(_displayed(page)) & set(graph.source[graph.target == answer].tolist())
    assert page.evaluate("__trace.cy.$('edge.lit').length") == len(drawn)


@pytest.mark.slow
@pytest.mark.parametrize("fitted", [False, True], ids=["opened", "fitted"])
def test_names_of_many_layers_and_tokens_do_not_cover_each_other(visit, address, graphs, fitted):
    page, graph = visit.page, graphs[2]
    _open(page, address, graph)
    if fitted:
        page.locator("#fit").click()
    for axis, first, last, room in (("layers", "top", "bottom", 12), ("words", "left", "right", 40)):
        spans = page.evaluate(
            "axis => [...document.querySelectorAll(`#${axis} span:not([hidden])`)].map(span => "
            "({ text: span.textContent, ...span.getBoundingClientRect().toJSON() }))",
            axis,
        )
        spans.sort(key=lambda span: span[first])
        assert len(spans) >= 5
        assert all(span[last] - span[first] > room for span in spans)
        assert all(one[last] <= other[first] + 1 for one, other in pairwise(spans))
        assert {"layers": "output", "words": graph.info.tokens[-1]}[axis] in [span["text"] for span in spans]


@pytest.mark.slow
def test_a_reader_asks_in_sql_and_goes_from_the_answer_to_a_node(visit, address, graphs):
    page, graph = visit.page, graphs[1]
    _open(page, address, graph)
    page.get_by_role("link", name="SQL", exact=True).click()
    page.wait_for_url(re.compile("/sql"))  # loaded with its scripts: before that no key does anything
    query = page.locator("#q")
    assert "WHERE graph_id = $graph" in query.input_value()
    assert page.locator("table.answer-table").count() == 0
    query.press("Control+Enter")
    rows = page.locator("table.answer-table tbody tr")
    playwright.expect(rows).to_have_count(min(graph.n_nodes, 50), timeout=30_000)
    assert HOSTILE in page.locator("table.answer-table").inner_text()

    query.fill("SELECT graph_id, node FROM nodes WHERE graph_id = $graph AND layer = $layer AND kind = 'feature'")
    page.get_by_role("button", name="Link to it").click()
    page.wait_for_url(re.compile("p_graph="))
    assert page.locator("#p_graph").input_value() != ""
    page.locator("#p_layer").fill("1")
    page.get_by_role("button", name="Run").click()
    found = int(np.count_nonzero((graph.kind == NodeKind.FEATURE) & (graph.layer == 1)))
    playwright.expect(rows).to_have_count(found, timeout=30_000)

    with page.expect_download() as download:
        page.get_by_role("button", name="Download CSV").click()
    assert Path(download.value.path()).read_text("utf-8").startswith('"graph_id","node"\n')

    link = rows.first.locator("td a").nth(1)
    node = int(link.inner_text())
    link.click()
    page.wait_for_selector(f'#panel[data-node="{node}"]')
    _assert_lists_neighbours(page, graph, node)


def test_the_form_of_another_server_is_refused(visit, address):
    form = f'<form method="post" action="{address}sql"><input name="q" value="SELECT 1"><button>Win</button></form>'

    class Attack(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/" else 204)  # nothing else, such as an icon
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(form.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Attack) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        visit.page.goto(f"http://127.0.0.1:{server.server_port}/")
        with visit.page.expect_response(address + "sql") as answer:
            visit.page.get_by_role("button", name="Win").click()
        server.shutdown()
    assert (answer.value.request.method, answer.value.status) == ("POST", 403)
    visit.page.wait_for_load_state("networkidle")
    # the browser itself reports every 403
    assert [text for text in visit.problems if "403" not in text] == []
    visit.problems.clear()


def test_a_page_fits_its_window(visit, address, graphs):
    for path in ("/", "/sql", f"/g/{_id(address, visit.page, graphs[0])}"):
        visit.page.goto(address.rstrip("/") + path)
        overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert visit.page.evaluate(overflow) <= 0


def _open(page, address: str, graph: AttributionGraph, query: str = "") -> None:
    page.goto(f"{address}g/{_id(address, page, graph)}{query}")
    page.wait_for_selector('[data-ready="1"]')


def _id(address: str, page, graph: AttributionGraph) -> str:
    """The graph's id, as the library links to it."""
    page.goto(address)
    return page.get_by_role("link", name=graph.info.prompt, exact=True).get_attribute("href").removeprefix("/g/")


def _click(page, node: int) -> None:
    """A click of the mouse where the node is; before that the node is moved into sight, as a reader would do."""
    page.evaluate("id => { __trace.cy.center(__trace.cy.getElementById(id)); }", f"n{node}")
    page.locator("#graph").scroll_into_view_if_needed()
    at = page.evaluate("id => __trace.cy.getElementById(id).renderedPosition()", f"n{node}")
    box = page.locator("#graph").bounding_box()
    page.mouse.click(box["x"] + at["x"], box["y"] + at["y"])


def _most_connected_feature(graph: AttributionGraph) -> int:
    degree = np.bincount(graph.source, minlength=graph.n_nodes) * np.bincount(graph.target, minlength=graph.n_nodes)
    return int(np.argmax(np.where(graph.kind == NodeKind.FEATURE, degree, -1)))


def _displayed(page) -> list[int]:
    # by style: Cytoscape's ":visible" tells the state of the last frame
    shown = "__trace.cy.nodes().filter(node => node.style('display') !== 'none').map(node => node.data('node'))"
    return page.evaluate(shown)


def _assert_lists_neighbours(page, graph: AttributionGraph, node: int) -> None:
    for side, expected in (
        ("incoming", graph.source[graph.target == node]),
        ("outgoing", graph.target[graph.source == node]),
    ):
        listed = page.evaluate(
            "side => [...document.querySelectorAll(`#${side} button`)].map(button => Number(button.dataset.node))", side
        )
        assert sorted(listed) == sorted(expected.tolist())


def _inside(text: str, *parts: str) -> bool:
    return all(part in text for part in parts)
