"""Many prompts into one store: what is asked of every worker, and what it answers, in whatever process it lives.

An engine hands out rows, one at a time, and hears what became of them; each worker loads the model once and saves its
own graphs. A worker that dies loses nothing but the row it was at, which another does again.
"""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from tracer.config import TraceConfig
from tracer.loading import Source
from tracer.prompts import Row

ATTEMPTS = 3
"""How often a row is begun before it is given up as one that kills its worker."""


class Status(Enum):
    """What became of a row."""

    TRACED = "traced"
    FOUND = "found"
    """The store had this prompt's graph with these settings."""
    FAILED = "failed"


@dataclass(frozen=True)
class Job:
    """What is done with every row."""

    store: Path
    source: Source
    config: TraceConfig


@dataclass(frozen=True)
class Outcome:
    """What became of one row."""

    row: Row
    status: Status
    error: str = ""
    process: int = 0
    """The process that did it."""
    doubt: str = ""
    """What speaks against the graph that was traced."""


@dataclass(frozen=True)
class Broken:
    """A worker cannot begin, and no other could."""

    error: str
