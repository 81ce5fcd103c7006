"""sparsify's per-layer transcoders, and every kind of decoder of clt-training."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.transcoders.formats.readings import assert_computes, normal
from transcoders import TranscoderError, load

N_LAYERS, D_MODEL, N_FEATURES, K = 3, 6, 9, 4
COALESCE = {"untied": "none", "source-tied": "none", "per-layer": "per-layer", "concat": "concat"}


def write_layer(folder, layer, tensors, meta):
    place = folder / f"h.{layer}.mlp"
    place.mkdir(exist_ok=True)
    save_file(tensors, place / "sae.safetensors")
    settings = {"activation": "topk", "k": K, "transcode": True, "num_latents": N_FEATURES, "d_in": D_MODEL}
    (place / "cfg.json").write_text(json.dumps(settings | meta), encoding="utf-8")


def change(folder, layer, **meta):
    path = folder / f"h.{layer}.mlp" / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | meta), encoding="utf-8")


def write_per_layer(folder, *, skip):
    random = normal(0)
    layers = []
    for layer in range(N_LAYERS):
        tensors = {
            "encoder.weight": random(N_FEATURES, D_MODEL), "encoder.bias": random(N_FEATURES),
            "W_dec": random(N_FEATURES, D_MODEL), "b_dec": random(D_MODEL),
        }  # fmt: skip
        if skip:
            tensors["W_skip"] = random(D_MODEL, D_MODEL)
        write_layer(folder, layer, tensors, {"skip_connection": skip, "expansion_factor": 32})
        layers.append(tensors)
    return layers


def write_cross_layer(folder, variant, *, reach=N_LAYERS, skip=True, norms=True, scales=True, divide=False):
    """Layers as clt-training saves them; returns their tensors."""
    random = normal(1)
    layers = []
    for layer in range(N_LAYERS):
        n_targets = min(reach, N_LAYERS - layer)
        tensors = {"encoder.weight": random(N_FEATURES, D_MODEL), "encoder.bias": random(N_FEATURES)}
        match variant:
            case "untied":
                tensors |= {f"W_decs.{j}": random(N_FEATURES, D_MODEL) for j in range(n_targets)}
                tensors["W_dec"] = tensors["W_decs.0"].clone()
            case "per-layer":
                tensors["W_dec"] = random((layer + 1) * N_FEATURES, D_MODEL)
            case _:
                tensors["W_dec"] = random(N_FEATURES, D_MODEL)
        at_source = variant in ("untied", "source-tied")
        if at_source:
            tensors |= {f"b_decs.{j}": random(D_MODEL) for j in range(n_targets)}
            tensors["b_dec"] = tensors["b_decs.0"].clone()
        else:
            tensors["b_dec"] = random(D_MODEL)
        if skip:
            tensors["W_skip"] = random(D_MODEL, D_MODEL)
            if at_source:
                tensors["W_skips.0"] = tensors["W_skip"].clone()
                tensors |= {f"W_skips.{j}": torch.zeros(D_MODEL, D_MODEL) for j in range(1, n_targets)}
        tensors |= {f"post_encs.{j}": torch.zeros(N_FEATURES) for j in range(n_targets)}
        if scales:
            tensors |= {f"post_enc_scales.{j}": random(N_FEATURES) for j in range(n_targets)}
        if norms:
            tensors |= {"in_norm": random(1).abs() + 1, "out_norm": random(1).abs() + 1}
        meta = {
            "n_targets": n_targets, "n_sources": layer + 1, "normalize_io": norms, "skip_connection": skip,
            "coalesce_topk": COALESCE[variant], "per_source_tied": variant == "source-tied",
            "post_encoder_scale": scales, "divide_cross_layer": divide,
        }  # fmt: skip
        write_layer(folder, layer, tensors, meta)
        layers.append(tensors)
    return layers


def top_k(z):
    values, features = z.relu().topk(K, dim=-1)
    return torch.zeros_like(z).scatter(-1, features, values)


def cross_layer_outputs(layers, x, variant, *, reach=N_LAYERS, divide=False, encode=top_k):
    """clt-training's forward pass: activations of each layer go to its own and later outputs."""
    root = D_MODEL**0.5
    unit = [x[s] * root / t["in_norm"] if "in_norm" in t else x[s] for s, t in enumerate(layers)]
    active = [encode(unit[s] @ t["encoder.weight"].T + t["encoder.bias"]) for s, t in enumerate(layers)]
    outputs = []
    for target, at_target in enumerate(layers):
        own, below = torch.zeros(x.shape[1], D_MODEL), torch.zeros(x.shape[1], D_MODEL)
        for source in range(max(0, target - reach + 1), target + 1):
            j, at_source = target - source, layers[source]
            a = active[source] + at_source[f"post_encs.{j}"] * (active[source] > 0)
            a = a * at_source.get(f"post_enc_scales.{j}", 1.0)
            match variant:
                case "untied":
                    written = a @ at_source[f"W_decs.{j}"]
                case "source-tied":
                    written = a @ at_source["W_dec"]
                case "per-layer":
                    written = a @ at_target["W_dec"][source * N_FEATURES : (source + 1) * N_FEATURES]
                case _:
                    written = a @ at_target["W_dec"]
            if variant in ("untied", "source-tied"):
                written = written + at_source[f"b_decs.{j}"]
            if j:
                below += written
            else:
                own += written
        total = own + below / (max(1, target) if divide else 1)
        if variant not in ("untied", "source-tied"):
            total = total + at_target["b_dec"]
        if "W_skip" in at_target:
            total = total + unit[target] @ at_target["W_skip"].T
        outputs.append(total * at_target["out_norm"] / root if "out_norm" in at_target else total)
    return torch.stack(outputs)


