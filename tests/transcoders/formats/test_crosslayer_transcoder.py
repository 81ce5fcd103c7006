"""crosslayer-transcoder: standardised inputs and outputs, and every nonlinearity that has an equal here."""

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.transcoders.formats.readings import assert_computes, normal
from transcoders import TranscoderError, load

N_LAYERS, D_MODEL, N_FEATURES = 3, 6, 9
MODULE = "crosslayer_transcoder.model"


def write_config(folder, nonlinearity, standardizer=None, *, is_folded=False, k=None):
    parts = {"nonlinearity": {"class_path": f"{MODULE}.jumprelu.{nonlinearity}", "init_args": {"k": k}}}
    for side in ("Input", "Output"):
        name = f"{side.lower()}_standardizer"
        parts[name] = {"class_path": f"{MODULE}.standardize.{standardizer}{side}Standardizer"} if standardizer else None
    model = {"class_path": f"{MODULE}.clt.CrossLayerTranscoder", "init_args": parts, "is_folded": is_folded}
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": model}), encoding="utf-8")


def tensors(nonlinearity, standardizer=None, *, cross_layer=True):
    random = normal(0)
    whole = {
        "encoder.W": random(N_LAYERS, D_MODEL, N_FEATURES), "encoder.b": random(N_LAYERS, N_FEATURES),
        "decoder.b": random(N_LAYERS, D_MODEL),
    }  # fmt: skip
    if cross_layer:
        whole |= {f"decoder.W_{target}": random(target + 1, N_FEATURES, D_MODEL) for target in range(N_LAYERS)}
    else:
        whole["decoder.W"] = random(N_LAYERS, N_FEATURES, D_MODEL)
    match nonlinearity:
        case "JumpReLU":
            whole["nonlinearity.theta"] = random(1, N_LAYERS, N_FEATURES) * 0.5
            whole["nonlinearity.bandwidth"] = torch.tensor(1.0)
        case "BatchTopK":
            whole["nonlinearity.threshold"] = torch.tensor([0.4])
        case "PerLayerBatchTopK":
            whole["nonlinearity.threshold"] = torch.tensor([0.4, -0.3, 0.9])
    if standardizer:
        shape = (N_LAYERS, D_MODEL) if standardizer == "Dimensionwise" else (N_LAYERS,)
        for side in ("input", "output"):
            whole[f"{side}_standardizer.mean"] = random(*shape)
            whole[f"{side}_standardizer.std"] = random(*shape).abs() + 0.5
    return whole


def activate(z, layer, nonlinearity, whole):
    match nonlinearity:
        case "ReLU":
            return z.relu()
        case "JumpReLU":
            return z * (z > whole["nonlinearity.theta"][0, layer]) * (z > 0)
        case "BatchTopK":
            return z * (z > 0.4)
        case "PerLayerBatchTopK":
            return z * (z > [0.4, 0.0, 0.9][layer])
        case _:
            values, features = z.relu().topk(2, dim=-1)
            return torch.zeros_like(z).scatter(-1, features, values)


def outputs(whole, x, nonlinearity, standardizer=None, *, cross_layer=True):
    """The publisher's forward pass."""

    def statistics(side, layer):
        if standardizer is None:
            return 0.0, 1.0
        return whole[f"{side}_standardizer.mean"][layer], whole[f"{side}_standardizer.std"][layer]

    activations = []
    for layer in range(N_LAYERS):
        mean, std = statistics("input", layer)
        z = ((x[layer] - mean) / std) @ whole["encoder.W"][layer] + whole["encoder.b"][layer]
        activations.append(activate(z, layer, nonlinearity, whole))
    written = []
    for target in range(N_LAYERS):
        if cross_layer:
            total = sum(activations[source] @ whole[f"decoder.W_{target}"][source] for source in range(target + 1))
        else:
            total = activations[target] @ whole["decoder.W"][target]
        mean, std = statistics("output", target)
        written.append((total + whole["decoder.b"][target]) * std + mean)
    return torch.stack(written)


@pytest.mark.parametrize("nonlinearity", ["ReLU", "JumpReLU", "PerLayerTopK", "BatchTopK", "PerLayerBatchTopK"])
@pytest.mark.parametrize("standardizer", [None, "Dimensionwise", "Layerwise"])
def test_it_computes_what_crosslayer_transcoder_computes(tmp_path, nonlinearity, standardizer):
    whole = tensors(nonlinearity, standardizer)
    save_file(whole, tmp_path / "checkpoint.safetensors")
    write_config(tmp_path, nonlinearity, standardizer, k=2)
    x = normal(1)(N_LAYERS, 8, D_MODEL)
    assert_computes(tmp_path, tmp_path, x, outputs(whole, x, nonlinearity, standardizer))


def test_a_per_layer_decoder_is_read(tmp_path):
    whole = tensors("JumpReLU", "Dimensionwise", cross_layer=False)
    save_file(whole, tmp_path / "checkpoint.safetensors")
    write_config(tmp_path, "JumpReLU", "Dimensionwise")
    x = normal(2)(N_LAYERS, 8, D_MODEL)
    assert_computes(tmp_path, tmp_path, x, outputs(whole, x, "JumpReLU", "Dimensionwise", cross_layer=False))


def test_folded_weights_are_not_folded_again(tmp_path):
    whole = tensors("ReLU")
    save_file(whole, tmp_path / "checkpoint.safetensors")
    write_config(tmp_path, "ReLU", "Dimensionwise", is_folded=True)
    x = normal(3)(N_LAYERS, 8, D_MODEL)
    assert_computes(tmp_path, tmp_path, x, outputs(whole, x, "ReLU"))


