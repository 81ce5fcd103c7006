"""Language-Model-SAEs: target by target, norms per hook, gates on pre-activation times decoder norm."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.transcoders.formats.readings import assert_computes, normal
from transcoders import TranscoderError, load

N_LAYERS, D_MODEL, N_FEATURES = 3, 6, 9
IN = [f"blocks.{layer}.ln2.hook_normalized" for layer in range(N_LAYERS)]
OUT = [f"blocks.{layer}.hook_mlp_out" for layer in range(N_LAYERS)]


def write_config(folder, **changes):
    meta = {
        "sae_type": "clt", "hook_points_in": IN, "hook_points_out": OUT, "d_model": D_MODEL, "expansion_factor": 1.5,
        "act_fn": "jumprelu", "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True, "top_k": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(meta | changes), encoding="utf-8")


def tensors(activation="jumprelu"):
    random = normal(0)
    whole = {"W_E": random(N_LAYERS, D_MODEL, N_FEATURES), "b_E": random(N_LAYERS, N_FEATURES)}
    threshold = random(N_LAYERS, N_FEATURES)
    if activation == "jumprelu":
        whole["activation_function.log_jumprelu_threshold"] = threshold
    for target in range(N_LAYERS):
        whole[f"W_D.{target}"] = random(target + 1, N_FEATURES, D_MODEL)
        whole[f"b_D.{target}"] = random(D_MODEL)
    for hook in IN + OUT:
        whole[f"dataset_average_activation_norm.{hook}"] = random().abs() + 1
    return whole


def outputs(whole, x, activation, *, include_norm, dataset_wise):
    """The publisher's forward pass."""

    def scale(hook):
        return D_MODEL**0.5 / whole[f"dataset_average_activation_norm.{hook}"] if dataset_wise else 1.0

    activations = []
    for source in range(N_LAYERS):
        z = scale(IN[source]) * x[source] @ whole["W_E"][source] + whole["b_E"][source]
        squared = sum(whole[f"W_D.{target}"][source].pow(2).sum(-1) for target in range(source, N_LAYERS))
        norm = squared.sqrt() if include_norm else torch.ones(N_FEATURES)
        h = z * norm
        match activation:
            case "relu":
                a = h.relu()
            case "jumprelu":
                a = h * (h > whole["activation_function.log_jumprelu_threshold"][source].exp())
            case _:
                values, features = h.relu().topk(2, dim=-1)
                a = torch.zeros_like(h).scatter(-1, features, values)
        activations.append(a / norm)
    written = []
    for target in range(N_LAYERS):
        total = sum(activations[source] @ whole[f"W_D.{target}"][source] for source in range(target + 1))
        written.append((total + whole[f"b_D.{target}"]) / scale(OUT[target]))
    return torch.stack(written)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("include_norm", [True, False])
@pytest.mark.parametrize("norm", ["dataset-wise", "inference"])
def test_it_computes_what_language_model_saes_computes(tmp_path, activation, include_norm, norm):
    whole = tensors(activation)
    save_file(whole, tmp_path / "sae_weights.safetensors", metadata={"version": "2.0.0"})
    write_config(tmp_path, act_fn=activation, sparsity_include_decoder_norm=include_norm, norm_activation=norm)
    x = normal(1)(N_LAYERS, 8, D_MODEL)
    expected = outputs(whole, x, activation, include_norm=include_norm, dataset_wise=norm == "dataset-wise")
    assert_computes(tmp_path, tmp_path, x, expected)


def test_weights_saved_by_torch_are_read_too(tmp_path):
    whole = tensors()
    torch.save({"sae": whole}, tmp_path / "sae_weights.pt")
    write_config(tmp_path)
    x = normal(2)(N_LAYERS, 8, D_MODEL)
    assert_computes(tmp_path, tmp_path, x, outputs(whole, x, "jumprelu", include_norm=True, dataset_wise=True))


def test_a_feature_that_writes_nothing_never_fires(tmp_path):
    for activation in ("jumprelu", "topk"):
        whole = tensors(activation)
        for target in range(N_LAYERS):
            whole[f"W_D.{target}"][0, 4] = 0
        if activation == "jumprelu":
            whole["activation_function.log_jumprelu_threshold"][0, 4] = -1000
        save_file(whole, tmp_path / "sae_weights.safetensors")
        write_config(tmp_path, act_fn=activation)
        transcoder = load(tmp_path)
        activations = transcoder.encode(100 * normal(3)(N_LAYERS, 50, D_MODEL))
        assert float(activations[0, :, 4].abs().max()) == 0
        assert bool(transcoder.decode(activations).isfinite().all())


def test_hooks_are_those_of_the_config(tmp_path):
    save_file(tensors(), tmp_path / "sae_weights.safetensors")
    mid = [f"blocks.{layer}.hook_resid_mid" for layer in range(N_LAYERS)]
    write_config(tmp_path, hook_points_in=mid, norm_activation="inference")
    assert load(tmp_path).config.reads == "hook_resid_mid"


