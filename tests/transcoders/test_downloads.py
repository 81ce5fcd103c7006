"""Transcoders that are downloaded, from a Hub on this machine that speaks as much of its protocol as is needed."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from tests.hub_server import COMMIT, Hub, point_to, serving
from transcoders import TranscoderError, load, load_on_demand
from transcoders.checkpoint import revision

TRANSCODER = Path(__file__).parents[1] / "data" / "llama-clt-jumprelu" / "transcoder"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with org/repo, which holds a transcoder and a page of every feature; and an empty cache of its client."""
    shutil.copytree(TRANSCODER, tmp_path / "repository")
    (tmp_path / "repository" / "features").mkdir()
    (tmp_path / "repository" / "features" / "layer_0.bin").write_bytes(b"a page of every feature")
    (tmp_path / "repository" / "README.md").write_text("about it", encoding="utf-8")
    with serving({"org/repo": tmp_path / "repository"}) as hub:
        point_to(hub.address, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield hub


@pytest.mark.parametrize("pin", ["", "@main", f"@{COMMIT}", f"?revision={COMMIT}"])
def test_weights_and_settings_are_downloaded_and_nothing_else(hub, pin):
    found, expected = load(f"hf://org/repo{pin}"), load(TRANSCODER)
    assert found.config == expected.config
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert sorted(hub.fetched) == sorted(f"org/repo/{path.name}" for path in TRANSCODER.iterdir())
    assert revision(f"hf://org/repo{pin}") == COMMIT


def test_what_was_downloaded_is_not_downloaded_again_and_needs_no_network(hub, monkeypatch):
    load("org/repo")
    hub.fetched.clear()
    load_on_demand("hf://org/repo")
    assert hub.fetched == []
    point_to("http://127.0.0.1:9", monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(load("org/repo").W_dec[1], load(TRANSCODER).W_dec[1])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("org/nothing", r"org/nothing cannot be downloaded \(.*404.*\); check its name, its revision and"),
        ("org/repo@v9", r"org/repo at revision v9 cannot be downloaded \(.*404.*\); check its name, its revision and"),
        ("hf://org/repo/layer_9/params.npz", r"org/repo cannot be downloaded \(.*404.*\); check its name"),
    ],
)
def test_what_the_hub_does_not_have_is_told_in_one_line(hub, source, message):
    with pytest.raises(TranscoderError, match=message) as caught:
        load(source)
    assert "\n" not in str(caught.value)


def test_what_only_some_may_read_is_told_in_one_line(hub):
    hub.gated.add("org/repo")
    with pytest.raises(
        TranscoderError, match=r"org/repo cannot be downloaded \(.*403.*\); .* logged in \(hf auth login"
    ):
        load("org/repo")


def test_a_hub_that_does_not_answer_is_told_in_one_line(hub, monkeypatch):
    point_to("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(TranscoderError, match=r"org/repo is not in the Hub's cache .* the Hub cannot be reached"):
        load("org/repo")


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's client tries again at once."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def test_a_download_that_breaks_off_once_is_tried_again(hub, at_once):
    hub.breaks["W_dec_1.safetensors"] = 1
    assert torch.equal(load("org/repo").W_dec[1], load(TRANSCODER).W_dec[1])
    assert hub.fetched.count("org/repo/W_dec_1.safetensors") == 2


def test_a_download_that_always_breaks_off_is_told_in_one_line_and_can_be_finished(hub, at_once):
    hub.breaks["W_dec_1.safetensors"] = 100
    for _ in range(2):
        with pytest.raises(
            TranscoderError, match=r"org/repo cannot be downloaded \(.*\); run the same command"
        ) as told:
            load("org/repo")
        assert "\n" not in str(told.value)
    hub.breaks.clear()
    assert torch.equal(load("org/repo").W_dec[1], load(TRANSCODER).W_dec[1])


def test_a_part_of_a_transcoder_in_the_cache_is_not_taken_for_all_of_it(hub, at_once, monkeypatch):
    hub.breaks["W_dec_1.safetensors"] = 100
    with pytest.raises(TranscoderError, match="cannot be downloaded"):
        load("org/repo")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TranscoderError, match=r"W_dec_1|not in the Hub's cache") as told:
        load("org/repo")
    assert "\n" not in str(told.value)
