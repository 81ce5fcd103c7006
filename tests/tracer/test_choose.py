"""What the settings of a trace name becomes its targets, and the settings survive JSON."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from graphs import NodeKind
from tracer.choose import choose_targets, read_direction
from tracer.config import TraceConfig
from tracer.errors import TraceError
from tracer.pipeline import trace


@pytest.fixture
def probe(tmp_path: Path) -> str:
    np.save(tmp_path / "probe.npy", np.arange(16, dtype=np.float32))
    return str(tmp_path / "probe.npy")


def chosen(replacement, local, **settings) -> list[tuple[str, int, int]]:
    """Name, layer and position of every target."""
    targets = choose_targets(replacement, local, TraceConfig(**settings))
    return list(zip(targets.names, targets.layers, targets.positions, strict=True))


def test_nothing_named_means_the_most_probable_tokens(replacement, local):
    targets = choose_targets(replacement, local, TraceConfig(max_logits=2, logit_mass=1.0, position="w4"))
    assert list(targets.token_ids) == local.logits[3].topk(2).indices.tolist()
    assert targets.positions == (3, 3)


def test_tokens_features_and_directions_are_explained_together(replacement, local, probe):
    feature = int(local.features.feature[(local.features.layer == 1) & (local.features.position == 3)][0])
    asked = {"target": ("w7", "w3"), "target_feature": (f"1/{feature}@w4",), "target_direction": (probe,)}
    assert chosen(replacement, local, **asked) == [
        ("w7", 3, 6), ("w3", 3, 6), (f"feature 1/{feature} at w4", 1, 3), ("probe", 3, 6)
    ]  # fmt: skip


def test_each_token_is_explained_less_another(replacement, local):
    asked = chosen(replacement, local, target=("w7", "w3"), target_minus="w5", position=2)
    assert asked == [("w7 − w5", 3, 2), ("w3 − w5", 3, 2)]


def test_tokens_and_differences_are_explained_together(replacement, local):
    asked = chosen(replacement, local, target=("w7",), target_difference=(("w7", "w5"), ("w3", "w2")))
    assert asked == [("w7", 3, 6), ("w7 − w5", 3, 6), ("w3 − w2", 3, 6)]


def test_a_difference_of_three_is_refused():
    with pytest.raises(TraceError, match="give pairs of tokens"):
        TraceConfig(target_difference=(("a", "b", "c"),))


def test_a_feature_is_taken_at_the_traced_position_unless_it_names_its_own(replacement, local):
    feature = int(local.features.feature[(local.features.layer == 1) & (local.features.position == 3)][0])
    for settings in ({"target_feature": (f"1/{feature}",), "position": 3}, {"target_feature": (f"1/{feature}@-4",)}):
        assert chosen(replacement, local, **settings) == [(f"feature 1/{feature} at w4", 1, 3)]


def test_settings_come_back_from_json(probe):
    config = TraceConfig(
        target=("w7", "w3"),
        target_difference=(("w7", "w5"),),
        target_feature=("1/2@3",),
        target_direction=(probe,),
        position="-2",
    )
    assert config.position == -2
    assert TraceConfig(**json.loads(json.dumps(asdict(config)))) == config
    assert hash(config) == hash(TraceConfig(**asdict(config)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "w7"}, "target is the text 'w7'; give a tuple of texts"),
        ({"target_minus": "w7"}, "target_minus was given without target"),
        ({"target_feature": ("217",)}, "feature '217' is not written LAYER/FEATURE or LAYER/FEATURE@POSITION"),
        ({"target_feature": ("1/x",)}, "feature '1/x' is not written"),
        ({"target_feature": ("1/2@",)}, "feature '1/2@' is not written"),
    ],
)
def test_settings_that_say_nothing_are_refused(settings, message):
    with pytest.raises(TraceError, match=message):
        TraceConfig(**settings)


def test_a_trace_predicts_at_the_traced_position(replacement):
    done = trace("w3 w1 w4 w1 w5", replacement, TraceConfig(position="w4"))
    expected = replacement.localize(replacement.tokenize("w3 w1 w4 w1 w5")).logits[3].softmax(-1)
    assert {one.position for one in done.predictions} == {3}
    assert done.predictions[0].token_id == int(expected.argmax())
    logits = done.graph.kind == NodeKind.LOGIT
    assert set(done.graph.position[logits].tolist()) == {3}
    assert done.graph.probability[logits].max() == pytest.approx(float(expected.max()))
    assert json.loads(done.graph.info.config)["position"] == "w4"


def test_a_direction_is_read_from_either_kind_of_file(tmp_path, probe):
    save_file({"vector": torch.arange(16, dtype=torch.bfloat16)}, tmp_path / "probe.safetensors")
    for file in (Path(probe), tmp_path / "probe.safetensors"):
        assert read_direction(file).tolist() == list(range(16))


def test_files_that_hold_no_direction_are_refused(tmp_path):
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "complex.npy", np.ones(16, dtype=complex))
    (tmp_path / "empty.npy").touch()
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    save_file({"a": torch.ones(16), "b": torch.ones(16)}, tmp_path / "two.safetensors")
    (tmp_path / "vector.pt").touch()
    for name, message in (
        ("missing.npy", "cannot be read"), ("missing.safetensors", "cannot be read"),
        ("object.npy", "cannot be read"), ("complex.npy", "values of type complex128"),
        ("empty.npy", "cannot be read"), ("broken.safetensors", "cannot be read"),
        ("two.safetensors", "holds 2 tensors; give a file with one vector"), ("vector.pt", "give a .npy or .safeten"),
    ):  # fmt: skip
        with pytest.raises(TraceError, match=message):
            read_direction(tmp_path / name)
