"""Every term of the training objective, and all that steers it, on numbers small enough to work out by hand."""

import math
from dataclasses import replace

import pytest
import torch

from tests.tracer.conftest import tiny_llama, tiny_tokenizer
from tests.transcoders.test_train import texts
from transcoders import TrainConfig, TranscoderConfig, train
from transcoders.activation import jump_relu_trained
from transcoders.adam import Adam
from transcoders.corpus import tokens_corpus
from transcoders.kernels import BREAK_EVEN
from transcoders.metrics import Gathered
from transcoders.model import CrossLayerTranscoder
from transcoders.objective import (
    Outcome,
    Sparsity,
    Typical,
    Weights,
    batch_threshold,
    clip,
    learning_rate_at,
    objective,
    sparsity_at,
)
from transcoders.parallel import Place
from transcoders.progress import latest, read_features, read_tensors
from transcoders.scales import Scales, measure_scales
from transcoders.shuffle import Batch
from transcoders.streams import forward_of, scaled
from transcoders.train import Reporting

CONFIG = TrainConfig(n_features=2, k=1, tokens=1000, batch_tokens=10, buffer_tokens=20, error_floor=0.5)
NONE_DEAD = [torch.zeros(0, dtype=torch.int64)]


def two_features(W_enc=((1.0, 0.0), (0.0, 1.0)), W_dec=((3.0, 4.0), (0.0, 0.0))):
    """One layer of width 2."""
    transcoder = CrossLayerTranscoder(TranscoderConfig(1, 2, 2, "relu"))
    with torch.no_grad():
        transcoder.W_enc[0] = torch.tensor(W_enc)
        transcoder.W_dec[0][:, 0] = torch.tensor(W_dec)
    return transcoder


def batch_of(inputs, outputs):
    return Batch(torch.tensor([inputs]), torch.tensor([outputs]), torch.ones(len(inputs), dtype=torch.int64))


def outcome_of(transcoder, batch, config=CONFIG, *, dead=NONE_DEAD, penalty=0.0, balanced=False, threshold=0.0):
    weights = Weights(transcoder, torch.full((1, 2), threshold, requires_grad=config.activation == "jumprelu"))
    typical = Typical(torch.tensor([10.0]), balanced)
    return weights, objective(weights, batch, config, Place(), Sparsity(1.0, penalty), typical, dead)


@pytest.mark.parametrize(("balanced", "expected"), [(False, (1 + 4) / 10 / 2), (True, (1 / (1 + 5) + 4 / (4 + 5)) / 2)])
def test_an_error_is_a_share_of_the_mean_or_of_the_tokens_own_size(balanced, expected):
    """Nothing fires; the floor is half of the mean squared norm 10."""
    batch = batch_of([[-1.0, 0.0], [-1.0, 0.0]], [[1.0, 0.0], [0.0, 2.0]])
    _, outcome = outcome_of(two_features(), batch, replace(CONFIG, activation="relu"), balanced=balanced)
    assert float(outcome.loss.detach()) == pytest.approx(expected)
    assert outcome.error.tolist() == outcome.size.tolist() == [[1.0, 4.0]]


def test_what_fires_is_decoded_and_counted():
    batch = batch_of([[0.5, -1.0], [-1.0, 2.0]], [[1.5, 2.0], [1.0, 0.0]])
    _, outcome = outcome_of(two_features(), batch, replace(CONFIG, activation="relu"))
    assert outcome.error.tolist() == [[0.0, 1.0]]
    assert outcome.firing.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_the_penalty_is_the_tanh_of_what_a_feature_writes_and_shortens_its_decoder(activation):
    """The feature's activation is 0.1 and its decoder's length 5, and the reconstruction is exact."""
    config = replace(CONFIG, activation=activation, tanh_scale=2.0, k=2)
    transcoder = two_features()
    _, outcome = outcome_of(transcoder, batch_of([[0.1, -9.0]], [[0.3, 0.4]]), config, penalty=0.6)
    assert float(outcome.loss.detach()) == pytest.approx(0.6 * math.tanh(2 * 0.1 * 5) / 2)
    outcome.loss.backward()
    slope = 0.3 * (1 - math.tanh(1.0) ** 2)  # by the argument of tanh, at 1
    assert transcoder.W_dec[0].grad[0, 0].tolist() == pytest.approx([slope * 0.2 * 0.6, slope * 0.2 * 0.8])
    assert transcoder.b_enc.grad[0].tolist() == pytest.approx([slope * 2 * 5, 0.0])


