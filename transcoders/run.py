"""A training run's state: how it starts, and what a checkpoint holds of it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from transcoders.adam import Adam
from transcoders.config import TrainConfig, TranscoderConfig
from transcoders.errors import TranscoderError
from transcoders.metrics import Gathered, is_of_own_features, load_metrics
from transcoders.model import CrossLayerTranscoder
from transcoders.objective import Weights, is_sharded
from transcoders.parallel import Place, added_up, average
from transcoders.progress import (
    COMMON,
    METRICS,
    latest,
    read_features,
    read_state,
    read_tensors,
    write_checkpoint,
)
from transcoders.scales import Scales, scales_of
from transcoders.shuffle import Activations
from transcoders.start import start_layer
from transcoders.streams import Stream


@dataclass
class Run:
    """A training run's state: what a checkpoint holds."""

    weights: Weights
    adam: Adam
    scales: Scales
    density: Float[Tensor, "layer feature"]
    """Share of tokens on which each feature fires, a running mean."""
    threshold: Float[Tensor, ""]
    """The contribution that features have to exceed, a running mean."""
    dead: Bool[Tensor, "layer feature"]
    dead_features: list[Tensor]
    """The same per layer, as numbers."""
    gathered: Gathered
    """What there will be to report."""
    step: int = 0
    seconds: float = 0.0
    reported: tuple[int, float] = (0, 0.0)
    """Step and seconds of the last row."""
    rows: list[dict[str, Any]] = field(default_factory=list)


