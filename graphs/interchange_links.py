"""Links of circuit-tracer's graph JSON as columns: checked and numbered batch by batch, so that millions fit."""

from collections.abc import Iterable, Mapping
from operator import itemgetter
from typing import Any

import numpy as np
from numpy import ndarray

from graphs.errors import GraphError
from graphs.interchange_fields import NUMBER, TEXT, check_object, shown
from graphs.shapes import Float64, Int, Int32

_ENDS = {"source": TEXT, "target": TEXT}
_COLUMNS = itemgetter("source", "target", "weight")


class Links:
    """The links of a file, in its order, as columns; ends are places in its list of nodes."""

    def __init__(
        self, source: Int32[ndarray, "edge"], target: Int32[ndarray, "edge"], weight: Float64[ndarray, "edge"]
    ) -> None:
        self.source, self.target, self.weight = source, target, weight


def read_links(batches: Iterable[list[Any]], number: Mapping[str, int]) -> Links:
    """The links of all batches. Raises `GraphError` that names the first bad one."""
    ends: list[list[ndarray]] = [[], []]
    weights: list[ndarray] = []
    done = 0
    for batch in filter(None, batches):
        source, target, weight = _columns(batch, number, done)
        ends[0].append(source)
        ends[1].append(target)
        weights.append(weight)
        done += len(batch)
    # each column's parts are let go before the next is put together: two of them at once are all that is ever held
    return Links(_joined(ends[0], np.int32), _joined(ends[1], np.int32), _joined(weights, np.float64))


def _joined(parts: list[ndarray], kind: type) -> ndarray:
    column = np.concatenate([np.zeros(0, kind), *parts])
    parts.clear()
    return column


def _columns(batch: list[Any], number: Mapping[str, int], before: int) -> tuple[ndarray, ndarray, ndarray]:
    try:
        source, target, weight = zip(*map(_COLUMNS, batch), strict=True)
        if not {float, int}.issuperset(map(type, weight)):
            raise TypeError
        columns = (
            np.fromiter(map(number.__getitem__, source), np.int32, len(batch)),
            np.fromiter(map(number.__getitem__, target), np.int32, len(batch)),
            np.fromiter(weight, np.float64, len(batch)),
        )
        if np.isfinite(columns[2]).all():
            return columns
    except (KeyError, TypeError, IndexError, AttributeError, OverflowError):
        pass  # some link of the batch is wrong: look which
    for place, link in enumerate(batch, before):
        _check(link, number, place)
    raise AssertionError("a batch with a bad link holds one")


def _check(link: object, number: Mapping[str, int], place: int) -> None:
    where = f"link {place}"
    record = check_object(where, link, _ENDS, {})
    where = f"link {place} ({shown(record['source'])} → {shown(record['target'])})"
    for name in ("source", "target"):
        if record[name] not in number:
            raise GraphError(f"{where}: {name} {shown(record[name])} is the id of no node; add the node.")
    check_object(where, link, {"weight": NUMBER}, {})


def told_apart(links: Links, colliding: Mapping[int, int], layer: Int[ndarray, "node"], ids: list[str]) -> Links:
    """The links with those of an id that a feature and an error share given to the one they belong to.

    Circuit-tracer up to 0.5.0 wrote such files: links in the order of targets and, for one target, of sources, which
    stand in the order of the nodes. So a link is the error's if it comes after a node behind the feature's place.
    Errors receive nothing.
    """
    if not colliding:
        return links
    source = links.source.copy()
    ambiguous = np.flatnonzero(np.isin(source, np.fromiter(colliding, np.int32, len(colliding))))
    # a loop, because such links are few
    for edge in ambiguous.tolist():
        feature = int(links.source[edge])
        error = colliding[feature]
        target = int(links.target[edge])
        fits = [
            layer[feature] < layer[target] and _is_in_order(links, edge, feature, colliding),
            layer[error] < layer[target] and _is_in_order(links, edge, error, colliding),
        ]
        if fits.count(True) != 1:
            raise GraphError(
                f"link {edge} ({ids[feature]} → {ids[target]}): a feature and an error share the id {ids[feature]} and "
                "nothing tells whose link it is; export the graph with circuit-tracer 0.5.1 or later."
            )
        source[edge] = feature if fits[0] else error
    return Links(source, links.target, links.weight)


def _is_in_order(links: Links, edge: int, place: int, colliding: Mapping[int, int]) -> bool:
    """Whether the link's neighbours of the same target stand on the right sides of the node that is tried."""
    for step in (-1, 1):
        other = edge + step
        while 0 <= other < len(links.source) and links.target[other] == links.target[edge]:
            neighbour = int(links.source[other])
            if neighbour not in colliding:
                if (place - neighbour) * step >= 0:
                    return False
                break
            if neighbour == links.source[edge] and (place == neighbour) != (step == 1):
                return False  # the same id twice: the feature's link comes first
            other += step
    return True
