"""Rule-based labels: the described situations that best tell where a feature fires, with precision and recall."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray
from scipy.sparse import csr_array

MOST_PARTS = 3
"""A label joins at most this many situations."""
WORTH = 0.1
"""A further one has to raise the score by this: labels are to be read."""
GOOD_ENOUGH = 0.5
"""Situations name a feature where their score reaches this …"""
COVERED = 0.6
"""… and this part of its activation falls in them."""
PURE = 0.9
"""Else those do in which this part falls, however rarely the feature fires in them, …"""
FEWEST_SITES, LOWEST_RECALL = 10, 0.02
"""… but for these bounds: it fires on so many sites at all, and on this part of those that the label describes."""
STRONG = 0.5
"""A feature fires strongly from this share of its largest activation on, …"""
NEARLY_PURE = 0.8
"""… and this part of its strong activation names it: less, as the name says that it is of that only."""


@dataclass(frozen=True)
class Situations:
    """Named yes-or-no descriptions of token sites ("the subject lies in Texas", "the token is Dal")."""

    names: tuple[str, ...]
    kind: tuple[str, ...]
    """Of what sort each is ("place", "relation", "token" …); what comes earlier wins ties."""
    holds: csr_array
    """(site, situation), 1 where the description holds."""


@dataclass(frozen=True)
class Label:
    """What a feature fires on, in words, and how well that predicts its firing."""

    text: str
    precision: float
    recall: float


class _Cover(NamedTuple):
    """Situations joined, and how well they do."""

    score: float
    text: str
    counts: Float[ndarray, "3"]


def label_by_firing(
    fires: csr_array, situations: Situations, weight: Float[ndarray, " site"], *, pure: float = PURE
) -> list[Label | None]:
    """A name for each row of `fires` (feature, site): up to three situations, of one kind or of several.

    Precision is the share of the feature's whole activation that falls where the label holds, recall the share of the
    label's sites at which the feature fires; in both a site counts by its weight. Where no label tells when the feature
    fires, one that the part `pure` of its activation falls in will do; where there is none either, it has no name.
    """
    return [_label(fires[[feature]], situations, weight, pure) for feature in range(len(fires.indptr) - 1)]


def strongest(fires: csr_array) -> csr_array:
    """Of each row of `fires` (feature, site) the sites where the feature fires strongly; none of a row in which these
    are so few that they show no rule."""
    starts = fires.indptr
    feature = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    strong = fires.data >= STRONG * fires.max(axis=1).toarray().ravel()[feature]
    strong &= (np.bincount(feature[strong], minlength=len(starts) - 1) >= FEWEST_SITES)[feature]
    return csr_array((fires.data[strong], (feature[strong], fires.indices[strong])), shape=fires.shape)


def _label(fires: csr_array, situations: Situations, weight: Float[ndarray, " site"], pure: float) -> Label | None:
    if not fires.nnz:
        return None
    activation = fires.toarray().ravel() * weight
    sites = np.stack([activation / activation.sum(), weight * (activation > 0), weight])
    counts = sites @ situations.holds
    kinds = np.array(situations.kind)
    of_one_kind = [kinds == kind for kind in dict.fromkeys(situations.kind)]
    of_all_kinds = np.ones(len(kinds), dtype=bool)
    covers = [_cover(sites, counts, situations, members, _telling) for members in [*of_one_kind, of_all_kinds]]
    best = max(covers, key=lambda cover: cover.score)
    if best.score >= GOOD_ENOUGH and best.counts[0] >= COVERED:
        return _labelled(best.text, best.counts)
    narrow = _cover(sites, counts, situations, of_all_kinds, partial(_purity, enough=pure), pure)
    return _labelled(narrow.text, narrow.counts) if fires.nnz >= FEWEST_SITES and narrow.score >= pure else None


def _cover(
    sites: Float[ndarray, "3 site"],
    counts: Float[ndarray, "3 situation"],
    situations: Situations,
    members: Bool[ndarray, " situation"],
    score_of: Callable[[Float[ndarray, "3 situation"]], Float[ndarray, " situation"]],
    enough: float = np.inf,
) -> _Cover:
    """Join members one by one, each time the one that raises the score most, until it is enough.

    The three rows are the share of the activation, the weight where the feature fires, and the weight; `counts` are
    their sums over the sites of each situation that none of the joined ones holds yet.
    """
    chosen: list[int] = []
    so_far, best = np.zeros(3), 0.0
    left = np.ones(sites.shape[1], dtype=bool)
    while len(chosen) < MOST_PARTS and best < enough:
        joined = so_far[:, None] + counts
        score = np.where(members, score_of(joined), 0)
        pick = int(score.argmax())
        if score[pick] < min(best + WORTH, enough):
            break
        chosen.append(pick)
        so_far, best = joined[:, pick], float(score[pick])
        here = np.flatnonzero((situations.holds @ (np.arange(len(members)) == pick) > 0) & left)
        left[here] = False
        counts = counts - sites[:, here] @ situations.holds[here]
    return _Cover(best, " / ".join(dict.fromkeys(situations.names[i] for i in chosen)), so_far)


def _telling(counts: Float[ndarray, "3 situation"]) -> Float[ndarray, " situation"]:
    """F0.5, in hundredths: a name that is wrong misleads more than one that is narrow, and near ties are ties."""
    share, fired, size = counts
    recall = fired / np.maximum(size, np.finfo(float).tiny)
    score = 1.25 * share * recall / np.maximum(0.25 * share + recall, np.finfo(float).tiny)
    return score.round(2)


def _purity(counts: Float[ndarray, "3 situation"], enough: float) -> Float[ndarray, " situation"]:
    """Precision, no more of it than matters, of what the feature fires on often enough."""
    share, fired, size = counts
    return np.where(fired >= LOWEST_RECALL * size, np.minimum(share, enough), 0)


def _labelled(text: str, counts: Float[ndarray, "3"]) -> Label:
    share, fired, size = counts.tolist()
    return Label(text, min(share, 1.0), min(fired / size, 1.0))  # sums may end a rounding error above


def f1_table(fires: csr_array, holds: csr_array) -> Float[ndarray, "feature situation"]:
    """F1 of every feature (row of `fires`) as a detector of every situation (column of `holds`), by counts."""
    fired = csr_array((np.ones_like(fires.data), fires.indices, fires.indptr), shape=fires.shape)
    both = csr_array(fired @ holds).toarray()
    n_fired, n_holds = np.asarray(fired.sum(axis=1)).ravel(), np.asarray(holds.sum(axis=0)).ravel()
    return 2 * both / np.maximum(n_fired[:, None] + n_holds, 1)


def situations_of(tags: list[list[tuple[str, str]]], kinds: tuple[str, ...]) -> Situations:
    """Situations from the (kind, name) tags of each site, in the order of their kinds."""
    found = dict.fromkeys(tag for held in tags for tag in held)
    ordered = sorted(found, key=lambda tag: kinds.index(tag[0]))
    number = {tag: i for i, tag in enumerate(ordered)}
    pairs = [(site, number[tag]) for site, held in enumerate(tags) for tag in dict.fromkeys(held)]
    rows, columns = np.array(pairs, dtype=int).reshape(-1, 2).T
    holds = csr_array((np.ones(len(pairs)), (rows, columns)), shape=(len(tags), len(ordered)))
    return Situations(tuple(name for _, name in ordered), tuple(kind for kind, _ in ordered), holds)
