"""`trace …` in a process of its own: its output, its exit status, and what it leaves behind."""

import importlib
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.forks import FORKS

TRACE = [sys.executable, "-c", "from tracer.__main__ import main; main()"]  # for what must begin from nothing
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Signal:
    """A signal that a process gets from itself, just before it calls a function for the n-th time."""

    number: int
    function: str
    """As "module:name", where it is looked up when it is called."""
    call: int = 1


def run(
    *arguments: str, folder: Path, memory: int = 0, spare: int = 0, struck: Signal | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `trace` in a folder; with `memory` it gets no more than so many bytes, with `spare` so many besides those
    that its libraries take (on Linux)."""
    with tempfile.TemporaryDirectory() as said:
        process = FORKS.Process(target=_command, args=(arguments, folder, memory, spare, Path(said), struck))
        process.start()
        process.join(timeout=300)
        assert process.exitcode is not None, f"trace {' '.join(arguments)} did not end within 300 s"
        output, errors = ((Path(said) / name).read_text() for name in ("output", "errors"))
        return subprocess.CompletedProcess(arguments, process.exitcode, output, errors)


def refused(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of an expected error."""
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("trace: ")
    return lines[0]


def _command(
    arguments: tuple[str, ...], folder: Path, memory: int, spare: int, said: Path, struck: Signal | None
) -> None:
    from tracer.__main__ import main

    for name, stream in (("output", sys.stdout), ("errors", sys.stderr)):
        with (said / name).open("w") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.chdir(folder)
    if spare:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        memory = pages * resource.getpagesize() + spare
    if memory:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    if struck is not None:
        _strike(struck)
    sys.argv = ["trace", *arguments]
    main()


def _strike(struck: Signal) -> None:
    module, name = struck.function.split(":")
    place = importlib.import_module(module)
    called, calls = getattr(place, name), iter(range(1, 1_000_000))

    def call(*arguments: object, **named: object) -> object:
        if next(calls) == struck.call:
            os.kill(os.getpid(), struck.number)
        return called(*arguments, **named)

    setattr(place, name, call)