@pytest.mark.parametrize("skip", [False, True])
def test_a_per_layer_transcoder_computes_what_sparsify_computes(tmp_path, skip):
    layers = write_per_layer(tmp_path, skip=skip)
    x = normal(2)(N_LAYERS, 8, D_MODEL)
    expected = []
    for inputs, layer in zip(x, layers, strict=True):
        output = top_k(inputs @ layer["encoder.weight"].T + layer["encoder.bias"]) @ layer["W_dec"] + layer["b_dec"]
        expected.append(output + inputs @ layer["W_skip"].T if skip else output)
    assert_computes(tmp_path, tmp_path, x, torch.stack(expected))
    config = load(tmp_path).config
    assert (config.reads, config.writes, config.cross_layer) == ("mlp.hook_in", "mlp.hook_out", False)


@pytest.mark.parametrize("variant", COALESCE)
@pytest.mark.parametrize("plain", [False, True])
def test_every_kind_of_decoder_computes_what_clt_training_computes(tmp_path, variant, plain):
    layers = write_cross_layer(tmp_path, variant, skip=not plain, norms=not plain, scales=not plain)
    x = normal(3)(N_LAYERS, 8, D_MODEL)
    assert_computes(tmp_path, tmp_path, x, cross_layer_outputs(layers, x, variant))


@pytest.mark.parametrize("variant", ["untied", "source-tied"])
def test_what_comes_from_below_may_be_divided_by_the_layers_below(tmp_path, variant):
    layers = write_cross_layer(tmp_path, variant, divide=True)
    x = normal(4)(N_LAYERS, 8, D_MODEL)
    assert_computes(tmp_path, tmp_path, x, cross_layer_outputs(layers, x, variant, divide=True))


def test_a_run_may_write_to_the_next_layer_only(tmp_path):
    layers = write_cross_layer(tmp_path, "untied", reach=2)
    x = normal(5)(N_LAYERS, 8, D_MODEL)
    assert_computes(tmp_path, tmp_path, x, cross_layer_outputs(layers, x, "untied", reach=2))


