"""Text to evaluate on: right-padded sequences, which of their tokens count, and where answers are read."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from transcoders.corpus import Corpus, pack
from transcoders.errors import TranscoderError


@dataclass(frozen=True)
class Passages:
    """Sequences of tokens; what pads them on the right neither counts nor answers."""

    tokens: Int[Tensor, "sequence position"]
    keep: Bool[Tensor, "sequence position"]
    """Tokens whose MLP outputs are to be explained; never the first of a sequence, which is an attention sink."""
    readout: Bool[Tensor, "sequence position"]
    """Tokens after which the model's and the replacement model's next tokens are compared."""


def passages_of_prompts(prompts: Sequence[Sequence[int]]) -> Passages:
    """Prompts as token ids; the answer is read after the last token."""
    for ids in prompts:
        if len(ids) < 2:
            raise TranscoderError(f"a prompt has {len(ids)} tokens; expected two or more, of which the first is kept.")
    length = torch.tensor([len(ids) for ids in prompts])
    position = torch.arange(int(length.max()))
    tokens = torch.zeros(len(prompts), len(position), dtype=torch.int64)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)] = torch.tensor(ids)
    return Passages(tokens, (position > 0) & (position < length[:, None]), position == length[:, None] - 1)


def passages_of_corpus(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, context: int, n_tokens: int
) -> Passages:  # fmt: skip
    """The first tokens of a corpus in sequences of one length, the last one shorter; answers are read after each token.

    Ends where the documents end: none is read twice.
    """
    packed = pack(corpus, tokenizer, context)
    body = context - (packed.first_token is not None)
    wanted = ceil(n_tokens / (context - 1)) * body
    ids: list[int] = []
    for text in corpus.documents(0):
        ids += packed.encode(text)
        if len(ids) >= wanted:
            break
    first = [] if packed.first_token is None else [packed.first_token]
    sequences = [[*first, *ids[start : min(start + body, wanted)]] for start in range(0, min(len(ids), wanted), body)]
    sequences = [sequence for sequence in sequences if len(sequence) > 1]
    if not sequences:
        raise TranscoderError(f"{corpus.name} has {len(ids)} tokens; expected two or more.")
    passages = passages_of_prompts(sequences)
    # other documents' beginnings are attention sinks too
    keep = passages.keep if packed.first_token is None else passages.keep & (passages.tokens != packed.first_token)
    return Passages(passages.tokens, keep, keep)


def batches(passages: Passages, tokens_at_once: int) -> Iterator[Passages]:
    """As many sequences at once as have no more tokens between them, one at least, without padding that all share."""
    rows = max(1, tokens_at_once // passages.tokens.shape[1])
    for start in range(0, len(passages.tokens), rows):
        tokens, keep, readout = (
            part[start : start + rows] for part in (passages.tokens, passages.keep, passages.readout)
        )
        [used] = (keep | readout).any(0).nonzero(as_tuple=True)
        end = int(used[-1]) + 1 if len(used) else 1
        yield Passages(tokens[:, :end], keep[:, :end], readout[:, :end])
