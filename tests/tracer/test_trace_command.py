"""`trace PROMPT` with what it explains named on the command line saves the graph that the API makes of the same."""

import json
from dataclasses import fields
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from graphs import AttributionGraph, GraphStore, NodeKind
from tests.tracer.conftest import tiny_llama, tiny_tokenizer, tiny_transcoder
from tests.tracer.processes import refused
from tracer.config import TraceConfig
from tracer.pipeline import trace
from tracer.replacement import ReplacementModel
from transcoders import save

PROMPT = "w3 w1 w4 w1 w5 w9"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, a transcoder for it, and directions."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama(0).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    save(tiny_transcoder(1), folder / "transcoder")
    np.save(folder / "probe.npy", np.linspace(-1, 1, 16))
    save_file({"vector": torch.arange(16.0)}, folder / "ramp.safetensors")
    np.save(folder / "short.npy", np.ones(12))
    np.save(folder / "zeros.npy", np.zeros(16))
    np.save(folder / "nan.npy", np.full(16, np.nan))
    (folder / "broken.npy").write_bytes(b"no array")
    return folder


@pytest.fixture
def traced(command, place):
    """What `trace PROMPT …` with the tiny model ends with."""

    def run(*arguments: str) -> tuple[int, str, str]:
        named = ("--model", "model", "--transcoder", "transcoder", "--store")
        return command(PROMPT, *named, str(place / "store"), *arguments, inside=place)

    return run


def explained(graph: AttributionGraph) -> list[tuple[str, int, int]]:
    """Name, layer and position of every target."""
    nodes = np.flatnonzero(graph.kind == NodeKind.LOGIT)
    return [(str(graph.token[n]), int(graph.layer[n]), int(graph.position[n])) for n in nodes]


@pytest.mark.parametrize(
    ("arguments", "settings", "targets"),
    [
        (("--target-direction", "probe.npy"), {"target_direction": ("probe.npy",)}, [("probe", 3, 6)]),
        (
            ("--target-direction", "ramp.safetensors", "--target-direction", "probe.npy", "--position", "2"),
            {"target_direction": ("ramp.safetensors", "probe.npy"), "position": 2},
            [("ramp", 3, 2), ("probe", 3, 2)],
        ),
        (
            ("--target", "w7", "--target", "w3", "--target-minus", "w5"),
            {"target": ("w7", "w3"), "target_minus": "w5"},
            [("w7 − w5", 3, 6), ("w3 − w5", 3, 6)],
        ),
        (
            ("--target", "w7", "--target-minus", "w5", "--position", "-4"),
            {"target": ("w7",), "target_minus": "w5", "position": -4},
            [("w7 − w5", 3, 3)],
        ),
        (("--target", "w7", "--position", "3"), {"target": ("w7",), "position": 3}, [("w7", 3, 3)]),
        (
            ("--target", "w7", "--target-difference", "w3", "w5", "--target-direction", "probe.npy", "--no-prune"),
            {
                "target": ("w7",), "target_difference": (("w3", "w5"),), "target_direction": ("probe.npy",),
                "prune": False,
            },
            [("w7", 3, 6), ("w3 − w5", 3, 6), ("probe", 3, 6)],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_the_saved_graph_is_the_one_that_the_api_makes(traced, place, arguments, settings, targets):
    code, output, errors = traced(*arguments, "--json")
    assert code == 0
    assert errors == f"trace: {json.loads(output)['doubt']}\n"
    assert errors.startswith("trace: the transcoder explains nothing of what most MLPs of")  # it is random
    record = json.loads(output)
    saved = GraphStore(place / "store").load(record["graph_id"])
    replacement = ReplacementModel.load(place / "model", place / "transcoder")
    made = trace(PROMPT, replacement, TraceConfig(**settings)).graph
    assert sorted(explained(saved)) == sorted(explained(made)) == sorted(targets)
    assert {target["name"] for target in record["targets"]} == {name for name, _, _ in targets}
    assert saved.n_edges > 10
    for column in fields(AttributionGraph):
        if column.name != "info":
            np.testing.assert_array_equal(getattr(saved, column.name), getattr(made, column.name), err_msg=column.name)
    assert saved.info.config == made.info.config


def test_a_numbered_position_is_that_of_the_prediction(traced, place):
    record = json.loads(traced("--position", "2", "--json")[1])
    replacement = ReplacementModel.load(place / "model", place / "transcoder")
    logits = replacement.localize(replacement.tokenize(PROMPT)).logits[2]
    best = record["predictions"][0]
    assert (best["token_id"], best["position"]) == (int(logits.argmax()), 2)
    assert best["probability"] == pytest.approx(float(logits.softmax(-1).max()))
    assert {target["position"] for target in record["targets"]} == {2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target-direction", "nowhere.npy"), "nowhere.npy cannot be read as a direction"),
        (("--target-direction", "broken.npy"), "broken.npy cannot be read as a direction"),
        (("--target-direction", "model/config.json"), "give a .npy or .safetensors file with one vector"),
        (("--target-direction", "short.npy"), "'short' has shape (12,); expected (16,)"),
        (("--target-direction", "zeros.npy"), "'zeros' holds only zeros"),
        (("--target-direction", "nan.npy"), "'nan' holds NaN or infinite values"),
        (("--target-direction", "probe.npy", "--target-direction", "probe.npy"), "'probe' at position 6 is given tw"),
        (("--target-direction", "probe.npy", "--target-minus", "w5"), "target_minus was given without target"),
        (("--target", "w7", "--target-minus", "w7"), "from itself"),
        (("--target", "w7", "--target-minus", "w5 w6"), "target 'w5 w6' is 2 tokens"),
        (("--target", "w7", "--target-minus", "Paris"), "target 'Paris' is no token of this model"),
        (("--position", "7"), "position 7 is not in the prompt; it has 7 tokens: 0 … 6"),
        (("--position", "-8"), "position -8 is not in the prompt"),
        (("--position", "1.5"), "position '1.5' is no word of the prompt"),
        (("--position", "w1"), "the word 'w1' is at positions 2, 4; give one of these"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_explained_is_refused_in_one_line(traced, place, arguments, message):
    before = sorted(path for path in (place / "store").rglob("*"))
    assert message in refused(CompletedProcess(arguments, *traced(*arguments)))
    assert sorted(path for path in (place / "store").rglob("*")) == before
