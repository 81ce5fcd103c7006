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
TRAINED = ("batchtopk", "topk", "jumprelu", "relu")
PRECISIONS = ("float32", "bfloat16")
MOMENTS = ("float32", "8bit")


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
        if self.k > self.n_features:
            raise TranscoderError(
                f"k is {self.k} of {self.n_features} features a layer; expected fewer active than there are: correct k."
            )


@dataclass(frozen=True)
class TrainConfig:
    """How a transcoder is trained: everything that decides the result, and nothing else."""

    n_features: int = 4096
    """Features of each layer."""
    cross_layer: bool = True
    """Whether features write to every later layer too; those of a per-layer transcoder write to their own."""
    skip: bool = False
    """Whether each layer also writes a linear map of what it reads."""
    reads: str = "mlp.hook_in"
    writes: str = "hook_mlp_out"

    activation: str = "batchtopk"
    """"batchtopk" (one threshold for all layers, saved as JumpReLU), "topk", "jumprelu" or "relu"."""
    k: int = 16
    """Active features per layer and token: on average ("batchtopk") or at most ("topk")."""
    k_start: float = 4.0
    """Training starts with so many times k and comes down to k over the first `k_anneal` of the steps."""
    k_anneal: float = 0.1
    sparsity: float = 1.0
    """Weight of the tanh penalty of "jumprelu" and "relu"; grows from 0 over all of training."""
    tanh_scale: float = 4.0
    """The penalty of a feature is tanh(scale · activation · decoder norm)."""
    bandwidth: float = 1.0
    """Width of the window around a JumpReLU threshold in which it gets a gradient."""
    threshold_start: float = 0.03
    """Where JumpReLU thresholds start."""

    tokens: int = 20_000_000
    """Tokens to train on."""
    batch_tokens: int = 4096
    """Tokens in a step."""
    learning_rate: float = 1e-3
    warm_up: int = 50
    """Steps until the learning rate is at its height."""
    decay: float = 0.2
    """Share of the steps, at the end, over which the learning rate falls to nothing."""
    clip: float = 1.0
    """Largest norm of all gradients together."""
    weights: str = "float32"
    """"float32", or "bfloat16" with stochastic rounding."""
    moments: str = "float32"
    """The optimiser's own numbers: "float32", or "8bit" for matrices."""
    products: str = "float32"
    """Precision of the matrix products with "float32" weights: "float32" or "bfloat16"."""

    balanced: bool | None = None
    """Divide each token's error by that token's own size; None: where few tokens hold most of what MLPs write."""
    error_floor: float = 0.02
    """Added to each token's squared norm, as a share of the layer's mean, before the error is divided by it."""
    density_steps: int = 1000
    """Steps over which firing is averaged."""
    dead_below: float = 1e-6
    """A feature that fires on a smaller share of tokens counts as dead and is pulled back."""
    dead_weight: float = 0.03
    """Weight of the error that dead features are asked to explain."""
    dead_tokens: int = 16
    """Dead features are trained on every so many tokens: they are rarely worth the full cost."""

    context: int = 128
    """Tokens in a sequence."""
    buffer_tokens: int = 131_072
    """Tokens that the shuffling buffer holds."""
    largest_norm: float = 20.0
    """Tokens whose MLP inputs are larger than so many times the mean are left out."""
    streams: int = 1
    """Into so many parts the data is split; several processes with data of their own take some of them each."""
    seed: int = 0

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_tokens

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("activation", self.activation, TRAINED), ("weights", self.weights, PRECISIONS),
            ("products", self.products, PRECISIONS), ("moments", self.moments, MOMENTS),
            ("reads", self.reads, READS), ("writes", self.writes, WRITES),
        ):  # fmt: skip
            if value not in allowed:
                raise TranscoderError(f"{name} is {value!r}; expected one of {', '.join(allowed)}.")
        _check_numbers(self)
        if self.k > self.n_features:
            raise TranscoderError(f"k is {self.k} of {self.n_features} features; expected fewer active than there are.")
        if self.steps < 1:
            raise TranscoderError(f"{self.tokens:,} tokens do not fill one step of {self.batch_tokens:,}; give more.")
        if self.batch_tokens % self.streams:
            raise TranscoderError(f"steps of {self.batch_tokens} tokens cannot be split into {self.streams} streams.")
        if self.buffer_tokens < 2 * self.batch_tokens:
            raise TranscoderError(
                f"a buffer of {self.buffer_tokens:,} tokens cannot shuffle steps of {self.batch_tokens:,}; "
                f"expected {2 * self.batch_tokens:,} or more."
            )


def _check_numbers(config: TrainConfig) -> None:
    for name in ("n_features", "k", "batch_tokens", "streams", "density_steps", "dead_tokens"):
        if getattr(config, name) < 1:
            raise TranscoderError(f"{name} is {getattr(config, name)}; expected 1 or more.")
    if config.context < 2:
        raise TranscoderError(
            f"context is {config.context}; expected 2 tokens or more: nothing is learnt from the first of a sequence."
        )
    for name in ("learning_rate", "clip"):
        if not getattr(config, name) > 0:  # which not-a-number is not either
            raise TranscoderError(f"{name} is {getattr(config, name)}; expected a number above 0.")
    if not config.sparsity >= 0:
        raise TranscoderError(f"sparsity is {config.sparsity}; expected 0 or more.")
