"""circuit-tracer's two layouts, with everything its config.yaml may say."""

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.transcoders.formats.readings import assert_computes, normal
from transcoders import TranscoderError, load, load_on_demand, open_stored

N_LAYERS, D_MODEL, N_FEATURES = 3, 6, 9
HOOKS = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out", "model_name": "some/model"}


def write_config(folder, **meta):
    (folder / "config.yaml").write_text(yaml.safe_dump(HOOKS | meta), encoding="utf-8")


def write_cross_layer(folder, *, threshold=False, skip=False, **meta):
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
    write_config(folder, model_kind="cross_layer_transcoder", **meta)
    return layers


def change(path, drop=(), **tensors):
    """Take tensors out of a file, or put others in."""
    kept = {name: tensor for name, tensor in load_file(path).items() if name not in drop}
    save_file(kept | tensors, path)


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


def write_per_layer(
    folder, n_features=N_FEATURES, *, threshold=False, skip=False, transposed=False, stored_k=None, **meta
):
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
        if stored_k is not None:  # as circuit-tracer saves its TopK transcoders
            written["k"] = stored_k
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
        (relu, {"activation": "ReLU", "k": 2}),
        (jump_relu, {"threshold": True, "activation": "JumpReLU"}),
        (jump_relu, {"threshold": True, "activation": "jump_relu", "k": 2}),
        (top_two, {"activation": "TopK", "k": 2}),
        (top_two, {"stored_k": torch.tensor(2)}),
        (top_two, {"stored_k": torch.tensor(2.0, dtype=torch.bfloat16), "activation": "topk"}),
        (top_two, {"stored_k": torch.tensor(2), "activation": "topk", "k": 2}),
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


