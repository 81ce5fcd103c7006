"""Activations written by a known cross-layer transcoder, as a stream to train on."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from transcoders import CrossLayerTranscoder, TranscoderConfig
from transcoders.scales import Scales
from transcoders.shuffle import Batch


def planted_transcoder(n_layers: int, d_model: int, n_features: int, seed: int = 0) -> CrossLayerTranscoder:
    """Unit encoder vectors; a feature writes the most to its own layer and less to later ones."""
    generator = torch.Generator().manual_seed(seed)
    transcoder = CrossLayerTranscoder(TranscoderConfig(n_layers, d_model, n_features, "relu")).requires_grad_(False)
    transcoder.W_enc.copy_(normalize(torch.randn(transcoder.W_enc.shape, generator=generator), dim=-1))
    for decoder in transcoder.W_dec:
        size = 0.6 ** torch.arange(decoder.shape[1])[:, None]
        decoder.copy_(normalize(torch.randn(decoder.shape, generator=generator), dim=-1) * size)
    return transcoder


def planted_activations(
    transcoder: CrossLayerTranscoder, n_tokens: int, k: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Features fire at random, k per layer and token on average; inputs are sums of what they read."""
    shape = (transcoder.config.n_layers, n_tokens, transcoder.config.n_features)
    fires = torch.rand(shape, generator=generator) < k / transcoder.config.n_features
    activations = fires * (1 + torch.rand(shape, generator=generator))
    return activations @ transcoder.W_enc, transcoder.decode(activations), activations


@dataclass
class PlantedStream:
    """An endless stream of them, in scaled units."""

    transcoder: CrossLayerTranscoder
    scales: Scales
    k: int
    seed: int
    device: torch.device = field(default=torch.device("cpu"))
    served: int = 0

    def next(self, n: int) -> Batch:
        generator = torch.Generator().manual_seed(self.seed + self.served)
        self.served += 1
        inputs, outputs, _ = planted_activations(self.transcoder, n, self.k, generator)
        return Batch(
            inputs * self.scales.inputs[:, None, None], outputs * self.scales.outputs[:, None, None],
            torch.ones(n, dtype=torch.int64),
        )  # fmt: skip

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"served": self.served}, {"nothing": torch.zeros(1)}

    def restore(self, plain: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.served = plain["served"]
