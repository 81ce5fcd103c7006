"""The one gate of the viewer: every request and every response of every route passes here.

A page of another site may reach 127.0.0.1 through the reader's browser, so the address alone protects nothing.
"""

import hmac
from urllib.parse import quote, urlencode

from flask import Flask, Response, abort, redirect, request
from werkzeug.exceptions import MethodNotAllowed
from werkzeug.wrappers import Response as BaseResponse

_HOSTS = ["127.0.0.1", "localhost"]  # the server does not listen on ::1
_METHODS = ("GET", "HEAD")
_QUESTIONS = ("/sql",)  # paths that take a POST as well; none of them changes anything
_LARGEST_BODY = 256 << 10
_OWN_SITES = ("same-origin", "none")  # another port of 127.0.0.1 is "same-site", and is not ours
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "font-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def protect(app: Flask, *, token: str | None, versions: dict[str, str]) -> None:
    """Put the gate before all routes of the app, those that are still to be added included.

    `versions` tells which static file in which version the browser may keep for ever.
    """
    app.config["TRUSTED_HOSTS"] = _HOSTS
    app.config["MAX_CONTENT_LENGTH"] = _LARGEST_BODY

    @app.before_request
    def refuse() -> BaseResponse | None:
        _ = request.host  # raises for a foreign host, before anything is told about the path
        _check_method()
        if request.path.startswith("/api/") and request.headers.get("Sec-Fetch-Site", "none") not in _OWN_SITES:
            abort(403, "Only the viewer's own pages may ask this.")
        if token is None or request.path == "/healthz":
            return None
        return _admit(token)

    @app.after_request
    def harden(response: Response) -> Response:
        response.headers.update(_HEADERS)
        version = versions.get(request.path.removeprefix("/static/"))
        kept = version is not None and request.args.get("v") == version and response.status_code < 400
        response.headers["Cache-Control"] = "private, max-age=31536000, immutable" if kept else "no-cache"
        return response


def _check_method() -> None:
    """Only what reads; and no page of another site, nor a link, makes this machine work on a question."""
    if request.method in _METHODS:
        return
    if request.path not in _QUESTIONS:
        raise MethodNotAllowed(valid_methods=_METHODS)
    if request.method != "POST":
        raise MethodNotAllowed(valid_methods=(*_METHODS, "POST"))
    if request.headers.get("Sec-Fetch-Site") != "same-origin":
        abort(403, "Only the form on the viewer's own page may ask this, in a browser that says where a form is from.")


def _admit(token: str) -> BaseResponse | None:
    """None for who has the token; it comes once in the address and moves to a cookie, out of sight."""
    cookie = f"trace_{request.environ['SERVER_PORT']}"  # browsers share cookies between ports
    if _same(request.args.get("token", ""), token):
        others = [(name, value) for name, value in request.args.items(multi=True) if name != "token"]
        # one slash: "//name" would lead to another site
        address = "/" + quote(request.path.lstrip("/")) + ("?" + urlencode(others) if others else "")
        response = redirect(address)
        response.set_cookie(cookie, token, httponly=True, samesite="Strict")
        return response
    if not _same(request.cookies.get(cookie, ""), token):
        abort(403, "This viewer needs its token; open the address that it printed when it started.")
    return None


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), token.encode())
