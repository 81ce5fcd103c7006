"""Rule-based labels: the described situation that best predicts when a feature fires, with precision and recall."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.sparse import csr_array

MOST_PARTS = 3
"""A label joins at most this many situations of one kind."""
GOOD_ENOUGH = 0.5
"""A situation names a feature only where its F1 reaches this."""


@dataclass(frozen=True)
class Situations:
    """Named yes-or-no descriptions of token sites ("the subject lies in Texas", "the token is Dal")."""

    names: tuple[str, ...]
    kind: tuple[str, ...]
    """Situations of one kind ("place", "relation", "token" …) may be joined in one label; earlier kinds win ties."""
    holds: csr_array
    """(site, situation), 1 where the description holds."""


@dataclass(frozen=True)
class Label:
    """What a feature fires on, in words, and how well that predicts its firing."""

    text: str
    precision: float
    recall: float


def label_by_firing(fires: csr_array, situations: Situations) -> list[Label | None]:
    """The best situation (or up to three of one kind) for each row of `fires` (feature, site), weighted by activation.

    Precision is the share of the feature's activation that falls where the label holds, recall the share of the
    label's sites at which the feature fires. None where no situation is good enough.
    """
    total = np.asarray(fires.sum(axis=1)).ravel()
    inside = _dense(fires @ situations.holds)  # activation that falls in each situation
    hits = _dense(_fired(fires) @ situations.holds)
    size = np.asarray(situations.holds.sum(axis=0)).ravel()
    kinds = np.array(situations.kind)
    return [
        _best(inside[row] / total[row], hits[row], size, situations.names, kinds) if total[row] > 0 else None
        for row in range(len(total))
    ]


def _best(
    precision: Float[ndarray, " situation"],
    hits: Float[ndarray, " situation"],
    size: Float[ndarray, " situation"],
    names: tuple[str, ...],
    kinds: ndarray,
) -> Label | None:
    best, best_score = None, GOOD_ENOUGH
    for kind in dict.fromkeys(kinds):
        members = np.flatnonzero(kinds == kind)
        members = members[np.argsort(-precision[members], kind="stable")][:MOST_PARTS]
        for n in range(1, len(members) + 1):
            chosen = members[:n]
            p, r = float(precision[chosen].sum()), float(hits[chosen].sum() / max(size[chosen].sum(), 1))
            score = _f1(min(p, 1.0), r)
            if score > best_score + 1e-3:
                best, best_score = Label(" / ".join(names[i] for i in chosen), min(p, 1.0), r), score
    return best


def f1_table(fires: csr_array, holds: csr_array) -> Float[ndarray, "feature situation"]:
    """F1 of every feature (row of `fires`) as a detector of every situation (column of `holds`), by counts."""
    fired = _fired(fires)
    both = _dense(fired @ holds)
    n_fired, n_holds = np.asarray(fired.sum(axis=1)).ravel(), np.asarray(holds.sum(axis=0)).ravel()
    return 2 * both / np.maximum(n_fired[:, None] + n_holds, 1)


def situations_of(tags: list[list[tuple[str, str]]]) -> Situations:
    """Situations from the (kind, name) tags of each site; kinds keep the order of their first appearance."""
    index: dict[tuple[str, str], int] = {}
    rows: list[int] = []
    columns: list[int] = []
    for site, held in enumerate(tags):
        for tag in dict.fromkeys(held):
            rows.append(site)
            columns.append(index.setdefault(tag, len(index)))
    holds = csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(tags), len(index)))
    return Situations(tuple(name for _, name in index), tuple(kind for kind, _ in index), holds)


def _fired(fires: csr_array) -> csr_array:
    """1 where a feature fires."""
    return csr_array((np.ones_like(fires.data), fires.indices, fires.indptr), shape=fires.shape)


def _dense(matrix: Any) -> ndarray:
    return csr_array(matrix).toarray()


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
