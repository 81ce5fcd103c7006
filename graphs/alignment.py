"""Which positions of several prompts stand for the same place."""

from collections.abc import Sequence
from difflib import SequenceMatcher

import numpy as np
from numpy import ndarray

from graphs.errors import GraphError
from graphs.shapes import Int

ALIGNMENTS = ("diff", "end", "start", "anywhere")
"""By the words that agree with the first prompt, from the last token, from the first, or without regard to places."""


def align(prompts: Sequence[Sequence[str]], how: str) -> list[Int[ndarray, "_"]]:
    """Per prompt the place of each of its tokens; equal places stand for the same, -1 for none.

    With `diff` a word that replaces another stands in its place, and what is added to the first prompt stands between.
    """
    longest = max(map(len, prompts), default=0)
    match how:
        case "start":
            return [np.arange(len(tokens)) for tokens in prompts]
        case "end":
            return [np.arange(longest - len(tokens), longest) for tokens in prompts]
        case "anywhere":
            return [np.full(len(tokens), -1) for tokens in prompts]
        case "diff":
            return _numbered([_against(prompts[0], tokens) for tokens in prompts])
    raise GraphError(f"alignment {how!r} is unknown; expected one of {', '.join(ALIGNMENTS)}.")


def _against(first: Sequence[str], other: Sequence[str]) -> list[tuple[int, int]]:
    """Per token of the other prompt the token of the first it stands for, or after which it was added, and as which."""
    places: list[tuple[int, int]] = []
    matcher = SequenceMatcher(None, first, other, autojunk=False)
    for _, start, end, begin, stop in matcher.get_opcodes():
        both = min(end - start, stop - begin)
        places += [(start + k, 0) for k in range(both)]
        places += [(start + both - 1, k + 1) for k in range(stop - begin - both)]
    return places


def _numbered(prompts: list[list[tuple[int, int]]]) -> list[Int[ndarray, "_"]]:
    every = sorted({place for places in prompts for place in places})
    number = {place: column for column, place in enumerate(every)}
    return [np.array([number[place] for place in places], np.int64) for places in prompts]
