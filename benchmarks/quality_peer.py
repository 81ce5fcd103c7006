"""A transcoder trained by a peer with its own loss, in a process of its own; written as tensors that ours can read.

Known are the peers of benchmarks/train_peer.py. Their BatchTopK becomes thresholds at the end: decode-clt's by its own
conversion, Llamascopium's by the least that fired in a layer, on average over some batches. The learning rate of each
step comes with the data.
"""

from pathlib import Path

import click
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.train_peer import crosslayer_coding, openmoss

CALIBRATION = 8
"""Batches that show the threshold."""


def _of_crosslayer_coding(model: nn.Module, held: list[Tensor]) -> dict[str, Tensor]:
    encoders, decoders = model.encoder_module.encoders, model.decoder_module.decoders
    layers = range(len(encoders))
    # its own way from BatchTopK, which ranks by deviations from each feature's mean over the batch, to thresholds
    threshold = model.estimate_theta_posthoc([(dict(enumerate(inputs)), {}) for inputs in held], num_batches=len(held))
    tensors = {
        "threshold": threshold,
        "W_enc": torch.stack([encoder.weight for encoder in encoders]),
        "b_enc": torch.stack([_bias(encoder, encoder.weight.shape[0]) for encoder in encoders]),
        "b_dec": torch.stack(
            [sum(_bias(decoders[f"{s}->{t}"], encoders[0].weight.shape[1]) for s in range(t + 1)) for t in layers]
        ),
    }
    for source in layers:
        reached = [decoders[f"{source}->{target}"].weight.T for target in layers[source:]]
        tensors[f"W_dec.{source}"] = torch.stack(reached, dim=1)
    return tensors


def _of_openmoss(model: nn.Module, held: list[Tensor]) -> dict[str, Tensor]:
    layers = range(len(model.W_D))
    norm = model.decoder_norm_per_feature()  # it ranks activations by what they write
    found = [model.encode(inputs.transpose(0, 1)) * norm for inputs in held]
    least = torch.stack([torch.stack([_least(one[:, layer]) for one in found]).mean() for layer in layers])
    tensors = {
        "W_enc": model.W_E.transpose(1, 2), "b_enc": model.b_E, "b_dec": torch.stack([*model.b_D]),
        "threshold": least[:, None] / norm.clamp(min=1e-12),
    }  # fmt: skip
    for source in layers:
        reached = [model.W_D[target][source] for target in layers[source:]]
        tensors[f"W_dec.{source}"] = torch.stack(reached, dim=1)
    return tensors


def _bias(module: nn.Module, width: int) -> Tensor:
    return torch.zeros(width) if module.bias_param is None else module.bias_param


def _least(activations: Tensor) -> Tensor:
    return activations[activations > 0].min()


PEERS = {"crosslayer-coding": (crosslayer_coding, _of_crosslayer_coding), "OpenMOSS": (openmoss, _of_openmoss)}
"""What makes a peer's model and its step, and what reads its weights as tensors of ours."""


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("way", type=click.Choice([*PEERS]))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--features", default=1024, show_default=True)
@click.option("--k", default=10, show_default=True)
@click.option("--clip", default=1.0, show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(file: Path, way: str, output: Path, features: int, k: int, clip: float, threads: int) -> None:
    """Train on inputs and outputs (layer, site, d_model) in FILE, in the batches (step, token) that it names.

    Each step has its learning rate there, too.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    cache = load_file(file)
    batches, rates = cache["batches"], cache["rates"].tolist()
    make, tensors_of = PEERS[way]
    model, step = make(cache["inputs"], features, k)
    optimizer = torch.optim.Adam(model.parameters())
    for number, (chosen, rate) in enumerate(zip(batches, rates, strict=True)):
        optimizer.param_groups[0]["lr"] = rate
        loss, active = step(cache["inputs"][:, chosen], cache["outputs"][:, chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        if number % 100 == 0:
            print(f"step {number}  loss {float(loss.detach()):.4f}  {float(active):.1f} active", flush=True)
    with torch.no_grad():
        held = [cache["inputs"][:, chosen] for chosen in batches[-CALIBRATION:]]
        tensors = tensors_of(model, held)
    save_file({name: value.contiguous() for name, value in tensors.items()}, output)


if __name__ == "__main__":
    main()