@pytest.mark.parametrize("write", [write_cross_layer, write_per_layer])
@pytest.mark.parametrize("threshold", [False, True])
@pytest.mark.parametrize("activation", ["batchtopk", "GroupMax", "none", 3])
def test_an_activation_nobody_knows_is_refused(tmp_path, write, threshold, activation):
    write(tmp_path, threshold=threshold, activation=activation, k=2)
    message = f"activation in .*config.yaml is {activation!r}; expected relu, jumprelu or topk"
    with pytest.raises(TranscoderError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("write", [write_cross_layer, write_per_layer])
@pytest.mark.parametrize(
    ("activation", "threshold", "message"),
    [
        ("relu", True, "means activation relu, but the transcoder's files hold thresholds; expected thresholds with"),
        ("topk", True, "means activation topk, but the transcoder's files hold thresholds; expected thresholds with"),
        ("jumprelu", False, "means activation jumprelu, but the transcoder's files hold no thresholds; expected"),
    ],
)
def test_thresholds_must_be_there_for_jumprelu_and_only_for_it(tmp_path, write, activation, threshold, message):
    write(tmp_path, threshold=threshold, activation=activation, k=2)
    with pytest.raises(TranscoderError, match=message):
        load(tmp_path)


def test_thresholds_and_a_k_in_the_files_are_refused(tmp_path):
    write_per_layer(tmp_path, threshold=True, stored_k=torch.tensor(2))
    with pytest.raises(
        TranscoderError, match="means activation topk, but the transcoder's files hold thresholds and k"
    ):
        load(tmp_path)


def test_gemma_scopes_jumprelu_is_not_read_as_another_activation(tmp_path):
    write_config(tmp_path, model_kind="cross_layer_transcoder", transcoders=["a"], activation="topk", k=2)
    with pytest.raises(TranscoderError, match="means activation topk, but the transcoder's files hold thresholds"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["threshold", "W_skip"])
@pytest.mark.parametrize("lacking", [0, 1, 2])
def test_a_tensor_that_one_layer_lacks_is_refused(tmp_path, name, lacking):
    write_cross_layer(tmp_path, threshold=True, skip=True)
    change(tmp_path / f"W_enc_{lacking}.safetensors", drop=[f"{name}_{lacking}"])
    other = 1 if lacking == 0 else 0
    message = (
        f"W_enc_{lacking}.safetensors lacks {name}_{lacking}, but .*W_enc_{other}.safetensors holds {name}_{other}"
    )
    with pytest.raises(TranscoderError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("file", "name"),
    [("W_enc_1", "log_thresholds_1"), ("W_enc_1", "threshold_0"), ("W_enc_0", "k"), ("W_dec_1", "W_dec_0")],
)
def test_a_tensor_nobody_knows_is_refused_in_a_cross_layer_transcoder(tmp_path, file, name):
    write_cross_layer(tmp_path)
    change(tmp_path / f"{file}.safetensors", **{name: torch.zeros(N_FEATURES)})
    with pytest.raises(TranscoderError, match=f"{file}.safetensors holds {name}, which this reader does not know"):
        load(tmp_path)


@pytest.mark.parametrize("shape", [(N_FEATURES + 1, D_MODEL), (N_FEATURES, 1)])
def test_a_per_layer_decoder_of_another_shape_is_refused(tmp_path, shape):
    write_per_layer(tmp_path)
    change(tmp_path / "layer_1.safetensors", W_dec=torch.zeros(shape))
    with pytest.raises(TranscoderError, match=r"W_dec in .*layer_1.safetensors has shape .*; expected \(9, 6\)"):
        load(tmp_path)


@pytest.mark.parametrize("read", [load, load_on_demand])
@pytest.mark.parametrize("write", [write_cross_layer, write_per_layer])
def test_a_threshold_that_is_nan_is_refused_and_one_that_is_infinite_is_read(tmp_path, read, write):
    write(tmp_path, threshold=True)
    name, file = "activation_function.threshold", tmp_path / "layer_1.safetensors"
    if write is write_cross_layer:
        name, file = "threshold_1", tmp_path / "W_enc_1.safetensors"
    threshold = load_file(file)[name]
    threshold[4] = float("inf")
    change(file, **{name: threshold})
    assert float(read(tmp_path).threshold[1, 4]) == float("inf")
    threshold[6] = float("nan")
    change(file, **{name: threshold})
    with pytest.raises(TranscoderError, match=r"layer 1 of .* has NaN in 1 of its 9 thresholds, first for feature 6;"):
        read(tmp_path)


@pytest.mark.parametrize("read", [load, load_on_demand])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_skip_connection_that_is_no_number_is_refused(tmp_path, read, value):
    write_cross_layer(tmp_path, skip=True)
    change(tmp_path / "W_enc_2.safetensors", W_skip_2=torch.full((D_MODEL, D_MODEL), value))
    with pytest.raises(TranscoderError, match=r"layer 2 of .* has a skip connection \(W_skip\) with NaN or infinite"):
        read(tmp_path)


@pytest.mark.parametrize("other", [3, None])
def test_a_k_that_differs_between_layers_is_refused(tmp_path, other):
    write_per_layer(tmp_path, stored_k=torch.tensor(2))
    change(tmp_path / "layer_1.safetensors", drop=["k"], **({} if other is None else {"k": torch.tensor(other)}))
    with pytest.raises(TranscoderError, match=rf"k is {other} in .*layer_1.safetensors and 2 in .*layer_0.safetensors"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"k": 3}, r"config.yaml says k: 3, but the files beside it hold k = 2; correct the wrong one"),
        ({"activation": "relu"}, "means activation relu, but the transcoder's files hold k; expected"),
    ],
)
def test_a_config_that_contradicts_the_k_of_the_files_is_refused(tmp_path, meta, message):
    write_per_layer(tmp_path, stored_k=torch.tensor(2), **meta)
    with pytest.raises(TranscoderError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("write", [write_cross_layer, write_per_layer])
@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"activation": "topk", "k": "abc"}, r"k in .*config.yaml is 'abc'; expected a whole number"),
        ({"activation": "topk", "k": 2.5}, r"k in .*config.yaml is 2.5; expected a whole number"),
        ({"activation": "topk", "k": True}, r"k in .*config.yaml is True; expected a whole number"),
        ({"activation": "topk", "k": 0}, "k is 0 with activation 'topk'"),
        ({"activation": "topk", "k": 100_000}, "k is 100000 of 9 features a layer; expected fewer active than there"),
        ({"k": 2}, "config.yaml says k: 2 and no activation; expected activation: topk, or relu without k"),
    ],
)
def test_a_k_that_cannot_be_is_refused(tmp_path, write, meta, message):
    write(tmp_path, **meta)
    with pytest.raises(TranscoderError, match=message):
        load(tmp_path)


def test_a_stored_k_that_is_no_whole_number_is_refused(tmp_path):
    write_per_layer(tmp_path, stored_k=torch.tensor(float("nan")))
    with pytest.raises(TranscoderError, match=r"k in .*layer_0.safetensors is nan; expected a whole number"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ("layer_0.safetensors", "transcoders in .* is 'layer_0.safetensors'; expected a list of files, one per layer"),
        ([{"id": "first"}], "transcoders in .* for layer 0; expected the file of that layer"),
        ([{"layer": 1, "filepath": "layer_1.safetensors"}], "transcoders in .* for layer 0; expected the file of that"),
    ],
)
def test_a_list_of_files_that_is_none_or_out_of_order_is_refused(tmp_path, listed, message):
    write_per_layer(tmp_path, transcoders=listed)
    with pytest.raises(TranscoderError, match=message):
        load(tmp_path)
