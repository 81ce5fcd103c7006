"""The server on real sockets."""

import http.client
import queue
import socket
import sys
import threading
import urllib.request
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import pytest

from tests.viewer.samples import make_graph
from tests.waiting import wait_until
from viewer.serve import ViewerError, serve


def test_port_0_takes_a_free_port_and_the_address_answers(store):
    addresses = queue.Queue()
    threading.Thread(target=serve, args=(store,), kwargs={"port": 0, "on_ready": addresses.put}, daemon=True).start()
    address = addresses.get(timeout=20)
    assert address.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(address + "healthz", timeout=10) as answer:
        assert answer.read() == b"ok\n"
        assert "Server" not in answer.headers


def test_a_port_in_use_is_told_with_what_to_do(store):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ViewerError, match=f"^port {port} is in use; pass another one with --port") as caught:
            serve(store, port=port, on_ready=pytest.fail)
    assert "\n" not in str(caught.value)


def test_a_port_that_does_not_exist_is_refused(store):
    with pytest.raises(ViewerError, match="port 70000 cannot be used"):
        serve(store, port=70000, on_ready=pytest.fail)


def test_an_interruption_ends_it_quietly(store):
    def interrupt(address: str) -> None:
        raise KeyboardInterrupt

    assert serve(store, port=0, on_ready=interrupt) is None


@pytest.mark.skipif(sys.platform != "linux", reason="looks for child processes in /proc")
def test_a_query_ends_when_its_reader_goes_away(store):
    store.save(make_graph())
    addresses = queue.Queue()
    threading.Thread(target=serve, args=(store,), kwargs={"port": 0, "on_ready": addresses.put}, daemon=True).start()
    address = urlsplit(addresses.get(timeout=20))
    endless = "WITH RECURSIVE t AS (SELECT 1 AS x UNION ALL SELECT x + 1 FROM t) SELECT count(*) FROM t"
    headers = {"Sec-Fetch-Site": "same-origin", "Content-Type": "application/x-www-form-urlencoded"}
    before = children()
    reader = http.client.HTTPConnection(address.hostname, address.port)
    reader.request("POST", "/sql", urlencode({"q": endless}), headers)
    wait_until(lambda: children() - before)
    reader.close()
    wait_until(lambda: not children() - before, seconds=10)  # it would end by itself after twenty


def children() -> set[str]:
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # of a thread that has just ended
            found |= set((task / "children").read_text().split())
    return found
