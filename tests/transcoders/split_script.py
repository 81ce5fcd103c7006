"""Trains tiny transcoders of several kinds under torchrun; run by test_parallel.py, not by pytest."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from tests.tracer.conftest import tiny_llama, tiny_tokenizer
from tests.transcoders.test_train import SMALL, texts
from transcoders.corpus import tokens_corpus
from transcoders.objective import clip
from transcoders.parallel import Place, joined
from transcoders.train import Reporting, train_to_folder

SHORT = replace(SMALL, tokens=40 * 256, streams=2)
KINDS = {
    "topk": replace(SHORT, activation="topk"),
    "jumprelu": replace(SHORT, activation="jumprelu", sparsity=0.02, threshold_start=0.1),
    "relu": replace(SHORT, activation="relu", sparsity=0.02),
    "dead": replace(SHORT, density_steps=2, dead_below=0.05, dead_weight=1.0),
    "clipped": replace(SHORT, clip=1e-3),
}


def train_all(folder: Path, place: Place) -> None:
    """One transcoder of each kind, in a folder of its name."""
    for name, config in KINDS.items():
        train_to_folder(
            tiny_llama(0).requires_grad_(False), tiny_tokenizer(), tokens_corpus(texts(), "texts"), config,
            folder / name, place=place, reporting=Reporting(report_every=1),
        )  # fmt: skip


def clip_in_one_of_two(folder: Path, rank: int) -> None:
    """Clip gradients of 2 and 6 for the features of two processes, and of 9 for what both hold: together 11."""
    dist.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    place = Place(shard=rank, shards=2, feature_group=dist.group.WORLD)
    weights = {name: torch.zeros(1, requires_grad=True) for name in ("W_enc", "b_dec")}
    weights["W_enc"].grad, weights["b_dec"].grad = torch.tensor([[2.0], [6.0]][rank]), torch.tensor([9.0])
    clip(place, weights, 1.1)
    found = {name: weight.grad.item() for name, weight in weights.items() if weight.grad is not None}
    (folder / f"clipped-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    torch.set_num_threads(1)
    with joined(int(sys.argv[2]), "cpu") as place:
        train_all(Path(sys.argv[1]), place)


if __name__ == "__main__":
    main()
