"""What a cross-layer (or per-layer) transcoder is, and how one is trained: frozen values."""

from dataclasses import dataclass

from transcoders.errors import TranscoderError

READS = ("hook_resid_mid", "mlp.hook_in", "ln2.hook_normalized")
"""Before the MLP's norm; after it; after an RMSNorm but before its gain: circuit-tracer's names.

Of a LayerNorm the last is the whole output, gain and bias included, as it is where these transcoders were trained.
"""
WRITES = ("hook_mlp_out", "mlp.hook_out")
"""What the MLP adds to the residual stream; both names mean the same where there is no norm after the MLP."""
ACTIVATIONS = ("relu", "jumprelu", "topk")


@dataclass(frozen=True)
class TranscoderConfig:
    """Shape of a cross-layer transcoder and where it is attached."""

    n_layers: int
    d_model: int
    n_features: int
    """Features of each layer."""
    activation: str = "jumprelu"
    """"relu", "jumprelu" (a threshold per feature) or "topk" (the k largest of a layer and position)."""
    k: int = 0
    """Active features per layer and position; for "topk" only."""
    reads: str = "mlp.hook_in"
    writes: str = "hook_mlp_out"
    model_name: str = ""
    """The language model it was trained on."""
    cross_layer: bool = True
    """Whether features write to every later layer too; those of a per-layer transcoder write to their own."""
    skip: bool = False
    """Whether each layer also writes a linear map of what it reads."""

    def reach(self, layer: int) -> int:
        """How many layers the features of a layer write to, from their own on."""
        return self.n_layers - layer if self.cross_layer else 1

    def sources(self, layer: int) -> range:
        """The layers whose features write to a layer."""
        return range(0 if self.cross_layer else layer, layer + 1)

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("activation", self.activation, ACTIVATIONS), ("reads", self.reads, READS), ("writes", self.writes, WRITES)
        ):  # fmt: skip
            if value not in allowed:
                raise TranscoderError(f"{name} is {value!r}; expected one of {', '.join(allowed)}.")
        if (self.activation == "topk") != (self.k > 0):
            raise TranscoderError(
                f"k is {self.k} with activation {self.activation!r}; k > 0 belongs to topk, and only to it."
            )


@dataclass(frozen=True)
class TrainConfig:
    """How a transcoder is trained."""

    steps: int = 2500
    learning_rate: float = 2e-3
    error_floor: float = 0.02
    """Added to each token's squared norm, as a share of the layer's mean, before the error is divided by it."""
    dead_after: int = 60
    """A feature that did not fire for this many steps counts as dead and is pulled back."""
    dead_weight: float = 0.03
    """Weight of the error that dead features are asked to explain."""
    dead_tokens: int = 4
    """Dead features are trained on every so many tokens: they are rarely worth the full cost."""
    written_weight: float = 0.0
    """Weight of what features write, in norms as shares of the MLP output's: it silences those that add little."""
    fewest: tuple[int, ...] = ()
    """Per layer, so many features are to fire on a token at least: those nearest to firing are pulled up."""
    fewest_weight: float = 0.05
    bfloat16: bool = False
    """Multiply by the decoders in bfloat16; weights, optimiser and sums stay float32."""
    seed: int = 0
