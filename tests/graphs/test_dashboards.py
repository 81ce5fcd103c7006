"""Feature dashboards of circuit-tracer become rows of table `features`; damaged files are told in one line."""

import gzip
import json
import shutil
import struct
import zlib
from pathlib import Path

import pytest

from graphs import GraphError, GraphStore
from graphs.dashboards import read_dashboards

THEIRS = Path(__file__).parents[1] / "data" / "circuit-tracer" / "features"


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(THEIRS, tmp_path / "features"))


def write_layer(folder, record, *, packed=None):
    """One layer with one record, whatever it is."""
    packed = zlib.compress(json.dumps(record).encode()) if packed is None else packed
    (folder / "layer_0.bin").write_bytes(struct.pack("<I", len(packed)) + packed)
    index = [{"filename": "layer_0.bin", "offsets": [0, 4 + len(packed)]}]
    (folder / "index.json.gz").write_bytes(gzip.compress(json.dumps(index).encode()))


def refusal(folder):
    with pytest.raises(GraphError) as error:
        read_dashboards(folder, "t")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_dashboards_are_found_in_sql(tmp_path):
    store = GraphStore(tmp_path / "store")
    store.save_features(read_dashboards(THEIRS, "mine"), "mine")
    rows = store.sql("FROM features ORDER BY layer, feature").to_pylist()
    assert [(row["transcoder"], row["layer"], row["feature"]) for row in rows] == [
        ("mine", layer, feature) for layer in (0, 1) for feature in (0, 1, 2)
    ]
    assert rows[4]["density"] == 0.25
    assert rows[4]["max_activation"] == 2.5
    assert rows[4]["histogram"] == [7, 2, 1]
    assert rows[4]["top_logits"] == [{"token": "w3", "value": None}, {"token": "w4", "value": None}]
    assert rows[4]["examples"] == [{"tokens": ["w1", "w2", "w1"], "activations": [0.0, 0.0, 2.5], "position": 2}]


def test_features_without_a_record_and_paired_indices_are_read(folder):
    packed = zlib.compress(json.dumps({"index": 5, "examples_quantiles": []}).encode())  # 5 is layer 0, feature 2
    (folder / "layer_0.bin").write_bytes(struct.pack("<I", len(packed)) + packed)
    index = [{"filename": "layer_0.bin", "offsets": [0, 0, 0, 4 + len(packed)]}]
    (folder / "index.json.gz").write_bytes(gzip.compress(json.dumps(index).encode()))
    assert read_dashboards(folder, "t").select(["layer", "feature"]).to_pylist() == [{"layer": 0, "feature": 2}]


def test_what_is_damaged_or_hostile_is_told(folder):
    whole = (folder / "layer_0.bin").read_bytes()
    (folder / "layer_0.bin").write_bytes(whole[:300])
    assert "layer_0.bin ends before its last feature does" in refusal(folder)
    (folder / "layer_0.bin").write_bytes(whole[:300] + bytes(len(whole) - 300))
    assert "layer_0.bin: feature 1 cannot be read" in refusal(folder)
    write_layer(folder, {"index": 1, "examples_quantiles": []})
    assert refusal(folder) == "layer_0.bin: feature 0: index is 1; expected 0; the index is of other files."
    write_layer(folder, {"index": 0})
    assert refusal(folder) == "layer_0.bin: feature 0 has no examples_quantiles; expected a list."
    example = {"tokens": ["a", "b"], "tokens_acts_list": [1.0]}
    write_layer(folder, {"index": 0, "examples_quantiles": [{"examples": [example]}]})
    assert "has not one finite activation per token" in refusal(folder)
    feature = {"index": 0, "examples_quantiles": []}
    write_layer(folder, feature | {"histogram": [1e300]})
    assert "histogram holds 1e+300; expected counts of tokens" in refusal(folder)
    write_layer(folder, feature | {"label": "\ud800"})
    assert "label is" in refusal(folder)
    example = {"tokens": ["a"], "tokens_acts_list": [1.0], "train_token_ind": 2**40}
    write_layer(folder, {"index": 0, "examples_quantiles": [{"examples": [example]}]})
    assert "train_token_ind of an example is 1099511627776, and it has 1 tokens" in refusal(folder)
    write_layer(folder, feature)
    index = [{"filename": "layer_0.bin", "offsets": [10**30, 10**30 + 1]}]
    (folder / "index.json.gz").write_bytes(gzip.compress(json.dumps(index).encode()))
    assert "layer_0.bin ends before its last feature does" in refusal(folder)
    write_layer(folder, None, packed=zlib.compress(b"[" * 100_000))
    assert "cannot be read" in refusal(folder)
    write_layer(folder, None, packed=zlib.compress(b" " * (1 << 25)))
    assert "unpacks to too much" in refusal(folder)
    (folder / "layer_0.bin").write_bytes(struct.pack("<I", 1 << 31) + bytes(1 << 16))
    assert "2147483648 bytes are more than a record has" in refusal(folder)
    (folder / "layer_0.bin").unlink()
    assert "No such file" in refusal(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "", "..", "a\0"])
def test_the_index_names_only_files_beside_it(folder, name):
    index = [{"filename": name, "offsets": [0, 5]}]
    (folder / "index.json.gz").write_bytes(gzip.compress(json.dumps(index).encode()))
    with pytest.raises(GraphError):
        read_dashboards(folder, "t")


@pytest.mark.parametrize("content", [b"", b"x", gzip.compress(b"{}"), gzip.compress(b"[1]"), gzip.compress(b"["),
                                     gzip.compress(b'[{"filename": "a", "offsets": [3, 1]}]')])  # fmt: skip
def test_a_damaged_index_is_told(folder, content):
    (folder / "index.json.gz").write_bytes(content)
    assert "index" in refusal(folder)


def test_a_folder_without_index_is_told(tmp_path):
    assert refusal(tmp_path).endswith("has no index.json.gz; give the folder features/ of a transcoder.")
