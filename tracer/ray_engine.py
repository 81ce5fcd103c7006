"""Workers as Ray actors, so many per device of a cluster: Ray places them, starts them again, repeats their rows.

All machines need this package, and the folder in which the command was typed, the store and the model at the same
paths, as on a shared file system.
"""

import logging
import os
import re
import signal
import socket
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graphs.names import one_line
from tracer.batch import ATTEMPTS, Broken, Job, Outcome, Status
from tracer.errors import TraceError
from tracer.prompts import Row
from tracer.worker import EXPECTED, Worker, begin

SECONDS_TO_ANSWER = 10.0
"""Waited for a cluster's address."""
OBJECT_STORE_BYTES = 100 << 20
"""Of a cluster that is started here: only rows travel, Ray's own default is a third of the memory."""


class TracingActor:
    """One loaded model in an actor's process."""

    def __init__(self, job: Job, device: str, folder: Path) -> None:
        self.job, self.device, self.folder = job, device, folder
        self.worker: Worker | None = None

    def trace(self, row: Row) -> Outcome | Broken:
        """Trace the row; the first one loads the model, so that an actor that Ray started again does so too."""
        if self.worker is None:
            if not self.folder.is_dir():
                return Broken(f"{self.folder} is not on machine {os.uname().nodename}; share it between all machines.")
            os.chdir(self.folder)
            try:
                # Ray has set the number of threads to what the actor may use
                self.worker = begin(self.job, self.device, share=1)
            except EXPECTED as error:
                return Broken(str(error))
        return self.worker.trace(row)


@dataclass(frozen=True)
class _Places:
    """Where actors go."""

    device: str
    n_actors: int
    needs: dict[str, float]
    """What Ray reserves for each."""


def trace_on_ray(job: Job, rows: Sequence[Row], address: str | None, workers: int) -> Generator[Outcome, None, None]:
    """Trace the rows with so many actors per device of the cluster; without an address one is started here.

    Outcomes come as they are ready, in any order. Closing the iterator ends the actors.
    """
    job = replace(job, store=job.store.resolve())
    with _cluster(address) as ray:
        places = _places(ray.nodes(), job.source.device, workers)
        remote = ray.remote(TracingActor).options(
            max_restarts=-1, max_task_retries=ATTEMPTS - 1, scheduling_strategy="SPREAD", **places.needs
        )
        n_actors = min(places.n_actors, len(rows))
        actors = [remote.remote(job, places.device, Path.cwd()) for _ in range(n_actors)]
        left = iter(rows)
        running = {actor.trace.remote(row): (actor, row) for actor, row in zip(actors, left, strict=False)}
        while running:
            [ready], _ = ray.wait(list(running), num_returns=1)
            actor, row = running.pop(ready)
            outcome = _result(ray, ready, row)
            following = next(left, None)
            if following is not None:
                running[actor.trace.remote(following)] = (actor, following)
            yield outcome


def _result(ray: Any, reference: Any, row: Row) -> Outcome:
    try:
        result = ray.get(reference)
    except ray.exceptions.RayActorError as error:
        told = f"its worker died {ATTEMPTS} times: {one_line(error)}"
        return Outcome(row, Status.FAILED, told)
    except ray.exceptions.RayTaskError as error:  # a bug, of which Ray has the traceback
        logging.getLogger(__name__).error("%s", error)
        return Outcome(row, Status.FAILED, f"{type(error.cause).__name__}: {one_line(error.cause)}")
    if isinstance(result, Broken):
        raise TraceError(result.error)
    return result


@contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    """Ray, connected; the actors end with the connection."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise TraceError("Ray is not installed; pip install 'clt-tracer[ray]', or use --engine local.") from error
    _knock(address)
    on_termination = signal.getsignal(signal.SIGTERM)
    here = {"object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False} if address is None else {}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **here)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise TraceError(f"no Ray cluster answers at {address or 'this machine'}: {one_line(error)}.") from error
    signal.signal(signal.SIGTERM, on_termination)  # Ray's own way to end is to abort
    try:
        yield ray
    finally:
        with _native_stderr_closed():  # on which Ray tells of each task that it breaks off
            ray.shutdown()


@contextmanager
def _native_stderr_closed() -> Iterator[None]:
    """Drop what this process's libraries write to stderr, past Python."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _knock(address: str | None) -> None:
    """Refuse an address at which nobody listens; Ray itself would try for minutes."""
    place = re.fullmatch(r"(?:ray://)?(.+):(\d+)", address or "")
    if place is None:
        return
    try:
        socket.create_connection((place[1], int(place[2])), SECONDS_TO_ANSWER).close()
    except (OSError, OverflowError) as error:
        raise TraceError(f"no Ray cluster answers at {address}: {one_line(error)}.") from error


def _places(nodes: Sequence[dict[str, Any]], device: str, workers: int) -> _Places:
    """One or more actors on every GPU of the cluster, or without GPUs on every machine."""
    if device not in ("auto", "cpu", "cuda"):
        raise TraceError(f"device {device!r} is none that Ray gives out; use auto, cpu or cuda.")
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in resources))
    if device == "cuda" and not gpus:
        raise TraceError("device cuda was asked for, but the Ray cluster has no GPU; use --device cpu or auto.")
    if gpus and device != "cpu":
        return _Places("cuda", gpus * workers, {"num_gpus": 1 / workers})
    cores = [node["CPU"] for node in resources if node.get("CPU", 0) >= 1]
    if not cores:
        raise TraceError("the Ray cluster has no processor to give; start it with --num-cpus.")
    share = min(cores) / workers
    return _Places("cpu", len(cores) * workers, {"num_cpus": float(int(share)) if share >= 1 else share})
