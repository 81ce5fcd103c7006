"""The viewer's pages and its JSON, over one store that is only read."""

import hashlib
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from flask import Flask, abort, jsonify, render_template, request
from flask.json.provider import DefaultJSONProvider
from flask.typing import ResponseReturnValue
from werkzeug.exceptions import HTTPException
from werkzeug.routing import BaseConverter

from graphs import AttributionGraph, GraphError, GraphStore
from graphs.answers import plain
from viewer.details import feature_record, graph_details, library, node_details, score_text
from viewer.elements import visible
from viewer.guard import protect
from viewer.sql import add_sql_page, nodes_address


def create_app(store: GraphStore, *, token: str | None = None) -> Flask:
    """The web application over the store; with a token, only who knows it is let in."""
    app = Flask("viewer")
    app.json = _Json(app)
    app.url_map.converters["graph"] = _GraphId
    versions = _versions(Path(app.static_folder or ""))
    app.jinja_env.globals["asset"] = lambda name: f"/static/{name}?v={versions[name]}"
    app.jinja_env.filters["visible"] = visible
    protect(app, token=token, versions=versions)
    graphs = _Graphs(store)
    _add_pages(app, store, graphs)
    _add_api(app, store, graphs)
    add_sql_page(app, store)
    app.register_error_handler(HTTPException, _tell)
    app.register_error_handler(GraphError, _tell_broken_store)
    return app


class _Graphs:
    """The graphs of a store, of which the one that was asked for last stays loaded: a page asks for the same one again
    and again, and one of millions of edges takes seconds to read.
    """

    def __init__(self, store: GraphStore) -> None:
        self._store = store
        self._last: tuple[tuple[str, Hashable], AttributionGraph] | None = None

    def load(self, graph_id: str) -> AttributionGraph:
        try:
            asked, last = (graph_id, self._store.version(graph_id)), self._last
            if last is None or last[0] != asked:
                self._last = last = None  # there need not be room for two
                self._last = last = asked, self._store.load(graph_id)
            return last[1]
        except GraphError as error:
            abort(404, str(error))


def _add_pages(app: Flask, store: GraphStore, graphs: _Graphs) -> None:
    @app.get("/")
    def show_library() -> str:
        return render_template("library.html", library=library(store), folder=store.folder)

    @app.get("/g/<graph:graph_id>")
    def show_graph(graph_id: str) -> str:
        graph = store.find(graph_id) or graphs.load(graph_id)  # which says why it is not there
        info = graph.info
        return render_template(
            "graph.html",
            graph_id=graph_id,
            graph=graph,
            info=info,
            sql_address=nodes_address(graph_id),
            replacement=score_text(info.replacement_score, info.pruned_replacement_score),
            completeness=score_text(info.completeness_score, info.pruned_completeness_score),
        )

    @app.get("/favicon.ico")
    def show_icon() -> ResponseReturnValue:
        return app.send_static_file("favicon.svg")

    @app.get("/healthz")
    def tell_health() -> ResponseReturnValue:
        return "ok\n", {"Content-Type": "text/plain; charset=utf-8"}


def _add_api(app: Flask, store: GraphStore, graphs: _Graphs) -> None:
    @app.get("/api/graphs/<graph:graph_id>")
    def tell_graph(graph_id: str) -> ResponseReturnValue:
        return jsonify({"graph_id": graph_id, **graph_details(graphs.load(graph_id))})

    @app.get("/api/graphs/<graph:graph_id>/nodes/<int:node>")
    def tell_node(graph_id: str, node: int) -> ResponseReturnValue:
        graph = graphs.load(graph_id)
        if node >= graph.n_nodes:
            abort(404, f"graph {graph_id} has no node {node}; its nodes are 0 … {graph.n_nodes - 1}.")
        return jsonify({**node_details(graph, node), "record": feature_record(store, graph, node)})


class _GraphId(BaseConverter):
    """The ids that a store gives; a path with anything else is no path of ours."""

    regex = "[a-z0-9][a-z0-9_.-]{0,63}"


class _Json(DefaultJSONProvider):
    """JSON as browsers read it: it has no NaN and no infinity, null stands for both."""

    def dumps(self, obj: Any, **kwargs: Any) -> str:
        return super().dumps(plain(obj), allow_nan=False, **kwargs)


def _tell(error: HTTPException) -> ResponseReturnValue:
    """The error as a page, or as JSON to who asked for that; redirects pass unchanged."""
    code = error.code or 500
    if code < 400:
        return error.get_response()
    # of the error's own headers only what HTTP demands, such as Allow
    headers = {name: value for name, value in error.get_headers() if name != "Content-Type"}
    if request.path.startswith("/api/"):
        return jsonify({"error": error.description}), code, headers
    return render_template("error.html", code=code, name=error.name, text=error.description), code, headers


def _tell_broken_store(error: GraphError) -> ResponseReturnValue:
    if request.path.startswith("/api/"):
        return jsonify({"error": str(error)}), 500
    return render_template("error.html", code=500, name="The store cannot be read", text=str(error)), 500


def _versions(folder: Path) -> dict[str, str]:
    """A short digest of every static file by its name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in files}
