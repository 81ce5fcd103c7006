"""Hub ids: what they name, what comes from the Hub's cache without a network, and what is said when nothing is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from transcoders import TranscoderError
from transcoders.checkpoint import revision
from transcoders.hub import HubPath, commit, locate, parse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROOT = Path(__file__).parents[2]
TRANSCODER = ROOT / "tests" / "data" / "llama-clt-jumprelu" / "transcoder"


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


def cache(folder: Path, repo: str, files: Path) -> None:
    """A repository as the Hub's client leaves it in its cache."""
    place = folder / f"models--{repo.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    snapshot = place / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for file in files.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own: the Hub's client reads its settings when it is imported."""
    settings = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder), "PYTHONPATH": str(ROOT), "HOME": str(folder)}
    return subprocess.run(
        [sys.executable, "-c", code], env=settings, capture_output=True, text=True, timeout=300, check=False
    )


CONVERT = "import sys; from tracer.cli import main; sys.argv = ['trace', 'convert', {source!r}, {target!r}]; main()"


@pytest.mark.parametrize("pin", ["", "@main", f"@{COMMIT}"])
def test_what_is_in_the_cache_needs_no_network(tmp_path, pin):
    cache(tmp_path / "hub", "org/repo", TRANSCODER)
    target = tmp_path / "converted"
    result = run(CONVERT.format(source=f"hf://org/repo{pin}", target=str(target)), tmp_path / "hub")
    assert result.returncode == 0, result.stderr
    assert "Found    circuit-tracer, cross-layer" in result.stdout
    assert (target / "W_dec_0.safetensors").is_file()


def test_a_config_may_list_files_on_the_hub(tmp_path):
    for layer in range(2):
        cache(tmp_path / "hub", f"org/layer{layer}", ROOT / "tests" / "data" / "qwen3-plt-relu" / "transcoder")
    listed = [f"hf://org/layer{layer}/layer_{layer}.safetensors?revision={COMMIT}" for layer in range(2)]
    (tmp_path / "local").mkdir()
    lines = ["model_kind: transcoder_set", "feature_input_hook: mlp.hook_in", f"transcoders: {listed}"]
    (tmp_path / "local" / "config.yaml").write_text("\n".join(lines), encoding="utf-8")
    target = tmp_path / "converted"
    result = run(CONVERT.format(source=str(tmp_path / "local"), target=str(target)), tmp_path / "hub")
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in target.glob("layer_*")) == ["layer_0.safetensors", "layer_1.safetensors"]


@pytest.mark.parametrize("source", ["hf://org/repo", "org/repo@v1", "hf://org/repo/layer_0/params.npz"])
def test_offline_and_not_in_the_cache_is_said_in_one_line(tmp_path, source):
    result = run(CONVERT.format(source=source, target=str(tmp_path / "converted")), tmp_path / "hub")
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert re.search(r"trace: org/repo is not in the Hub's cache and cannot be downloaded.*Go online once, or", line)
    assert not (tmp_path / "converted").exists()


def test_an_impossible_repository_name_is_said_in_one_line(tmp_path):
    result = run(CONVERT.format(source="hf://org/re--po", target=str(tmp_path / "converted")), tmp_path / "hub")
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert "trace: org/re--po cannot be downloaded" in line


def test_the_commit_is_the_revision_of_a_hub_folder(tmp_path):
    cache(tmp_path, "org/repo", TRANSCODER)
    snapshot = tmp_path / "models--org--repo" / "snapshots" / COMMIT
    assert revision(snapshot) == COMMIT
    assert commit(snapshot / "layer_0" / "params.npz") == COMMIT
    assert commit(TRANSCODER) is None
    assert re.fullmatch(r"[0-9a-f]{10}", revision(TRANSCODER))
