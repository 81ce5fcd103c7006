"""From a prompt to an attribution graph, and back to the model to check it."""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "ReplacementModel": "tracer.replacement",
    "Sources": "tracer.sources",
    "Targets": "tracer.targets",
    "Trace": "tracer.pipeline",
    "TraceConfig": "tracer.config",
    "TraceError": "tracer.errors",
    "attribute": "tracer.attribution",
    "difference_target": "tracer.targets",
    "direction_target": "tracer.targets",
    "feature_target": "tracer.targets",
    "join": "tracer.targets",
    "prepare": "tracer.pipeline",
    "token_targets": "tracer.targets",
    "top_targets": "tracer.targets",
    "trace": "tracer.pipeline",
    "trace_prepared": "tracer.pipeline",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    # Loaded when first used: the command line must answer --help without waiting for torch.
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tracer' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
