"""One gate for every request and one seal for every response, whatever the route.

A page on the internet can make the browser send requests to 127.0.0.1 and, with a name that it lets point there, read
the answers. So the Host is checked, nothing but reading is possible, and other sites get no data.
"""

import hmac
import secrets
import threading
from urllib.parse import urlencode

from flask import Flask, Response, redirect, request
from werkzeug.wrappers import Response as AnyResponse

LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "font-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def protect(app: Flask, token: str | None) -> None:
    """Check every request of the application, and with a token let in only who brings it."""
    app.config["TRUSTED_HOSTS"] = list(LOCAL_NAMES)
    admission = None if token is None else Admission(token)

    @app.before_request
    def check() -> AnyResponse | None:
        refusal = _refusal()
        if refusal is None and admission is not None and request.path != "/healthz":
            refusal = admission.check()
        return refusal

    @app.after_request
    def seal(response: AnyResponse) -> AnyResponse:
        response.headers.update(_HEADERS)
        response.headers.setdefault("Cache-Control", "no-store")
        return response


class Admission:
    """Trades the token of the first URL, once, for a cookie: a URL is kept in histories, and must not open later."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()
        self._session = secrets.token_urlsafe(32).encode()
        self._spent = False
        self._lock = threading.Lock()

    def check(self) -> AnyResponse | None:
        """None for who has the cookie; else a response that sets it or refuses."""
        cookie = f"trace_{_port()}"  # cookies do not know ports
        if hmac.compare_digest(request.cookies.get(cookie, "").encode(), self._session):
            return None
        if not self._spend(request.args.get("token", "").encode()):
            return _plain(403, "Open the address that was printed when the viewer started; it works once.")
        rest = urlencode([(name, value) for name, value in request.args.items(multi=True) if name != "token"])
        # one slash only: two would lead to another host
        response = redirect("/" + request.path.lstrip("/\\") + (f"?{rest}" if rest else ""), 303)
        response.set_cookie(cookie, self._session.decode(), httponly=True, samesite="Strict")
        return response

    def _spend(self, given: bytes) -> bool:
        with self._lock:
            if self._spent or not hmac.compare_digest(given, self._token):
                return False
            self._spent = True
            return True


def _refusal() -> AnyResponse | None:
    # the header itself: request.host raises before a response could be chosen
    if request.environ.get("HTTP_HOST", "").lower() not in _own_hosts():
        return _plain(400, "This viewer answers only to 127.0.0.1 and localhost, with its port.")
    if request.method not in ("GET", "HEAD"):
        response = _plain(405, "This viewer only reads; use GET.")
        response.headers["Allow"] = "GET, HEAD"
        return response
    if request.path.startswith("/api/") and request.headers.get("Sec-Fetch-Site") not in (None, "same-origin", "none"):
        return _plain(403, "Data is given to the viewer's own pages only.")
    return None


def _own_hosts() -> set[str]:
    port = _port()
    bare = set(LOCAL_NAMES) if port == "80" else set()
    return bare | {f"{name}:{port}" for name in LOCAL_NAMES}


def _port() -> str:
    return request.environ["SERVER_PORT"]


def _plain(status: int, text: str) -> Response:
    return Response(text + "\n", status, mimetype="text/plain")
