"""Gemma Scope 1 (npz), and Gemma Scope 2 per layer and across layers."""

import json
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.transcoders.formats.readings import assert_computes, normal
from transcoders import TranscoderError, load, open_stored

N_LAYERS, D_MODEL, N_FEATURES = 3, 6, 10


def write_first(folder, *, save=np.savez, l0="average_l0_7"):
    random = normal(0)
    layers = []
    for layer in range(N_LAYERS):
        path = folder / f"layer_{layer}" / "width_16k" / l0 / "params.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            "W_enc": random(D_MODEL, N_FEATURES), "b_enc": random(N_FEATURES), "W_dec": random(N_FEATURES, D_MODEL),
            "b_dec": random(D_MODEL), "threshold": random(N_FEATURES) * 0.5,
        }  # fmt: skip
        layers.append({name: tensor.numpy() for name, tensor in tensors.items()})
        save(path, **layers[-1])
    return layers


def write_second(folder, *, affine, width="width_16k_l0_small", n_features=N_FEATURES, layers=range(N_LAYERS)):
    random = normal(1)
    written = []
    for layer in layers:
        path = folder / f"layer_{layer}_{width}{'_affine' if affine else ''}"
        path.mkdir(parents=True)
        tensors = {
            "w_enc": random(D_MODEL, n_features), "b_enc": random(n_features), "w_dec": random(n_features, D_MODEL),
            "b_dec": random(D_MODEL), "threshold": random(n_features).abs(),
        }  # fmt: skip
        if affine:
            tensors["affine_skip_connection"] = random(D_MODEL, D_MODEL)
        save_file(tensors, path / "params.safetensors")
        (path / "config.json").write_text(
            json.dumps({
                "hf_hook_point_in": f"model.layers.{layer}.pre_feedforward_layernorm.output",
                "hf_hook_point_out": f"model.layers.{layer}.post_feedforward_layernorm.output",
                "model_name": "google/gemma-3-1b-pt", "architecture": "jump_relu",
            }),
            encoding="utf-8",
        )  # fmt: skip
        written.append({name: tensor.numpy() for name, tensor in tensors.items()})
    return written


def write_cross_layer(folder, *, affine):
    random = normal(2)
    written = []
    for layer in range(N_LAYERS):
        decoder = random(N_FEATURES, N_LAYERS, D_MODEL)
        decoder[:, :layer] = 0
        tensors = {
            "w_enc": random(D_MODEL, N_FEATURES), "b_enc": random(N_FEATURES), "w_dec": decoder,
            "b_dec": random(D_MODEL), "threshold": random(N_FEATURES).abs(),
        }  # fmt: skip
        if affine:
            tensors["affine_skip_connection"] = random(D_MODEL, D_MODEL)
        save_file(tensors, folder / f"params_layer_{layer}.safetensors")
        written.append({name: tensor.numpy() for name, tensor in tensors.items()})
    return written


def gated(x, encoder, layer):
    z = x @ encoder + layer["b_enc"]
    return np.maximum(z, 0) * (z > layer["threshold"])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_the_first_computes_relu_gated_by_a_threshold(tmp_path, save):
    layers = write_first(tmp_path, save=save)
    x = normal(3)(N_LAYERS, 8, D_MODEL)
    expected = [
        gated(inputs.numpy(), layer["W_enc"], layer) @ layer["W_dec"] + layer["b_dec"]
        for inputs, layer in zip(x, layers, strict=True)
    ]
    assert min(layer["threshold"].min() for layer in layers) < 0
    assert_computes(tmp_path, tmp_path, x, torch.from_numpy(np.stack(expected)))
    config = load(tmp_path).config
    assert (config.reads, config.writes, config.cross_layer) == ("ln2.hook_normalized", "hook_mlp_out", False)


@pytest.mark.parametrize("affine", [False, True])
def test_the_second_per_layer_adds_an_affine_map_of_its_input(tmp_path, affine):
    layers = write_second(tmp_path, affine=affine)
    x = normal(4)(N_LAYERS, 8, D_MODEL)
    expected = []
    for inputs, layer in zip(x.numpy(), layers, strict=True):
        output = gated(inputs, layer["w_enc"], layer) @ layer["w_dec"] + layer["b_dec"]
        expected.append(output + inputs @ layer["affine_skip_connection"] if affine else output)
    assert_computes(tmp_path, tmp_path, x, torch.from_numpy(np.stack(expected)))
    config = load(tmp_path).config
    assert (config.reads, config.writes) == ("mlp.hook_in", "hook_mlp_out")
    assert config.model_name == "google/gemma-3-1b-pt"


