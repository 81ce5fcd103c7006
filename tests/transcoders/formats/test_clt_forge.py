"""CLT-Forge: pairs of layers, scales, a bias per pair, shards that its own loader cannot read, low-rank decoders."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.transcoders.formats.readings import assert_computes, normal
from transcoders import TranscoderError, load, open_stored

N_LAYERS, D_MODEL, N_FEATURES = 3, 6, 9
PAIRS = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]


def write_config(folder, **changes):
    meta = {
        "d_in": D_MODEL, "d_latent": N_FEATURES, "n_layers": N_LAYERS, "activation_fn": "jumprelu",
        "cross_layer_decoders": True, "model_name": "gpt2",
    }  # fmt: skip
    (folder / "clt_cfg.json").write_text(json.dumps(meta | changes), encoding="utf-8")


def tensors(*, n_pairs=6):
    random = normal(0)
    return {
        "W_enc": random(N_LAYERS, D_MODEL, N_FEATURES), "b_enc": random(N_LAYERS, N_FEATURES),
        "W_dec": random(n_pairs, N_FEATURES, D_MODEL), "b_dec": random(n_pairs, D_MODEL),
        "log_threshold": random(N_LAYERS, N_FEATURES) - 1,
        "estimated_norm_scaling_factor_in": random(N_LAYERS).abs() + 0.3,
        "estimated_norm_scaling_factor_out": random(N_LAYERS).abs() + 0.3,
        "feature_count": torch.zeros(N_LAYERS, N_FEATURES, dtype=torch.int64),
        "layer_mask": torch.ones(N_LAYERS, n_pairs),
    }  # fmt: skip


def write_shards(folder, whole, sizes):
    first = 0
    for rank, size in enumerate(sizes):
        part = slice(first, first + size)
        shard = dict(whole)
        shard["W_enc"] = whole["W_enc"][:, :, part].contiguous()
        shard["W_dec"] = whole["W_dec"][:, part].contiguous()
        for name in ("b_enc", "log_threshold", "feature_count"):
            shard[name] = whole[name][:, part].contiguous()
        save_file(shard, folder / f"rank{rank}_clt_weights.safetensors")
        first += size


def top_two(z):
    values, features = z.relu().topk(2, dim=-1)
    return torch.zeros_like(z).scatter(-1, features, values)


def outputs(whole, x, decoders, activation="jumprelu"):
    """The publisher's forward pass; `decoders` maps pairs of layers to (feature, d_model)."""
    written = torch.zeros(N_LAYERS, x.shape[1], D_MODEL)
    for number, (source, target) in enumerate(decoders):
        scaled = whole["estimated_norm_scaling_factor_in"][source] * x[source]
        z = scaled @ whole["W_enc"][source] + whole["b_enc"][source]
        a = z * (z > whole["log_threshold"][source].exp()) if activation == "jumprelu" else top_two(z)
        written[target] += a @ decoders[source, target] + whole["b_dec"][number]
    return written / whole["estimated_norm_scaling_factor_out"][:, None, None]


def by_pair(whole):
    return dict(zip(PAIRS, whole["W_dec"], strict=True))


@pytest.mark.parametrize("activation", ["jumprelu", "topk"])
def test_a_plain_file_computes_what_clt_forge_computes(tmp_path, activation):
    whole = tensors()
    save_file(whole, tmp_path / "clt_weights.safetensors")
    write_config(tmp_path, activation_fn=activation, k=2)
    x = normal(1)(N_LAYERS, 8, D_MODEL)
    assert_computes(tmp_path, tmp_path, x, outputs(whole, x, by_pair(whole), activation))


def test_shards_are_joined_in_the_order_of_their_ranks(tmp_path):
    whole = tensors()
    write_shards(tmp_path, whole, [4, 2, 3])
    write_config(tmp_path)
    x = normal(2)(N_LAYERS, 8, D_MODEL)
    assert open_stored(tmp_path).layout == "CLT-Forge, 3 shards"
    assert_computes(tmp_path, tmp_path, x, outputs(whole, x, by_pair(whole)))


def test_rank_10_comes_after_rank_9(tmp_path):
    whole = tensors() | {name: torch.cat([tensors()[name]] * 2, -1) for name in ("W_enc", "b_enc", "log_threshold")}
    whole["W_dec"] = torch.cat([tensors()["W_dec"]] * 2, 1)
    whole["feature_count"] = torch.zeros(N_LAYERS, 2 * N_FEATURES)
    whole["b_enc"] += torch.arange(2 * N_FEATURES)
    write_shards(tmp_path, whole, [1] * 11 + [7])
    write_config(tmp_path, d_latent=2 * N_FEATURES)
    torch.testing.assert_close(load(tmp_path).b_enc, whole["b_enc"])


def test_a_per_layer_transcoder_has_one_decoder_a_layer(tmp_path):
    whole = tensors(n_pairs=N_LAYERS)
    save_file(whole, tmp_path / "clt_weights.safetensors")
    write_config(tmp_path, cross_layer_decoders=False)
    x = normal(3)(N_LAYERS, 8, D_MODEL)
    own = {(layer, layer): whole["W_dec"][layer] for layer in range(N_LAYERS)}
    assert_computes(tmp_path, tmp_path, x, outputs(whole, x, own))


