"""Train, evaluate, load and save cross-layer transcoders."""

from transcoders.checkpoint import load, save
from transcoders.config import TrainConfig, TranscoderConfig
from transcoders.errors import TranscoderError
from transcoders.evaluate import Report, evaluate
from transcoders.model import CrossLayerTranscoder
from transcoders.train import train

__all__ = [
    "CrossLayerTranscoder", "Report", "TrainConfig", "TranscoderConfig", "TranscoderError",
    "evaluate", "load", "save", "train",
]  # fmt: skip
