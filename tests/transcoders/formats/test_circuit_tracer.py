"""circuit-tracer's two layouts, with everything its config.yaml may say."""

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.transcoders.formats.readings import assert_computes, normal
from transcoders import TranscoderError, load, open_stored

N_LAYERS, D_MODEL, N_FEATURES = 3, 6, 9
HOOKS = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out", "model_name": "some/model"}


def write_config(folder, **meta):
    (folder / "config.yaml").write_text(yaml.safe_dump(HOOKS | meta), encoding="utf-8")


def write_cross_layer(folder, *, threshold=False, skip=False):
    random = normal(0)
    layers = []
    for i in range(N_LAYERS):
        layer = {
            "W_enc": random(N_FEATURES, D_MODEL), "b_enc": random(N_FEATURES), "b_dec": random(D_MODEL),
            "W_dec": random(N_FEATURES, N_LAYERS - i, D_MODEL),
        }  # fmt: skip
        if threshold:
            layer["threshold"] = random(N_FEATURES).abs()
        if skip:
            layer["W_skip"] = random(D_MODEL, D_MODEL)
        decoder = {f"W_dec_{i}": layer["W_dec"]}
        encoder = {f"{name}_{i}": tensor for name, tensor in layer.items() if name != "W_dec"}
        save_file(encoder, folder / f"W_enc_{i}.safetensors")
        save_file(decoder, folder / f"W_dec_{i}.safetensors")
        layers.append(layer)
    write_config(folder, model_kind="cross_layer_transcoder")
    return layers


def cross_layer_outputs(layers, x):
    outputs = []
    for target in range(N_LAYERS):
        total = layers[target]["b_dec"].expand(x.shape[1], D_MODEL)
        for source in range(target + 1):
            z = x[source] @ layers[source]["W_enc"].T + layers[source]["b_enc"]
            a = z * (z > layers[source]["threshold"]) if "threshold" in layers[source] else z.relu()
            total = total + a @ layers[source]["W_dec"][:, target - source]
        if "W_skip" in layers[target]:
            total = total + x[target] @ layers[target]["W_skip"]
        outputs.append(total)
    return torch.stack(outputs)


def write_per_layer(folder, n_features=N_FEATURES, *, threshold=False, skip=False, transposed=False, **meta):
    random = normal(1)
    layers = []
    for i in range(N_LAYERS):
        layer = {
            "W_enc": random(n_features, D_MODEL), "W_dec": random(n_features, D_MODEL),
            "b_enc": random(n_features), "b_dec": random(D_MODEL),
        }  # fmt: skip
        if threshold:
            layer["activation_function.threshold"] = random(n_features).abs()
        if skip:
            layer["W_skip"] = random(D_MODEL, D_MODEL)
        written = layer | ({"W_dec": layer["W_dec"].T.contiguous()} if transposed else {})
        save_file(written, folder / f"layer_{i}.safetensors")
        layers.append(layer)
    write_config(folder, model_kind="transcoder_set", **meta)
    return layers


def per_layer_outputs(layers, x, activate):
    outputs = []
    for layer, inputs in zip(layers, x, strict=True):
        a = activate(inputs @ layer["W_enc"].T + layer["b_enc"], layer)
        skipped = inputs @ layer["W_skip"].T if "W_skip" in layer else 0
        outputs.append(a @ layer["W_dec"] + layer["b_dec"] + skipped)
    return torch.stack(outputs)


def relu(z, layer):
    return z.relu()


def jump_relu(z, layer):
    return z * (z > layer["activation_function.threshold"])


def top_two(z, layer):
    kept = torch.zeros_like(z)
    for row, values in enumerate(z):
        for feature in values.argsort(descending=True)[:2]:
            kept[row, feature] = max(float(values[feature]), 0.0)
    return kept


@pytest.mark.parametrize(("threshold", "skip"), [(False, False), (True, False), (True, True)])
def test_a_cross_layer_transcoder_computes_what_circuit_tracer_computes(tmp_path, threshold, skip):
    layers = write_cross_layer(tmp_path, threshold=threshold, skip=skip)
    x = normal(2)(N_LAYERS, 7, D_MODEL)
    assert_computes(tmp_path, tmp_path, x, cross_layer_outputs(layers, x))


