"""The page for SQL through the test client: who may ask, what is answered, and that nothing else happens."""

import csv
import html
import re
from urllib.parse import parse_qs, urlsplit

import pytest

from graphs.sandbox import query
from graphs.statements import macro_example, macros
from tests.viewer.samples import make_graph
from viewer.app import create_app

HOSTILE = '"><img src=x onerror=window.__pwned=1>'
ENDLESS = "WITH RECURSIVE t AS (SELECT 1 AS x UNION ALL SELECT x + 1 FROM t) SELECT count(*) FROM t"
OWN = {"Sec-Fetch-Site": "same-origin"}


@pytest.fixture
def client(store):
    return create_app(store).test_client()


@pytest.fixture
def graph_id(store):
    return store.save(make_graph())


def ask(client, sql, headers=OWN, **fields):
    return client.post("/sql", data={"q": sql} | fields, headers=headers)


def cells(page):
    body = re.search(r'<table class="answer-table">.*?<tbody>(.*?)</tbody>', page.text, re.DOTALL).group(1)
    return [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in body.split("</tr>")[:-1]]


def error(page):
    return re.search(r'<p class="problem" role="alert">(.*?)</p>', page.text).group(1)


def test_a_link_fills_in_the_form_and_runs_nothing(client, graph_id, monkeypatch):
    monkeypatch.setattr("viewer.sql.query", pytest.fail)
    page = client.get("/sql", query_string={"q": "SELECT $word", "p_word": "Dallas", "p_other": "not in the query"})
    assert page.status_code == 200
    assert "\nSELECT $word</textarea>" in page.text
    assert re.findall(r'name="p_(\w+)" value="(\w*)"', page.text) == [("word", "Dallas")]
    assert "answer-table" not in page.text


def test_the_answer_is_a_table(client, graph_id):
    page = ask(client, "SELECT kind, count(*) AS n, NULL AS a, 0.1234567::DOUBLE AS b FROM nodes GROUP BY 1 ORDER BY 1")
    assert page.status_code == 200
    null = '<span class="quiet">NULL</span>'
    assert cells(page) == [
        ["error", "6", null, "0.123457"],
        ["feature", "6", null, "0.123457"],
        ["logit", "2", null, "0.123457"],
        ["token", "3", null, "0.123457"],
    ]
    assert re.search(r"4 rows, in \d+\.\d s", page.text)


def test_ids_and_nodes_lead_to_the_graph(client, graph_id):
    page = ask(client, "SELECT graph_id, node, 'x/../y' AS other FROM nodes WHERE node = 3")
    assert cells(page) == [[f'<a href="/g/{graph_id}">{graph_id}</a>', f'<a href="/g/{graph_id}?n=3">3</a>', "x/../y"]]
    assert cells(ask(client, "SELECT '../etc' AS graph_id, 3 AS node")) == [["../etc", "3"]]
    assert cells(ask(client, "SELECT 3 AS node")) == [["3"]]
    assert cells(ask(client, "SELECT 'a' AS graph_id, -1 AS node"))[0][1] == "-1"
    assert cells(ask(client, "SELECT 'a' AS graph_id, true AS node"))[0][1] == "True"


def test_the_page_of_a_graph_leads_to_a_query_for_its_nodes(client, graph_id):
    [link] = re.findall(r'<a href="(/sql[^"]*)">SQL</a>', client.get(f"/g/{graph_id}").text)
    fields = {name: values[0] for name, values in parse_qs(urlsplit(link.replace("&amp;", "&")).query).items()}
    page = client.post("/sql", data=fields, headers=OWN)
    assert len(cells(page)) == 17
    assert {row[0] for row in cells(page)} == {f'<a href="/g/{graph_id}">{graph_id}</a>'}


def test_parameters_are_numbers_or_texts_as_they_read(client, graph_id):
    sql = "SELECT typeof($a), typeof($b), $b || '$5' WHERE $c IS NULL"
    assert cells(ask(client, sql, p_a="3", p_b="O'Neill", p_c="null")) == [["INTEGER", "VARCHAR", "O&#39;Neill$5"]]


def test_a_parameter_without_a_value_is_asked_for(client, graph_id):
    page = ask(client, "SELECT $word")
    assert page.status_code == 400
    assert "word" in error(page)
    assert 'name="p_word"' in page.text


def test_rows_beyond_the_most_are_left_out_and_that_is_said(client, graph_id):
    page = ask(client, "FROM range(1001)")
    assert len(cells(page)) == 1000
    assert "The first 1,000 rows; there are more" in page.text


