"""Ids of graphs, names of files made from texts, and texts as errors show them."""

import difflib
import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence

from graphs.errors import GraphError
from graphs.graph import GraphInfo

_ID = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_SLUG_LENGTH = 40


def is_graph_id(text: str) -> bool:
    """Whether a graph could have this id; nothing else becomes part of a path."""
    return _ID.fullmatch(text) is not None


def check_graph_id(text: str) -> None:
    """Raise `GraphError` if no graph could have this id."""
    if not is_graph_id(text):
        raise GraphError(
            f"{shown(text)} is no graph id; an id has up to 64 of a-z, 0-9, '_', '.' and '-', and begins with "
            "a letter or digit."
        )


def graph_id_of(info: GraphInfo) -> str:
    """A readable name, and a digest of what was asked: the same question has the same id."""
    text = info.prompt
    for token, word in zip(info.tokens, info.words, strict=True):
        if not word and token.strip():  # a special token
            text = text.replace(token, " ")
    asked = [info.token_ids, info.model, info.model_revision, info.transcoder, info.transcoder_revision, info.config]
    return f"{slug(text) or 'graph'}-{digest(asked)}"


def closest(text: str, known: Sequence[str]) -> list[str]:
    """The ids that begin as the text, or nearly so."""
    words = re.sub("-[0-9a-f]{8}$", "", text)  # digests are alike by chance only
    if not words or len(known) > 1000:  # of more, who waits for an error would wait for seconds
        return []
    beginnings = sorted({graph_id[: len(words)] for graph_id in known})
    close = difflib.get_close_matches(words, beginnings, n=3, cutoff=0.6)
    return [graph_id for beginning in close for graph_id in known if graph_id.startswith(beginning)]


def slug(text: str) -> str:
    """The text's words in lower-case ASCII, joined by '-', as many as fit; "" if there are none."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    words = "-".join(re.findall("[a-z0-9]+", plain))
    if len(words) <= _SLUG_LENGTH:
        return words
    return words[: words.rfind("-", 0, _SLUG_LENGTH + 1)] if "-" in words[:_SLUG_LENGTH] else words[:_SLUG_LENGTH]


def digest(values: object) -> str:
    """Eight characters that differ where the values do."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]


def one_line(error: BaseException) -> str:
    """The error's text without line ends and the last full stop."""
    return " ".join(str(error).split()).rstrip(".")


def shown(text: str) -> str:
    """A text of any length and content, for an error."""
    return repr(text[:80])


def some(names: Sequence[str]) -> str:
    """The first of the names."""
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
