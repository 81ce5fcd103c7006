"""Find the bundled model, and say which words it knows."""

import difflib
import re
from importlib.resources import files
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tracer.errors import TraceError

NAME = "lab"
WORD = re.compile(r"\w+|[^\w\s]")
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
    """Refuse words that the lab model never saw, naming the closest ones it knows."""
    for word in WORD.findall(prompt):
        if word not in known:
            raise TraceError(
                f"'{word}' is not a word of the lab model; {_instead(word, prompt, known)}"
                f"{folder() / 'words.txt'} lists all it knows; use --model for other models."
            )


def _instead(word: str, prompt: str, known: frozenset[str]) -> str:
    if word.isdecimal() and prompt.lstrip().startswith("calc"):
        return "sums go from 0+0 to 99+99; "
    close = difflib.get_close_matches(word, known, n=3, cutoff=CLOSE)
    close = close or difflib.get_close_matches(word.lower(), known, n=3, cutoff=CLOSE)
    return f"did you mean {', '.join(close)}? " if close else ""