def test_a_long_text_is_cut_with_its_length(client, graph_id):
    [[text]] = cells(ask(client, "SELECT repeat('a', 2000)"))
    assert text == "a" * 500 + " … (2,000 characters)"


def test_lists_and_maps_are_json(client, graph_id):
    assert cells(ask(client, "SELECT [1, 2], MAP {'a': 1.5::DOUBLE}, {'x': NULL}")) == [
        ["[1, 2]", "{&#34;a&#34;: 1.5}", "{&#34;x&#34;: null}"]
    ]


def test_hostile_cells_names_and_queries_are_escaped(client, store):
    store.save(make_graph(f"say {HOSTILE}", label=HOSTILE, answer=HOSTILE))
    name = HOSTILE.replace('"', '""')
    page = ask(client, f'SELECT prompt, label AS "{name}", [label] FROM nodes JOIN graphs USING (graph_id)')
    assert page.status_code == 200
    assert page.text.count("&lt;img") > 3
    assert "<img" not in page.text
    for refused in (f"SELECT '{HOSTILE}' FROM", f'SELECT "{name}"', "</textarea><script>1</script>"):
        page = ask(client, refused)
        assert page.status_code == 400
        assert "<img" not in page.text
        assert "<script>" not in page.text


@pytest.mark.parametrize(
    ("sql", "told"),
    [
        ("", "the query is empty"),
        ("SELEKT", "syntax error"),
        ("SELECT 1; SELECT 2", "2 statements"),
        ("DELETE FROM nodes", "DELETE statements are not allowed"),
        ("SELECT * FROM read_csv('/etc/passwd')", "disabled"),
        ("SELECT length(repeat('a', 3000000000))", "memory"),
    ],
)
def test_what_cannot_be_answered_is_told_in_one_line_beside_the_query(client, graph_id, sql, told):
    page = ask(client, sql)
    assert page.status_code == 400
    assert re.search(told, error(page))
    assert f"\n{sql}</textarea>" in page.text.replace("&#39;", "'")


def test_a_query_without_end_is_stopped(client, graph_id, monkeypatch):
    monkeypatch.setattr("viewer.sql.SECONDS", 2.0)
    page = ask(client, ENDLESS)
    assert (page.status_code, "took longer than 2 s and was stopped" in error(page)) == (400, True)


def test_more_queries_at_once_than_there_are_places_are_refused(client, graph_id, monkeypatch):
    asked = []  # the first question asks the second while it is answered, and that the third

    def ask_another_first(*arguments, **limits):
        if len(asked) < 2:
            asked.append(None)
            asked[asked.index(None)] = ask(client.application.test_client(), "SELECT 2")
        return query(*arguments, **limits)

    monkeypatch.setattr("viewer.sql.query", ask_another_first)
    assert ask(client, "SELECT 1").status_code == 200
    assert sorted(page.status_code for page in asked) == [200, 400]
    [refused] = [page for page in asked if page.status_code == 400]
    assert "2 queries are being answered already" in error(refused)
    assert ask(client, "SELECT 3").status_code == 200


def test_an_answer_comes_as_a_file_whole_or_not_at_all(client, graph_id):
    answer = ask(client, "SELECT node, [kind] AS kinds FROM nodes WHERE node < 2", **{"as": "csv"})
    assert answer.content_type == "text/csv; charset=utf-8"
    assert answer.headers["Content-Disposition"] == 'attachment; filename="answer.csv"'
    assert answer.text == '"node","kinds"\n0,"[""token""]"\n1,"[""token""]"\n'
    page = ask(client, "FROM range(100001)", **{"as": "csv"})
    assert (page.status_code, "more than 100,000 rows" in error(page)) == (400, True)


@pytest.mark.parametrize("site", ["cross-site", "same-site", "none", "", None])
def test_only_the_form_of_the_page_itself_may_ask(client, graph_id, site, monkeypatch):
    monkeypatch.setattr("viewer.sql.query", pytest.fail)
    answer = ask(client, "SELECT 1", headers={} if site is None else {"Sec-Fetch-Site": site})
    assert answer.status_code == 403
    assert "Only the form on the viewer&#39;s own page" in answer.text


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS"])
def test_other_methods_are_refused(client, method):
    answer = client.open("/sql", method=method, headers=OWN)
    assert answer.status_code == 405
    assert set(answer.headers["Allow"].split(", ")) == {"GET", "HEAD", "POST"}


