"""Train a cross-layer (or per-layer) transcoder: start reading at `train`, then `learn`."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transcoders.checkpoint import load, save
from transcoders.config import TrainConfig, TranscoderConfig
from transcoders.corpus import Corpus, first_token
from transcoders.errors import TranscoderError
from transcoders.families import dissect
from transcoders.memory import check_fits
from transcoders.metrics import Gathered, save_metrics
from transcoders.model import CrossLayerTranscoder
from transcoders.objective import (
    Outcome,
    Typical,
    clip,
    learning_rate_at,
    objective,
    sparsity_at,
)
from transcoders.parallel import Place, anywhere, average, wait_for_all
from transcoders.progress import (
    METRICS,
    check_settings,
    latest,
)
from transcoders.run import Run, diverged, resumed, started, whole, write
from transcoders.scales import Scales
from transcoders.shuffle import Activations, Batch
from transcoders.streams import Stream, cached, forward_of, next_batch, open_streams, sample, scaled

DEAD_EVERY = 20
"""Steps after which the list of dead features is made anew."""
SLOWLY = 0.1
"""How much of the threshold that is saved comes from the latest step."""


@dataclass(frozen=True)
class Reporting:
    """How often a run writes things down, whom it tells, and who may stop it; none of it changes the result."""

    report_every: int = 20
    """Steps between rows of metrics; only then does a step wait for the device."""
    checkpoint_every: int = 500
    on_report: Callable[[dict[str, Any]], None] = lambda row: None
    on_step: Callable[[int, int], None] = lambda step, steps: None
    """Gets the step and the number of steps."""
    should_stop: Callable[[], bool] = lambda: False


class Stopped(TranscoderError):
    """The run was asked to stop, and has written a checkpoint."""


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    config: TrainConfig,
    folder: Path | str,
    *,
    place: Place | None = None,
    reporting: Reporting | None = None,
    cache: Path | None = None,
    model_name: str = "",
) -> CrossLayerTranscoder:
    """Train on the model's activations on a corpus and return the transcoder that is then in `folder`/transcoder.

    A run that is in the folder already goes on from its last checkpoint. `cache` keeps activations for other runs.
    Raises `TranscoderError`, or its kind `Stopped` after a checkpoint was written.
    """
    folder, place = Path(folder), place or Place()
    dissect(model)  # or it says which families there are
    shape = shape_of(model, config, model_name or str(model.config.name_or_path))
    dtype = torch.bfloat16 if "bfloat16" in (config.weights, config.products) else torch.float32
    check_fits(shape, config, place, model.device)
    settings = asdict(config) | {"model": shape.model_name, "corpus": corpus.name}
    if place.is_first:
        check_settings(folder, settings)
    wait_for_all(place)
    forward = forward_of(model, config, first_token(tokenizer))
    if cache is not None:
        forward = cached(forward, cache / f"{Path(shape.model_name).name}-{config.reads}-{config.writes}")
    scales, seen = sample(forward, corpus, tokenizer, config)
    read = scaled(forward, scales, config, model.device, dtype)
    streams = open_streams(read, corpus, tokenizer, config, place.streams(config.streams), model.device)
    learn(streams, scales, seen, shape, config, folder, place=place, reporting=reporting or Reporting())
    return load(folder / "transcoder", device=model.device)


def shape_of(model: PreTrainedModel, config: TrainConfig, model_name: str) -> TranscoderConfig:
    """The transcoder of this model that these settings train."""
    text = model.config.get_text_config()
    return TranscoderConfig(
        text.num_hidden_layers, text.hidden_size, config.n_features,
        "topk" if config.activation == "topk" else "relu", config.k if config.activation == "topk" else 0,
        config.reads, config.writes, model_name, config.cross_layer, config.skip,
    )  # fmt: skip


def learn(
    streams: dict[int, Stream], scales: Scales, seen: Activations, shape: TranscoderConfig, config: TrainConfig,
    folder: Path, *, place: Place, reporting: Reporting,
) -> None:  # fmt: skip
    """Train on streams of scaled activations and write `folder`/transcoder, which reads them unscaled.

    `seen` are some activations as they come, that features start from.
    """
    features = place.features(config.n_features)
    checkpoint = latest(folder)
    if checkpoint is None:
        run = started(shape, config, scales, seen, features)
    else:
        run = resumed(shape, config, checkpoint, folder, features, streams)
    balanced = run.scales.has_sinks if config.balanced is None else config.balanced
    typical = Typical(run.scales.square.to(run.density), balanced)
    gathered = Gathered(shape.n_layers, run.density.device)
    started_at, mark = time.time() - run.seconds, (run.step, run.seconds)
    while run.step < config.steps:
        batch = next_batch(streams, config)
        gathered.add(_step(run, batch, config, place, typical), batch.position)
        run.seconds = time.time() - started_at
        reporting.on_step(run.step, config.steps)
        last = run.step == config.steps
        reports = last or run.step % reporting.report_every == 0
        if reports:
            row = gathered.read(place, run.dead.float().mean(1))
            row["tokens_per_second"] = (run.step - mark[0]) * config.batch_tokens / (run.seconds - mark[1])
            mark = run.step, run.seconds
            _note(run, row, config, reporting, folder, place)
        stops = not last and reports and anywhere(place, reporting.should_stop())
        if last or stops or run.step % reporting.checkpoint_every == 0:
            write(run, streams, features, folder, place)
        if stops:
            raise Stopped(f"stopped after step {run.step} of {config.steps}; start the same command again to go on.")
    if place.is_first:
        save(whole(folder, shape, config), folder / "transcoder")
    wait_for_all(place)


def _step(run: Run, batch: Batch, config: TrainConfig, place: Place, typical: Typical) -> Outcome:
    """Learn from one batch."""
    run.step += 1
    if run.step % DEAD_EVERY == 1:  # seldom, because only then does the step wait for the device
        run.dead = run.density < config.dead_below
        run.dead_features = [dead.nonzero()[:, 0] for dead in run.dead]
    outcome = objective(run.weights, batch, config, place, sparsity_at(config, run.step), typical, run.dead_features)
    outcome.loss.backward()
    named = run.weights.named()
    average(place, [w.grad for w in named.values() if w.grad is not None])
    clip(place, named, config.clip)
    run.adam.step(learning_rate_at(config, run.step))
    _remember(run, outcome.firing, outcome.threshold, config, place)
    return outcome


@torch.no_grad()
def _remember(
    run: Run, firing: Float[Tensor, "layer feature"], threshold: Float[Tensor, ""], config: TrainConfig, place: Place
) -> None:  # fmt: skip
    """Running means of what fires, and of the threshold it has to pass."""
    average(place, [firing])
    run.density.lerp_(firing, 1 / config.density_steps)
    run.threshold.copy_(torch.where(run.threshold.isnan(), threshold, run.threshold.lerp(threshold, SLOWLY)))


def _note(
    run: Run, row: dict[str, Any], config: TrainConfig, reporting: Reporting, folder: Path, place: Place
) -> None:  # fmt: skip
    row |= {
        "step": run.step, "tokens": run.step * config.batch_tokens, "seconds": run.seconds,
        "learning_rate": learning_rate_at(config, run.step), "k": sparsity_at(config, run.step).k,
    }  # fmt: skip
    run.rows.append(row)
    if not math.isfinite(row["loss"]):
        raise diverged(run, folder)
    if place.is_first:
        save_metrics(folder / METRICS, run.rows)
        reporting.on_report(row)
