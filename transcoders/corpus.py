"""Text to train on, as packed sequences of tokens: text, JSONL and Parquet files, or a data set of the Hub."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from transcoders.errors import TranscoderError
from transcoders.files import told_in_one_line

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
BLOCK = 1 << 16
N_BLOCKS = 1 << 10
"""Blocks read of all files together to tell their content, but one of each at least: 64 MB, however large they are."""


@dataclass(frozen=True)
class Corpus:
    """Documents that can be read from any one on, as often as one likes."""

    name: str
    """Changes when the documents do: a run is not resumed on other data."""
    documents: Callable[[int], Iterator[str]]
    """The documents from this one on; ends where they end. Empty ones are counted, and left out."""
    content: str = ""
    """Digits that change with the text itself, where that can be told without reading all of it."""


@dataclass
class Packed:
    """Documents one after the other, cut into sequences of one length."""

    corpus: Corpus
    encode: Callable[[str], list[int]]
    context: int
    first_token: int | None
    """Put before every sequence, if the model has one."""
    part: int = 0
    parts: int = 1
    document: int = 0
    """How many documents were taken since the first."""
    left: list[int] = field(default_factory=list)
    """Tokens of taken documents that are in no sequence yet."""
    _documents: Iterator[str] | None = None
    _found: bool = False
    """Whether this part has text at all: else it would be looked for without end."""

    def next(self, n: int) -> Int[Tensor, "sequence position"]:
        """The next sequences; after the last document comes the first again."""
        body = self.context - (self.first_token is not None)
        while len(self.left) < n * body:
            self._take_document()
        rows = torch.tensor(self.left[: n * body]).unflatten(0, (n, body))
        self.left = self.left[n * body :]
        if self.first_token is None:
            return rows
        return torch.cat([torch.full((n, 1), self.first_token), rows], dim=1)

    def restore(self, document: int, left: list[int]) -> None:
        """Go on after so many documents, with these tokens left of them."""
        self.document, self.left, self._documents, self._found = document, left, None, True

    def _take_document(self) -> None:
        if self._documents is None:
            self._documents = self.corpus.documents(self.document)
        for text in self._documents:
            self.document += 1
            if (self.document - 1) % self.parts == self.part and text.strip():
                self.left += self.encode(text)
                self._found = True
                return
        if not self._found:
            raise TranscoderError(
                f"{self.corpus.name} has {self.document} documents for {self.parts} streams; "
                "expected text, a document or more for each."
            )
        self.document, self._documents = 0, None


def open_corpus(source: str | Path, *, column: str = "text", split: str = "train") -> Corpus:
    """A file, a folder of files, or a Hub data set; `column` holds the text of JSONL, Parquet and Hub data."""
    path = Path(source)
    if not path.exists():
        return _hub_corpus(str(source), column, split)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
    if not files:
        raise TranscoderError(f"{path} holds no {', '.join(SUFFIXES)} file; give text to train on.")
    for file in files:
        if file.suffix not in SUFFIXES:
            raise TranscoderError(f"{file} is of no known kind; expected one of {', '.join(SUFFIXES)}.")
    digest = hashlib.sha256(column.encode())
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}".encode())

    def documents(first: int) -> Iterator[str]:
        texts = (text for file in files for text in _texts(file, column))
        for number, text in enumerate(texts):
            if number >= first:
                yield text

    if next(documents(0), None) is None:
        raise TranscoderError(f"{path} holds no text; expected a document or more.")
    return Corpus(f"{path.name}:{digest.hexdigest()[:10]}", documents, _content(files))


def tokens_corpus(texts: Iterable[str], name: str) -> Corpus:
    """Texts that are in memory already."""
    held = list(texts)
    if not held:
        raise TranscoderError(f"{name} holds no text; expected a document or more.")
    digest = hashlib.sha256()
    for text in held:
        digest.update(f"{len(text)} {text}".encode(errors="surrogatepass"))
    return Corpus(name, lambda first: iter(held[first:]), digest.hexdigest()[:10])


def _content(files: list[Path]) -> str:
    """Ten hexadecimal digits of the files: all of small ones, blocks evenly spaced through large ones."""
    digest = hashlib.sha256()
    for path in files:
        with told_in_one_line(f"read {path}"), path.open("rb") as file:
            size = path.stat().st_size
            for start in range(0, size, max(BLOCK, size * len(files) // N_BLOCKS)):
                file.seek(start)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:10]


def pack(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, context: int, *, part: int = 0, parts: int = 1
) -> Packed:  # fmt: skip
    """Sequences of the tokenizer's tokens: documents end with its end token, sequences begin with its first token."""
    begin, end = first_token(tokenizer), _number(tokenizer.eos_token_id)

    def encode(text: str) -> list[int]:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [*ids, *([] if end is None else [end])]

    return Packed(corpus, encode, context, begin, part, parts)