def test_low_rank_decoders_are_multiplied_out(tmp_path):
    random = normal(4)
    whole = tensors()
    base, left, right = random(N_LAYERS, N_FEATURES, D_MODEL), random(3, N_FEATURES, 2), random(3, 2, D_MODEL)
    del whole["W_dec"]
    save_file(whole | {"W_dec_base": base, "lora_A": left, "lora_B": right}, tmp_path / "clt_weights.safetensors")
    write_config(tmp_path, decoder_type="lora", decoder_rank=2)
    decoders = {
        (0, 0): base[0], (0, 1): base[0] + left[0] @ right[0], (0, 2): base[0] + left[1] @ right[1],
        (1, 1): base[1], (1, 2): base[1] + left[2] @ right[2], (2, 2): base[2],
    }  # fmt: skip
    x = random(N_LAYERS, 8, D_MODEL)
    assert_computes(tmp_path, tmp_path, x, outputs(whole, x, decoders))


def test_scales_are_folded_in_float32_whatever_the_files_hold(tmp_path):
    whole = {name: tensor.bfloat16() for name, tensor in tensors().items()}
    save_file(whole, tmp_path / "clt_weights.safetensors")
    write_config(tmp_path)
    expected = whole["W_enc"][1].float().T * whole["estimated_norm_scaling_factor_in"][1].float()
    assert torch.equal(load(tmp_path).W_enc[1], expected)
    assert open_stored(tmp_path).dtype == torch.bfloat16


def test_it_reads_the_norm_before_its_gain(tmp_path):
    save_file(tensors(), tmp_path / "clt_weights.safetensors")
    write_config(tmp_path)
    config = load(tmp_path).config
    assert (config.reads, config.writes, config.model_name) == ("ln2.hook_normalized", "hook_mlp_out", "gpt2")


def test_a_missing_shard_is_refused(tmp_path):
    write_shards(tmp_path, tensors(), [4, 2, 3])
    write_config(tmp_path)
    (tmp_path / "rank1_clt_weights.safetensors").unlink()
    with pytest.raises(TranscoderError, match=r"holds shards \[0, 2\]; expected all from 0 on"):
        load(tmp_path)


def test_shards_that_overwrote_each_other_are_refused(tmp_path):
    write_shards(tmp_path, tensors(), [4])
    (tmp_path / "rank0_clt_weights.safetensors").rename(tmp_path / "clt_weights.safetensors")
    write_config(tmp_path)
    with pytest.raises(TranscoderError, match="holds 4 features a layer of 9: shards are missing, or overwrote each"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_fn": "groupmax", "k": 2}, "uses groupmax, which has no equal here; expected jumprelu or topk"),
        ({"activation_fn": "topk", "k": "abc"}, r"k in .*clt_cfg.json is 'abc'; expected a whole number"),
        ({"activation_fn": "topk", "k": 100_000}, "k is 100000 of 9 features a layer"),
        ({"n_layers": None}, r"clt_cfg.json does not say n_layers"),
        ({"n_layers": "3"}, r"n_layers in .*clt_cfg.json is '3'; expected a whole number"),
        ({"n_layers": 4}, r"W_enc in .* has shape \(3, 6, 9\); expected \(4, 6, any\)"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, changes, message):
    save_file(tensors(), tmp_path / "clt_weights.safetensors")
    write_config(tmp_path, **changes)
    with pytest.raises(TranscoderError, match=message):
        load(tmp_path)


def test_a_missing_scale_is_refused(tmp_path):
    whole = tensors()
    del whole["estimated_norm_scaling_factor_out"]
    save_file(whole, tmp_path / "clt_weights.safetensors")
    write_config(tmp_path)
    with pytest.raises(TranscoderError, match="lacks the tensor estimated_norm_scaling_factor_out"):
        load(tmp_path)


def test_a_tensor_nobody_knows_is_refused(tmp_path):
    save_file(tensors() | {"W_skip": torch.zeros(1)}, tmp_path / "clt_weights.safetensors")
    write_config(tmp_path)
    with pytest.raises(TranscoderError, match=r"clt_weights.safetensors holds W_skip, which this reader does not know"):
        load(tmp_path)


def test_broken_settings_are_refused(tmp_path):
    save_file(tensors(), tmp_path / "clt_weights.safetensors")
    (tmp_path / "clt_cfg.json").write_text('{"d_in": 6,', encoding="utf-8")
    with pytest.raises(TranscoderError, match=r"clt_cfg.json cannot be read \(Expecting property name"):
        load(tmp_path)
    assert load_file(tmp_path / "clt_weights.safetensors")


def test_whole_and_low_rank_decoders_together_are_refused(tmp_path):
    save_file(tensors() | {"lora_A": torch.zeros(3, N_FEATURES, 2)}, tmp_path / "clt_weights.safetensors")
    write_config(tmp_path)
    with pytest.raises(TranscoderError, match=r"holds decoders both whole \(W_dec\) and low-rank; expected one kind"):
        load(tmp_path)


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf")])
def test_a_scale_that_was_never_estimated_is_refused(tmp_path, scale):
    whole = tensors()
    whole["estimated_norm_scaling_factor_in"][1] = scale
    save_file(whole, tmp_path / "clt_weights.safetensors")
    write_config(tmp_path)
    with pytest.raises(
        TranscoderError, match=r"estimated_norm_scaling_factor_in in .* is 0, NaN or infinite somewhere"
    ):
        load(tmp_path)


def test_a_threshold_that_is_nan_is_refused(tmp_path):
    whole = tensors()
    whole["log_threshold"][1, 5:7] = float("nan")
    save_file(whole, tmp_path / "clt_weights.safetensors")
    write_config(tmp_path)
    with pytest.raises(TranscoderError, match=r"layer 1 of .* has NaN in 2 of its 9 thresholds, first for feature 5;"):
        load(tmp_path)