@pytest.mark.parametrize("bias", [-1.5, 0.5])
@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_loss_and_gradients_are_those_of_computing_all_activations(activation, bias):
    """With a bias of −1.5 few features fire, with 0.5 most do: work is done for pairs, or by dense products."""
    config = replace(CONFIG, activation=activation, n_features=30, tanh_scale=2.0, bandwidth=0.8, k=2)
    generator = torch.Generator().manual_seed(0)
    transcoder = CrossLayerTranscoder(TranscoderConfig(2, 6, 30, "relu"))
    with torch.no_grad():
        for weight in transcoder.parameters():
            weight.copy_(0.4 * torch.randn(weight.shape, generator=generator))
        transcoder.b_enc += bias
    threshold = torch.rand(2, 30, generator=generator, requires_grad=activation == "jumprelu")
    inputs, outputs = torch.randn(2, 2, 25, 6, generator=generator)
    weights, typical = Weights(transcoder, threshold), Typical(torch.tensor([4.0, 9.0]), balanced=True)
    batch = Batch(inputs, outputs, torch.ones(25, dtype=torch.int64))
    outcome = objective(weights, batch, config, Place(), Sparsity(2.0, 0.7), typical, NONE_DEAD)

    z = torch.baddbmm(transcoder.b_enc[:, None], inputs, transcoder.W_enc.transpose(1, 2))
    activations = z.relu()
    if activation == "jumprelu":
        activations = torch.stack([jump_relu_trained(z[i], threshold[i], 0.8) for i in range(2)])
    first, second = (decoder.flatten(1) for decoder in transcoder.W_dec)
    written = (activations[0] @ first).split(6, dim=1)
    reconstruction = torch.stack([written[0], written[1] + activations[1] @ second]) + transcoder.b_dec[:, None]
    scale = outputs.square().sum(-1) + 0.5 * typical.square[:, None]
    loss = ((outputs - reconstruction).square().sum(-1) / scale).mean()
    lengths = torch.stack([first.norm(dim=1), second.norm(dim=1)])
    loss = loss + 0.7 * torch.tanh(2.0 * activations * lengths[:, None]).sum((0, 2)).mean() / (2 * 2)

    assert (float((activations > 0).float().mean()) > BREAK_EVEN["cpu"]) is (bias > 0)
    assert outcome.l0.tolist() == (activations > 0).sum(2).tolist()
    torch.testing.assert_close(outcome.loss, loss, rtol=1e-5, atol=0)
    of = [*transcoder.parameters(), *([threshold] if activation == "jumprelu" else [])]
    for ours, dense in zip(*(torch.autograd.grad(one, of) for one in (outcome.loss, loss)), strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-6)


def test_a_threshold_learns_from_what_is_near_it():
    threshold = torch.tensor([0.5, 0.5], requires_grad=True)
    pre_activation = torch.tensor([[0.6, 0.8], [0.45, 9.0]], requires_grad=True)
    activations = jump_relu_trained(pre_activation, threshold, 0.4)
    assert activations.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0.0, 9.0]]
    activations.backward(torch.tensor([[1.0, 10.0], [2.0, 100.0]]))
    assert threshold.grad is not None and pre_activation.grad is not None
    assert threshold.grad.tolist() == pytest.approx([-0.5 / 0.4 * (1 + 2), 0.0])
    assert pre_activation.grad.tolist() == [[1.0, 10.0], [0.0, 100.0]]