@pytest.mark.parametrize("affine", [False, True])
def test_the_second_across_layers_counts_targets_from_layer_0_and_keeps_the_last_layer(tmp_path, affine):
    layers = write_cross_layer(tmp_path, affine=affine)
    x = normal(5)(N_LAYERS, 8, D_MODEL)
    expected = np.zeros((N_LAYERS, 8, D_MODEL), dtype=np.float32)
    for source, layer in enumerate(layers):
        a = gated(x[source].numpy(), layer["w_enc"], layer)
        for target in range(N_LAYERS):
            expected[target] += a @ layer["w_dec"][:, target]
        expected[source] += layer["b_dec"]
        if affine:
            expected[source] += x[source].numpy() @ layer["affine_skip_connection"]
    assert_computes(tmp_path, tmp_path, x, torch.from_numpy(expected))
    assert load(tmp_path).config.n_layers == N_LAYERS


def test_circuit_tracers_list_may_name_the_last_cross_layer_file_twice(tmp_path):
    write_cross_layer(tmp_path, affine=False)
    names = [f"params_layer_{layer}.safetensors" for layer in (0, 1, 2, 2)]
    lines = ["model_kind: cross_layer_transcoder", "feature_input_hook: mlp.hook_in", f"transcoders: {names}"]
    (tmp_path / "config.yaml").write_text("\n".join(lines), encoding="utf-8")
    assert open_stored(tmp_path).config.n_layers == 3
    assert open_stored(tmp_path).layout == "Gemma Scope, cross-layer"


def test_a_pattern_chooses_one_of_several_transcoders_of_a_layer(tmp_path):
    write_second(tmp_path, affine=True)
    wide = write_second(tmp_path, affine=False, width="width_64k_l0_big", n_features=12)
    with pytest.raises(TranscoderError, match=r"layer 0 has 2 transcoders .* name one of each layer by a pattern"):
        load(tmp_path)
    chosen = load(tmp_path / "layer_*_width_64k_l0_big")
    assert chosen.config.n_features == 12
    np.testing.assert_array_equal(chosen.W_dec[2][:, 0], wide[2]["w_dec"])


def test_layers_that_were_left_out_are_refused(tmp_path):
    write_second(tmp_path, affine=False, layers=[0, 2])
    with pytest.raises(TranscoderError, match="holds layers 0, 2; expected every layer from 0 on"):
        load(tmp_path)


def test_an_autoencoder_of_the_same_shape_is_refused(tmp_path):
    write_second(tmp_path, affine=False)
    path = tmp_path / "layer_1_width_16k_l0_small" / "config.json"
    path.write_text(json.dumps({"hf_hook_point_in": "model.layers.1.output"}), encoding="utf-8")
    with pytest.raises(TranscoderError, match=r"reads model.layers.1.output .*; expected a transcoder of"):
        load(tmp_path)


def test_decoders_that_write_backward_are_refused(tmp_path):
    write_cross_layer(tmp_path, affine=False)
    path = tmp_path / "params_layer_2.safetensors"
    tensors = load_file(path)
    tensors["w_dec"][3, 0] = 0.5
    save_file(tensors, path)
    with pytest.raises(TranscoderError, match=r"params_layer_2.safetensors writes to layers before 2"):
        load(tmp_path)


def test_a_wrong_width_is_refused(tmp_path):
    write_cross_layer(tmp_path, affine=False)
    path = tmp_path / "params_layer_1.safetensors"
    save_file(load_file(path) | {"w_dec": torch.zeros(N_FEATURES, N_LAYERS + 1, D_MODEL)}, path)
    with pytest.raises(TranscoderError, match=r"w_dec in .* has shape \(10, 4, 6\); expected \(10, 3, 6\)"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0, 100, 700])
def test_a_truncated_npz_is_refused(tmp_path, keep):
    write_first(tmp_path)
    path = tmp_path / "layer_1" / "width_16k" / "average_l0_7" / "params.npz"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(TranscoderError, match=r"params.npz cannot be read"):
        load(tmp_path)