def test_a_query_too_long_is_refused(client, graph_id):
    assert ask(client, "SELECT '" + "a" * (300 << 10) + "'").status_code == 413


def test_a_viewer_with_a_token_answers_only_who_has_it(store, graph_id):
    client = create_app(store, token="sesame").test_client()
    assert ask(client, "SELECT 1").status_code == 403
    client.get("/?token=sesame")
    assert cells(ask(client, "SELECT 1")) == [["1"]]


def test_a_saved_query_that_cannot_be_read_harms_nothing_else(client, store, graph_id, tmp_path):
    store.save_query("good", "SELECT 1")
    folder = store.folder / "queries"
    (folder / "latin.sql").write_bytes(b"SELECT '\xe9'")
    (folder / "folder.sql").mkdir()
    (tmp_path / "secret").write_text("secret")
    (folder / "link.sql").symlink_to(tmp_path / "secret")
    (folder / "large.sql").write_text("SELECT 1 --" + "x" * 300_000)
    assert cells(ask(client, "SELECT 1")) == [["1"]]
    for name in ("latin", "folder", "link", "large", "nothing", "../secret"):
        page = client.get("/sql", query_string={"saved": name})
        assert page.status_code == 404
        assert re.search("there is no readable query|is no name for a query", error(page))
        assert "secret</textarea>" not in page.text


VALUES = {
    "TIMESTAMP '290000-01-01'": "290000-01-01 00:00:00",
    "'infinity'::DATE": "infinity",
    "DATE '0044-03-15 (BC)'": "0044-03-15 (BC)",
    "'2020-01-01 00:00:00.123456789'::TIMESTAMP_NS": "2020-01-01 00:00:00.123456789",
    "TIMESTAMPTZ '2020-01-01 00:00:00+02'": "2019-12-31 22:00:00+00",
    "TIME '24:00:00'": "24:00:00",
    "INTERVAL 3 MONTH": "3 months",
    "'0101'::BIT": "0101",
    "'\\xAA\\x00'::BLOB": "\\xAA\\x00",
    "uuid '00000000-0000-0000-0000-000000000001'": "00000000-0000-0000-0000-000000000001",
    "MAP {[1]: 2}": "{[1]=2}",
    "[TIMESTAMP '290000-01-01']": "['290000-01-01 00:00:00']",
    "(SELECT sum(range) FROM range(4))": "6",
    "1e300::DOUBLE": "1e+300",
}


def test_values_of_any_type_are_shown_and_written_as_duckdb_writes_them(client, graph_id):
    sql = f"SELECT {', '.join(VALUES)}"
    assert [[html.unescape(cell) for cell in row] for row in cells(ask(client, sql))] == [list(VALUES.values())]
    [_, row] = csv.reader(ask(client, sql, **{"as": "csv"}).text.splitlines())
    assert row == list(VALUES.values())


def test_a_query_whose_reader_has_gone_is_stopped(client, graph_id):
    gone = {"waitress.client_disconnected": lambda: True}
    page = client.post("/sql", data={"q": ENDLESS}, headers=OWN, environ_overrides=gone)
    assert "nobody waits for its answer any more" in error(page)


def test_damaged_graphs_that_are_left_out_are_counted(client, store, graph_id):
    broken = store.save(make_graph("another prompt"))
    for file in (store.folder / "graphs" / broken).rglob("*nodes*"):
        file.write_bytes(b"broken")
    page = ask(client, "SELECT count(DISTINCT graph_id) FROM nodes")
    assert cells(page) == [["1"]]
    assert "1 damaged graph is left out" in page.text


def test_values_that_are_no_numbers_of_sql_are_texts(client, graph_id):
    values = {"p_a": '{"a":' * 20000, "p_b": "9" * 5000, "p_c": "9" * 4000, "p_d": "1e400"}
    page = ask(client, "SELECT typeof($a), typeof($b), typeof($c), typeof($d)", **values)
    assert cells(page) == [["VARCHAR"] * 4]


def test_saved_queries_examples_and_columns_are_listed(client, store, graph_id):
    store.save_query("by-kind", "SELECT kind FROM nodes")
    page = client.get("/sql").text
    assert '<a href="/sql?saved=by-kind">by-kind</a>' in page
    assert "\nSELECT kind FROM nodes\n</textarea>" in client.get("/sql?saved=by-kind").text
    for sql in macros().values():
        assert macro_example(sql).replace("'", "&#39;") in page
    assert "<code>reaches_answer</code>" in page