def test_thresholds_get_the_gradient_of_the_loss():
    """Silence costs an error of 0.3² + 0.4² per firing at 0.1; the window of width 1 holds it."""
    weights, outcome = outcome_of(
        two_features(), batch_of([[0.1, -9.0]], [[0.0, 0.0]]), replace(CONFIG, activation="jumprelu"), threshold=0.05
    )
    outcome.loss.backward()
    by_activation = 2 * (0.3 * 3 + 0.4 * 4) / 10
    assert weights.threshold.grad is not None
    assert weights.threshold.grad[0].tolist() == pytest.approx([-0.05 * by_activation, 0.0])


def test_thresholds_stay_above_zero_so_that_nothing_fires_negatively():
    threshold = torch.tensor([[0.03, 0.03]], requires_grad=True)
    adam = Adam({"threshold": threshold}, seed=0)
    for _ in range(3):
        threshold.grad = torch.tensor([[1.0, -1.0]])  # the first one would go down by the learning rate each time
        adam.step(0.02)
    assert threshold[0].tolist() == pytest.approx([1e-3, 0.09])


def test_dead_features_explain_what_the_living_leave_on_some_tokens():
    """Of three tokens the first and the third count. Two dead features write less by √2; their own errors are added."""
    transcoder = two_features(W_dec=((1.0, 0.0), (0.0, 1.0)))
    config = replace(CONFIG, activation="batchtopk", dead_tokens=2, dead_weight=0.5)
    batch = batch_of([[0.0, 1.0], [9.0, 9.0], [2.0, 0.0]], [[0.0, 3.0], [9.0, 9.0], [4.0, 0.0]])
    _, living = outcome_of(transcoder, batch, config)
    _, both = outcome_of(transcoder, batch, config, dead=[torch.tensor([0, 1])])
    left = living.error[0].tolist()  # 9 wants all: the threshold is 2, so only the second token has what fires
    assert left == [9.0, 0.0, 16.0]
    root = math.sqrt(2)
    errand = ((3 - 1 / root) ** 2 + (4 - 2 / root) ** 2) / 10 / 2
    assert float((both.loss - living.loss).detach()) == pytest.approx(0.5 * errand)
    both.loss.backward()
    pulled = [-0.5 / 10 * (4 - 2 / root) * 2 / root, -0.5 / 10 * (3 - 1 / root) * 1 / root]
    assert transcoder.W_dec[0].grad[:, 0].diagonal().tolist() == pytest.approx(pulled)  # the second token is exact


def test_the_threshold_of_a_step_is_what_k_features_exceed():
    transcoder = two_features(W_dec=((3.0, 4.0), (0.0, 2.0)))
    inputs = torch.tensor([[[1.0, 1.0], [0.5, -1.0], [-1.0, 3.0]]])  # contributions 5 and 2, 2.5 and 0, 0 and 6
    norms = torch.tensor([[5.0, 2.0]])
    found = [float(batch_threshold(transcoder, inputs, norms, k, Place())) for k in (1 / 3, 1.0, 4 / 3, 2.0)]
    assert found == [6.0, 2.5, 2.0, 0.0]


def test_the_threshold_is_found_on_256_tokens_from_all_over_the_step():
    """Each fourth of 1,024 tokens: 1, 5, …, 1021. One feature in 256 tokens is to fire, that of the last one."""
    transcoder = CrossLayerTranscoder(TranscoderConfig(4, 1, 8192, "relu"))
    with torch.no_grad():
        transcoder.W_enc[:, 0] = 1.0  # one feature of each layer reads the token
    norms = torch.ones(4, 8192)
    inputs = torch.zeros(4, 1024, 1)
    inputs[:, :, 0] = torch.arange(1, 1025)
    assert float(batch_threshold(transcoder, inputs, norms, 1 / 256, Place())) == 1021
    other_way_round = inputs.unflatten(1, (2, 512)).flip(1).flatten(1, 2)
    assert float(batch_threshold(transcoder, other_way_round, norms, 1 / 256, Place())) == 1021