def started(
    shape: TranscoderConfig, config: TrainConfig, scales: Scales, seen: Activations, place: Place,
    on_block: Callable[[], None],
) -> Run:  # fmt: skip
    """Weights that start from clusters of what the MLPs read; every process finds all and keeps its own."""
    features = place.features(config.n_features)
    run = _empty(shape, config, scales, len(features), seen[0].device)
    generator = torch.Generator().manual_seed(config.seed)
    own = slice(features.start, features.stop)
    k = min(round(config.k * config.k_start), config.n_features)
    transcoder = run.weights.transcoder
    with torch.no_grad():
        for layer in range(shape.n_layers):
            start = start_layer(
                seen[0][layer].float() * scales.inputs[layer], seen[1][layer].float() * scales.outputs[layer],
                config.n_features, k, config.error_floor, generator, at_once=max(1, config.n_features // 256),
                on_block=on_block,
            )  # fmt: skip
            transcoder.W_enc[layer] = start.W_enc[own]
            transcoder.b_enc[layer] = start.b_enc[own]
            transcoder.b_dec[layer] = start.b_dec
            transcoder.W_dec[layer][:, 0] = start.W_dec[own]
    _start_alike(run, place)
    return run


@torch.no_grad()
def same_scales(scales: Scales, place: Place) -> Scales:
    """Those of the first process: the same text may give others by a rounding error elsewhere."""
    if place.size == 1:
        return scales
    has_sinks = torch.tensor(int(scales.has_sinks), device=scales.inputs.device)
    for value in (scales.inputs, scales.outputs, scales.largest, scales.square, has_sinks):
        dist.broadcast(value, src=0)
    return replace(scales, has_sinks=bool(has_sinks))


@torch.no_grad()
def _start_alike(run: Run, place: Place) -> None:
    """Take the weights of the first data part: gradients are averaged, weights never, so a difference would stay."""
    for name, weight in run.weights.named().items():
        if not is_sharded(name):
            if place.size > 1:
                dist.broadcast(weight.detach(), src=0)
        elif place.data_parts > 1:
            assert place.data_group is not None
            dist.broadcast(weight.detach(), src=dist.get_global_rank(place.data_group, 0), group=place.data_group)


def _empty(
    shape: TranscoderConfig, config: TrainConfig, scales: Scales, n_features: int, device: torch.device
) -> Run:  # fmt: skip
    own = TranscoderConfig(**(asdict(shape) | {"n_features": n_features, "activation": "relu", "k": 0}))
    dtype = torch.bfloat16 if config.weights == "bfloat16" else torch.float32
    transcoder = CrossLayerTranscoder(own).to(device=device, dtype=dtype)
    threshold = torch.full((shape.n_layers, n_features), config.threshold_start, device=device)
    weights = Weights(transcoder, threshold.requires_grad_(config.activation == "jumprelu"))
    density = torch.full((shape.n_layers, n_features), 10 * config.dead_below, device=device)
    adam = Adam(weights.named(), config.seed, eight_bits=config.moments == "8bit")
    dead = torch.zeros_like(density, dtype=torch.bool)
    threshold_seen = torch.full((), float("nan"), device=device)
    return Run(
        weights, adam, scales, density, threshold_seen, dead,
        [dead[layer].nonzero()[:, 0] for layer in range(shape.n_layers)], Gathered(scales.square.to(density)),
    )  # fmt: skip


def resumed(
    shape: TranscoderConfig, config: TrainConfig, checkpoint: Path, folder: Path, features: range,
    streams: dict[int, Stream],
) -> Run:  # fmt: skip
    state = read_state(checkpoint)
    tensors = read_features(checkpoint, features) | read_tensors(checkpoint / COMMON)
    device = next(iter(streams.values())).device
    run = _empty(shape, config, scales_of(tensors), len(features), device)
    with torch.no_grad():
        for name, weight in run.weights.named().items():
            weight.copy_(tensors[f"weight:{name}"])
        for name, moment in run.adam.tensors().items():
            moment.copy_(tensors[name])
    run.adam.steps = run.step = state["step"]
    run.seconds = state["seconds"]
    run.density.copy_(tensors["density"])
    run.dead.copy_(tensors["dead"])
    run.dead_features = [dead.nonzero()[:, 0] for dead in run.dead]
    run.threshold.copy_(tensors["threshold"])
    run.rows = load_metrics(folder / METRICS, run.step)
    _resume_report(run, state, tensors, features)
    for number, stream in streams.items():
        stream.restore(state["streams"][str(number)], read_tensors(checkpoint / f"stream-{number}.safetensors"))
    return run


def checkpointed_scales(checkpoint: Path) -> Scales:
    """The scales that a run goes on with."""
    return scales_of(read_tensors(checkpoint / COMMON))


def _resume_report(run: Run, state: dict[str, Any], tensors: dict[str, Tensor], features: range) -> None:
    """Go on with the row that was being gathered; the first shard has what all of them counted."""
    reported = state.get("reported", {"step": run.step, "seconds": run.seconds, "gathered": 0})  # of older checkpoints
    run.reported = reported["step"], reported["seconds"]
    run.gathered.steps = reported["gathered"]
    for name, value in tensors.items():
        if name.startswith("sums:") and not name.startswith("sums:by "):  # as older versions called other sums
            run.gathered.sums[name.removeprefix("sums:")] = value.to(run.density.device)
            if features.start > 0 and is_of_own_features(name.removeprefix("sums:")):
                run.gathered.sums[name.removeprefix("sums:")].zero_()


def _sums(run: Run, place: Place) -> dict[str, Tensor]:
    """What is gathered so far in all processes together, as `Gathered.read` puts it together."""
    sums = {name: value.float().clone() for name, value in run.gathered.sums.items()}
    sums |= {name: added_up(place, value) for name, value in sums.items() if is_of_own_features(name)}
    average(place, [*sums.values()])
    return sums


def write(run: Run, streams: dict[int, Stream], features: range, folder: Path, place: Place) -> None:
    """A checkpoint that is known to be good."""
    named = run.weights.named() | {"threshold": run.weights.threshold}
    if not all(bool(torch.isfinite(weight).all()) for weight in named.values()):
        raise diverged(run, folder)
    tensors = {f"weight:{name}": weight for name, weight in named.items()}
    tensors |= run.adam.tensors()
    sharded = {name: t for name, t in tensors.items() if is_sharded(name.split(":")[1])} | {
        "density": run.density,
        "dead": run.dead,
    }
    common = {name: t for name, t in tensors.items() if name not in sharded} | {"threshold": run.threshold}
    common |= {f"scales:{name}": value for name, value in asdict(run.scales).items() if name != "has_sinks"}
    common |= {f"sums:{name}": value for name, value in _sums(run, place).items()}
    common["scales:has_sinks"] = torch.tensor(run.scales.has_sinks)
    states = {number: stream.state() for number, stream in streams.items()}
    step, seconds = run.reported
    plain = {
        "step": run.step, "seconds": run.seconds, "streams": {n: values for n, (values, _) in states.items()},
        "reported": {"step": step, "seconds": seconds, "gathered": run.gathered.steps},
    }  # fmt: skip
    write_checkpoint(folder, place, features, sharded, common, {n: t for n, (_, t) in states.items()}, plain)


def diverged(run: Run, folder: Path) -> TranscoderError:
    good = latest(folder)
    kept = f"the checkpoint of {good.name.replace('-', ' ')} is kept" if good else "there is no checkpoint yet"
    return TranscoderError(
        f"the loss is not finite at step {run.step}; {kept}. Start again in another folder with a smaller "
        "learning rate."
    )
