import pyarrow as pa
import pytest

from graphs import schema
from graphs.graph import NODE_COLUMNS, GraphInfo


def test_the_public_tables_are_these():
    assert list(schema.tables()) == [
        "graphs",
        "nodes",
        "edges",
        "features",
        "supernodes",
        "interventions",
        "validations",
        "comparisons",
        "comparison_nodes",
        "comparison_edges",
    ]
    assert schema.SCHEMA_VERSION == 3


@pytest.mark.parametrize("table", schema.tables())
def test_every_table_and_column_is_described(table):
    assert schema.description(schema.tables()[table]).endswith(".")
    for field in schema.tables()[table]:
        assert field.metadata[b"description"], field.name
        assert b"unit" in field.metadata


def test_table_graphs_has_one_column_per_field_of_a_graphs_info():
    derived = {"graph_id", "schema_version", "n_nodes", "n_edges"}
    assert set(schema.tables()["graphs"].names) == set(GraphInfo.__dataclass_fields__) | derived


def test_table_nodes_has_one_column_per_column_of_a_graph():
    derived = {"graph_id", "node", "reached_from", "reaches_answer"}
    assert set(schema.tables()["nodes"].names) == {*derived, *NODE_COLUMNS}


def test_features_have_examples_and_promoted_tokens_as_nested_lists():
    features = schema.tables()["features"]
    assert features.field("top_logits").type == pa.list_(pa.struct([("token", pa.string()), ("value", pa.float32())]))
    assert features.names[-4:] == ["label", "label_source", "label_precision", "label_recall"]


def test_a_description_ends_with_the_unit():
    edges = schema.tables()["edges"]
    assert schema.description(edges.field("source")) == "Node that acts."
    assert schema.description(edges.field("weight")) == (
        "Direct effect on the target. [the target's pre-activation, or logits]"
    )