def test_gradients_are_scaled_down_to_the_largest_norm_together():
    weights = {name: torch.zeros(1, requires_grad=True) for name in ("W_enc", "b_dec", "W_skip")}
    weights["W_enc"].grad, weights["b_dec"].grad = torch.tensor([3.0]), torch.tensor([4.0])
    clip(Place(), weights, 10.0)
    assert [weights[name].grad.tolist() for name in ("W_enc", "b_dec")] == [[3.0], [4.0]]
    clip(Place(), weights, 1.0)
    assert [weights[name].grad.item() for name in ("W_enc", "b_dec")] == pytest.approx([0.6, 0.8])


def test_k_comes_down_at_first_and_the_penalty_grows_to_the_end():
    config = replace(CONFIG, n_features=20, k=4, k_start=3.0, k_anneal=0.2, sparsity=0.5)  # 100 steps
    assert [sparsity_at(config, step).k for step in (0, 5, 10, 20, 21, 100)] == [12.0, 10.0, 8.0, 4.0, 4.0, 4.0]
    assert [sparsity_at(config, step).penalty for step in (0, 50, 100)] == [0.0, 0.25, 0.5]
    assert sparsity_at(replace(config, k_start=9.0), 0).k == 20.0


def test_the_learning_rate_warms_up_and_falls_to_nothing():
    config = replace(CONFIG, learning_rate=0.2, warm_up=10, decay=0.25)  # 100 steps
    found = [learning_rate_at(config, step) for step in (1, 5, 10, 50, 76, 88, 100)]
    assert found == pytest.approx([0.02, 0.1, 0.2, 0.2, 0.2, 0.104, 0.008])


def test_metrics_are_parted_by_size_and_position():
    gathered = Gathered(torch.ones(1))
    size = torch.tensor([[0.04, 0.04, 1.0, 2.92]])  # of their mean, 1, the roots are 0.2, 0.2, 1 and 1.7
    outcome = Outcome(
        torch.tensor(0.5), size * torch.tensor([0.5, 1.0, 0.25, 2.0]), size, torch.tensor([[0.5, 0.25]]),
        torch.tensor([[0.0, 1.0, 2.0, 0.0]]), torch.tensor(3.0),
    )  # fmt: skip
    gathered.add(outcome, torch.tensor([3, 4, 63, 64]))
    gathered.add(outcome, torch.tensor([1, 15, 16, 99]))
    row = gathered.read(Place(), torch.tensor([0.5]))
    assert row["relative_error_by_norm"] == [pytest.approx(0.75), None, pytest.approx(1.125), None]
    assert row["relative_error_by_position"] == pytest.approx([0.5, 1.0, 0.25, 2.0])
    assert row["nmse_by_norm"] == [pytest.approx(0.75), None, pytest.approx((0.25 + 5.84) / 3.92), None]
    assert row["nmse_by_position"] == pytest.approx([0.5, 1.0, 0.25, 2.0])
    assert row["l0_by_norm"] == [0.5, None, 1.0, None]
    assert row["l0_by_position"] == [0.0, 1.0, 2.0, 0.0]
    assert row["nmse"] == pytest.approx((0.02 + 0.04 + 0.25 + 5.84) / 4)
    assert row["relative_error"] == pytest.approx(3.75 / 4)
    assert (row["loss"], row["threshold"], row["l0_by_layer"], row["dead"]) == (0.5, 3.0, [0.75], 0.5)
    assert gathered.steps == 0


def test_tokens_far_larger_than_the_mean_are_left_out_and_the_others_scaled():
    inputs = torch.tensor([[[1.0, 0.0], [0.0, 5.0], [2.0, 0.0]], [[1.0, 0.0], [1.0, 0.0], [0.0, 30.1]]])
    one = torch.ones(2)
    scales = Scales(2 * one, 3 * one, torch.tensor([1.0, 10.0]), one, False)
    made = scaled(
        lambda tokens: (inputs, inputs, torch.tensor([1, 2, 3])), scales, replace(CONFIG, largest_norm=3.0),
        torch.device("cpu"), torch.float32,
    )  # fmt: skip
    read, written, position = made(torch.zeros(1, 3, dtype=torch.int64))
    assert read.tolist() == [[[2.0, 0.0]], [[2.0, 0.0]]]  # the second is too large for layer 0, the third for layer 1
    assert written.tolist() == [[[3.0, 0.0]], [[3.0, 0.0]]]
    assert position.tolist() == [1]


