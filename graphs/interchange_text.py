"""JSON of any size, read a piece at a time: whole values where they are small, arrays item by item.

What is held is a piece of the text and the items in it, never the document; a single value is at most `LARGEST`
characters, so that no nesting, number or string of a hostile file can fill the memory.
"""

import re
from collections.abc import Callable, Collection, Iterator
from json import JSONDecoder
from pathlib import Path
from typing import Any, TextIO

from graphs.errors import GraphError
from graphs.files import file_errors_as_graph_errors

PIECE = 1 << 22
LARGEST = 1 << 24
"""Characters of one value: the metadata, a node or a link."""

_BLANK = re.compile(r"[ \t\n\r]*")
_AFTER = re.compile(r"[ \t\n\r,:\]}]")
_COMMA = re.compile(r"[ \t\n\r]*,[ \t\n\r]*")

Batches = Iterator[list[Any]]
"""The items of an array, as many at a time as a piece of the text holds."""


def ignore(done: int, total: int) -> None:
    """Progress that nobody watches."""


def members(
    path: Path, arrays: Collection[str], on_progress: Callable[[int, int], None] = ignore
) -> Iterator[tuple[str, Any]]:
    """The members of the object in the file, in their order; of those named in `arrays` the value is `Batches`.

    These must be read to their end before the next member is asked for. Raises `GraphError`.
    `on_progress` is told the characters read, and how many bytes there are.
    """
    with file_errors_as_graph_errors(f"read {path}"), path.open(encoding="utf-8-sig") as file:
        size = path.stat().st_size
        text = _Text(file, path.name, lambda done: on_progress(done, size))
        text.take("{")
        seen: set[str] = set()
        more = text.mark('"', "}") == '"'
        if not more:
            text.take("}")
        while more:
            text.mark('"')
            key = text.value()
            if key in seen:
                raise text.wrong(f"has the member {key[:40]!a} twice")
            seen.add(key)
            text.take(":")
            yield key, text.batches() if key in arrays else text.value()
            more = text.take(",", "}") == ","
        text.finish()


class _Text:
    """The part of a file's text that is being read."""

    def __init__(self, file: TextIO, name: str, on_progress: Callable[[int], None]) -> None:
        self.file, self.name, self.on_progress = file, name, on_progress
        self.buffer, self.place, self.before, self.ended = "", 0, 0, False
        self.scan: Callable[[str, int], tuple[Any, int]] = JSONDecoder().scan_once  # type: ignore[attr-defined]

    def mark(self, *expected: str) -> str:
        """The next character that is not blank, which must be one of those expected; it is not passed."""
        found = self._next()
        if found not in expected or not found:
            raise self.wrong(f"has {found!r} where {' or '.join(map(repr, expected))} belongs")
        return found

    def take(self, *expected: str) -> str:
        """The same, and pass it."""
        found = self.mark(*expected)
        self.place += 1
        return found

    def finish(self) -> None:
        """Make sure that nothing follows."""
        while not self.ended:
            self._more()
            if self.buffer[self.place :].strip(" \t\n\r"):
                break
        if self.buffer[self.place :].strip(" \t\n\r"):
            raise self.wrong("goes on after its end")

    def value(self) -> Any:
        """The value that comes next, and pass it."""
        self._next()
        while True:
            try:
                found, end = self.scan(self.buffer, self.place)
            except (StopIteration, ValueError) as error:
                if self.ended:
                    raise self.wrong(f"is not valid JSON, or cut off ({_reason(error)})") from error
            except RecursionError as error:
                raise self.wrong("is nested too deeply") from error
            else:
                # a number that ends with the piece may go on, as 0. does
                if self.ended or _AFTER.match(self.buffer, end):
                    self.place = end
                    return found
            self._more()

    def batches(self) -> Batches:
        """The items of the array that comes next."""
        self.take("[")
        if self._next() == "]":
            self.take("]")
            return
        more = True
        while more:
            batch = self._whole_items()
            batch.append(self.value())
            more = self.take(",", "]") == ","
            yield batch

    def wrong(self, what: str) -> GraphError:
        """The error of a file that cannot be read."""
        return GraphError(f"{self.name} {what}, at character {self.before + self.place:,}; export it again.")

    def _whole_items(self) -> list[Any]:
        """The items in this piece that a comma follows: fast, because nothing is asked that can wait."""
        scan, comma, buffer = self.scan, _COMMA.match, self.buffer
        place, found = self._past_blanks(), []
        try:
            while True:
                item, end = scan(buffer, place)
                gap = comma(buffer, end)
                if gap is None:
                    break
                found.append(item)
                place = gap.end()
        except (StopIteration, ValueError, RecursionError):
            pass  # cut off by the end of the piece or broken: `value` will tell
        self.place = place
        return found

    def _past_blanks(self) -> int:
        blank = _BLANK.match(self.buffer, self.place)
        assert blank is not None, "the pattern also matches nothing"
        return blank.end()

    def _next(self) -> str:
        """The next character that is not blank, or "" at the end; what is blank is passed."""
        self.place = self._past_blanks()
        while self.place == len(self.buffer) and not self.ended:
            self._more()
            self.place = self._past_blanks()
        return self.buffer[self.place : self.place + 1]

    def _more(self) -> None:
        left = len(self.buffer) - self.place
        if left > LARGEST:
            raise self.wrong(f"has a value of more than {LARGEST:,} characters, or is not valid JSON")
        try:
            text = self.file.read(max(PIECE, left))  # doubled, so that a long value is not tried again for each piece
        except UnicodeDecodeError as error:
            raise self.wrong(f"is not UTF-8 text ({error.reason})") from error
        self.before += self.place
        self.buffer, self.place, self.ended = self.buffer[self.place :] + text, 0, not text
        self.on_progress(self.before + len(self.buffer))


def _reason(error: Exception) -> str:
    return "a value is missing" if isinstance(error, StopIteration) else str(error).split(":")[0]
