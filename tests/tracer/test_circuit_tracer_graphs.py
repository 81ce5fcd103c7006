"""circuit-tracer's .pt graphs: the same as its JSON, and nothing in a file is ever run."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from graphs import NodeKind
from graphs.interchange import from_json
from tests.tracer.conftest import CASES
from tracer.circuit_tracer import read_circuit_tracer_graph
from tracer.errors import TraceError

THEIRS = CASES / "circuit-tracer"


class Marks:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def refusal(path):
    with pytest.raises(TraceError) as error:
        read_circuit_tracer_graph(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def saved():
    """What is in a file, as plain tensors and texts."""
    from tracer.circuit_tracer import _load

    return _load(THEIRS / "graph.pt")


def test_the_graph_is_the_one_that_circuit_tracer_exports_as_json():
    ours = read_circuit_tracer_graph(THEIRS / "graph.pt", lambda number: "<bos>" if number == 1 else f"w{number - 3}")
    theirs = from_json(THEIRS / "whole.json").graph
    assert ours.info.tokens == theirs.info.tokens
    assert ours.info.words == theirs.info.words
    assert ours.info.n_layers == theirs.info.n_layers == 4
    assert (ours.n_nodes, ours.n_edges) == (175, 5108)

    def edges(graph):
        names = ("kind", "layer", "position", "feature", "token_id")
        keys = list(zip(*(getattr(graph, name).tolist() for name in names), strict=True))
        ends = zip(graph.source.tolist(), graph.target.tolist(), graph.weight.tolist(), strict=True)
        return {(keys[source], keys[target]): weight for source, target, weight in ends}

    whole, part = edges(ours), edges(theirs)
    assert part == {key: whole[key] for key in part}  # the JSON is without what has no influence
    logits = ours.kind == NodeKind.LOGIT
    assert ours.probability[logits].tolist() == theirs.probability[theirs.kind == NodeKind.LOGIT].tolist()
    assert np.nansum(ours.influence) > 0


def test_a_file_that_would_run_something_is_refused_and_nothing_runs(tmp_path):
    mark = tmp_path / "mark"
    torch.save({"adjacency_matrix": Marks(mark)}, tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Marks(mark)))
    for name in ("evil.pt", "plain.pt"):
        message = refusal(tmp_path / name)
        assert "was not opened" in message
        assert "import the JSON that it exports" in message
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"x" * 100])
def test_a_file_that_is_no_graph_is_told(tmp_path, content):
    (tmp_path / "bad.pt").write_bytes(content)
    assert "bad.pt" in refusal(tmp_path / "bad.pt")


def test_a_truncated_file_is_told(tmp_path):
    (tmp_path / "half.pt").write_bytes((THEIRS / "graph.pt").read_bytes()[:60_000])
    assert "cannot be read as a .pt file" in refusal(tmp_path / "half.pt")


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("active_features", (slice(None), 0), 10**13, "a layer is 10000000000000; expected 0 to 3; "),
        ("active_features", (slice(None), 1), 10**6, "a position is 1000000; expected 0 to 8; "),
        ("active_features", (slice(None), 1), -1, "a position is -1; expected 0 to 8; "),
        ("active_features", (slice(None), 2), 2**40, "a feature's number is 1099511627776; expected 0 to 2147483647; "),
        ("input_tokens", (0,), -1, "a token's number is -1; expected 0 to 2147483647; "),
        ("logit_probabilities", (0,), 5.0, "a probability is 5.0; expected 0 to 1; "),
        ("logit_probabilities", (0,), float("nan"), "a probability is nan; expected 0 to 1; "),
    ],
)
def test_numbers_that_cannot_be_are_told(tmp_path, saved, name, place, value, message):
    record = saved | {"logit_targets": [tuple(target) for target in saved["logit_targets"]]}
    record[name] = record[name].clone()
    record[name][place] = value
    torch.save(record, tmp_path / "changed.pt")
    with torch.serialization.safe_globals([type(saved["cfg"])]):
        assert message in refusal(tmp_path / "changed.pt")


@pytest.mark.parametrize("n_layers", [True, 10**13, 0])
def test_numbers_of_layers_that_cannot_be_are_told(tmp_path, saved, n_layers):
    record = saved | {"logit_targets": [(target[0], target[1]) for target in saved["logit_targets"]]}
    record["cfg"].n_layers = n_layers
    torch.save(record, tmp_path / "changed.pt")
    with torch.serialization.safe_globals([type(saved["cfg"])]):
        assert "does not say how many layers the model has" in refusal(tmp_path / "changed.pt")


def test_target_numbers_and_complex_numbers_that_cannot_be_are_told(tmp_path, saved):
    record = saved | {"logit_targets": [(target[0], 10**30) for target in saved["logit_targets"]]}
    torch.save(record, tmp_path / "changed.pt")
    with torch.serialization.safe_globals([type(saved["cfg"])]):
        assert "a target's number is 1000000000000000000000000000000" in refusal(tmp_path / "changed.pt")
        record["activation_values"] = record["activation_values"] + 1j
        torch.save(record, tmp_path / "changed.pt")
        assert "has no activation_values of 1 axes" in refusal(tmp_path / "changed.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adjacency_matrix": torch.zeros(3)}, "has no adjacency_matrix of 2 axes"),
        ({"adjacency_matrix": torch.zeros(1).expand(175, 175)}, "adjacency_matrix repeats its numbers"),
        ({"adjacency_matrix": torch.zeros(10, 10)}, "the matrix is not of 175 nodes"),
        ({"selected_features": torch.full((125,), 999)}, "names features that are not active"),
        ({"logit_probabilities": torch.ones(2)}, "not as many logit_probabilities as logit_targets"),
        ({"logit_targets": "x"}, "has no logit_targets"),
        ({"cfg": None}, "does not say how many layers the model has"),
    ],
)
def test_what_does_not_fit_together_is_told(tmp_path, saved, change, message):
    record = {name: value for name, value in saved.items() if name != "cfg"}
    if "cfg" not in change:
        record["cfg"] = saved["cfg"]
    record["logit_targets"] = [tuple(target) for target in saved["logit_targets"]]
    path = tmp_path / "changed.pt"
    torch.save(record | {name: value for name, value in change.items() if value is not None}, path)
    with torch.serialization.safe_globals([type(saved["cfg"])]):
        assert message in refusal(path)
