"""The cross-layer transcoder: a feature reads one layer and writes to the MLP outputs of that and every later layer."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from transcoders.activation import jump_relu, relu, top_k
from transcoders.config import TranscoderConfig
from transcoders.stored import Stored

DENSE = 0.1
"""Where a larger share of features fires on a token, one matrix product is faster than gathering decoder rows."""
MOST = 0.5
"""Where a larger share of a layer's features is used, its decoder vectors stay in their file, and are not copied."""


class CrossLayerTranscoder(nn.Module):
    """Encoders and decoders of every layer ("Circuit Tracing", 2025, section 2).

    `W_dec[l]` has shape (feature, layers from l on, d_model): its slice [:, k] writes to layer l + k. `W_skip[l]`
    (d_model, d_model), where there is one, is applied as x @ W_skip[l].
    """

    threshold: Tensor
    W_skip: nn.Parameter | None

    def __init__(self, config: TranscoderConfig) -> None:
        super().__init__()
        self.config = config
        n_layers, n_features, d_model = config.n_layers, config.n_features, config.d_model
        self.W_enc = nn.Parameter(torch.zeros(n_layers, n_features, d_model))
        self.b_enc = nn.Parameter(torch.zeros(n_layers, n_features))
        self.b_dec = nn.Parameter(torch.zeros(n_layers, d_model))
        self.W_dec = nn.ParameterList(
            [nn.Parameter(torch.zeros(n_features, config.reach(layer), d_model)) for layer in range(n_layers)]
        )
        self.W_skip = nn.Parameter(torch.zeros(n_layers, d_model, d_model)) if config.skip else None
        self.register_buffer("threshold", torch.zeros(n_layers, n_features))

    def initialise(self, generator: torch.Generator) -> None:
        """Random unit encoder vectors; decoders stay at zero."""
        with torch.no_grad():
            vectors = torch.randn(self.W_enc.shape, generator=generator)
            self.W_enc.copy_(vectors / vectors.norm(dim=-1, keepdim=True))

    def pre_activations(
        self, inputs: Float[Tensor, "layer position d_model"]
    ) -> Float[Tensor, "layer position feature"]:
        """z = W_enc x + b_enc, layer by layer, in the precision of the inputs whatever that of the weights."""
        return torch.baddbmm(self.b_enc[:, None].to(inputs.dtype), inputs, self.W_enc.to(inputs.dtype).transpose(1, 2))

    def activate(
        self, pre_activation: Float[Tensor, "layer position feature"]
    ) -> Float[Tensor, "layer position feature"]:
        """Feature activations: the pre-activation of active features, 0 of the others."""
        return self._activate(pre_activation, self.threshold[:, None])

    def encode(self, inputs: Float[Tensor, "layer position d_model"]) -> Float[Tensor, "layer position feature"]:
        """Feature activations of MLP inputs."""
        return self.activate(self.pre_activations(inputs))

    def pre_activations_of(
        self, layer: int, inputs: Float[Tensor, "*position d_model"]
    ) -> Float[Tensor, "*position feature"]:
        """The same of one layer."""
        return inputs @ self.W_enc[layer].to(inputs.dtype).T + self.b_enc[layer].to(inputs.dtype)

    def activate_layer(
        self, layer: int, pre_activation: Float[Tensor, "*position feature"]
    ) -> Float[Tensor, "*position feature"]:
        """Feature activations of one layer."""
        return self._activate(pre_activation, self.threshold[layer])

    def encode_layer(
        self, layer: int, inputs: Float[Tensor, "*position d_model"]
    ) -> Float[Tensor, "*position feature"]:
        """Feature activations of MLP inputs of one layer."""
        return self.activate_layer(layer, self.pre_activations_of(layer, inputs))

    def _activate(self, pre_activation: Tensor, threshold: Tensor) -> Tensor:
        match self.config.activation:
            case "relu":
                return relu(pre_activation)
            case "jumprelu":
                return jump_relu(pre_activation, threshold)
            case _:
                return top_k(pre_activation, self.config.k)

    def decode(self, activations: Float[Tensor, "layer position feature"]) -> Float[Tensor, "layer position d_model"]:
        """MLP outputs reconstructed from the activations of all layers, less what skip connections add."""
        n_layers = self.config.n_layers
        outputs = [self.b_dec[layer] for layer in range(n_layers)]
        for source, active in enumerate(activations.unbind()):  # not by index: its backward would fill zeros for each
            for k, write in enumerate(self.writes(source, active)):
                outputs[source + k] = outputs[source + k] + write
        return torch.stack(outputs)

    def writes(
        self, source: int, activations: Float[Tensor, "*position feature"]
    ) -> tuple[Float[Tensor, "*position d_model"], ...]:
        """What the features of one layer add to its own MLP output and to those above, layer by layer."""
        flat, decoder = activations.flatten(0, -2), self.W_dec[source].flatten(1)
        most = int((flat != 0).sum(-1).max()) if len(flat) else 0
        if most > DENSE * self.config.n_features:
            written = flat @ decoder
        else:
            chosen = flat.abs().topk(max(most, 1)).indices
            written = embedding_bag(chosen, decoder, per_sample_weights=flat.gather(1, chosen), mode="sum")
        return written.unflatten(0, activations.shape[:-1]).split(self.config.d_model, dim=-1)

    def decoder_rows(self, source: int, features: Int[Tensor, " row"]) -> Float[Tensor, "row reach d_model"]:
        """Decoder vectors of some features of a layer: one for each layer they write to."""
        return self.W_dec[source][features]

    def decoders_with(
        self, source: int, features: Int[Tensor, " used"]
    ) -> tuple[Float[Tensor, "row reach d_model"], Int[Tensor, " used"]]:
        """Decoder vectors of a layer among which are those of some distinct features, and the row of each of these.

        Where it takes less memory than to copy the rows, they are those of the whole layer.
        """
        return self.W_dec[source].detach(), features

    def skip(self, inputs: Float[Tensor, "layer position d_model"]) -> Float[Tensor, "layer position d_model"]:
        """What skip connections add: a linear map of each layer's input, or nothing."""
        return torch.zeros_like(inputs) if self.W_skip is None else torch.bmm(inputs, self.W_skip.to(inputs.dtype))

    def forward(self, inputs: Float[Tensor, "layer position d_model"]) -> Float[Tensor, "layer position d_model"]:
        """MLP outputs reconstructed from MLP inputs."""
        return self.decode(self.encode(inputs)) + self.skip(inputs)


