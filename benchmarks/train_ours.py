"""Training steps with this package's kernels, or with dense products, in a process of its own; prints one line of JSON.

python -m benchmarks.train_ours FILE --way sparse --k 16
"""

import json
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.machine import bandwidth, matrix_rate, now, peak_mb
from transcoders.adam import Adam
from transcoders.config import TrainConfig, TranscoderConfig
from transcoders.kernels import decode, sparse_encode, sparse_encode_top
from transcoders.objective import Typical
from transcoders.parallel import Place
from transcoders.run import started
from transcoders.scales import measure_scales
from transcoders.shuffle import Batch
from transcoders.start import go_on
from transcoders.train import learn_from

WAYS = ("sparse", "sparse-top-k", "dense", "trainer")
"""By a threshold a layer, by the k largest of each token, by the threshold and dense products; all the trainer does."""
WARM_UP = 2
"""Steps before the clock starts."""
ERROR_FLOOR = 0.02
LEARNING_RATE = 1e-3


@dataclass
class State:
    """What training changes."""

    encoders: list[Tensor]
    biases: list[Tensor]
    decoders: list[Tensor]
    """By source layer (feature, layers from it on × d_model)."""
    thresholds: Tensor
    """By layer; steered so that k features fire on a token."""

    def parameters(self) -> list[Tensor]:
        return [*self.encoders, *self.biases, *self.decoders]


@dataclass(frozen=True)
class Timed:
    """What was measured of some steps."""

    seconds: list[float]
    l0: float
    """Features that fired on a token, a layer."""
    loss: float


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--way", type=click.Choice(WAYS), default="sparse", show_default=True)
@click.option("--features", default=4096, show_default=True)
@click.option("--k", default=16, show_default=True)
@click.option("--tokens", default=1024, show_default=True)
@click.option("--steps", default=10, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--weights", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--moments", type=click.Choice(["float32", "8bit"]), default="float32", show_default=True)
def main(
    file: Path, way: str, features: int, k: int, tokens: int, steps: int, threads: int, device: str, dtype: str,
    weights: str, moments: str,
) -> None:  # fmt: skip
    """Train on the activations in FILE; `--dtype` is that of products and gathered rows."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    cache = {name: part.to(device) for name, part in load_file(file).items()}
    if way == "trainer":
        timed = _time_trainer(
            cache,
            TrainConfig(
                n_features=features, k=k, k_start=1, batch_tokens=tokens, buffer_tokens=2 * tokens,
                tokens=(WARM_UP + steps) * tokens, learning_rate=LEARNING_RATE, weights=weights, moments=moments,
                products=dtype, balanced=True, error_floor=ERROR_FLOOR,
            ),
        )  # fmt: skip
    else:
        state = _start(cache["inputs"], features, k, getattr(torch, weights))
        timed = _time_steps(cache, state, way, k, tokens, steps, getattr(torch, dtype), eight_bits=moments == "8bit")
    print(
        json.dumps(
            vars(timed)
            | {
                "peak_mb": peak_mb(device),  # before the measurements below, which take more
                "matrix_rate": matrix_rate(device, getattr(torch, dtype)),
                "bandwidth": bandwidth(device),
            }
        )
    )


def _time_steps(
    cache: dict[str, Tensor], state: State, way: str, k: int, tokens: int, steps: int, dtype: torch.dtype, *,
    eight_bits: bool,
) -> Timed:  # fmt: skip
    """Encode, decode, relative error, gradients and Adam, and nothing else."""
    device = str(cache["inputs"].device.type)
    optimizer = Adam({str(i): part for i, part in enumerate(state.parameters())}, 0, eight_bits=eight_bits)
    losses, counts, seconds = [], [], []
    for step in range(WARM_UP + steps):
        inputs, outputs = (_batch(cache[name], step, tokens) for name in ("inputs", "outputs"))
        start = now(device)
        loss, active = _step(state, inputs.to(dtype), outputs, way, k)
        loss.backward()
        optimizer.step(LEARNING_RATE)
        # more pairs than wanted raise a layer's threshold
        state.thresholds += 0.2 * state.thresholds.abs() * (torch.stack(active) / (tokens * k)).log().clamp(-1, 1)
        if step >= WARM_UP:
            seconds.append(now(device) - start)
            losses.append(loss.detach())
            counts.append(torch.stack(active).detach())
    return Timed(seconds, float(torch.stack(counts).mean()) / tokens, float(losses[-1]))


def _time_trainer(cache: dict[str, Tensor], config: TrainConfig) -> Timed:
    """The trainer's step with all that it does: threshold, clipping, dead features, metrics."""
    n_layers, _, d_model = cache["inputs"].shape
    device = cache["inputs"].device
    scales = measure_scales(cache["inputs"], cache["outputs"])
    position = torch.ones(cache["inputs"].shape[1], dtype=torch.int64, device=device)
    shape = TranscoderConfig(n_layers, d_model, config.n_features)
    run = started(shape, config, scales, (cache["inputs"], cache["outputs"], position), Place(), go_on)
    # features of clusters fire seldom at first; so they are ready to, as many as in the middle of training
    torch.nn.init.zeros_(run.weights.transcoder.b_enc)
    cache = {name: part * getattr(scales, name)[:, None, None] for name, part in cache.items()}
    typical, seconds = Typical(scales.square, balanced=True), []
    for step in range(config.steps):
        inputs, outputs = (_batch(cache[name], step, config.batch_tokens) for name in ("inputs", "outputs"))
        start = now(device.type)
        outcome = learn_from(run, Batch(inputs, outputs, position[: config.batch_tokens]), config, Place(), typical)
        run.gathered.add(outcome, position[: config.batch_tokens])
        if step >= WARM_UP:
            seconds.append(now(device.type) - start)
    row = run.gathered.read(Place(), run.dead.float().mean(1))
    return Timed(seconds, row["l0"] / n_layers, row["loss"])