class Harmful:
    def __reduce__(self):
        return print, ("ran",)


def test_pickled_objects_are_refused(tmp_path, capsys):
    torch.save({"sae": tensors(), "more": Harmful()}, tmp_path / "sae_weights.pt")
    write_config(tmp_path)
    with pytest.raises(TranscoderError, match=r"sae_weights.pt cannot be read \(it holds Python objects"):
        load(tmp_path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_activation": "token-wise"}, "is normalised token-wise, by what each prompt holds"),
        ({"norm_activation": "batch-wise"}, "is normalised batch-wise, by what each prompt holds"),
        ({"act_fn": "batchtopk"}, "uses batchtopk, whose active features depend on the batch or on all layers"),
        ({"act_fn": "layertopk"}, "uses layertopk, whose active features depend on the batch or on all layers"),
        ({"sae_type": "lorsa"}, r"holds a lorsa; expected a cross-layer transcoder \(sae_type clt\)"),
        ({"hook_points_in": IN[:2]}, r"W_E in .* has shape \(3, 6, 9\); expected \(2, 6, any\)"),
        ({"hook_points_in": IN[::-1]}, "expected one hook of every layer from 0 on"),
        ({"hook_points_in": ["blocks.0.hook_q", "blocks.1.hook_q", "blocks.2.hook_q"]}, "reads is 'hook_q'; expected"),
        ({"d_model": None}, "config.json does not say d_model"),
        ({"d_model": "6"}, r"d_model in .*config.json is '6'; expected a whole number"),
        ({"hook_points_out": OUT[:2]}, "names 3 hook_points_in and 2 hook_points_out; expected as many of both"),
        ({"act_fn": "relu"}, "holds activation_function.log_jumprelu_threshold, which this reader does not know"),
    ],
)
def test_what_cannot_be_exact_is_refused(tmp_path, changes, message):
    whole = tensors()
    for layer in range(N_LAYERS):
        whole[f"dataset_average_activation_norm.blocks.{layer}.hook_q"] = torch.tensor(1.0)
    save_file(whole, tmp_path / "sae_weights.safetensors")
    write_config(tmp_path, **changes)
    with pytest.raises(TranscoderError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan"), float("inf")])
def test_a_norm_that_was_never_set_is_refused(tmp_path, norm):
    whole = tensors() | {f"dataset_average_activation_norm.{OUT[1]}": torch.tensor(norm)}
    save_file(whole, tmp_path / "sae_weights.safetensors")
    write_config(tmp_path)
    with pytest.raises(TranscoderError, match=r"average norm at blocks.1.hook_mlp_out .* set norm_activation to"):
        load(tmp_path)


def test_a_distributed_checkpoint_is_refused(tmp_path):
    (tmp_path / "sae_weights.dcp").mkdir()
    write_config(tmp_path)
    with pytest.raises(TranscoderError, match=r"distributed checkpoint \(sae_weights.dcp\); load it with the library"):
        load(tmp_path)


def test_missing_decoders_are_refused(tmp_path):
    whole = tensors()
    del whole["W_D.2"]
    save_file(whole, tmp_path / "sae_weights.safetensors")
    write_config(tmp_path)
    with pytest.raises(TranscoderError, match=r"lacks the tensor W_D.2"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("k", "message"),
    [("abc", r"top_k in .*config.json is 'abc'; expected a whole number"), (100_000, "k is 100000 of 9 features")],
)
def test_a_k_that_cannot_be_is_refused(tmp_path, k, message):
    save_file(tensors("topk"), tmp_path / "sae_weights.safetensors")
    write_config(tmp_path, act_fn="topk", top_k=k)
    with pytest.raises(TranscoderError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("name", ["W_skip", "W_D.3"])
def test_a_tensor_nobody_knows_is_refused(tmp_path, name):
    save_file(tensors() | {name: torch.zeros(1)}, tmp_path / "sae_weights.safetensors")
    write_config(tmp_path)
    with pytest.raises(TranscoderError, match=f"sae_weights.safetensors holds {name}, which this reader does not know"):
        load(tmp_path)


def test_a_threshold_that_is_nan_is_refused(tmp_path):
    whole = tensors()
    whole["activation_function.log_jumprelu_threshold"][2, 3] = float("nan")
    save_file(whole, tmp_path / "sae_weights.safetensors")
    write_config(tmp_path)
    with pytest.raises(TranscoderError, match=r"layer 2 of .* has NaN in 1 of its 9 thresholds, first for feature 3;"):
        load(tmp_path)


@pytest.mark.parametrize("content", [torch.zeros(3), {"sae": torch.zeros(3)}, ["W_E"]])
def test_a_file_without_named_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "sae_weights.pt")
    write_config(tmp_path)
    with pytest.raises(
        TranscoderError, match=r"sae_weights.pt cannot be read \(it holds a (Tensor|list), not tensors by"
    ):
        load(tmp_path)
