"""Workers as processes of this machine: one loaded model each, handed one row at a time over a pipe of its own.

Nothing is shared between workers, so that one can be killed at any moment without harm to the others.
"""

import multiprocessing
import signal
import sys
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait

from tracer.batch import ATTEMPTS, Broken, Job, Outcome, Status
from tracer.errors import TraceError
from tracer.prompts import Row

SECONDS_TO_LEAVE = 10.0
"""Given to a worker that was asked to leave, to remove what it was writing."""


class _Signal(Enum):
    """What a worker says beside outcomes; DEAD is said of it."""

    READY = "ready"
    DEAD = "dead"


@dataclass
class _Task:
    """A row that is to be done or is being done."""

    row: Row
    deaths: int = 0
    """How many workers died at it."""


def trace_in_processes(job: Job, rows: Sequence[Row], devices: Sequence[str]) -> Generator[Outcome, None, None]:
    """Trace the rows with one process per device named; a device may be named several times.

    Outcomes come as they are ready, in any order. Closing the iterator stops the processes at once.
    """
    left = deque(_Task(row) for row in rows)
    team = _Team(job, devices[: len(rows)])
    try:
        team.begin()
        while left or team.is_busy():
            team.hand_out(left)
            for member in team.heard():
                match member.receive():
                    case Outcome() as outcome:
                        yield outcome
                    case Broken(error):
                        raise TraceError(error)
                    case _Signal.DEAD:
                        given_up = team.replace(member, left)
                        if given_up is not None:
                            yield given_up
    finally:
        team.stop()


class _Member:
    """A worker process as the driver sees it."""

    def __init__(self, job: Job, device: str, share: int) -> None:
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        self.device = device
        self.is_ready = False
        self.task: _Task | None = None
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, job, device, share), daemon=True)
        resource_tracker.ensure_running()  # or starting it, with the first process, would unblock again
        # a new process inherits what is blocked: Ctrl-C at a terminal reaches all, and only the driver acts on it
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()  # or nobody would notice when the worker's own end closes

    def give(self, task: _Task) -> None:
        self.task = task
        with suppress(OSError):  # of one that just died, which `receive` tells
            self.connection.send(task.row)

    def receive(self) -> Outcome | Broken | _Signal:
        try:
            message = self.connection.recv()
        except (EOFError, OSError):  # the second where it died in the middle of a message
            return _Signal.DEAD
        self.is_ready = True
        if isinstance(message, Outcome):
            self.task = None
        return message


class _Team:
    """The worker processes, each replaced when it dies."""

    def __init__(self, job: Job, devices: Sequence[str]) -> None:
        self.job, self.devices = job, devices
        self.members: list[_Member] = []
        self.deaths_at_start = 0

    def begin(self) -> None:
        for device in self.devices:
            self._add(device)

    def is_busy(self) -> bool:
        return any(member.task for member in self.members)

    def hand_out(self, left: deque[_Task]) -> None:
        for member in self.members:
            if left and member.is_ready and member.task is None:
                member.give(left.popleft())

    def heard(self) -> list[_Member]:
        """Wait for workers that have something to say."""
        speaking = wait([member.connection for member in self.members])
        return [member for member in self.members if member.connection in speaking]

    def replace(self, dead: _Member, left: deque[_Task]) -> Outcome | None:
        """Start another worker and put the row back; or, if too many died at it, what became of it."""
        dead.process.join()
        dead.connection.close()
        self.members.remove(dead)
        end, task = _end(dead.process.exitcode), dead.task
        self.deaths_at_start = 0 if dead.is_ready else self.deaths_at_start + 1
        if self.deaths_at_start == ATTEMPTS:
            raise TraceError(
                f"{ATTEMPTS} workers {end} while they loaded the model; try --workers 1 or --dtype bfloat16."
            )
        given_up = None
        if task is not None:
            task.deaths += 1
            if task.deaths < ATTEMPTS:
                left.appendleft(task)
            else:
                error = f"{ATTEMPTS} workers {end} while they traced it; the reason may stand above, on stderr."
                given_up = Outcome(task.row, Status.FAILED, error, dead.process.pid or 0)
        if len(left) > sum(member.task is None for member in self.members):
            self._add(dead.device)
        return given_up

    def stop(self) -> None:
        """End all processes, the idle and the busy."""
        for member in self.members:
            member.process.terminate()
        for member in self.members:
            member.process.join(SECONDS_TO_LEAVE)
            member.process.kill()
            member.process.join()
            member.connection.close()

    def _add(self, device: str) -> None:
        self.members.append(_Member(self.job, device, len(self.devices)))


def _serve(connection: Connection, job: Job, device: str, share: int) -> None:
    """A worker's life: load the model, then answer rows until the driver leaves."""
    signal.signal(signal.SIGTERM, _leave)
    from tracer.worker import EXPECTED, begin  # and with it torch, which the driver does without

    try:
        with suppress(EOFError, ConnectionError):
            try:
                worker = begin(job, device, share)
            except EXPECTED as error:
                connection.send(Broken(str(error)))
                return
            connection.send(_Signal.READY)
            while True:
                connection.send(worker.trace(connection.recv()))
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to remove, and exit hooks print exceptions


def _leave(number: int, frame: object) -> None:
    sys.exit(0)  # as an exception, so that half-written files are removed


def _end(code: int | None) -> str:
    return f"were killed by signal {-code}" if code is not None and code < 0 else f"ended with status {code}"
