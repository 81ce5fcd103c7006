"""Training recovers a known transcoder, goes on where it was interrupted, and says in one line what is wrong."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from torch.nn.functional import normalize

from tests.tracer.conftest import tiny_llama, tiny_tokenizer
from tests.transcoders.planted import PlantedStream, planted_activations, planted_transcoder
from tests.waiting import ended, wait_until
from transcoders import TrainConfig, TranscoderConfig, TranscoderError, load, train
from transcoders.activations import mlp_activations
from transcoders.corpus import tokens_corpus
from transcoders.parallel import Place
from transcoders.progress import latest, read_tensors
from transcoders.scales import measure_scales
from transcoders.streams import open_streams, scaled
from transcoders.train import Reporting, Stopped, learn

HERE = Path(__file__).parent
SMALL = TrainConfig(
    n_features=48, k=4, tokens=60 * 256, batch_tokens=256, buffer_tokens=1024, context=16, density_steps=20,
    dead_below=1e-3,
)  # fmt: skip


def texts(n=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(0, 40, (n, 30), generator=generator)
    return [" ".join(f"w{i}" for i in row.tolist()) for row in draws]


FEWEST_BITS = {"weights": "bfloat16", "moments": "8bit"}


def trained(folder, config=SMALL, **reporting):
    model = tiny_llama(0).requires_grad_(False)
    corpus = tokens_corpus(texts(), "texts")
    return train(model, tiny_tokenizer(), corpus, config, folder, reporting=Reporting(**reporting))


def done_at(folder, step):
    """Seconds after which a step was reported."""
    rows = pq.read_table(folder / "metrics.parquet").to_pylist()
    return next(row["seconds"] for row in rows if row["step"] == step)


def assert_same(first, second):
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name


@pytest.mark.slow
def test_a_planted_transcoder_is_recovered(tmp_path):
    planted = planted_transcoder(3, 48, 128)
    inputs, outputs, _ = planted_activations(planted, 16_384, 3, torch.Generator().manual_seed(9))
    scales = measure_scales(inputs, outputs)
    config = TrainConfig(
        n_features=160, k=3, tokens=700 * 1024, batch_tokens=1024, buffer_tokens=4096, learning_rate=3e-3,
        density_steps=100, dead_below=1e-4, k_anneal=0.3, decay=0.5,
    )  # fmt: skip
    seen = inputs, outputs, torch.ones(16_384, dtype=torch.int64)
    stream = PlantedStream(planted, scales, 3, seed=100)
    learn({0: stream}, scales, seen, TranscoderConfig(3, 48, 160, "relu"), config, tmp_path, place=Place(),
          reporting=Reporting(report_every=100))  # fmt: skip
    found = load(tmp_path / "transcoder")
    for ours, theirs in zip(found.W_dec, planted.W_dec, strict=True):
        cosine = normalize(theirs.flatten(1), dim=-1) @ normalize(ours.flatten(1), dim=-1).T
        assert float((cosine.amax(1) >= 0.95).float().mean()) >= 0.95
    inputs, _, activations = planted_activations(planted, 4096, 3, torch.Generator().manual_seed(77))
    planted_l0 = float((activations > 0).sum((0, 2)).float().mean())
    assert float((found.encode(inputs) > 0).sum((0, 2)).float().mean()) == pytest.approx(planted_l0, rel=0.05)


@pytest.mark.parametrize("activation", ["batchtopk", "topk", "jumprelu", "relu"])
@pytest.mark.parametrize("cross_layer", [True, False])
def test_every_kind_learns_and_is_saved_to_read_activations_as_they_come(tmp_path, activation, cross_layer):
    config = replace(SMALL, activation=activation, cross_layer=cross_layer, skip=cross_layer, tokens=120 * 256,
                     sparsity=0.02, threshold_start=0.1)  # fmt: skip
    rows = []
    transcoder = trained(tmp_path, config, report_every=20, on_report=rows.append)
    assert rows[-1]["nmse"] < 0.6 * rows[0]["nmse"]
    saved = {"batchtopk": "jumprelu"}.get(activation, activation)
    assert transcoder.config.activation == saved
    tokens = torch.randint(2, 42, (64, 12), generator=torch.Generator().manual_seed(5))
    keep = torch.ones_like(tokens, dtype=torch.bool)
    keep[:, 0] = False
    inputs, outputs = mlp_activations(tiny_llama(0), tokens, keep, "mlp.hook_in")
    error = (transcoder(inputs) - outputs).square().sum((1, 2)) / outputs.square().sum((1, 2))
    assert float(error.mean()) == pytest.approx(rows[-1]["nmse"], rel=0.35)  # other tokens of the same kind
    l0 = float((transcoder.encode(inputs) > 0).sum((0, 2)).float().mean())
    assert l0 == pytest.approx(rows[-1]["l0"], rel=0.25)
    if activation == "batchtopk":
        assert rows[-1]["l0"] == pytest.approx(4 * 3, rel=0.1)


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, **FEWEST_BITS)])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, config):
    rows, resumed = [], []
    whole = trained(tmp_path / "whole", config, report_every=10, on_report=rows.append)
    done = []
    with pytest.raises(Stopped, match="stopped after step 33 of 60; start the same command again"):
        trained(tmp_path / "parts", config, report_every=10, checkpoint_every=7,
                on_step=lambda step, steps: done.append(step), should_stop=lambda: done[-1:] == [33])  # fmt: skip
    parts = trained(tmp_path / "parts", config, report_every=10, checkpoint_every=7, on_report=resumed.append)
    assert [row["step"] for row in resumed] == [40, 50, 60]
    times = ("seconds", "tokens_per_second")
    for again, before in zip(resumed, rows[3:], strict=True):  # the first of them began before the interruption
        assert {name: value for name, value in again.items() if name not in times} == {
            name: value for name, value in before.items() if name not in times
        }
    assert resumed[0]["tokens_per_second"] < 10 * 256 / (resumed[0]["seconds"] - done_at(tmp_path / "parts", 30)) * 1.01
    assert_same(whole, parts)
    kept = pq.read_table(tmp_path / "parts" / "metrics.parquet").to_pylist()
    assert [row["step"] for row in kept] == [10, 20, 30, 40, 50, 60]
    assert [path.name for path in (tmp_path / "parts" / "checkpoint").iterdir()] == ["step-60"]


@pytest.mark.slow
def test_a_cache_of_activations_changes_nothing(tmp_path):
    model, tokenizer, corpus = tiny_llama(0).requires_grad_(False), tiny_tokenizer(), tokens_corpus(texts(), "texts")
    without = train(model, tokenizer, corpus, SMALL, tmp_path / "a")
    filled = train(model, tokenizer, corpus, SMALL, tmp_path / "b", cache=tmp_path / "cache")
    passes = []
    model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    read = train(model, tokenizer, corpus, SMALL, tmp_path / "c", cache=tmp_path / "cache")
    assert passes == []
    assert_same(without, filled)
    assert_same(filled, read)
    for number, path in enumerate(sorted((tmp_path / "cache").rglob("*.safetensors"))):
        if number % 2:
            path.unlink()
    half = train(model, tokenizer, corpus, SMALL, tmp_path / "d", cache=tmp_path / "cache")
    assert passes
    assert_same(filled, half)


def test_a_cache_gives_a_model_none_of_another_ones_activations(tmp_path):
    tokenizer, corpus, config = tiny_tokenizer(), tokens_corpus(texts(), "texts"), replace(SMALL, tokens=4 * 256)
    models = [tiny_llama(0), tiny_llama(7), tiny_llama(0).bfloat16()]
    for number, model in enumerate(models):
        name = f"organisation-{number}/model"
        train(model, tokenizer, corpus, config, tmp_path / f"a{number}", cache=tmp_path / "cache", model_name=name)
    for number, model in enumerate(models):
        alone = train(model, tokenizer, corpus, config, tmp_path / f"b{number}")
        assert_same(load(tmp_path / f"a{number}" / "transcoder"), alone)


def test_a_cache_tells_sequences_of_different_lengths_apart(tmp_path):
    tokenizer, corpus = tiny_tokenizer(bos=None), tokens_corpus(texts(), "texts")
    for context in (16, 32):  # the same tokens in the same order
        config = replace(SMALL, tokens=4 * 256, context=context)
        cached = train(tiny_llama(0), tokenizer, corpus, config, tmp_path / f"a{context}", cache=tmp_path / "cache")
        assert_same(cached, train(tiny_llama(0), tokenizer, corpus, config, tmp_path / f"b{context}"))


@pytest.mark.parametrize(
    "half",
    [
        FEWEST_BITS,
        pytest.param({"weights": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param({"products": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param({"moments": "8bit"}, marks=pytest.mark.slow),
    ],
)
def test_half_precision_learns_as_single_does(tmp_path, half):
    rows, narrow = [], []
    trained(tmp_path / "single", replace(SMALL, tokens=200 * 256), on_report=rows.append)
    trained(tmp_path / "half", replace(SMALL, tokens=200 * 256, **half), on_report=narrow.append)
    assert narrow[-1]["nmse"] == pytest.approx(rows[-1]["nmse"], rel=0.1)


def test_resuming_with_other_settings_is_refused_and_the_differences_are_named(tmp_path):
    trained(tmp_path)
    with pytest.raises(TranscoderError, match="holds a run with other settings: k was 4 and is 5; learning_rate was"):
        trained(tmp_path, replace(SMALL, k=5, learning_rate=0.5))


def test_a_run_goes_on_only_with_the_same_weights_precision_and_text(tmp_path):
    def again(model=None, documents=None):
        corpus = tokens_corpus(documents or texts(), "texts")
        train(model or tiny_llama(0), tiny_tokenizer(), corpus, replace(SMALL, tokens=256), tmp_path)

    again()
    for changed, names in (
        ({"model": tiny_llama(7)}, "model_weights was '.*' and is"),
        ({"model": tiny_llama(0).bfloat16()}, "dtype was 'float32' and is 'bfloat16'"),
        ({"documents": texts(seed=1)}, "corpus_content was '.*' and is"),
    ):
        with pytest.raises(TranscoderError, match=f"holds a run with other settings: .*{names}"):
            again(**changed)
    settings = json.loads((tmp_path / "run.json").read_text())
    for name in ("model_weights", "dtype", "corpus_content"):
        del settings[name]  # as runs from before these were noted
    (tmp_path / "run.json").write_text(json.dumps(settings))
    again()


def test_a_longer_context_than_the_model_reads_is_refused(tmp_path):
    with pytest.raises(TranscoderError, match=r"context is 33, the model reads 32 tokens at most; give --context 32"):
        trained(tmp_path / "out", replace(SMALL, context=33))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"context": 1}, "context is 1; expected 2 tokens or more"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0; expected a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; expected a number above 0"),
        ({"clip": 0.0}, "clip is 0.0; expected a number above 0"),
        ({"sparsity": -0.1}, "sparsity is -0.1; expected 0 or more"),
        ({"density_steps": 0}, "density_steps is 0; expected 1 or more"),
    ],
)
def test_settings_that_cannot_train_are_refused(changed, message):
    with pytest.raises(TranscoderError, match=message):
        replace(SMALL, **changed)


@pytest.mark.parametrize("name", ["report_every", "checkpoint_every"])
def test_intervals_are_a_step_or_more(name):
    with pytest.raises(TranscoderError, match=f"--{name.replace('_', '-')} is 0; expected 1 step or more"):
        Reporting(**{name: 0})


@pytest.mark.parametrize("asked_at", [1, 4, 5])
def test_a_run_that_is_asked_to_stop_before_its_first_step_ends_at_once(tmp_path, asked_at):
    asked = []

    def should_stop():
        asked.append(1)
        return len(asked) == asked_at  # up to 3: while activations are sampled; from 5: while features are looked for

    with pytest.raises(Stopped, match="stopped before the first step; start the same command again"):
        trained(tmp_path, on_step=lambda step, steps: pytest.fail("took a step"), should_stop=should_stop)
    assert latest(tmp_path) is None


@pytest.mark.parametrize(
    ("spoil", "told"),
    [(float("nan"), "the model's activations are not finite"), (1e6, "tokens read at once is of usual size")],
)
def test_activations_that_cannot_be_learnt_from_end_the_run_after_its_beginning_too(spoil, told):
    """As of a text that overflows in half precision: nothing else would ever fill the buffer."""
    model = tiny_llama(0).requires_grad_(False)
    inputs, outputs = torch.randn(2, 3, 200, 16, generator=torch.Generator().manual_seed(0))
    good = measure_scales(inputs, outputs)

    def forward(tokens):
        return inputs * spoil, outputs, torch.ones(200, dtype=torch.int64)

    stream = open_streams(
        scaled(forward, good, SMALL, model.device, torch.float32), tokens_corpus(texts(), "texts"), tiny_tokenizer(),
        SMALL, [0], model.device,
    )[0]  # fmt: skip
    with pytest.raises(TranscoderError, match=told):
        stream.next(64)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(tmp_path):
    config = replace(SMALL, learning_rate=1e30, warm_up=25, clip=1e30)
    with pytest.raises(TranscoderError, match="the loss is not finite at step"):
        trained(tmp_path, config, report_every=1, checkpoint_every=1)
    good = latest(tmp_path)
    assert good is not None
    files = [*good.glob("*.safetensors")]
    assert len(files) > 1
    assert all(bool(tensor.isfinite().all()) for file in files for tensor in read_tensors(file).values())


def test_a_model_that_gives_no_numbers_any_more_ends_the_run_and_keeps_the_checkpoint(tmp_path):
    model = tiny_llama(0).requires_grad_(False)

    def spoil(step, steps):
        if step == 7:
            model.model.layers[1].mlp.down_proj.weight.fill_(float("nan"))

    reporting = Reporting(on_step=spoil, checkpoint_every=5)
    with pytest.raises(TranscoderError, match="the model's activations are not finite"):
        train(model, tiny_tokenizer(), tokens_corpus(texts(), "texts"), SMALL, tmp_path, reporting=reporting)
    # a forward pass, the first, gives 30 steps their tokens; the second is of the spoilt model
    assert latest(tmp_path).name == "step-25"


def run_script(folder, *arguments, n=1, timeout=120):
    """A training script in its own process, or in `n` of them under torchrun."""
    script = [str(HERE / "train_script.py"), str(folder), *arguments]
    command = [sys.executable, *script]
    if n > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), "--master-port", "0",
                   "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *script]  # fmt: skip
    root = HERE.parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(process, folder, step):
    wait_until(lambda: latest(folder) is not None and int(latest(folder).name.removeprefix("step-")) >= step, process)


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    expected = trained(tmp_path / "whole")
    process = run_script(tmp_path / "killed", "--slow")
    wait_for_step(process, tmp_path / "killed", 10)
    process.kill()
    process.communicate()
    reached = int(latest(tmp_path / "killed").name.removeprefix("step-"))
    assert 10 <= reached < 60
    process = run_script(tmp_path / "killed")
    _, error = ended(process)
    assert process.returncode == 0, error
    assert_same(load(tmp_path / "killed" / "transcoder"), expected)


@pytest.mark.slow
def test_a_terminated_run_writes_a_checkpoint_and_leaves(tmp_path):
    process = run_script(tmp_path, "--slow")
    wait_for_step(process, tmp_path, 5)
    process.send_signal(signal.SIGTERM)
    _, error = ended(process)
    assert "stopped after step" in error
    assert process.returncode == 3
    assert f"after step {latest(tmp_path).name.removeprefix('step-')} of 60" in error


@pytest.mark.slow
def test_a_full_disk_ends_the_run_in_one_line_and_keeps_the_last_checkpoint(tmp_path):
    process = run_script(tmp_path, "--disk-full-at=8")
    _, error = ended(process)
    assert process.returncode == 2
    assert "cannot write" in error and "make room" in error
    assert len(error.splitlines()) == 1
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-5"]
    process = run_script(tmp_path)
    _, error = ended(process)
    assert process.returncode == 0, error


@pytest.mark.slow
def test_a_full_disk_when_metrics_are_written_is_told_in_one_line(tmp_path):
    process = run_script(tmp_path, "--metrics-full-at=3")
    _, error = ended(process)
    assert process.returncode == 2
    assert f"cannot write {tmp_path}/metrics.parquet" in error and "make room" in error
    assert len(error.splitlines()) == 1


@pytest.mark.slow
def test_a_full_disk_at_the_end_leaves_no_part_of_a_transcoder(tmp_path):
    process = run_script(tmp_path)
    _, error = ended(process)
    assert process.returncode == 0, error
    before = load(tmp_path / "transcoder")
    process = run_script(tmp_path, "--full-from-the-start")  # all steps are done: only the end is left
    _, error = ended(process)
    assert process.returncode == 2
    assert f"cannot write {tmp_path}/transcoder: " in error and "make room" in error
    assert len(error.splitlines()) == 1
    assert_same(load(tmp_path / "transcoder"), before)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint", "metrics.parquet", "run.json", "transcoder",
    ]  # fmt: skip


@pytest.mark.slow
def test_ctrl_c_writes_a_checkpoint_too_and_no_report_is_waited_for(tmp_path):
    process = run_script(tmp_path, "--slow", "--report-every=1000")
    wait_for_step(process, tmp_path, 5)
    process.send_signal(signal.SIGINT)
    _, error = ended(process)
    assert process.returncode == 3, error
    assert f"after step {latest(tmp_path).name.removeprefix('step-')} of 60" in error
    assert not (tmp_path / "metrics.parquet").exists()


def test_a_model_of_another_family_is_refused_with_the_known_ones(tmp_path):
    model = tiny_llama(0)
    model.config.model_type = "mystery"
    with pytest.raises(TranscoderError, match=r"'mystery' cannot be traced yet; known types: llama"):
        train(model, tiny_tokenizer(), tokens_corpus(texts(), "texts"), SMALL, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_groups_of_processes_start_from_the_weights_of_the_first(tmp_path):
    process = run_script(tmp_path, "--shards=1", "--start-only", n=2)
    _, error = ended(process)
    assert process.returncode == 0, error
    first, second = ((tmp_path / f"start-{rank}").read_text() for rank in range(2))
    assert first == second


@pytest.mark.slow
def test_several_processes_end_together_if_one_is_asked_to_before_the_first_step(tmp_path):
    process = run_script(tmp_path, "--asked-at-once", n=2)
    _, error = ended(process)
    assert process.returncode == 1  # torchrun's, when its processes have failed
    assert error.count("stopped before the first step; start the same command again.") == 2
    assert latest(tmp_path) is None


@pytest.mark.slow
def test_several_processes_that_are_asked_to_stop_agree_on_a_step(tmp_path):
    process = run_script(tmp_path, "--streams", "--slow", "--report-every=1000", n=2)
    wait_for_step(process, tmp_path, 5)
    process.send_signal(signal.SIGTERM)
    _, error = ended(process)
    step = int(latest(tmp_path).name.removeprefix("step-"))
    assert step % 5 == 0
    assert f"stopped after step {step} of 60" in error