def test_an_npz_with_pickled_objects_is_refused(tmp_path):
    write_first(tmp_path)
    path = tmp_path / "layer_0" / "width_16k" / "average_l0_7" / "params.npz"
    for save in (np.savez, np.savez_compressed):
        save(path, W_enc=np.array([{"run": "me"}], dtype=object))
        assert zipfile.is_zipfile(path)
        with pytest.raises(TranscoderError, match=r"params.npz cannot be read"):
            load(tmp_path)


def test_a_skip_connection_that_layer_0_lacks_is_refused(tmp_path):
    write_cross_layer(tmp_path, affine=False)
    path = tmp_path / "params_layer_1.safetensors"
    save_file(load_file(path) | {"affine_skip_connection": torch.ones(D_MODEL, D_MODEL)}, path)
    message = (
        r"layer_0.safetensors lacks affine_skip_connection, but .*layer_1.safetensors holds affine_skip_connection"
    )
    with pytest.raises(TranscoderError, match=message):
        load(tmp_path)


def test_a_tensor_nobody_knows_is_refused_in_every_kind_of_file(tmp_path):
    for kind, write in (
        ("first", write_first),
        ("second", lambda folder: write_second(folder, affine=False)),
        ("across", lambda folder: write_cross_layer(folder, affine=False)),
    ):
        folder = tmp_path / kind
        folder.mkdir()
        write(folder)
        path = max(path for path in folder.rglob("params*") if path.is_file())
        if path.suffix == ".npz":
            np.savez(path, **np.load(path), gate=np.zeros(1))
        else:
            save_file(load_file(path) | {"gate": torch.zeros(1)}, path)
        with pytest.raises(TranscoderError, match="holds gate, which this reader does not know"):
            load(folder)


def test_another_architecture_is_refused(tmp_path):
    write_second(tmp_path, affine=False)
    path = tmp_path / "layer_1_width_16k_l0_small" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architecture": "batch_topk"}), encoding="utf-8")
    with pytest.raises(TranscoderError, match=r"architecture in .* is batch_topk; expected jump_relu"):
        load(tmp_path)


def test_hooks_that_are_no_text_are_refused(tmp_path):
    write_second(tmp_path, affine=False)
    path = tmp_path / "layer_1_width_16k_l0_small" / "config.json"
    path.write_text(json.dumps({"hf_hook_point_in": ["model.layers.1.output"]}), encoding="utf-8")
    with pytest.raises(TranscoderError, match=r"reads \['model.layers.1.output'\] .*; expected a transcoder of"):
        load(tmp_path)


def test_a_threshold_that_is_nan_is_refused(tmp_path):
    layers = write_first(tmp_path)
    path = tmp_path / "layer_2" / "width_16k" / "average_l0_7" / "params.npz"
    layers[2]["threshold"][4] = np.nan
    np.savez(path, **layers[2])
    with pytest.raises(TranscoderError, match=r"layer 2 of .* has NaN in 1 of its 10 thresholds, first for feature 4;"):
        load(tmp_path)


def test_a_skip_connection_that_is_nan_is_refused(tmp_path):
    write_cross_layer(tmp_path, affine=True)
    path = tmp_path / "params_layer_2.safetensors"
    save_file(load_file(path) | {"affine_skip_connection": torch.full((D_MODEL, D_MODEL), float("nan"))}, path)
    with pytest.raises(TranscoderError, match=r"layer 2 of .* has a skip connection \(W_skip\) with NaN or infinite"):
        load(tmp_path)


def test_an_npz_that_holds_words_or_broken_data_is_refused(tmp_path):
    write_first(tmp_path)
    path = tmp_path / "layer_0" / "width_16k" / "average_l0_7" / "params.npz"
    np.savez(path, W_enc=np.array(["words"]))
    with pytest.raises(TranscoderError, match=r"params.npz cannot be read \(can't convert"):
        load(tmp_path)
    np.savez_compressed(path, W_enc=np.arange(1000))
    path.write_bytes(
        path.read_bytes()[:60] + bytes(byte ^ 0x55 for byte in path.read_bytes()[60:200]) + path.read_bytes()[200:]
    )
    with pytest.raises(TranscoderError, match=r"params.npz cannot be read \(Error -3 while decompressing"):
        load(tmp_path)