def test_a_lightning_checkpoint_is_read(tmp_path):
    whole = tensors("JumpReLU")
    training = {"last_active": torch.zeros(N_LAYERS, N_FEATURES, dtype=torch.int64)}
    model = {f"model.{name}": value for name, value in whole.items()}
    torch.save({"state_dict": training | model}, tmp_path / "clt.ckpt")
    write_config(tmp_path, "JumpReLU")
    x = normal(4)(N_LAYERS, 8, D_MODEL)
    assert_computes(tmp_path, tmp_path, x, outputs(whole, x, "JumpReLU"))


def test_a_training_runs_own_config_is_understood(tmp_path):
    save_file(tensors("ReLU"), tmp_path / "checkpoint.safetensors")
    write_config(tmp_path, "ReLU")
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    run = {"model": {"class_path": f"{MODULE}.clt_lightning.Module", "init_args": saved}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    config = load(tmp_path).config
    assert (config.activation, config.reads, config.writes) == ("relu", "hook_resid_mid", "hook_mlp_out")


@pytest.mark.parametrize(
    ("nonlinearity", "standardizer", "message"),
    [
        ("SoftTopK", None, "uses SoftTopK; expected one of ReLU, JumpReLU, PerLayerTopK"),
        ("ReLU", "Samplewise", "standardised by SamplewiseInputStandardizer, which may depend on the prompt"),
        ("ReLU", "Dimensionwise", "lacks the tensor input_standardizer.mean"),
        ("JumpReLU", None, "lacks the tensor nonlinearity.theta"),
        ("BatchTopK", None, "lacks the tensor nonlinearity.threshold"),
        ("PerLayerTopK", None, "config.yaml does not say how many features PerLayerTopK keeps"),
    ],
)
def test_what_cannot_be_exact_is_refused(tmp_path, nonlinearity, standardizer, message):
    save_file(tensors("ReLU"), tmp_path / "checkpoint.safetensors")
    write_config(tmp_path, nonlinearity, standardizer)
    with pytest.raises(TranscoderError, match=message):
        load(tmp_path)


def test_weights_without_their_config_are_refused(tmp_path):
    save_file(tensors("ReLU"), tmp_path / "checkpoint.safetensors")
    with pytest.raises(TranscoderError, match=r"config.yaml names no nonlinearity; expected the config.yaml that was"):
        load(tmp_path)


def test_a_missing_decoder_is_refused(tmp_path):
    whole = tensors("ReLU")
    del whole["decoder.W_1"]
    save_file(whole, tmp_path / "checkpoint.safetensors")
    write_config(tmp_path, "ReLU")
    with pytest.raises(TranscoderError, match=r"lacks the tensor decoder.W_1"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "nonlinearity"),
    [
        ("decoder.W_3", "ReLU"),
        ("skip.W", "ReLU"),
        ("nonlinearity.theta", "ReLU"),
        ("nonlinearity.threshold", "JumpReLU"),
    ],
)
def test_a_tensor_that_the_kind_does_not_have_is_refused(tmp_path, name, nonlinearity):
    save_file(tensors(nonlinearity) | {name: torch.zeros(1)}, tmp_path / "checkpoint.safetensors")
    write_config(tmp_path, nonlinearity)
    with pytest.raises(TranscoderError, match=f"checkpoint.safetensors holds {name}, which this reader does not know"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("k", "message"), [("abc", "k in .*config.yaml is 'abc'; expected a whole"), (100_000, "k is 100000 of 9 features")]
)
def test_a_k_that_cannot_be_is_refused(tmp_path, k, message):
    save_file(tensors("PerLayerTopK"), tmp_path / "checkpoint.safetensors")
    write_config(tmp_path, "PerLayerTopK", k=k)
    with pytest.raises(TranscoderError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("part", ["ReLU", {"init_args": {}}])
def test_a_nonlinearity_without_a_class_is_refused(tmp_path, part):
    save_file(tensors("ReLU"), tmp_path / "checkpoint.safetensors")
    saved = {"model": {"init_args": {"nonlinearity": part}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved), encoding="utf-8")
    with pytest.raises(TranscoderError, match="where a class is named; expected its class_path"):
        load(tmp_path)


def test_arguments_left_empty_name_no_k(tmp_path):
    save_file(tensors("PerLayerTopK"), tmp_path / "checkpoint.safetensors")
    saved = {"model": {"init_args": {"nonlinearity": {"class_path": "x.PerLayerTopK", "init_args": None}}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved), encoding="utf-8")
    with pytest.raises(TranscoderError, match=r"config.yaml does not say how many features PerLayerTopK keeps"):
        load(tmp_path)


def test_a_deviation_of_zero_is_refused(tmp_path):
    whole = tensors("ReLU", "Dimensionwise")
    whole["input_standardizer.std"][1, 2] = 0
    save_file(whole, tmp_path / "checkpoint.safetensors")
    write_config(tmp_path, "ReLU", "Dimensionwise")
    with pytest.raises(TranscoderError, match=r"input_standardizer.std in .* is 0, NaN or infinite somewhere"):
        load(tmp_path)


def test_a_threshold_that_is_nan_is_refused(tmp_path):
    whole = tensors("PerLayerBatchTopK") | {"nonlinearity.threshold": torch.tensor([0.4, float("nan"), 0.9])}
    save_file(whole, tmp_path / "checkpoint.safetensors")
    write_config(tmp_path, "PerLayerBatchTopK")
    with pytest.raises(TranscoderError, match=r"layer 1 of .* has NaN in 9 of its 9 thresholds"):
        load(tmp_path)
