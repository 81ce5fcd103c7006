"""What the store knows of a transcoder's features."""

import pyarrow as pa
import pytest

from graphs import GraphError, GraphStore
from graphs.schema import tables


def feature_rows(transcoder="tiny-clt", **changes):
    row = {
        "transcoder": transcoder,
        "layer": 0,
        "feature": 4,
        "density": 0.01,
        "max_activation": 3.5,
        "top_logits": [{"token": " Austin", "value": 2.0}],
        "bottom_logits": [],
        "examples": [{"tokens": ["a", "b"], "activations": [0.0, 1.5], "position": 1}],
        "histogram": [0] * 20,
        "label": "Texas",
        "label_source": "fires on",
        "label_precision": 0.9,
        "label_recall": None,
    }
    return pa.Table.from_pylist([row | changes], schema=tables()["features"])


def test_features_are_saved_per_transcoder_and_replaced(tmp_path):
    store = GraphStore(tmp_path)
    store.save_features(feature_rows(label="old"), "tiny-clt")
    store.save_features(feature_rows(), "tiny-clt")
    store.save_features(feature_rows("org/other's clt"), "org/other's clt")
    assert store.has_features("tiny-clt")
    assert store.has_features("org/other's clt")
    assert not store.has_features("tiny")
    answer = store.sql("SELECT label, examples[1].tokens[2] AS token FROM features WHERE transcoder = 'tiny-clt'")
    assert answer.to_pylist() == [{"label": "Texas", "token": "b"}]
    assert store.sql("SELECT count(*) AS n FROM features").to_pylist() == [{"n": 2}]
    assert len(list((tmp_path / "features").iterdir())) == 2


def test_features_may_come_with_columns_in_another_order_and_wider_types(tmp_path):
    table = feature_rows().select(list(reversed(tables()["features"].names)))
    table = table.set_column(0, "label_recall", pa.array([0.5], pa.float32()))
    GraphStore(tmp_path).save_features(table, "tiny-clt")
    assert GraphStore(tmp_path).sql("SELECT label_recall FROM features").to_pylist() == [{"label_recall": 0.5}]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (feature_rows().drop_columns("label"), "the features do not fit table features"),
        (feature_rows().set_column(1, "layer", pa.array(["zero"])), "the features do not fit table features"),
        (feature_rows("another"), "features of another were given as those of tiny-clt"),
    ],
)
def test_features_that_do_not_fit_are_refused(tmp_path, table, message):
    with pytest.raises(GraphError, match=message) as error:
        GraphStore(tmp_path / "store").save_features(table, "tiny-clt")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "store").exists()


def test_a_damaged_features_file_is_left_out(tmp_path):
    store = GraphStore(tmp_path)
    store.save_features(feature_rows(), "tiny-clt")
    (tmp_path / "features" / "broken.parquet").write_bytes(b"PAR1")
    assert store.sql("SELECT count(*) AS n FROM features").to_pylist() == [{"n": 1}]
