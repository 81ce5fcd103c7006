"""trace convert: whole or not at all, never over something, in the dtype asked for."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.transcoders.test_checkpoint import random_transcoder
from tracer.cli import main
from transcoders import TranscoderError, convert, load, open_stored, save


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save(random_transcoder(), tmp_path / "source", dtype=torch.bfloat16)
    return tmp_path / "source"


def trace(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["trace", *arguments])
    main()


def test_the_command_says_what_it_found_and_wrote(source, monkeypatch, capsys):
    target = source.parent / "target"
    trace(monkeypatch, "convert", str(source), str(target), "--reads", "ln2.hook_normalized", "--model-name", "gpt2")
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "Found    circuit-tracer, cross-layer: a cross-layer transcoder, jumprelu, 3 layers of 10 features, width 8",
        "Hooks    ln2.hook_normalized → hook_mlp_out",
        "Folded   nothing",
        f"Wrote    {target} (bfloat16)",
    ]
    converted = load(target)
    assert (converted.config.reads, converted.config.model_name) == ("ln2.hook_normalized", "gpt2")
    assert torch.equal(converted.W_dec[1], load(source).W_dec[1])
    assert [path.name for path in source.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(("chosen", "expected"), [(None, torch.bfloat16), (torch.float32, torch.float32)])
def test_matrices_have_the_dtype_of_the_source_or_the_one_asked_for(source, chosen, expected):
    target = source.parent / "target"
    convert(open_stored(source), target, dtype=chosen)
    assert load_file(target / "W_dec_0.safetensors")["W_dec_0"].dtype == expected
    assert load_file(target / "W_enc_0.safetensors")["b_enc_0"].dtype == torch.float32


def test_progress_counts_layers(source):
    seen = []
    convert(open_stored(source), source.parent / "target", on_layer=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_what_is_there_is_never_written_over(source, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        trace(monkeypatch, "convert", str(source), str(source))
    assert capsys.readouterr().err == f"trace: {source} exists already; name a folder that does not, or delete it.\n"
    assert load(source).config.n_layers == 3


def test_a_conversion_that_fails_leaves_nothing_behind(source):
    stored = open_stored(source)

    def decoder(layer, rows):
        if layer == 1:
            raise TranscoderError("the disk is gone")
        return stored.decoder(layer, rows)

    with pytest.raises(TranscoderError, match="the disk is gone"):
        convert(replace(stored, decoder=decoder), source.parent / "target")
    assert [path.name for path in source.parent.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nowhere", "target"], "nowhere is no folder; expected a transcoder folder or a Hub id"),
     (["source", "target", "--reads", "hook_resid_pre"], "reads is 'hook_resid_pre'; expected one of")],
)  # fmt: skip
def test_what_cannot_be_converted_is_said_in_one_line(source, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(source.parent)
    with pytest.raises(SystemExit, match="2"):
        trace(monkeypatch, "convert", *arguments)
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert not Path("target").exists()


def test_a_threshold_that_is_nan_is_not_carried_over(source):
    path = source / "W_enc_1.safetensors"
    tensors = load_file(path)
    tensors["threshold_1"][3] = float("nan")
    save_file(tensors, path)
    with pytest.raises(TranscoderError, match=r"layer 1 of .* has NaN in 1 of its 10 thresholds"):
        convert(open_stored(source), source.parent / "target")
    assert [path.name for path in source.parent.iterdir()] == ["source"]
