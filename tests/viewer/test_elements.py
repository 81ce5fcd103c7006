"""Laws of the picture: what lies where, and that nothing covers anything."""

import math
from dataclasses import replace

import numpy as np
import pytest

from graphs import NodeKind
from tests.viewer.samples import make_graph
from viewer.elements import (
    LARGEST,
    SPACING,
    backbone,
    drawn_nodes,
    edge_elements,
    layer_text,
    layout,
    node_elements,
    node_sizes,
    node_text,
    percent,
    probability,
    short,
    visible,
)


@pytest.mark.parametrize("per_cell", [1, 3, 4, 11])
def test_later_tokens_stand_further_right(per_cell):
    graph = make_graph(per_cell=per_cell)
    x = layout(graph).x
    for position in range(2):
        assert x[graph.position == position].max() < x[graph.position == position + 1].min()


@pytest.mark.parametrize("per_cell", [1, 3, 4, 11])
def test_higher_layers_stand_higher(per_cell):
    graph = make_graph(per_cell=per_cell)
    y = layout(graph).y
    for layer in range(-1, 2):
        assert y[graph.layer == layer].min() > y[graph.layer == layer + 1].max()


@pytest.mark.parametrize("per_cell", [1, 4, 11])
def test_no_two_nodes_overlap(per_cell):
    graph = make_graph(per_cell=per_cell)
    placed = layout(graph)
    at = np.column_stack((placed.x, placed.y))
    distance = np.linalg.norm(at[:, None] - at[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    assert distance.min() == pytest.approx(SPACING)
    assert LARGEST < SPACING


def test_nodes_lie_within_their_column_and_band():
    graph = make_graph(per_cell=7)
    placed = layout(graph)
    for node in range(graph.n_nodes):
        column, band = placed.columns[graph.position[node] + 1], placed.bands[graph.layer[node] + 1]
        assert abs(placed.x[node] - column.middle) + LARGEST / 2 <= column.extent / 2
        assert abs(placed.y[node] - band.middle) + LARGEST / 2 <= band.extent / 2


def test_the_column_without_position_has_no_width_if_nothing_stands_there():
    columns = layout(make_graph()).columns
    assert [column.text for column in columns] == ["", "the", "capital", "of"]
    assert columns[0].extent == 0


def test_bands_are_named_from_tokens_to_output():
    assert [band.text for band in layout(make_graph()).bands] == ["tokens", "L0", "L1", "output"]


def test_the_picture_is_the_same_every_time():
    graph = make_graph(per_cell=5)
    first, second = (node_elements(graph, layout(graph)) for _ in range(2))
    assert [node["position"] for node in first] == [node["position"] for node in second]
    assert backbone(graph).tolist() == backbone(graph).tolist()


def test_the_most_influential_node_is_the_largest():
    graph = make_graph(per_cell=3)
    size = node_sizes(graph)
    of_kind = np.flatnonzero(graph.kind == NodeKind.FEATURE)
    assert size[of_kind].max() == size[of_kind[np.argmax(graph.influence[of_kind])]] == LARGEST


def test_an_edge_is_classed_by_its_sign_and_wide_by_its_share():
    graph = make_graph()
    share = np.linspace(0, 1, graph.n_edges)
    first, last = edge_elements(graph, share, np.array([0, graph.n_edges - 1]))
    assert [first["classes"], last["classes"]] == [
        "positive" if graph.weight[edge] > 0 else "negative" for edge in (0, -1)
    ]
    assert first["data"]["width"] == 1.0
    assert last["data"]["width"] == 8.0
    assert first["data"]["source"] == f"n{graph.source[0]}"


def test_the_backbone_is_cut_to_the_strongest():
    graph = make_graph(per_cell=3)
    every = backbone(graph, most=graph.n_edges)
    assert sorted(every.tolist()) == list(range(graph.n_edges))
    assert backbone(graph, most=5).tolist() == every[:5].tolist()


def test_nodes_are_called_what_they_are():
    graph = make_graph(label="")
    names = {NodeKind(graph.kind[node]): node_text(graph, node) for node in range(graph.n_nodes)}
    assert names == {
        NodeKind.TOKEN: "of",
        NodeKind.FEATURE: "L1/0",
        NodeKind.ERROR: "error L1",
        NodeKind.LOGIT: "Dallas 12 %",
    }


def test_an_explained_feature_stands_where_it_is_and_has_no_probability():
    graph = make_graph()
    columns = {name: getattr(graph, name).copy() for name in ("layer", "position", "feature", "token_id", "token")}
    target = int(np.flatnonzero(graph.kind == NodeKind.LOGIT)[0])
    for name, value in zip(columns, (1, 1, 7, -1, "feature 1/7 at capital"), strict=True):
        columns[name][target] = value
    graph = replace(graph, **columns)
    placed = layout(graph)
    assert node_text(graph, target) == "feature 1/7 at capital"
    assert layer_text(graph, target) == "L1"
    assert math.isnan(probability(graph, target))
    for place, spans in ((placed.x[target], placed.columns[2]), (placed.y[target], placed.bands[2])):
        assert abs(place - spans.middle) <= spans.extent / 2
    points = np.column_stack((placed.x, placed.y))
    assert len(np.unique(points, axis=0)) == graph.n_nodes


@pytest.mark.parametrize(("token", "shown"), [(" of", "of"), ("\n", "↵"), ("  ", "␣"), ("", ""), ("a\tb", "a⇥b")])
def test_tokens_that_cannot_be_seen_are_made_visible(token, shown):
    assert visible(token) == shown


def test_long_labels_are_cut():
    assert short("a" * 30) == "a" * 30
    assert short("a" * 31) == "a" * 29 + "…"


@pytest.mark.parametrize(("part", "text"), [(0.75, "75 %"), (0.012, "1.2 %"), (None, ""), (float("nan"), "")])
def test_shares_are_told_in_percent(part, text):
    assert percent(part) == text


def test_of_a_graph_too_large_to_draw_the_most_important_nodes_are_drawn():
    graph = make_graph(per_cell=5)
    drawn = drawn_nodes(graph, most=7)
    inner = (graph.kind == NodeKind.FEATURE) | (graph.kind == NodeKind.ERROR)
    assert drawn[~inner].all()
    assert drawn[inner].sum() == 7
    assert graph.influence[drawn & inner].min() >= graph.influence[~drawn].max()
    assert drawn_nodes(graph, most=int(inner.sum())).all()
    edges = backbone(graph, drawn, most=10_000)
    assert sorted(edges.tolist()) == np.flatnonzero(drawn[graph.source] & drawn[graph.target]).tolist()
    assert backbone(graph, drawn, most=4).tolist() == edges[:4].tolist()
