"""Questions as token ids: padded batches for training and measuring."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from examples.lab.world import Question


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids, and where an answer token has to be predicted."""

    tokens: Int[Tensor, "batch position"]
    predicts: Bool[Tensor, "batch position"]
    """True at the positions whose next token is part of the answer."""
    length: Int[Tensor, " batch"]
    direct: Bool[Tensor, " batch"]
    """Whether a place follows its city at once."""


def encode(questions: list[Question], tokenizer: PreTrainedTokenizerFast) -> Batch:
    """Prompt and answer of every question as one batch."""
    prompts = tokenizer([question.prompt for question in questions])["input_ids"]
    whole = [
        prompt + answer[1:]
        for prompt, answer in zip(prompts, tokenizer([q.answer for q in questions])["input_ids"], strict=True)
    ]
    width = max(map(len, whole))
    tokens = torch.zeros(len(whole), width, dtype=torch.int64)
    predicts = torch.zeros(len(whole), width, dtype=torch.bool)
    for row, (prompt, ids) in enumerate(zip(prompts, whole, strict=True)):
        tokens[row, : len(ids)] = torch.tensor(ids)
        predicts[row, len(prompt) - 1 : len(ids) - 1] = True
    direct = torch.tensor([question.family.startswith("city then") for question in questions])
    return Batch(tokens, predicts, torch.tensor([*map(len, whole)]), direct)


def select(batch: Batch, rows: Int[Tensor, " row"]) -> Batch:
    """Some rows of a batch, cut to the longest of them."""
    length = batch.length[rows]
    width = int(length.max())
    return Batch(batch.tokens[rows, :width], batch.predicts[rows, :width], length, batch.direct[rows])


def new_prefixes(batch: Batch, counts: Counter[tuple[int, ...]]) -> Bool[Tensor, "batch position"]:
    """Where a prefix ends that was not met before, in the order of `counts`; the first token alone is none."""
    keep = torch.zeros_like(batch.tokens, dtype=torch.bool)
    for row, (sequence, n) in enumerate(zip(batch.tokens.tolist(), batch.length.tolist(), strict=True)):
        for position in range(1, n):
            prefix = tuple(sequence[: position + 1])
            keep[row, position] = prefix not in counts
            counts[prefix] += 1
    return keep


def repeated_sequences(vocabulary: Int[np.ndarray, " token"], n: int, random: np.random.Generator) -> Batch:
    """Random sequences of 4 to 8 distinct tokens, each given twice: the second time every token can be known."""
    width = 17
    tokens = torch.zeros(n, width, dtype=torch.int64)
    predicts = torch.zeros(n, width, dtype=torch.bool)
    period = torch.tensor(random.integers(4, 9, n))
    for row in range(n):
        k = int(period[row])
        sequence = torch.tensor(random.choice(vocabulary, k, replace=False))
        tokens[row, 1 : 2 * k + 1] = torch.cat([sequence, sequence])
        predicts[row, k + 1 : 2 * k] = True
    return Batch(tokens, predicts, 2 * period + 1, torch.zeros(n, dtype=torch.bool))