def test_an_offset_of_every_active_feature_is_a_threshold_where_k_is_only_a_cap(tmp_path):
    layers = write_cross_layer(tmp_path, "per-layer", skip=False, norms=False, scales=False)
    for layer, tensors in enumerate(layers):
        offset = normal(6)(N_FEATURES).abs()
        tensors |= {f"post_encs.{j}": offset.clone() for j in range(N_LAYERS - layer)}
        save_file(tensors, tmp_path / f"h.{layer}.mlp" / "sae.safetensors")
    with pytest.raises(TranscoderError, match="adds post_enc to active features, which is exact only where fewer"):
        load(tmp_path)
    for layer in range(N_LAYERS):
        change(tmp_path, layer, activation="jumprelu")
    x = normal(7)(N_LAYERS, 8, D_MODEL)
    expected = cross_layer_outputs(layers, x, "per-layer", encode=torch.relu)
    assert_computes(tmp_path, tmp_path, x, expected)


@pytest.mark.parametrize(
    ("hooks", "reads"),
    [(["layers.0.post_attention_layernorm", "layers.1.post_attention_layernorm"], "hook_resid_mid"),
     (["h.0.mlp", "h.1.mlp"], "mlp.hook_in")],
)  # fmt: skip
def test_the_runs_config_says_where_it_read(tmp_path, hooks, reads):
    write_per_layer(tmp_path, skip=False)
    (tmp_path / "config.json").write_text(json.dumps({"hookpoints_in": hooks}), encoding="utf-8")
    assert load(tmp_path).config.reads == reads


def test_a_run_that_read_somewhere_else_is_refused(tmp_path):
    write_per_layer(tmp_path, skip=False)
    (tmp_path / "config.json").write_text(json.dumps({"hookpoints_in": ["h.0.attn"]}), encoding="utf-8")
    with pytest.raises(TranscoderError, match=r"config.json reads h.0.attn .*; expected the MLPs or the norms before"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"activation": "groupmax"}, "uses groupmax, which has no equal here; expected activation topk"),
        ({"activation": "batchtopk"}, "uses batchtopk, which has no equal here; expected activation topk"),
        ({"coalesce_topk": "group"}, "uses coalesce_topk group, which has no equal here"),
        ({"topk_coalesced": True}, "topk_coalesced, which keeps the largest activations of all layers together"),
        ({"secondary_target_tied": True}, "secondary_target_tied, which leaves other layers' scales out"),
        ({"transcode": False}, "is a sparse autoencoder, which encodes MLP outputs; expected transcode: true"),
        ({"k": 2}, "has another activation, k or kind of decoder than layer 0"),
        ({"k": None}, r"h.1.mlp/cfg.json does not say k"),
        ({"n_targets": "2"}, r"n_targets in .*h.1.mlp/cfg.json is '2'; expected a whole number"),
        ({"n_targets": 2}, "writes to 2 layers, more than there are above it, or more than layer 0 does"),
        ({"skip_connection": True}, "h.1.mlp and layer 0 differ in skip_connection; expected it of all layers or none"),
    ],
)
def test_what_cannot_be_exact_is_refused(tmp_path, meta, message):
    write_per_layer(tmp_path, skip=False)
    change(tmp_path, 1, **meta)
    with pytest.raises(TranscoderError, match=message):
        load(tmp_path)


def test_skip_connections_to_later_layers_are_refused(tmp_path):
    layers = write_cross_layer(tmp_path, "untied")
    layers[0]["W_skips.1"][2, 3] = 0.1
    save_file(layers[0], tmp_path / "h.0.mlp" / "sae.safetensors")
    with pytest.raises(TranscoderError, match=r"has skip connections to later layers \(W_skips.1\)"):
        load(tmp_path)


def test_offsets_that_differ_between_targets_are_refused(tmp_path):
    layers = write_cross_layer(tmp_path, "concat")
    layers[0]["post_encs.1"] += 1
    save_file(layers[0], tmp_path / "h.0.mlp" / "sae.safetensors")
    for layer in range(N_LAYERS):
        change(tmp_path, layer, activation="jumprelu")
    with pytest.raises(TranscoderError, match="another one for each target; a JumpReLU has one threshold"):
        load(tmp_path)