def _batch(held: Tensor, step: int, tokens: int) -> Tensor:
    return held[:, step * tokens % held.shape[1] :][:, :tokens]


def _start(inputs: Tensor, n_features: int, k: int, dtype: torch.dtype) -> State:
    n_layers, _, d_model = inputs.shape
    like = {"device": inputs.device, "dtype": dtype}
    encoders = [torch.randn(n_features, d_model, **like) / d_model**0.5 for _ in range(n_layers)]
    some = [part[:256].float() @ encoder.float().T for part, encoder in zip(inputs, encoders, strict=True)]
    thresholds = torch.stack([z.flatten().kthvalue(int(z.numel() * (1 - k / n_features))).values for z in some])
    decoders = [
        torch.randn(n_features, (n_layers - layer) * d_model, **like) * (k * n_layers * d_model) ** -0.5
        for layer in range(n_layers)
    ]
    state = State(encoders, [torch.zeros(n_features, **like) for _ in encoders], decoders, thresholds)
    for part in state.parameters():
        part.requires_grad_()
    return state


def _step(state: State, inputs: Tensor, outputs: Tensor, way: str, k: int) -> tuple[Tensor, list[Tensor]]:
    """The mean relative error, and how many pairs fired by layer."""
    n_layers, n_tokens, d_model = inputs.shape
    written = torch.zeros(n_tokens, n_layers * d_model, device=inputs.device)
    active = []
    for layer in range(n_layers):
        weights = state.encoders[layer], state.biases[layer]
        decoder, threshold = state.decoders[layer], state.thresholds[layer]
        if inputs.dtype != torch.float32 and inputs.is_cuda:
            decoder = decoder.to(inputs.dtype)
        if way == "dense":
            pre_activation = torch.addmm(weights[1].to(inputs.dtype), inputs[layer], weights[0].to(inputs.dtype).T)
            fires = pre_activation > threshold
            write = (pre_activation * fires) @ decoder.to(inputs.dtype)
            active.append(fires.sum().float())
        else:
            top = way == "sparse-top-k"
            selection = (
                sparse_encode_top(inputs[layer], *weights, k)
                if top
                else sparse_encode(inputs[layer], *weights, threshold)
            )
            write = decode(selection, decoder, n_tokens)
            active.append(torch.full((), float(len(selection.value)), device=inputs.device))
        written[:, layer * d_model :] += write
    written = written.view(n_tokens, n_layers, d_model).transpose(0, 1)
    size = outputs.float().square().sum(-1)
    error = (written - outputs).square().sum(-1) / (size + ERROR_FLOOR * size.mean(1, keepdim=True))
    return error.mean(), active


if __name__ == "__main__":
    main()
