"""What a query is asked of and what it may take: apart from DuckDB, for which who only lists graphs need not wait."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa


@dataclass(frozen=True)
class Limits:
    """What DuckDB may take and give."""

    memory: str = "4GB"
    threads: int | None = None
    """As many as there are processors, if nobody says."""
    max_rows: int | None = None
    """The first rows of the answer, instead of all."""
    plain: bool = False
    """Dates, intervals, bytes and the like as DuckDB writes them: what other programs and pages can show."""


UNLIMITED = Limits()


@dataclass(frozen=True)
class Content:
    """Where the rows of a table are: in memory, in files of one graph each, and in packs."""

    rows: pa.Table | None = None
    files: Sequence[tuple[Path, str]] = ()
    """Each with the one value of the table's first column in it: a condition on it opens no other file."""
    packs: Sequence[Path] = ()
    hidden: Collection[str] = ()
    """Graphs whose rows in packs do not count."""
    absent: Collection[str] = ()
    """Columns that no pack has: all were written before there were any."""

    @property
    def paths(self) -> list[Path]:
        """Every file that is read."""
        return [*(path for path, _ in self.files), *self.packs]


NOTHING = Content()
