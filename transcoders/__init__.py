"""Train, evaluate, load and save cross-layer transcoders."""

from transcoders.checkpoint import convert, load, load_on_demand, open_stored, save
from transcoders.config import TrainConfig, TranscoderConfig
from transcoders.errors import TranscoderError
from transcoders.evaluate import Report, evaluate
from transcoders.model import CrossLayerTranscoder
from transcoders.train import Reporting, Stopped, train

__all__ = [
    "CrossLayerTranscoder",
    "Report",
    "Reporting",
    "Stopped",
    "TrainConfig",
    "TranscoderConfig",
    "TranscoderError",
    "convert",
    "evaluate",
    "load",
    "load_on_demand",
    "open_stored",
    "save",
    "train",
]  # fmt: skip
