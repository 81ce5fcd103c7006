"""Folders in circuit-tracer's layout: what is saved is loaded, and what is broken is refused in one line."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from transcoders import CrossLayerTranscoder, TranscoderConfig, TranscoderError, load, save
from transcoders.checkpoint import as_stored, save_whole


def random_transcoder(activation="jumprelu", k=0):
    torch.manual_seed(0)
    transcoder = CrossLayerTranscoder(TranscoderConfig(3, 8, 10, activation, k, model_name="m"))
    for parameter in transcoder.parameters():
        torch.nn.init.normal_(parameter)
    if activation == "jumprelu":
        transcoder.threshold.uniform_(0, 0.5)
    return transcoder.requires_grad_(False)


@pytest.mark.parametrize(("activation", "k"), [("jumprelu", 0), ("relu", 0), ("topk", 3)])
def test_a_saved_transcoder_loads_equal(tmp_path, activation, k):
    ours = random_transcoder(activation, k)
    save(ours, tmp_path)
    theirs = load(tmp_path)
    assert theirs.config == ours.config
    for name, tensor in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor), name


def test_the_forward_pass_is_the_sum_over_layers_written_out():
    transcoder = random_transcoder()
    x = torch.randn(3, 5, 8)
    expected = torch.zeros(3, 5, 8)
    for target in range(3):
        expected[target] = transcoder.b_dec[target]
        for source in range(target + 1):
            z = x[source] @ transcoder.W_enc[source].T + transcoder.b_enc[source]
            a = torch.where(z > transcoder.threshold[source], z, 0.0)
            for position in range(5):
                for feature in range(10):
                    expected[target, position] += (
                        a[position, feature] * transcoder.W_dec[source][feature, target - source]
                    )
    torch.testing.assert_close(transcoder(x), expected)


def test_topk_keeps_the_k_largest_positive_ones():
    transcoder = random_transcoder("topk", 3)
    activations = transcoder.encode(torch.randn(3, 50, 8))
    assert (activations > 0).sum(-1).max() == 3
    assert activations.min() == 0


def test_a_layer_encodes_as_the_whole_does():
    transcoder = random_transcoder("topk", 3)
    x = torch.randn(3, 5, 8)
    for layer in range(3):
        torch.testing.assert_close(transcoder.encode_layer(layer, x[layer]), transcoder.encode(x)[layer])


def test_a_missing_file_is_named(tmp_path):
    save(random_transcoder(), tmp_path)
    (tmp_path / "W_dec_1.safetensors").unlink()
    with pytest.raises(TranscoderError, match=r"W_dec_1.safetensors is missing"):
        load(tmp_path)


def test_a_truncated_file_is_named(tmp_path):
    save(random_transcoder(), tmp_path)
    path = tmp_path / "W_enc_2.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TranscoderError, match=r"W_enc_2.safetensors cannot be read"):
        load(tmp_path)


def test_a_wrong_shape_is_named(tmp_path):
    save(random_transcoder(), tmp_path)
    path = tmp_path / "W_dec_2.safetensors"
    tensors = load_file(path)
    save_file({"W_dec_2": tensors["W_dec_2"][:, :, :4].contiguous()}, path)
    with pytest.raises(
        TranscoderError, match=r"W_dec_2 in .*W_dec_2.safetensors has shape \(10, 1, 4\); expected \(10, 1, 8\)"
    ):
        load(tmp_path)


def test_a_folder_of_something_else_is_refused_with_the_known_layouts(tmp_path):
    with pytest.raises(
        TranscoderError, match=r"in no known transcoder layout \(circuit-tracer, Gemma Scope, CLT-Forge"
    ):
        load(tmp_path)


def test_what_a_kill_left_behind_goes_with_the_next_save(tmp_path):
    folder, later = tmp_path / "transcoder", random_transcoder("relu")
    save_whole(as_stored(random_transcoder()), folder)
    folder.rename(tmp_path / ".transcoder-before")  # as it is between the two renames
    (tmp_path / ".transcoder-abc").mkdir()
    save_whole(as_stored(later), folder)
    assert torch.equal(load(folder).W_enc, later.W_enc)
    assert load(folder).config.activation == "relu"
    assert [path.name for path in tmp_path.iterdir()] == ["transcoder"]
