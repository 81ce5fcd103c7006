"""Find the bundled model, and say which words it knows."""

import difflib
import re
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tracer.errors import TraceError

NAME = "lab"
WORD = re.compile(r"\w+|[^\w\s]")
UNFINISHED_SUM = re.compile(r"\s*calc\b[^=]*")
BEFORE_ONLY = {"The": "Hague"}
"""Words that begin many a sentence, but of which the lab model knows only the name that they begin."""
CLOSE = 0.5
"""How alike two words have to be for one to be meant by the other (`difflib`'s ratio)."""


def folder() -> Path:
    """The folder with model/, transcoder/, features.parquet, words.txt and the card."""
    return Path(str(files("tracer") / "lab"))


def features() -> pa.Table:
    """What each feature of the bundled transcoder fires on and promotes: the store's `features` table."""
    return pq.read_table(folder() / "features.parquet")


def labels(table: pa.Table) -> dict[tuple[int, int], str]:
    """Feature labels by (layer, feature)."""
    layer, feature, label = (table[name].to_pylist() for name in ("layer", "feature", "label"))
    return {(a, b): text for a, b, text in zip(layer, feature, label, strict=True) if text}


def words() -> frozenset[str]:
    """All words that the lab model saw."""
    return frozenset((folder() / "words.txt").read_text(encoding="utf-8").split())


def check_words(prompt: str, known: frozenset[str]) -> None:
    """Refuse words that the lab model never saw, naming the closest it knows, and sums that ask for nothing yet."""
    found = WORD.findall(prompt)
    for word in found:
        if word not in known:
            raise TraceError(
                f"'{word}' is not a word of the lab model; {_instead(word, prompt, known)}"
                f"{folder() / 'words.txt'} lists all it knows; use --model for other models."
            )
    for word, following in pairwise(found):
        if BEFORE_ONLY.get(word, following) != following:
            raise TraceError(
                f"'{word}' is known to the lab model from {word} {BEFORE_ONLY[word]} only; did you mean "
                f"{word.lower()}? Write it small."
            )
    if UNFINISHED_SUM.fullmatch(prompt):
        raise TraceError(
            "the lab model answers sums after an equals sign only; write them like this: trace 'calc: 36+59='."
        )


def _instead(word: str, prompt: str, known: frozenset[str]) -> str:
    if word.isdecimal() and prompt.lstrip().startswith("calc"):
        return "sums go from 0+0 to 99+99; "
    close = difflib.get_close_matches(word, known, n=3, cutoff=CLOSE)
    close = close or difflib.get_close_matches(word.lower(), known, n=3, cutoff=CLOSE)
    return f"did you mean {', '.join(close)}? " if close else ""
