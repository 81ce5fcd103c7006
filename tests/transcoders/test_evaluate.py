"""Every number of an evaluation against a direct computation, and against what must hold of any transcoder."""

import itertools

import pytest
import torch
from torch.nn.functional import kl_div

from tests.tracer.conftest import tiny_llama, tiny_tokenizer, tiny_transcoder
from tests.tracer.families import tiny_model
from transcoders import TranscoderConfig, TranscoderError, evaluate
from transcoders.activations import mlp_activations, replaced_mlps
from transcoders.comparison import by_norm, by_position, compare, one_by_one
from transcoders.corpus import tokens_corpus
from transcoders.families import dissect
from transcoders.loss import relative_error
from transcoders.model import CrossLayerTranscoder
from transcoders.passages import Passages, passages_of_corpus, passages_of_prompts
from transcoders.reconstruction import (
    answer_norms,
    decoder_norms,
    densities,
    density_histogram,
    errors,
    errors_by_norm,
    errors_by_position,
    reconstruct,
)

ALL = (0, 1, 2)
PROMPTS = [[1, 5, 9, 12], [1, 7], [1, 30, 2, 2, 8, 41, 3], [1, 4, 6]]


def batches(seed):
    generator = torch.Generator().manual_seed(seed)
    while True:
        tokens = torch.randint(2, 42, (32, 8), generator=generator)
        keep = torch.ones_like(tokens, dtype=torch.bool)
        keep[:, 0] = False
        yield tokens, keep


def passages(seed=1):
    tokens, keep = next(batches(seed))
    return Passages(tokens, keep, keep)


def the_mlps_themselves(n_layers):
    """A ReLU MLP is a transcoder whose features write to their own layer."""
    model = tiny_llama(3, n_layers=n_layers, biases=False).requires_grad_(False)
    transcoder = CrossLayerTranscoder(TranscoderConfig(n_layers, 16, 24, "relu")).requires_grad_(False)
    for layer, block in enumerate(model.model.layers):
        up, down = block.mlp.up_proj.weight, block.mlp.down_proj.weight
        block.mlp.forward = lambda x, up=up, down=down: (x @ up.T).relu() @ down.T
        transcoder.W_enc[layer] = up
        transcoder.W_dec[layer][:, 0] = down.T
    return model, transcoder


