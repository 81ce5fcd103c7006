"""Train a cross-layer (or per-layer) transcoder: start reading at `train_to_folder`."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transcoders.checkpoint import load, save_whole
from transcoders.config import TrainConfig, TranscoderConfig
from transcoders.corpus import Corpus, first_token
from transcoders.errors import TranscoderError
from transcoders.families import dissect, longest_context
from transcoders.files import told_in_one_line
from transcoders.memory import check_fits, check_start_fits
from transcoders.metrics import save_metrics
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
    settings_of,
)
from transcoders.result import result_of
from transcoders.run import Run, checkpointed_scales, diverged, resumed, same_scales, started, write
from transcoders.scales import Scales
from transcoders.shuffle import Activations, Batch
from transcoders.streams import (
    Forward,
    Stream,
    cached,
    forward_of,
    next_batch,
    open_streams,
    sample,
    scaled,
)

DEAD_EVERY = 20
"""Steps after which the list of dead features is made anew."""
AGREE_EVERY = 5
"""Steps after which several processes tell each other whether they were asked to stop."""
SLOWLY = 0.1
"""How much of the threshold that is saved comes from the latest step."""


@dataclass(frozen=True)
class Reporting:
    """How often a run writes things down, whom it tells, and who may stop it; none of it changes the result."""

    report_every: int = 20
    """Steps between rows of metrics, which wait for the device."""
    checkpoint_every: int = 500
    on_report: Callable[[dict[str, Any]], None] = lambda row: None
    on_step: Callable[[int, int], None] = lambda step, steps: None
    """Gets the step and the number of steps."""
    should_stop: Callable[[], bool] = lambda: False
    """Asked after every step, of several processes after every fifth, and often before the first one."""

    def __post_init__(self) -> None:
        for name, steps in (("report-every", self.report_every), ("checkpoint-every", self.checkpoint_every)):
            if steps < 1:
                raise TranscoderError(f"--{name} is {steps}; expected 1 step or more.")


class Stopped(TranscoderError):
    """The run was asked to stop, and has written a checkpoint, if it had learnt anything."""


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, config: TrainConfig,
    folder: Path | str, *, place: Place | None = None, reporting: Reporting | None = None, cache: Path | None = None,
    model_name: str = "",
) -> CrossLayerTranscoder:  # fmt: skip
    """As `train_to_folder`, and return the transcoder: whole, in float32, on the device of each process that asks."""
    train_to_folder(
        model, tokenizer, corpus, config, folder, place=place, reporting=reporting, cache=cache, model_name=model_name
    )
    return load(Path(folder) / "transcoder", device=model.device)


def train_to_folder(
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
) -> None:
    """Train on the model's activations on a corpus; the transcoder is then in `folder`/transcoder.

    A run that is in the folder already goes on from its last checkpoint. `cache` keeps activations for other runs.
    Raises `TranscoderError`, or its kind `Stopped`.
    """
    folder, place, reporting = Path(folder), place or Place(), reporting or Reporting()
    dissect(model)  # or it says which families there are
    _check_context(model, config)
    shape = shape_of(model, config, model_name or str(model.config.name_or_path))
    checkpoint = latest(folder)
    if checkpoint is None:
        check_start_fits(shape, config, place, model.device, model.dtype)
    check_fits(shape, config, place, model.device)
    if place.is_first:
        check_settings(folder, settings_of(model, shape.model_name, corpus, config))
    wait_for_all(place)
    forward = forward_of(model, config, first_token(tokenizer))
    if cache is not None:
        forward = cached(forward, model, config, first_token(tokenizer), cache)

    streams_at = partial(_streams, forward, corpus, tokenizer, config, place, model.device)
    if checkpoint is None:
        run = _begun(forward, corpus, tokenizer, shape, config, place, reporting, model.device)
        streams = streams_at(run.scales)
    else:
        streams = streams_at(checkpointed_scales(checkpoint))
        run = resumed(shape, config, checkpoint, folder, place.features(config.n_features), streams)
    _go_on(run, streams, shape, config, folder, place, reporting)


def _begun(
    forward: Forward, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, shape: TranscoderConfig, config: TrainConfig,
    place: Place, reporting: Reporting, device: torch.device,
) -> Run:  # fmt: skip
    """A run that has learnt nothing yet. The sample that it starts from is let go when this returns."""
    scales, seen = sample(_until_asked(forward, place, reporting), corpus, tokenizer, config, device)
    _end_if_any_is_asked(place, reporting)
    run = started(shape, config, same_scales(scales, place), seen, place, partial(_end_if_asked, place, reporting))
    _end_if_any_is_asked(place, reporting)
    return run


def _streams(
    forward: Forward, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, place: Place,
    device: torch.device, scales: Scales,
) -> dict[int, Stream]:  # fmt: skip
    dtype = torch.bfloat16 if "bfloat16" in (config.weights, config.products) else torch.float32
    read = scaled(forward, scales, config, device, dtype)
    return open_streams(read, corpus, tokenizer, config, place.streams(config.streams), device)


def _check_context(model: PreTrainedModel, config: TrainConfig) -> None:
    longest = longest_context(model)
    if longest is not None and config.context > longest:
        raise TranscoderError(
            f"context is {config.context}, the model reads {longest} tokens at most; give --context {longest} or less."
        )


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
    checkpoint = latest(folder)
    if checkpoint is None:
        run = started(shape, config, scales, seen, place, partial(_end_if_asked, place, reporting))
    else:
        run = resumed(shape, config, checkpoint, folder, place.features(config.n_features), streams)
    _go_on(run, streams, shape, config, folder, place, reporting)


def _until_asked(forward: Forward, place: Place, reporting: Reporting) -> Forward:
    """The same, but it ends the run when asked to: for where nothing is learnt yet that could be kept."""

    def forward_or_end(tokens: Int[Tensor, "sequence position"]) -> Activations:
        _end_if_asked(place, reporting)
        return forward(tokens)

    return forward_or_end


def _end_if_asked(place: Place, reporting: Reporting) -> None:
    """Several processes do not end by themselves: the others may be waiting for each other already."""
    if place.size == 1:
        _end_if_any_is_asked(place, reporting)


def _end_if_any_is_asked(place: Place, reporting: Reporting) -> None:
    if anywhere(place, reporting.should_stop()):
        raise Stopped("stopped before the first step; start the same command again.")


def _go_on(
    run: Run, streams: dict[int, Stream], shape: TranscoderConfig, config: TrainConfig, folder: Path, place: Place,
    reporting: Reporting,
) -> None:  # fmt: skip
    """Learn until the last step, or until asked to stop."""
    features = place.features(config.n_features)
    balanced = run.scales.has_sinks if config.balanced is None else config.balanced
    typical = Typical(run.scales.square.to(run.density), balanced)
    started_at = time.time() - run.seconds
    while run.step < config.steps:
        batch = next_batch(streams, config)
        run.gathered.add(learn_from(run, batch, config, place, typical), batch.position)
        run.seconds = time.time() - started_at
        reporting.on_step(run.step, config.steps)
        last = run.step == config.steps
        if last or run.step % reporting.report_every == 0:
            _note(run, config, reporting, folder, place)
        stops = not last and _is_asked(run, place, reporting)
        if last or stops or run.step % reporting.checkpoint_every == 0:
            write(run, streams, features, folder, place)
        if stops:
            raise Stopped(f"stopped after step {run.step} of {config.steps}; start the same command again to go on.")
    if place.is_first:
        save_whole(result_of(folder, shape, config), folder / "transcoder")
    wait_for_all(place)


def _is_asked(run: Run, place: Place, reporting: Reporting) -> bool:
    """Whether to stop after this step. Several processes have to agree on one, and to ask them waits for the device."""
    return (place.size == 1 or run.step % AGREE_EVERY == 0) and anywhere(place, reporting.should_stop())


def learn_from(run: Run, batch: Batch, config: TrainConfig, place: Place, typical: Typical) -> Outcome:
    """One step."""
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


def _note(run: Run, config: TrainConfig, reporting: Reporting, folder: Path, place: Place) -> None:
    """Add a row to the metrics, of the steps since the last one."""
    step, seconds = run.reported
    row = run.gathered.read(place, run.dead.float().mean(1))
    row |= {
        "tokens_per_second": (run.step - step) * config.batch_tokens / (run.seconds - seconds),
        "step": run.step, "tokens": run.step * config.batch_tokens, "seconds": run.seconds,
        "learning_rate": learning_rate_at(config, run.step), "k": sparsity_at(config, run.step).k,
    }  # fmt: skip
    run.reported = run.step, run.seconds
    run.rows.append(row)
    if not math.isfinite(row["loss"]):
        raise diverged(run, folder)
    if place.is_first:
        with told_in_one_line(f"write {folder / METRICS}"):
            save_metrics(folder / METRICS, run.rows)
        reporting.on_report(row)