class StoredTranscoder(CrossLayerTranscoder):
    """A transcoder whose decoders stay in their files: only the rows of active features are ever read.

    `W_dec` is empty; everything else is as in memory.
    """

    def __init__(self, stored: Stored) -> None:
        with torch.device("meta"):  # decoders may be larger than the memory
            super().__init__(stored.config)
        self.W_dec = nn.ParameterList()
        self.to_empty(device="cpu")
        self.threshold.zero_()
        self._stored = stored

    def writes(
        self, source: int, activations: Float[Tensor, "*position feature"]
    ) -> tuple[Float[Tensor, "*position d_model"], ...]:
        """What the features of one layer add to its own MLP output and to those above, layer by layer."""
        [active] = activations.flatten(0, -2).any(0).nonzero(as_tuple=True)
        rows = self.decoder_rows(source, active)
        return (activations[..., active] @ rows.flatten(1)).split(self.config.d_model, dim=-1)

    def decoder_rows(self, source: int, features: Int[Tensor, " row"]) -> Float[Tensor, "row reach d_model"]:
        """Decoder vectors of some features of a layer, each read once and in the order of the file."""
        wanted, place = features.cpu().unique(return_inverse=True)
        rows = self._stored.decoder(source, wanted).to(self.W_enc)
        return rows if torch.equal(features.cpu(), wanted) else rows[place.to(rows.device)]

    def decoders_with(
        self, source: int, features: Int[Tensor, " used"]
    ) -> tuple[Float[Tensor, "row reach d_model"], Int[Tensor, " used"]]:
        """Those of the whole layer as they lie in its file, if most are used, and as they are; else their copies."""
        decoder = self._stored.mapped(source)
        as_it_is = decoder is not None and (decoder.dtype, decoder.device) == (self.W_enc.dtype, self.W_enc.device)
        if decoder is not None and as_it_is and len(features) > MOST * len(decoder):
            return decoder, features
        return self.decoder_rows(source, features), torch.arange(len(features), device=features.device)