def first_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that sequences begin with, if the model has one."""
    return _number(tokenizer.bos_token_id)


def _number(value: object) -> int | None:
    """A token id; some models name several."""
    first = value[0] if isinstance(value, list) else value
    return first if isinstance(first, int) else None


def _texts(file: Path, column: str) -> Iterator[str]:
    """The documents of one file: paragraphs of text, or the values of a column."""
    try:
        if file.suffix == ".txt":
            yield from _paragraphs(file)
        elif file.suffix == ".parquet":
            yield from _rows_of_parquet(file, column)
        else:
            yield from _rows_of_json(file, column)
    except (OSError, UnicodeError, pa.ArrowException) as error:
        raise TranscoderError(
            f"{file} cannot be read ({' '.join(str(error).split())}); expected UTF-8 text."
        ) from error


def _paragraphs(file: Path) -> Iterator[str]:
    """What empty lines separate; a file without any is one document per line."""
    with file.open(encoding="utf-8") as lines:
        has_gaps = any(not line.strip() for line, _ in zip(lines, range(1000), strict=False))
        lines.seek(0)
        gathered: list[str] = []
        for line in lines:
            if line.strip():
                gathered.append(line)
            if gathered and not (has_gaps and line.strip()):
                yield "".join(gathered).strip()
                gathered = []
        if gathered:
            yield "".join(gathered).strip()


def _rows_of_parquet(file: Path, column: str) -> Iterator[str]:
    with pq.ParquetFile(file) as table:
        if column not in table.schema_arrow.names:
            raise TranscoderError(f"{file} has no column {column!r}; it has {', '.join(table.schema_arrow.names)}.")
        for batch in table.iter_batches(columns=[column]):
            for text in batch.column(0).to_pylist():
                yield from _if_text(text, file, column)


def _rows_of_json(file: Path, column: str) -> Iterator[str]:
    with file.open(encoding="utf-8") as lines:
        for number, line in zip(count(1), lines, strict=False):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise TranscoderError(
                    f"{file} line {number} is no JSON ({error.msg}); expected one object per line."
                ) from error
            if not isinstance(row, dict) or column not in row:
                raise TranscoderError(
                    f"{file} line {number} has no {column!r}; expected an object with the text in it."
                )
            yield from _if_text(row[column], file, column)


def _if_text(text: object, source: Path | str, column: str) -> Iterator[str]:
    if text is None:
        return
    if not isinstance(text, str):
        raise TranscoderError(f"column {column!r} of {source} holds {type(text).__name__}; expected text.")
    if text.strip():
        yield text


def _hub_corpus(source: str, column: str, split: str) -> Corpus:
    """A data set of the Hub, read as it downloads."""
    try:
        # an extra, which the type checker need not have
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
        from datasets.exceptions import (  # pyright: ignore[reportMissingImports]
            DataFilesNotFoundError,
            DatasetNotFoundError,
        )
    except ImportError as error:
        raise TranscoderError(
            f"{source} is no file here, and data sets of the Hub need another package: pip install 'clt-tracer[train]'."
        ) from error
    name, _, revision = source.partition("@")
    try:
        rows = load_dataset(name, split=split, revision=revision or None, streaming=True)
    except (DatasetNotFoundError, DataFilesNotFoundError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise TranscoderError(f"{source} is neither a file here nor a data set that can be read ({reason}).") from error

    def documents(first: int) -> Iterator[str]:
        for row in rows.skip(first):
            if column not in row:
                raise TranscoderError(f"{source} has no column {column!r}; it has {', '.join(row)}.")
            yield next(_if_text(row[column], source, column), "")  # rows are counted: a run goes on from one

    return Corpus(f"{source}:{split}:{column}", documents)