@pytest.mark.parametrize(("largest", "has_sinks"), [(9.0, False), (11.0, True)])
def test_an_mlp_has_sinks_where_a_hundredth_of_the_tokens_holds_half_of_what_it_writes(largest, has_sinks):
    """99 tokens of squared norm 1 and one of 81 or 121."""
    outputs = torch.ones(2, 100, 1)
    outputs[1, 7] = largest
    scales = measure_scales(torch.ones(2, 100, 1), outputs)
    assert scales.has_sinks is has_sinks


@pytest.mark.parametrize("first_token", [None, 1])
def test_first_positions_and_first_tokens_are_not_learned_from(first_token):
    tokens = torch.tensor([[1, 7, 8, 1, 9], [5, 6, 7, 8, 9]])
    inputs, outputs, position = forward_of(tiny_llama(0), CONFIG, first_token)(tokens)
    expected = [1, 2, 3, 4, 1, 2, 3, 4] if first_token is None else [1, 2, 4, 1, 2, 3, 4]
    assert position.tolist() == expected
    assert inputs.shape[1] == outputs.shape[1] == len(expected)


def test_firing_and_the_saved_threshold_are_running_means(tmp_path):
    """A feature's rate moves by a quarter of the difference each step, the threshold by a tenth."""
    rows = []
    config = TrainConfig(
        n_features=48, k=4, tokens=2 * 256, batch_tokens=256, buffer_tokens=512, context=16, density_steps=4,
        dead_below=1e-3,
    )  # fmt: skip
    train(tiny_llama(0).requires_grad_(False), tiny_tokenizer(), tokens_corpus(texts(), "texts"), config, tmp_path,
          reporting=Reporting(report_every=1, on_report=rows.append))  # fmt: skip
    first, second = rows
    kept = read_tensors(latest(tmp_path) / "common.safetensors")["threshold"]
    assert first["threshold"] != second["threshold"]
    assert float(kept) == pytest.approx(0.9 * first["threshold"] + 0.1 * second["threshold"], rel=1e-5)
    density = read_features(latest(tmp_path), range(48))["density"]
    for layer in range(3):
        start = 48 * 10 * 1e-3  # far from dead
        after = 0.75 * (0.75 * start + 0.25 * first["l0_by_layer"][layer]) + 0.25 * second["l0_by_layer"][layer]
        assert float(density[layer].sum()) == pytest.approx(after, rel=1e-4)


@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_thresholds_stay_float32_beside_bfloat16_weights(tmp_path, moments):
    """They move by a thousandth of their size a step, which bfloat16 would round away."""
    config = TrainConfig(
        n_features=48, k=4, tokens=10 * 256, batch_tokens=256, buffer_tokens=512, context=16, activation="jumprelu",
        weights="bfloat16", moments=moments, threshold_start=0.5, learning_rate=1e-3, warm_up=1,
    )  # fmt: skip
    saved = train(tiny_llama(0).requires_grad_(False), tiny_tokenizer(), tokens_corpus(texts(), "texts"), config,
                  tmp_path)  # fmt: skip
    kept = read_features(latest(tmp_path), range(48))
    assert kept["weight:W_enc"].dtype == kept["weight:W_dec.0"].dtype == torch.bfloat16
    threshold = kept["weight:threshold"]
    assert threshold.dtype == torch.float32
    moved = threshold != 0.5
    assert float(moved.float().mean()) > 0.5
    assert float((threshold[moved] - 0.5).abs().max()) < 0.02
    assert float((threshold[moved] != threshold[moved].bfloat16()).float().mean()) > 0.9
    assert torch.equal(saved.threshold, threshold)
