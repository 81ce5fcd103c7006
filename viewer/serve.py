"""The viewer as a server on this machine, for this machine only."""

import errno
import socket
from collections.abc import Callable
from contextlib import closing, suppress

from waitress.server import create_server

from graphs import GraphStore
from viewer.app import create_app

HOST = "127.0.0.1"
_LARGEST_BODY = 1 << 20  # bytes that the server takes before the application sees, and refuses, them


class ViewerError(ValueError):
    """The viewer cannot start, told in one line that says what to do."""


def serve(store: GraphStore, *, port: int, on_ready: Callable[[str], None]) -> None:
    """Serve the store until interrupted; port 0 takes any free one, and `on_ready` gets the address that answers."""
    with closing(_bound(port)) as listener, suppress(KeyboardInterrupt):
        app = create_app(store)
        server = create_server(
            app, sockets=[listener], threads=4, ident=None, max_request_body_size=_LARGEST_BODY,
            channel_request_lookahead=1,  # or nobody would notice that a browser is gone while it is answered
        )  # fmt: skip
        on_ready(f"http://{HOST}:{listener.getsockname()[1]}/")
        server.run()


def _bound(port: int) -> socket.socket:
    """A socket on the port. Waitress would bind as well, but could not say what is wrong in our words."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        # without this, the port of a viewer that just ended could not be used for a minute
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
    except (OSError, OverflowError) as error:
        listener.close()
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        reason = "is in use" if taken else f"cannot be used ({error})"
        raise ViewerError(
            f"port {port} {reason}; pass another one with --port, or --port 0 for any free one."
        ) from error
    return listener