def with_skip():
    """A per-layer transcoder with skip connections that reads and writes around the norms of a Gemma."""
    config = TranscoderConfig(
        3, 16, 20, "topk", k=4, reads="hook_resid_mid", writes="mlp.hook_out", cross_layer=False, skip=True
    )
    transcoder = CrossLayerTranscoder(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for parameter in transcoder.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return transcoder


def test_relative_error_weighs_every_token_alike():
    output = torch.tensor([[[100.0, 0.0], [1.0, 0.0]]])
    assert relative_error(0.9 * output, output)[0].tolist() == pytest.approx([0.01, 0.01])
    assert relative_error(torch.zeros_like(output), output, floor=1.0)[0, 1] == pytest.approx(1 / (1 + 10001 / 2))


def test_a_transcoder_that_equals_the_mlps_replaces_them():
    model, transcoder = the_mlps_themselves(2)
    tokens, keep = next(batches(1))
    with replaced_mlps(model, transcoder):
        replaced = model(tokens).logits
    torch.testing.assert_close(replaced, model(tokens).logits, atol=1e-5, rtol=1e-5)
    report = evaluate(model, transcoder, tokens, keep, torch.full((32,), 7))
    assert report.top1_match == 1
    assert report.kl == pytest.approx(0, abs=1e-6)
    assert report.relative_error == pytest.approx(0, abs=1e-6)


def test_a_transcoder_that_equals_the_mlps_has_no_error_and_changes_no_answer_in_any_subset_of_layers():
    model, transcoder = the_mlps_themselves(3)
    seen = reconstruct(model, transcoder, passages())
    assert errors(seen).nmse.tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    subsets = [subset for n in range(4) for subset in itertools.combinations(ALL, n)]
    _, compared = compare(model, transcoder, passages(), subsets)
    assert [one.layers for one in compared] == subsets
    assert [one.top1_match for one in compared] == [1.0] * 8
    assert [one.mean_kl for one in compared] == pytest.approx([0.0] * 8, abs=1e-6)


def test_replacing_no_layer_changes_nothing_and_all_layers_are_the_default():
    model, transcoder = tiny_llama(0), tiny_transcoder(1)
    tokens, _ = next(batches(1))
    with torch.no_grad():
        own = model(tokens).logits
        with replaced_mlps(model, transcoder, layers=()):
            assert torch.equal(model(tokens).logits, own)
        with replaced_mlps(model, transcoder, layers=ALL):
            replaced = model(tokens).logits
        with replaced_mlps(model, transcoder):
            assert torch.equal(model(tokens).logits, replaced)
    assert not torch.allclose(replaced, own, atol=1e-3)
    [nothing] = compare(model, transcoder, passages(), [()])[1]
    assert (nothing.top1_match, nothing.mean_kl) == (1.0, 0.0)


@pytest.mark.parametrize("layers", [(1,), (0, 2), (2,)])
def test_some_layers_write_what_features_of_all_earlier_layers_decode_and_the_others_what_they_wrote(layers):
    model, transcoder = tiny_llama(0), tiny_transcoder(1)
    tokens, keep = next(batches(4))
    with replaced_mlps(model, transcoder, layers=layers):
        inputs, outputs = mlp_activations(model, tokens, keep, "mlp.hook_in")
    with torch.no_grad():
        decoded = transcoder(inputs)
        for layer, part in enumerate(dissect(model).layers):
            expected = decoded[layer] if layer in layers else part.mlp(inputs[layer])
            torch.testing.assert_close(outputs[layer], expected, atol=1e-5, rtol=1e-5)


def test_hooks_are_gone_after_the_block_also_when_it_fails():
    model, transcoder = tiny_llama(0), tiny_transcoder(1)
    tokens, _ = next(batches(1))
    own = model(tokens).logits
    with pytest.raises(RuntimeError, match="enough"), replaced_mlps(model, transcoder, layers=(0,)):
        raise RuntimeError("enough")
    assert torch.equal(model(tokens).logits, own)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_errors_of_every_layer_equal_a_direct_computation(family):
    model = tiny_model(family)
    transcoder = tiny_transcoder(1) if family == "llama" else with_skip()
    config = transcoder.config
    seen = reconstruct(model, transcoder, passages())
    tokens, keep = next(batches(1))
    inputs, outputs = mlp_activations(model, tokens, keep, config.reads, config.writes)
    with torch.no_grad():
        activations = transcoder.encode(inputs)
        squared = (transcoder(inputs) - outputs).pow(2).sum(-1)
    size = outputs.pow(2).sum(-1)
    means = errors(seen)
    torch.testing.assert_close(means.nmse, (squared.sum(1) / size.sum(1)).double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(means.relative_error, (squared / size).mean(1).double(), rtol=1e-4, atol=0)
    assert means.l0.tolist() == pytest.approx((activations != 0).sum(-1).double().mean(1).tolist())
    assert means.tokens.tolist() == [224] * 3
    torch.testing.assert_close(seen.fired, (activations != 0).sum(1))


def test_densities_of_a_layer_sum_to_its_l0_and_every_feature_is_in_one_bin():
    seen = reconstruct(tiny_llama(0), tiny_transcoder(1), passages())
    assert densities(seen).sum(1).tolist() == pytest.approx(errors(seen).l0.tolist())
    histogram = density_histogram(densities(seen))
    assert histogram.sum(1).tolist() == [20, 20, 20]
    assert histogram[:, 0].tolist() == (seen.fired == 0).sum(1).tolist()


def test_the_density_histogram_parts_features_by_half_powers_of_ten():
    density = torch.tensor([[0.0, 1e-9, 0.009, 0.011, 0.05, 0.5, 1.0]])
    assert density_histogram(density)[0].tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 2]


def test_buckets_part_all_tokens_and_their_errors_add_up():
    seen = reconstruct(tiny_llama(0), tiny_transcoder(1), passages())
    whole = errors(seen)
    for parts in (errors_by_norm(seen), errors_by_position(seen)):
        assert sum(part.tokens for part in parts).tolist() == [224] * 3
        for name in ("relative_error", "l0"):
            sums = sum(torch.nan_to_num(getattr(part, name)) * part.tokens for part in parts)
            assert (sums / 224).tolist() == pytest.approx(getattr(whole, name).tolist())
    early, later, *none = errors_by_position(seen)
    assert [part.tokens.tolist() for part in none] == [[0, 0, 0]] * 2
    at_three = seen.position < 4
    expected = (seen.error[:, at_three] / seen.size[:, at_three]).double().mean(1)
    torch.testing.assert_close(early.relative_error, expected, rtol=1e-5, atol=0)
    assert (int(early.tokens[0]), int(later.tokens[0])) == (32 * 3, 32 * 4)


def test_top1_match_and_kl_equal_a_direct_computation():
    model, transcoder = tiny_llama(0), tiny_transcoder(1)
    asked = passages_of_prompts(PROMPTS)
    own, compared = compare(model, transcoder, asked, [(1,), ALL])
    for row, ids in enumerate(PROMPTS):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            assert int(own.token[row]) == int(logits.argmax())
            assert float(own.probability[row]) == pytest.approx(float(logits.exp().max()), rel=1e-5)
            for one in compared:
                with replaced_mlps(model, transcoder, layers=one.layers):
                    other = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
                assert int(one.token[row]) == int(other.argmax())
                expected = float(kl_div(other, logits, reduction="sum", log_target=True))
                assert float(one.kl[row]) == pytest.approx(expected, abs=1e-5)
    assert own.position.tolist() == [3, 1, 6, 2]
    parts = by_position(own, compared[1])
    assert [len(part.kl) for part in parts] == [3, 1, 0, 0]


def test_answers_are_parted_by_the_size_of_what_mlps_write_there():
    model, transcoder = tiny_llama(0), tiny_transcoder(1)
    asked = passages_of_prompts(PROMPTS)
    norms = answer_norms(reconstruct(model, transcoder, asked))
    _, written = mlp_activations(model, asked.tokens, asked.keep, "mlp.hook_in", "hook_mlp_out")
    usual = written.square().sum(-1).mean(1)
    _, at_answers = mlp_activations(model, asked.tokens, asked.readout, "mlp.hook_in", "hook_mlp_out")
    expected = (at_answers.square().sum(-1) / usual[:, None]).mean(0).sqrt()
    torch.testing.assert_close(norms.float(), expected, rtol=1e-5, atol=0)
    _, [compared] = compare(model, transcoder, asked, [ALL])
    parts = by_norm(torch.tensor([0.4, 2.0, 0.5, 1.9]), compared)
    kept = [compared.kl[list(which)].tolist() for which in ([0], [2], [3], [1])]
    assert [part.kl.tolist() for part in parts] == kept


def test_how_many_sequences_run_at_once_changes_nothing(monkeypatch):
    model, transcoder = tiny_llama(0), tiny_transcoder(1)
    mixed = passages_of_prompts(PROMPTS)
    together, (_, [once]) = reconstruct(model, transcoder, mixed), compare(model, transcoder, mixed, [ALL])
    for module in ("reconstruction", "comparison"):
        monkeypatch.setattr(f"transcoders.{module}.NUMBERS_AT_ONCE", 1)
    told = []
    single = reconstruct(model, transcoder, mixed, on_progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    torch.testing.assert_close(single.error, together.error)
    assert torch.equal(single.fired, together.fired)
    assert torch.equal(single.readout, together.readout)
    torch.testing.assert_close(compare(model, transcoder, mixed, [ALL])[1][0].kl, once.kl, atol=1e-5, rtol=1e-4)


def test_layers_are_replaced_alone_and_from_the_first_on():
    assert one_by_one(3) == ([(0,), (1,), (2,)], [(0,), (0, 1), (0, 1, 2)])


def test_decoder_norms_are_means_over_features_by_output_layer():
    transcoder = tiny_transcoder(1)
    norms = decoder_norms(transcoder)
    for source in range(3):
        for target in range(3):
            rows = transcoder.W_dec[source][:, target - source] if target >= source else torch.zeros(1)
            assert float(norms[source, target]) == pytest.approx(float(rows.norm(dim=-1).mean()))
    per_layer = decoder_norms(with_skip())
    assert torch.equal(per_layer, per_layer.diag().diag())


def test_prompts_are_read_out_at_their_last_token():
    made = passages_of_prompts([[1, 5, 9], [1, 7]])
    assert made.tokens.tolist() == [[1, 5, 9], [1, 7, 0]]
    assert made.keep.tolist() == [[False, True, True], [False, True, False]]
    assert made.readout.tolist() == [[False, False, True], [False, True, False]]


@pytest.mark.parametrize("ids", [[], [1]])
def test_a_prompt_of_one_token_is_refused(ids):
    with pytest.raises(TranscoderError, match=f"a prompt has {len(ids)} tokens; expected two or more"):
        passages_of_prompts([[1, 5], ids])


def test_text_is_cut_into_sequences_that_begin_with_the_first_token_and_none_is_read_twice():
    corpus = tokens_corpus(["w0 w1 w2", "w3 w4 w5 w6"], "seven words")
    made = passages_of_corpus(corpus, tiny_tokenizer(), context=4, n_tokens=100)
    assert made.tokens.tolist() == [[1, 2, 3, 4], [1, 5, 6, 7], [1, 8, 0, 0]]
    assert made.keep.tolist() == [[False, True, True, True]] * 2 + [[False, True, False, False]]
    assert torch.equal(made.readout, made.keep)
    short = passages_of_corpus(corpus, tiny_tokenizer(), context=4, n_tokens=3)
    assert short.tokens.tolist() == [[1, 2, 3, 4]]
    without = passages_of_corpus(corpus, tiny_tokenizer(bos=None), context=4, n_tokens=100)
    assert without.tokens.shape == (2, 4)
    assert without.keep.sum() == 5


def test_text_of_one_token_is_refused():
    with pytest.raises(TranscoderError, match="one word has 1 tokens; expected two or more"):
        passages_of_corpus(tokens_corpus(["w0"], "one word"), tiny_tokenizer(bos=None), context=4, n_tokens=9)


def test_activations_are_what_the_mlps_read_and_wrote():
    model = tiny_llama(0)
    tokens, keep = next(batches(2))
    inputs, outputs = mlp_activations(model, tokens, keep, "mlp.hook_in")
    assert inputs.shape == (3, 32 * 7, 16)
    for layer, part in enumerate(dissect(model).layers):
        torch.testing.assert_close(part.mlp(inputs[layer]), outputs[layer])


def test_an_unknown_family_is_refused_with_the_known_ones():
    model = tiny_llama(0)
    model.config.model_type = "mystery"
    with pytest.raises(TranscoderError, match=r"'mystery' cannot be traced yet; known types: llama"):
        dissect(model)