@pytest.mark.parametrize(
    ("activate", "settings"),
    [
        (relu, {}),
        (jump_relu, {"threshold": True, "skip": True}),
        (top_two, {"activation": "topk", "k": 2, "skip": True}),
        (relu, {"transposed": True, "activation": "relu"}),
    ],
)
def test_a_per_layer_transcoder_computes_what_circuit_tracer_computes(tmp_path, activate, settings):
    layers = write_per_layer(tmp_path, **settings)
    x = normal(3)(N_LAYERS, 7, D_MODEL)
    assert_computes(tmp_path, tmp_path, x, per_layer_outputs(layers, x, activate))


def test_hooks_and_model_are_those_of_the_config(tmp_path):
    write_per_layer(tmp_path, feature_input_hook="mlp.hook_in", feature_output_hook="mlp.hook_out")
    config = load(tmp_path).config
    assert (config.reads, config.writes, config.model_name) == ("mlp.hook_in", "mlp.hook_out", "some/model")


def test_a_config_may_list_files_of_another_layout(tmp_path):
    random = normal(4)
    for layer in range(2):
        folder = tmp_path / f"layer_{layer}" / "width_16k" / "average_l0_9"
        folder.mkdir(parents=True)
        np.savez(
            folder / "params.npz", W_enc=random(D_MODEL, N_FEATURES).numpy(), b_enc=random(N_FEATURES).numpy(),
            W_dec=random(N_FEATURES, D_MODEL).numpy(), b_dec=random(D_MODEL).numpy(),
            threshold=random(N_FEATURES).abs().numpy(),
        )  # fmt: skip
    listed = [f"layer_{layer}/width_16k/average_l0_9/params.npz" for layer in range(2)]
    entries = [listed[0], {"id": "second", "layer": 1, "filepath": listed[1]}]
    write_config(tmp_path, model_kind="transcoder_set", feature_input_hook="ln2.hook_normalized", transcoders=entries)
    transcoder = load(tmp_path)
    assert transcoder.config.reads == "ln2.hook_normalized"
    stored = np.load(tmp_path / listed[1])
    x = random(2, 4, D_MODEL).numpy()
    z = x[1] @ stored["W_enc"] + stored["b_enc"]
    expected = (z * (z > stored["threshold"])) @ stored["W_dec"] + stored["b_dec"]
    np.testing.assert_allclose(transcoder(torch.from_numpy(x))[1], expected, atol=1e-5)


def test_decoders_keep_their_dtype_until_they_are_used(tmp_path):
    write_cross_layer(tmp_path)
    for path in tmp_path.glob("W_dec_*.safetensors"):
        save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    assert open_stored(tmp_path).dtype == torch.bfloat16
    assert load(tmp_path).W_dec[0].dtype == torch.float32


def test_top_k_without_k_is_refused(tmp_path):
    write_per_layer(tmp_path, activation="topk")
    with pytest.raises(TranscoderError, match=r"config.yaml does not say k"):
        load(tmp_path)


def test_a_tensor_nobody_knows_is_refused(tmp_path):
    write_per_layer(tmp_path)
    path = tmp_path / "layer_1.safetensors"
    save_file(load_file(path) | {"log_thresholds": torch.zeros(N_FEATURES)}, path)
    with pytest.raises(TranscoderError, match=r"layer_1.safetensors holds log_thresholds, which this reader does not"):
        load(tmp_path)


def test_a_missing_layer_is_refused(tmp_path):
    write_per_layer(tmp_path)
    (tmp_path / "layer_1.safetensors").unlink()
    with pytest.raises(TranscoderError, match=r"layer_1.safetensors is missing"):
        load(tmp_path)


def test_layers_of_different_transcoders_are_refused(tmp_path):
    write_per_layer(tmp_path)
    layer = load_file(tmp_path / "layer_2.safetensors")
    save_file(layer | {"activation_function.threshold": torch.ones(N_FEATURES)}, tmp_path / "layer_2.safetensors")
    with pytest.raises(TranscoderError, match=r"layer_2.safetensors and .*layer_0.safetensors are not of one"):
        load(tmp_path)


def test_a_config_without_a_kind_is_refused(tmp_path):
    write_per_layer(tmp_path)
    (tmp_path / "config.yaml").write_text("model_name: x\n", encoding="utf-8")
    with pytest.raises(TranscoderError, match="names no model_kind; expected cross_layer_transcoder or transcoder_set"):
        load(tmp_path)


def test_a_hook_nobody_knows_is_refused(tmp_path):
    write_per_layer(tmp_path, feature_input_hook="hook_resid_pre")
    with pytest.raises(TranscoderError, match="reads is 'hook_resid_pre'; expected one of hook_resid_mid"):
        load(tmp_path)
