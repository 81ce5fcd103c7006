"""Which device is chosen, and what is said of a model whose files are not all there."""

import json
import shutil
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tracer.conftest import CASES
from tests.tracer.processes import refused
from tracer.errors import TraceError
from tracer.loading import Source, load, resolve_device, resolve_devices

CASE = CASES / "llama-clt-jumprelu"
PROMPT = "w28 w12 w25 w16"
MODEL, TOKENIZER = "the model model cannot be loaded (", "the tokenizer model cannot be loaded ("


@pytest.fixture
def devices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which torch sees two GPUs, Apple's, or neither."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in request.param)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2 if "cuda" in request.param else 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in request.param)


@pytest.mark.parametrize(
    ("devices", "expected", "each"),
    [((), "cpu", ["cpu"]), (("mps",), "mps", ["mps"]), (("cuda", "mps"), "cuda", ["cuda:0", "cuda:1"])],
    indirect=["devices"],
    ids=["neither", "Apple's", "two GPUs"],
)
def test_auto_is_the_best_device_there_is(devices, expected, each):
    assert resolve_device("auto") == expected
    assert resolve_devices("auto") == each
    assert resolve_devices("cpu") == [resolve_device("cpu")] == ["cpu"]


@pytest.mark.parametrize("devices", [("cuda",)], indirect=True, ids=[""])
def test_a_numbered_device_is_taken_as_it_is(devices):
    assert resolve_device("cuda:1") == "cuda:1"
    assert resolve_devices("cuda:1") == ["cuda:1"]


@pytest.mark.parametrize("devices", [()], indirect=True, ids=[""])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda", "device cuda was asked for, but torch sees no CUDA device; use --device cpu or auto"),
        ("cuda:1", "device cuda was asked for, but torch sees no CUDA device; use --device cpu or auto"),
        ("mps", "device mps was asked for, but torch sees no MPS device; use --device cpu or auto"),
        ("tpu", "device 'tpu' is unknown; expected auto, cpu, cuda or mps"),
        ("", "device '' is unknown; expected auto, cpu, cuda or mps"),
    ],
)
def test_a_device_that_is_not_there_is_refused(devices, name, message):
    for resolve in (resolve_device, resolve_devices):
        with pytest.raises(TraceError, match=message):
            resolve(name)


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="needs to be without a GPU")
def test_without_a_gpu_everything_is_loaded_onto_the_cpu():
    source = Source(str(CASE / "model"), str(CASE / "transcoder"))
    assert source.device == "auto"
    replacement = load(source).replacement
    assert {parameter.device.type for parameter in replacement.model.parameters()} == {"cpu"}
    assert {parameter.device.type for parameter in replacement.transcoder.parameters()} == {"cpu"}


def without_weights(folder: Path) -> None:
    (folder / "model" / "model.safetensors").unlink()


def cut(keep: float, name: str = "model/model.safetensors"):
    def shorten(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(keep * len(content))])

    return shorten


def with_text(name: str, text: str):
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def with_setting(**changes: object):
    def change(folder: Path) -> None:
        path = folder / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")

    return change


def with_empty_torch_weights(folder: Path) -> None:
    without_weights(folder)
    (folder / "model" / "pytorch_model.bin").touch()


def with_a_shard_lacking(folder: Path) -> None:
    """Weights in two files, of which the second was not copied."""
    path = folder / "model" / "model.safetensors"
    weights = load_file(path)
    path.unlink()
    names = sorted(weights)
    shards = {name: f"model-0000{1 + (i > 4)}-of-00002.safetensors" for i, name in enumerate(names)}
    first = {name: weights[name] for name in names[:5]}
    save_file(first, folder / "model" / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": shards}
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_weights, MODEL),
        (cut(0.0), MODEL),
        (cut(0.01), MODEL),
        (cut(0.5), MODEL),
        (cut(0.99), MODEL),
        (with_a_shard_lacking, MODEL),
        (cut(0.5, "model/config.json"), MODEL),
        (with_setting(hidden_size="24"), MODEL),
        (with_setting(num_attention_heads=0), MODEL),
        (with_empty_torch_weights, MODEL),
        (cut(0.5, "model/tokenizer.json"), TOKENIZER),
        (with_text("model/tokenizer.json", "{}"), TOKENIZER),
        (with_text("model/tokenizer_config.json", "[]"), TOKENIZER),
        (cut(0.5, "transcoder/W_dec_1.safetensors"), "transcoder/W_dec_1.safetensors cannot be read ("),
        (cut(0.5, "transcoder/W_enc_2.safetensors"), "transcoder/W_enc_2.safetensors cannot be read ("),
    ],
    ids=[
        "no weights", "empty weights", "a cut header", "half the weights", "nearly all weights", "a shard lacking",
        "half the config", "a width that is text", "no heads", "empty torch weights",
        "half the tokenizer", "an empty tokenizer", "a list for a tokenizer", "half a decoder", "half an encoder",
    ],
)  # fmt: skip
def test_files_that_are_lacking_or_cut_are_told_in_one_line(command, tmp_path, damage, message):
    shutil.copytree(CASE, tmp_path, dirs_exist_ok=True)
    arguments = (PROMPT, "--model", "model", "--transcoder", "transcoder", "--store", "s")
    damage(tmp_path)
    assert message in refused(CompletedProcess(arguments, *command(*arguments)))
    assert not (tmp_path / "s").exists()


def test_the_same_files_when_they_are_whole_are_traced(command, tmp_path):
    arguments = (PROMPT, "--model", str(CASE / "model"), "--transcoder", str(CASE / "transcoder"), "--store", "s")
    assert command(*arguments)[0] == 0
    assert len(list((tmp_path / "s" / "graphs").iterdir())) == 1
