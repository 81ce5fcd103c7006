"""What one trace is asked to do: a frozen value, also stored with the graph."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tracer.errors import TraceError


@dataclass(frozen=True)
class TraceConfig:
    """Settings of a trace; the defaults are those of the command line."""

    target: Sequence[str] = ()
    """Explain these tokens instead of the most probable ones, each weighted by its probability."""
    target_minus: str | None = None
    """Explain each `target` less this token: what made the model prefer one to the other."""
    target_difference: Sequence[Sequence[str]] = ()
    """Explain the first token of each pair less the second, beside whatever else is named."""
    target_feature: Sequence[str] = ()
    """Explain these active features, written LAYER/FEATURE or LAYER/FEATURE@POSITION."""
    target_direction: Sequence[str] = ()
    """Explain these directions at the final norm's output: .npy or .safetensors files of one vector each."""
    position: int | str = -1
    """Explain what the model says after this token: its number, counted from the end if negative, or a word."""
    max_logits: int = 10
    """Explain at most this many tokens."""
    logit_mass: float = 0.95
    """Take the top tokens until their probabilities sum to this."""
    coverage: float = 0.99
    """Attribute features until at most 1 − coverage of each layer's influence is left out; 1 attributes all."""
    max_features: int | None = None
    """Attribute at most this many features."""
    row_share: float | None = None
    """Keep of each target's inputs the largest that hold this share of Σ|input|; by default all that fit."""
    batch_size: int | None = None
    """Rows computed at once, by default what suits the prompt's length; does not change them."""
    node_threshold: float = 0.8
    """Keep the most influential nodes until they hold this share of all influence."""
    edge_threshold: float = 0.98
    """Keep the strongest edges between them until they hold this share."""
    prune: bool = True
    """False keeps every node and edge."""

    def __post_init__(self) -> None:
        for name in ("target", "target_feature", "target_direction"):
            if isinstance(getattr(self, name), str):
                raise TraceError(f"{name} is the text {getattr(self, name)!r}; give a tuple of texts.")
            # JSON gives lists; a frozen value has none
            object.__setattr__(self, name, tuple(getattr(self, name)))
        pairs = tuple(tuple(pair) for pair in self.target_difference)
        if any(len(pair) != 2 for pair in pairs):
            raise TraceError(f"target_difference is {list(self.target_difference)}; give pairs of tokens.")
        object.__setattr__(self, "target_difference", pairs)
        object.__setattr__(self, "position", as_position(self.position))
        for name in ("logit_mass", "coverage", "node_threshold", "edge_threshold", "row_share"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise TraceError(f"{name} is {value}; expected a share above 0 and up to 1.")
        for name in ("max_logits", "max_features", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TraceError(f"{name} is {value}; expected 1 or more.")
        if self.target_minus is not None and not self.target:
            raise TraceError("target_minus was given without target; name the token to compare with it.")
        for text in self.target_feature:
            parse_feature(text)


def parse_feature(text: str) -> tuple[int, int, int | str | None]:
    """Layer, number and position of LAYER/FEATURE@POSITION; the position is None where it is not named."""
    parts = re.fullmatch(r"(\d+)/(\d+)(?:@(.+))?", text)
    if parts is None:
        raise TraceError(f"feature {text!r} is not written LAYER/FEATURE or LAYER/FEATURE@POSITION, as 3/217@Dallas.")
    layer, feature, position = parts.groups()
    return int(layer), int(feature), None if position is None else as_position(position)


def as_position(position: int | str) -> int | str:
    """A number where the text is one; any other text is a word of the prompt."""
    return int(position) if isinstance(position, str) and re.fullmatch(r"-?\d+", position) else position
