"""The viewer's Flask application: a list of graphs, a page per graph, and the data behind it."""

import json
import math
from datetime import datetime
from importlib.resources import files
from typing import Any

from flask import Flask, Response, jsonify, render_template, request, send_from_directory
from flask.json.provider import DefaultJSONProvider
from werkzeug.exceptions import HTTPException, NotFound
from werkzeug.routing import BaseConverter

from graphs import GraphError, GraphStore
from viewer import records
from viewer.elements import edge_elements, visible_token
from viewer.guard import protect

MOST_BACKBONE_EDGES = 2000


def create_app(store: GraphStore, *, token: str | None = None) -> Flask:
    """The application over a store. With a token, only the browser that first opens `/?token=…` gets in."""
    app = Flask(__name__)
    app.json = _StrictJSON(app)
    app.url_map.converters["graph"] = _GraphId
    app.jinja_env.filters.update(percent=_percent, token=visible_token, minute=_minute)
    protect(app, token)
    _add_pages(app, store)
    _add_api(app, store)
    _add_files(app)
    app.register_error_handler(GraphError, lambda error: _problem(404, str(error)))
    app.register_error_handler(HTTPException, lambda error: _problem(error.code or 500, error.description or ""))
    return app


def _add_pages(app: Flask, store: GraphStore) -> None:
    @app.get("/")
    def library_page() -> str:
        return render_template("library.html", library=records.library(store), folder=store.folder)

    @app.get("/g/<graph:graph_id>")
    def explorer_page(graph_id: str) -> str:
        graph = store.load(graph_id)
        return render_template(
            "explorer.html", graph_id=graph_id, graph=graph, info=graph.info, answer=records.answer(graph)
        )


def _add_api(app: Flask, store: GraphStore) -> None:
    @app.get("/api/graphs/<graph:graph_id>")
    def graph_data(graph_id: str) -> Response:
        return jsonify(records.graph_record(store.load(graph_id), graph_id))

    @app.get("/api/graphs/<graph:graph_id>/nodes/<int:node>")
    def node_data(graph_id: str, node: int) -> Response:
        graph = store.load(graph_id)
        if node >= graph.n_nodes:
            raise NotFound(f"Graph {graph_id} has no node {node}; its nodes are 0 … {graph.n_nodes - 1}.")
        return jsonify(records.node_record(graph, node, records.feature_record(store, graph, node)))

    @app.get("/api/graphs/<graph:graph_id>/backbone")
    def backbone_data(graph_id: str) -> Response:
        k = min(max(request.args.get("k", 300, type=int), 0), MOST_BACKBONE_EDGES)
        graph = store.load(graph_id)
        return jsonify(elements=edge_elements(graph, records.backbone(graph, k)))


def _add_files(app: Flask) -> None:
    vendored = json.loads((files("viewer") / "static" / "vendor" / "manifest.json").read_text("utf-8"))
    version = vendored["sha256"][:8]
    app.jinja_env.globals["cytoscape_version"] = version

    @app.get("/healthz")
    def health() -> Response:
        return Response("ok\n", mimetype="text/plain")

    @app.get("/favicon.ico")
    def favicon() -> Response:
        return send_from_directory(str(app.static_folder), "icon.svg", mimetype="image/svg+xml")

    @app.after_request
    def keep_vendored_files(response: Response) -> Response:
        if request.path.startswith("/static/vendor/") and request.args.get("v") == version and response.status_code == 200:
            response.headers["Cache-Control"] = "public, max-age=31536000, immutable"
        return response


class _GraphId(BaseConverter):
    """What a store accepts as an id; anything else is no route."""

    regex = "[a-z0-9][a-z0-9_.-]{0,63}"


class _StrictJSON(DefaultJSONProvider):
    """JSON as browsers read it: null where Python has NaN or an infinity."""

    def dumps(self, obj: Any, **options: Any) -> str:
        return super().dumps(_without_nan(obj), allow_nan=False, **options)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _problem(status: int, message: str) -> tuple[Response | str, int]:
    if request.path.startswith("/api/"):
        return jsonify(error=message), status
    return render_template("problem.html", status=status, message=message), status


def _percent(share: float | None) -> str:
    if share is None or not math.isfinite(share):
        return "–"
    return f"{100 * share:.0f} %" if share == 0 or 0.1 <= share <= 0.99 or share == 1 else f"{100 * share:.1f} %"


def _minute(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M} UTC"