def test_a_missing_layer_is_refused(tmp_path):
    write_per_layer(tmp_path, skip=False)
    (tmp_path / "h.1.mlp" / "cfg.json").unlink()
    with pytest.raises(TranscoderError, match=r"holds layers \[0, 2\]; expected every layer from 0 on"):
        load(tmp_path)


def test_stacked_decoders_of_the_wrong_height_are_refused(tmp_path):
    write_cross_layer(tmp_path, "per-layer")
    path = tmp_path / "h.2.mlp" / "sae.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"W_dec": tensors["W_dec"][:N_FEATURES].clone()}, path)
    with pytest.raises(TranscoderError, match=r"W_dec in .*h.2.mlp.* has shape \(9, 6\); expected \(27, 6\)"):
        load(tmp_path)


def test_a_tensor_nobody_knows_is_refused(tmp_path):
    write_per_layer(tmp_path, skip=False)
    path = tmp_path / "h.0.mlp" / "sae.safetensors"
    save_file(load_file(path) | {"gate": torch.zeros(1)}, path)
    with pytest.raises(TranscoderError, match=r"holds gate, which this reader does not know"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("k", "message"), [("abc", r"k in .*cfg.json is 'abc'; expected a whole number"), (100_000, "k is 100000 of 9")]
)
def test_a_k_that_cannot_be_is_refused(tmp_path, k, message):
    write_per_layer(tmp_path, skip=False)
    for layer in range(N_LAYERS):
        change(tmp_path, layer, k=k)
    with pytest.raises(TranscoderError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "setting"),
    [("W_skip", "skip_connection"), ("post_enc_scales.0", "post_encoder_scale"), ("in_norm", "normalize_io")],
)
def test_a_tensor_that_the_settings_do_not_speak_of_is_refused(tmp_path, name, setting):
    write_cross_layer(tmp_path, "untied", skip=False, norms=False, scales=False)
    path = tmp_path / "h.1.mlp" / "sae.safetensors"
    save_file(load_file(path) | {name: torch.ones(1)}, path)
    with pytest.raises(TranscoderError, match=rf"holds {name}, but cfg.json beside it does not say {setting}: true"):
        load(tmp_path)


def test_decoders_beyond_the_targets_are_refused(tmp_path):
    write_cross_layer(tmp_path, "untied")
    change(tmp_path, 0, n_targets=2)
    with pytest.raises(TranscoderError, match=r"holds .*s\.2, but cfg.json beside it says n_targets: 2"):
        load(tmp_path)


def test_a_last_layer_that_was_not_copied_is_missed(tmp_path):
    write_cross_layer(tmp_path, "untied")
    (tmp_path / "h.2.mlp" / "cfg.json").unlink()
    with pytest.raises(TranscoderError, match=r"h.0.mlp writes to 3 layers, more than there are above it"):
        load(tmp_path)


def test_a_norm_of_zero_is_refused(tmp_path):
    layers = write_cross_layer(tmp_path, "concat")
    save_file(layers[1] | {"in_norm": torch.zeros(1)}, tmp_path / "h.1.mlp" / "sae.safetensors")
    with pytest.raises(TranscoderError, match=r"in_norm in .*h.1.mlp.* is 0, NaN or infinite somewhere"):
        load(tmp_path)


def test_offsets_and_skip_connections_that_are_nan_are_refused(tmp_path):
    layers = write_cross_layer(tmp_path, "concat")
    path = tmp_path / "h.1.mlp" / "sae.safetensors"
    save_file(layers[1] | {"post_encs.1": torch.full((N_FEATURES,), float("nan"))}, path)
    with pytest.raises(TranscoderError, match=r"post_enc in .*h.1.mlp.* holds NaN; copy or download"):
        load(tmp_path)
    save_file(layers[1] | {"W_skip": torch.full((D_MODEL, D_MODEL), float("inf"))}, path)
    with pytest.raises(TranscoderError, match=r"layer 1 of .* has a skip connection \(W_skip\) with NaN or infinite"):
        load(tmp_path)
