"""What one trace is asked to do: a frozen value, also stored with the graph."""

from dataclasses import dataclass

from tracer.errors import TraceError


@dataclass(frozen=True)
class TraceConfig:
    """Settings of a trace; the defaults are those of the command line."""

    target: str | None = None
    """Explain this token instead of the most probable ones."""
    target_minus: str | None = None
    """Explain `target` less this token: what made the model prefer one to the other."""
    max_logits: int = 10
    """Explain at most this many tokens."""
    logit_mass: float = 0.95
    """Take the top tokens until their probabilities sum to this."""
    coverage: float = 0.99
    """Attribute features until at most 1 − coverage of each layer's influence is left out; 1 attributes all."""
    max_features: int | None = None
    """Attribute at most this many features."""
    batch_size: int = 256
    """Rows computed at once; does not change them."""
    node_threshold: float = 0.8
    """Keep the most influential nodes until they hold this share of all influence."""
    edge_threshold: float = 0.98
    """Keep the strongest edges between them until they hold this share."""
    prune: bool = True
    """False keeps every node and edge."""

    def __post_init__(self) -> None:
        for name in ("logit_mass", "coverage", "node_threshold", "edge_threshold"):
            if not 0 < getattr(self, name) <= 1:
                raise TraceError(f"{name} is {getattr(self, name)}; expected a share above 0 and up to 1.")
        for name in ("max_logits", "max_features", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TraceError(f"{name} is {value}; expected 1 or more.")
        if self.target_minus is not None and self.target is None:
            raise TraceError("target_minus was given without target; name the token to compare with it.")
