"""Hub ids: what they name, what comes from the cache without a network, and what is said when nothing is there."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from tracer.errors import TraceError
from tracer.replacement import ReplacementModel
from transcoders import TranscoderError, load
from transcoders.checkpoint import revision
from transcoders.hub import HubPath, commit, locate, parse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CASES = Path(__file__).parents[1] / "data"
TRANSCODER, PER_LAYER = CASES / "llama-clt-jumprelu" / "transcoder", CASES / "qwen3-plt-relu" / "transcoder"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://org/repo", HubPath("org/repo")),
        ("hf://org/repo@v2", HubPath("org/repo", "", "v2")),
        ("hf://org/repo/a/b.npz?revision=abc", HubPath("org/repo", "a/b.npz", "abc")),
        ("hf://org/repo/a/layer_*_width_16k@abc", HubPath("org/repo", "a/layer_*_width_16k", "abc")),
        ("org/repo-1.0", HubPath("org/repo-1.0")),
        ("org/repo@refs/pr/1", HubPath("org/repo", "", "refs/pr/1")),
        ("folder", None),
        ("./folder/inside", None),
        ("/some/where", None),
        ("a/b/c", None),
        ("some/layer_*", None),
    ],
)
def test_a_hub_id_names_a_repository_a_path_and_a_revision(text, expected):
    assert parse(text) == expected


def test_a_hub_id_without_a_repository_is_refused():
    with pytest.raises(TranscoderError, match="'hf://org' names no repository; write it as hf://org/repo"):
        parse("hf://org")


def test_a_local_folder_comes_before_a_hub_id_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "org" / "repo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate("org/repo") == Path("org/repo")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty cache of the Hub's client, which may not use the network."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def put(hub_cache: Path, repo: str, files: Path) -> Path:
    """A repository as the Hub's client leaves it in its cache."""
    place = hub_cache / f"models--{repo.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    return Path(shutil.copytree(files, place / "snapshots" / COMMIT))


@pytest.mark.parametrize("pin", ["", "@main", f"@{COMMIT}"])
def test_what_is_in_the_cache_needs_no_network_and_has_its_commit_as_revision(hub_cache, pin):
    put(hub_cache, "org/repo", TRANSCODER)
    assert load(f"hf://org/repo{pin}").config == load(TRANSCODER).config
    assert revision(f"org/repo{pin}") == COMMIT


def test_a_config_may_list_files_on_the_hub(hub_cache, tmp_path):
    for layer in range(2):
        put(hub_cache, f"org/layer{layer}", PER_LAYER)
    listed = [f"hf://org/layer{layer}/layer_{layer}.safetensors?revision={COMMIT}" for layer in range(2)]
    lines = ["model_kind: transcoder_set", "feature_input_hook: mlp.hook_in", f"transcoders: {listed}"]
    (tmp_path / "config.yaml").write_text("\n".join(lines), encoding="utf-8")
    ours, theirs = load(tmp_path), load(PER_LAYER)
    assert ours.config.n_layers == 2
    assert torch.equal(ours.W_dec[1], theirs.W_dec[1])


@pytest.mark.parametrize("source", ["hf://org/repo", "org/repo@v1", "hf://org/repo/layer_0/params.npz"])
def test_offline_and_not_in_the_cache_says_what_to_do(hub_cache, source):
    with pytest.raises(TranscoderError, match=r"org/repo is not in the Hub's cache .* Go online once, or give a local"):
        load(source)


def test_an_impossible_repository_name_is_refused(hub_cache):
    with pytest.raises(TranscoderError, match="org/re--po cannot be downloaded"):
        load("hf://org/re--po")


def test_a_model_that_is_neither_here_nor_in_the_cache_is_refused_in_one_line(hub_cache):
    with pytest.raises(TraceError, match=r"the model org/model@v1 cannot be loaded \(.*give a local directory"):
        ReplacementModel.load("org/model@v1", TRANSCODER)


def test_local_folders_have_the_hash_of_their_weights_as_revision():
    assert commit(TRANSCODER) is None
    assert re.fullmatch(r"[0-9a-f]{10}", revision(TRANSCODER))
