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


def test_every_macro_is_documented_by_its_leading_comment():
    macros = schema.macros()
    assert sorted(macros) == [
        "best_paths", "common_features", "diff", "in_edges", "influence_by_kind", "input_share", "inputs_of",
        "node_text", "out_edges", "outputs_of", "paths", "paths_between", "strongest_circuit", "strongest_path",
    ]  # fmt: skip
    names = list(macros)
    assert names.index("node_text") < names.index("best_paths") < names.index("strongest_path")
    for name, sql in macros.items():
        assert schema.macro_signature(name, sql).startswith(name + "(")
        assert schema.macro_description(sql).endswith(".")


def test_the_page_of_documentation_names_every_table_column_and_macro():
    page = schema.schema_markdown()
    for name, table in schema.tables().items():
        assert f"\n## {name}\n" in page
        assert all(f"| `{column}` |" in page for column in table.names)
    assert "### `strongest_path(from_word)`\n\nIn every graph of a prompt with this word" in page
    assert "| `tokens` | `list<string>` |  | Text of each token of the prompt. |" in page
