"""Training steps of the peers that this Python has, in a process of its own; prints one line of JSON.

Known: crosslayer-coding (decode-clt 0.0.1) and OpenMOSS Language-Model-SAEs (llamascopium 2.0.0b34, with a
transformer-lens below 4), each with its own model, loss and BatchTopK at the same k, and torch's Adam. What is optional
in their steps and costs time is off: decoder norms in the gate, sparsity and dead-feature terms, metrics.
"""

import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.machine import bandwidth, matrix_rate, now, peak_mb

WARM_UP = 2
"""Steps before the clock starts."""
WAYS = {"crosslayer-coding": "clt", "OpenMOSS": "llamascopium", "OpenMOSS, CSR": "llamascopium"}
"""Names of the steps, and the packages they need."""
Batch = tuple[Tensor, Tensor]
Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""MLP inputs and outputs (layer, token, d_model) → loss, and features that fire a layer and token."""


@click.command()
@click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("way", required=False, type=click.Choice(list(WAYS)))
@click.option("--list", "list_ways", is_flag=True, help="Print the ways that can run here instead.")
@click.option("--features", default=4096, show_default=True)
@click.option("--k", default=16, show_default=True)
@click.option("--tokens", default=1024, show_default=True)
@click.option("--steps", default=10, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
def main(
    file: Path | None, way: str | None, list_ways: bool, features: int, k: int, tokens: int, steps: int, threads: int,
    device: str, dtype: str,
) -> None:  # fmt: skip
    """Train one peer on the activations in FILE; `--dtype` is that of autocast."""
    if list_ways or file is None or way is None:
        print(json.dumps({"ways": [name for name, package in WAYS.items() if find_spec(package)]}))
        return
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    cache = {name: part.to(device) for name, part in load_file(file).items()}
    model, step = quick_model(way, cache["inputs"], features, k)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    seconds, losses, counts = [], [], []
    for number, (inputs, outputs) in zip(range(WARM_UP + steps), _batches(cache, tokens), strict=False):
        start = now(device)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss, active = step(inputs, outputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number >= WARM_UP:
            seconds.append(now(device) - start)
            losses.append(loss.detach())
            counts.append(active)
    print(
        json.dumps(
            {
                "seconds": seconds,
                "l0": float(torch.stack(counts).mean()),
                "loss": float(losses[-1]),
                "peak_mb": peak_mb(device),  # before the measurements below, which take more
                "matrix_rate": matrix_rate(device, getattr(torch, dtype)),
                "bandwidth": bandwidth(device),
            }
        )
    )


def _batches(cache: dict[str, Tensor], n_tokens: int) -> Iterator[Batch]:
    while True:
        yield from zip(cache["inputs"].split(n_tokens, 1), cache["outputs"].split(n_tokens, 1), strict=True)


def quick_model(way: str, inputs: Tensor, n_features: int, k: int) -> tuple[nn.Module, Step]:
    """A peer's model and step, without what is optional and costs time."""
    if way == "crosslayer-coding":
        return crosslayer_coding(
            inputs, n_features, k, apply_sparsity_penalty_to_batchtopk=False, preactivation_coef=0.0
        )
    return openmoss(inputs, n_features, k, sparsity_include_decoder_norm=False, decode_with_csr="CSR" in way)


def crosslayer_coding(inputs: Tensor, n_features: int, k: int, **options: Any) -> tuple[nn.Module, Step]:
    """The model and step of decode-clt; `options` of its training."""
    from clt.config import CLTConfig, TrainingConfig
    from clt.models.clt import CrossLayerTranscoder
    from clt.training.losses import LossManager

    n_layers, _, d_model = inputs.shape
    config = CLTConfig(
        num_features=n_features, num_layers=n_layers, d_model=d_model, activation_fn="batchtopk",
        batchtopk_k=k * n_layers,
    )  # fmt: skip
    training = TrainingConfig(
        learning_rate=1e-3, training_steps=1000, normalization_method="none", activation_path=".", **options
    )  # fmt: skip
    model = CrossLayerTranscoder(config, process_group=None, device=inputs.device)
    losses = LossManager(training)

    def step(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        reads, targets = dict(enumerate(inputs)), dict(enumerate(outputs))
        activations = model.get_feature_activations(reads)  # as its trainer does, before the loss encodes again
        loss, _ = losses.compute_total_loss(model, reads, targets, 0, 1000, precomputed_activations=activations)
        return loss, sum((a != 0).sum() for a in activations.values()) / (n_layers * inputs.shape[1])

    return model, step


def openmoss(inputs: Tensor, n_features: int, k: int, **options: Any) -> tuple[nn.Module, Step]:
    """The model and step of Llamascopium; `options` of its model."""
    from llamascopium.models.clt import CLTConfig, CrossLayerTranscoder

    n_layers, _, d_model = inputs.shape
    reads, writes = ([f"{kind}{layer}" for layer in range(n_layers)] for kind in ("in", "out"))
    config = CLTConfig(
        d_model=d_model, expansion_factor=n_features / d_model, act_fn="batchtopk", top_k=k, hook_points_in=reads,
        hook_points_out=writes, norm_activation="inference", device=str(inputs.device), **options,
    )  # fmt: skip
    model = CrossLayerTranscoder(config)
    model.init_parameters()

    def step(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        batch = dict(zip(reads, inputs, strict=True)) | dict(zip(writes, outputs, strict=True))
        result = model.compute_loss(batch | {"tokens": torch.zeros(inputs.shape[1])})
        return result["loss"], (result["feature_acts"] != 0).sum() / (n_layers * inputs.shape[1])

    return model, step


if __name__ == "__main__":
    main()
