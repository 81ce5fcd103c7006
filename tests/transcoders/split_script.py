"""Trains tiny transcoders of several kinds under torchrun; run by test_parallel.py, not by pytest."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from tests.tracer.conftest import tiny_llama, tiny_tokenizer
from tests.transcoders.test_train import SMALL, texts
from transcoders.corpus import tokens_corpus
from transcoders.parallel import Place, joined
from transcoders.train import Reporting, train_to_folder

SHORT = replace(SMALL, tokens=40 * 256, streams=2)
KINDS = {
    "topk": replace(SHORT, activation="topk"),
    "jumprelu": replace(SHORT, activation="jumprelu", sparsity=0.02, threshold_start=0.1),
    "relu": replace(SHORT, activation="relu", sparsity=0.02),
    "dead": replace(SHORT, density_steps=2, dead_below=0.05, dead_weight=1.0),
}


def train_all(folder: Path, place: Place) -> None:
    """One transcoder of each kind, in a folder of its name."""
    for name, config in KINDS.items():
        train_to_folder(
            tiny_llama(0).requires_grad_(False), tiny_tokenizer(), tokens_corpus(texts(), "texts"), config,
            folder / name, place=place, reporting=Reporting(report_every=1),
        )  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    with joined(int(sys.argv[2]), "cpu") as place:
        train_all(Path(sys.argv[1]), place)


if __name__ == "__main__":
    main()
